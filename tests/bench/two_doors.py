"""`llorch control` with a second door: clients come in without TLS, on loopback, while nodes have all of it.

    python -m tests.bench.two_doors --clients 127.0.0.1:8080 [flags of llorch control, among them --tls on]

A control has one listener, and with TLS it has it for everybody. For a load generator that speaks no TLS this one gets
another, of the same application: the same lane, gate, quotas and count of connections, whichever door a request takes.
All else is the shipped control, its settings, ready line and end. For measurements only: whoever is on this machine
could read what passes. Never listens beyond loopback without TLS.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import typer

from llorch import listen
from llorch.cli.flags import flag_values, role_flags, with_flags
from llorch.cli.roles import role_settings
from llorch.config import ControlSettings
from llorch.control import app


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--clients", required=True, help="where clients come in without TLS: HOST:PORT, on loopback")
    asked, words = parser.parse_known_args()
    host, _, port = asked.clients.rpartition(":")

    async def open_door(server: listen.Server) -> None:
        url = await server.serve_without_tls(host.strip("[]"), int(port))
        print(f"clients url={url}", file=sys.stderr, flush=True)

    def run(given: dict[str, Any]) -> int:
        settings, source = role_settings(ControlSettings, flag_values(ControlSettings, given), given["config"])
        return app.main(settings, source, open_door)

    def control(_: object) -> None:
        """A control plane with a second door."""

    command = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    command.command()(with_flags(run, control, role_flags(ControlSettings)))
    command(args=words)


if __name__ == "__main__":
    main()
