"""llorch as it ships, in front of one engine, in the foreground: what a load generator is pointed at.

    LLORCH_BENCH_TOKEN=... python -m tests.bench.start [--engine http://127.0.0.1:18080] [--model fake-model]

Starts a control and a node that joins it, as children of this process, and ends them with it. Nothing is left out for
speed: three client tokens, admission, placement over 50 pools, metrics, request ids, logs at `info` and an audit log
(in files), task logs, usage. The rate limit of a principal is in force, and out of a load generator's reach.
LLORCH_BENCH_TOKEN is the first of the three tokens; nothing is printed of it.

`--link-tls`: what a cluster of several machines pays between them, for a load generator that speaks no TLS. The control
listens with TLS, the node joins it there by a join token and shows its certificate on its link; clients come in at
`--bind` as before, through a second door that no llorch has outside of here (tests/bench/two_doors.py). Without it
nothing is encrypted, and the node shows a token.
"""

from __future__ import annotations

import argparse
import os
import secrets
import signal
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from tests.bench.roles import RATE_PER_S, Role, clean_env, join_command, node_settings


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--engine", default="http://127.0.0.1:18080", help="what every pool's engine is")
    parser.add_argument("--model", default="fake-model", help="what the engine calls its model")
    parser.add_argument("--bind", default="127.0.0.1:8080", help="where the control listens")
    parser.add_argument("--pools", type=int, default=50)
    parser.add_argument("--slots", type=int, default=64, help="of each pool")
    parser.add_argument("--others", type=int, default=0, help="how many of the pools serve some other model")
    parser.add_argument("--link-tls", action="store_true", help="mutual TLS between control and node, none to clients")
    parser.add_argument("--profile", help="a folder: both roles run under cProfile, and leave their figures there")
    return parser.parse_args()


def _model(asked: argparse.Namespace, number: int) -> str:
    return asked.model if number < asked.pools - asked.others else f"another-{number % 4}"


def main() -> int:
    asked = arguments()
    token = os.environ.get("LLORCH_BENCH_TOKEN", "")
    others = [secrets.token_hex(24) for _ in range(4)]
    env = clean_env(LLORCH_API_TOKEN=f"bench={token},b={others[0]},c={others[1]}")
    if not asked.link_tls:
        env |= {"LLORCH_SERVICE_TOKEN": others[2], "LLORCH_NODE_TOKEN": others[3]}
    roles: list[Role] = []
    stopped = False

    def stop(*_: object) -> None:
        nonlocal stopped
        stopped = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    with tempfile.TemporaryDirectory(prefix="llorch-bench-") as folder_name:
        folder = Path(folder_name)
        pools = node_settings(asked.engine, asked.model, asked.pools, asked.slots, partial(_model, asked))
        (folder / "node.yaml").write_text(pools)
        try:
            control = ["--data-dir", f"{folder}/control", "--rate-requests", str(RATE_PER_S), "--shutdown-grace", "0s"]
            if asked.link_tls:
                control += ["--clients", asked.bind, "--bind", "127.0.0.1:0", "--tls", "on"]
            else:
                control += ["--bind", asked.bind]
            module = "tests.bench.two_doors" if asked.link_tls else "llorch"
            roles.append(Role(folder, "control", control, env, asked.profile, module=module))
            roles[0].wait_for("ready url=")
            env, join = join_command(folder) if asked.link_tls else (env, ["--join", f"http://{asked.bind}"])
            node = [*join, "--bind", "127.0.0.1:0", "--node-id", "gpu-1"]
            node += ["--data-dir", f"{folder}/node", "--config", f"{folder}/node.yaml", "--shutdown-grace", "0s"]
            roles.append(Role(folder, "node", node, env, asked.profile))
            roles[1].wait_for("ready url=")
            for role in roles:
                print(role.name, role.process.pid, role.log, flush=True)
            while not stopped and all(role.process.poll() is None for role in roles):
                time.sleep(0.2)
        finally:
            for role in reversed(roles):
                role.end()
    return 0 if stopped else 1


if __name__ == "__main__":
    sys.exit(main())
