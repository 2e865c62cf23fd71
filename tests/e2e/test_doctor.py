"""`llorch doctor` at a real cluster: well from all three sides, then broken one thing at a time, and each is named."""

from __future__ import annotations

import asyncio
import json
import sys
import time

import pytest

from llorch.control.token_files import FILE_NAME as TOKENS
from tests.cluster import Cluster, eventually, lasting_port
from tests.e2e.test_join import command, data, node_words, start_control, start_node

Findings = dict[str, dict[str, str]]

ENDS_WITHIN_S = 10.0


async def doctor(llorch: Cluster, *words: str, exit_code: int) -> Findings:
    """The findings by check, the worst one of each."""
    started = time.monotonic()
    code, out, err = await command(llorch, "doctor", *words, "--json")
    assert time.monotonic() - started < ENDS_WITHIN_S + 5, "a machine with two cores and much to do"
    assert (code, err) == (exit_code, ""), out
    found: Findings = {}
    rank = ("ok", "warn", "fail").index
    for row in json.loads(out):
        if row["check"] not in found or rank(row["state"]) > rank(found[row["check"]]["state"]):
            found[row["check"]] = row
    return found


def bad(found: Findings) -> dict[str, str]:
    return {check: row["state"] for check, row in found.items() if row["state"] != "ok"}


@pytest.mark.slow
async def test_a_healthy_cluster_is_ok_from_all_three_and_what_is_broken_is_named(llorch: Cluster) -> None:
    bind = f"127.0.0.1:{lasting_port()}"
    control = await start_control(llorch, bind=bind)
    node = await (await start_node(llorch, "a")).ready()
    await eventually(lambda: "link.up" in node.text(), within_s=10, what=node.text())
    _, token, _ = await command(llorch, "token", "new", *data(llorch))
    _, rows, _ = await command(llorch, "certs", "status", "--json", *data(llorch))
    pin = json.loads(rows)[0]["sha256"]
    at = ["--url", control.url, "--ca-pin", pin]
    secret = llorch.folder / "client.token"
    secret.write_text(token)
    secret.chmod(0o600)
    assert (await command(llorch, "context", "add", "lab", "--token-file", str(secret), *at))[0] == 0
    here = ["control", "--bind", bind, "--tls", "on", *data(llorch)]
    there = ["node", "--join", control.url, *node_words(llorch, "a")]
    there[there.index("--bind") + 1] = node.url.partition("://")[2]

    for words in ([], here, there):
        found = await doctor(llorch, *words, exit_code=0)
        assert bad(found) == {}
    assert {"accepted", "driver", "engines", "inotify"} <= set(found)
    for running in (control, node):
        assert "auth.failed" not in running.text(), "it leaves no trace of a refusal"

    tokens = llorch.folder / "control" / TOKENS
    tokens.chmod(0o644)
    found = await doctor(llorch, *here, exit_code=1)
    assert bad(found) == {"secrets": "fail", "tokens": "fail"}
    assert found["secrets"]["mend"] == f"chmod 600 {tokens}"
    tokens.chmod(0o600)
    assert bad(await doctor(llorch, *here, exit_code=0)) == {}, "the mend mends it"

    assert (await command(llorch, "certs", "revoke", "a", *data(llorch)))[0] == 0
    await eventually(lambda: "control.refuses" in node.text(), within_s=5, what=node.text())
    found = await doctor(llorch, *there, exit_code=1)
    assert bad(found) == {"accepted": "fail"}
    assert "revoked" in found["accepted"]["found"]
    assert "llorch token join --node a" in found["accepted"]["mend"]

    assert (await command(llorch, "token", "revoke", token.strip(), *data(llorch)))[0] == 0

    async def refused() -> bool:
        return (await command(llorch, "node", "ls"))[0] == 3

    await eventually(refused, within_s=10)
    found = await doctor(llorch, exit_code=1)
    assert bad(found) == {"token": "fail"}
    assert "llorch token new" in found["token"]["mend"]

    assert await control.stop() == 0
    found = await doctor(llorch, exit_code=1)
    assert bad(found) == {"tcp": "fail"}
    assert f"llorch control --bind {bind}" in found["tcp"]["mend"]
    assert bad(await doctor(llorch, *there, exit_code=1)) == {"tcp": "fail"}
    found = await doctor(llorch, *here, exit_code=0)
    assert bad(found) == {"tokens": "warn", "running": "warn"}
    assert "llorch control" in found["running"]["mend"]


@pytest.mark.slow
async def test_a_resolver_that_hangs_keeps_the_process_no_longer_than_its_limit(llorch: Cluster) -> None:
    """What hangs in a thread ends with the process, which waits for none of them."""
    program = (
        "import socket, sys, time\n"
        "socket.getaddrinfo = lambda *_, **__: time.sleep(60)\n"
        "from llorch.cli.main import run\n"
        "sys.exit(run(['doctor', '--url', 'https://desk.example:8080']))\n"
    )
    started = time.monotonic()
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, cwd=llorch.folder, stdout=asyncio.subprocess.PIPE, env=llorch.env()
    )
    out, _ = await child.communicate()
    assert (child.returncode, b"dns       fail" in out) == (1, True), out
    assert time.monotonic() - started < ENDS_WITHIN_S
