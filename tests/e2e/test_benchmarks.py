"""What `tests.bench.start` puts in front of a load generator is what it says: here, whether the link is encrypted."""

from __future__ import annotations

import json
import secrets
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llorch import tls
from llorch.node.certificate import NodeCertificate
from tests.bench import engine
from tests.bench.roles import NODE, Role, clean_env
from tests.cluster import lasting_port

WITHIN_S = 20.0


class Bench:
    """The start script with `--link-tls`, its engine, and what is left of it on disk."""

    def __init__(self, folder: Path) -> None:
        self.token, self.port = secrets.token_hex(24), lasting_port()
        self.engine = Role(folder, "engine", [], clean_env(), module="tests.bench.engine")
        words = ["--engine", self.engine.ready(), "--bind", f"127.0.0.1:{self.port}", "--link-tls"]
        env = clean_env(LLORCH_BENCH_TOKEN=self.token, TMPDIR=str(folder))
        self.start = Role(folder, "start", words, env, module="tests.bench.start")

    def end(self) -> None:
        self.start.end()
        self.engine.end()

    @property
    def folder(self) -> Path:
        """Where the logs and data directories of the roles are: the script tells of them once both are ready."""
        self.start.wait_for("\nnode ")
        return Path(self.start.text().splitlines()[0].split()[2]).parent

    def chat(self) -> Any:
        """The answer to one request, over plain HTTP. While no pool can be placed on yet, it is sent again."""
        body = {"model": engine.MODEL, "messages": [{"role": "user", "content": "go"}], "max_tokens": 3}
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"},
        )
        until = time.monotonic() + WITHIN_S
        while True:
            try:
                with urllib.request.urlopen(request, timeout=WITHIN_S) as answer:
                    return json.load(answer)
            except urllib.error.HTTPError as error:
                told = error.read()
                assert error.status in (404, 503), told
                assert time.monotonic() < until, told
                time.sleep(0.05)

    def on_record(self, event: str) -> dict[str, Any]:
        """The first of these events in the control's audit log."""
        file, until = self.folder / "control" / "audit" / "audit.jsonl", time.monotonic() + WITHIN_S
        while time.monotonic() < until:
            for line in file.read_text().splitlines():
                record: dict[str, Any] = json.loads(line)
                if record["event"] == event:
                    return record
            time.sleep(0.05)
        raise AssertionError(f"there is no {event}")


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    running = Bench(tmp_path)
    try:
        yield running
    finally:
        running.end()


def test_clients_come_in_plain_while_the_link_shows_a_certificate_over_tls_1_3(bench: Bench) -> None:
    folder = bench.folder
    assert bench.chat()["choices"][0]["message"]["content"] == engine.text_of(3)

    link = bench.on_record("link.up")
    assert link["principal"] == f"node:{NODE}", "whom a certificate stands for; with a token it is the token's name"
    certificate = NodeCertificate.load(folder / "node", NODE)
    assert certificate is not None
    assert link["fingerprint"] == f"{certificate.holding.cert.serial_number:x}"[:8]

    at = json.loads((folder / "control" / "control.json").read_text())["url"]
    assert at.startswith("https://")
    with (
        socket.create_connection(("127.0.0.1", int(at.rpartition(":")[2])), WITHIN_S) as sock,
        certificate.outgoing.wrap_socket(sock, server_hostname=tls.CONTROL_NAME) as door,
    ):
        assert door.version() == "TLSv1.3"
