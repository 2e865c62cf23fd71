"""A cluster that makes its own certificates: what a person types, and what an impostor gets to see."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import shlex
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from llorch import pki, tls
from llorch.control.authority import Authority
from tests.cluster import Cluster, Running, descendants, eventually, expected_text, simulated
from tests.faults import netns


async def command(llorch: Cluster, *words: str, **env: str) -> tuple[int, str, str]:
    """One `llorch` command, as typed."""
    ran = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "llorch", *words],
        env=llorch.env(**env),
        capture_output=True,
        text=True,
        timeout=30,
        cwd=llorch.folder,
    )
    assert "Traceback" not in ran.stderr
    return ran.returncode, ran.stdout, ran.stderr


def data(llorch: Cluster, name: str = "control") -> list[str]:
    return ["--data-dir", str(llorch.folder / name)]


async def start_control(llorch: Cluster, *argv: str, bind: str = "127.0.0.1:0", **env: str) -> Running:
    """A control with nothing but its authority: no token is set anywhere."""
    (llorch.folder / "control").mkdir(exist_ok=True, mode=0o700)
    (llorch.folder / "control" / "nodes.json").write_text('{"nodes": []}')
    words = ["control", "--bind", bind, "--tls", "on", *data(llorch), *argv]
    llorch.control = await llorch.start("control", words, **env).ready()
    return llorch.control


async def join_command(llorch: Cluster, *argv: str) -> tuple[dict[str, str], list[str]]:
    """What `llorch token join` prints, as the shell would take it: (environment, words after `llorch`)."""
    code, out, _ = await command(llorch, "token", "join", *data(llorch), *argv)
    assert code == 0
    first, program, *words = shlex.split(out)
    assert program == "llorch"
    name, _, value = first.partition("=")
    return {name: value}, words


def node_words(llorch: Cluster, name: str, *pools: dict[str, Any]) -> list[str]:
    config = llorch.folder / f"{name}.yaml"
    config.write_text(json.dumps({"pools": list(pools) or [simulated()]}))
    return ["--node-id", name, "--bind", "127.0.0.1:0", *data(llorch, name), "--config", str(config)]


async def start_node(llorch: Cluster, name: str, *argv: str) -> Running:
    env, words = await join_command(llorch, *argv)
    return llorch.start(name, [*words, *node_words(llorch, name)], **env)


@contextlib.asynccontextmanager
async def client_of(llorch: Cluster) -> AsyncIterator[None]:
    """The harness's client, with a token of `llorch token new` and the cluster's authority."""
    code, out, _ = await command(
        llorch, "token", "new", "--name", "test", "--scope", "submit,read,admin", *data(llorch)
    )
    assert code == 0
    llorch.tokens["LLORCH_API_TOKEN"] = out.strip()
    authority = llorch.folder / "ca.pem"
    async with llorch.session.get(f"{llorch.url}/cacerts", ssl=False) as response:
        authority.write_bytes(await response.read())
    trusting = ssl.create_default_context(cafile=str(authority))
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=trusting)) as session:
        plain, llorch.session = llorch.session, session
        try:
            yield
        finally:
            llorch.session = plain


async def test_two_commands_make_a_cluster_and_no_certificate_is_handled_by_hand(llorch: Cluster) -> None:
    control = await start_control(llorch)
    env, words = await join_command(llorch)
    assert set(env) == {"LLORCH_JOIN_TOKEN"}, "no secret in the arguments"
    node = llorch.start("a", [*words, *node_words(llorch, "a")], **env)
    await node.ready()
    async with client_of(llorch):
        await llorch.bound("a", 1)
        assert (await llorch.complete(tokens=9))["text"] == expected_text(9)
        assert (await llorch.get("/v2/nodes/a"))["link"] is True
    secret = env["LLORCH_JOIN_TOKEN"]
    for running in (control, node):
        assert secret not in running.text()
        assert secret not in Path(f"/proc/{running.pid}/cmdline").read_text()
    kept = llorch.folder / "a" / "pki" / "node.pem"
    assert kept.stat().st_mode & 0o777 == 0o600
    assert secret not in kept.read_text()


@pytest.mark.slow
async def test_no_secret_of_such_a_cluster_is_anywhere_but_where_it_is_kept(llorch: Cluster) -> None:
    """Join token, client token, keys, prompt and output: in no log, no audit record, no argument, no environment."""
    prompt = f"canary{secrets.token_hex(8)}"
    control = await start_control(llorch, "--log-level", "debug")
    env, words = await join_command(llorch)
    node = await llorch.start("a", [*words, *node_words(llorch, "a"), "--log-level", "debug"], **env).ready()
    async with client_of(llorch):
        await llorch.bound("a", 1)
        status, task = await llorch.post("/v2/tasks", {"model": "sim", "prompt": prompt, "max_tokens": 4})
        assert (status, task["text"]) == (200, expected_text(4))
        headers = {"Authorization": f"Bearer {llorch.token}x"}
        async with llorch.session.post(f"{llorch.url}/v2/tasks", data=prompt, headers=headers) as response:
            refusal = await response.text()
        async with llorch.session.get(f"{llorch.url}/metrics", headers=llorch.headers()) as response:
            metrics = await response.text()
    kept = [llorch.folder / "control" / "pki" / "authority.pem", llorch.folder / "a" / "pki" / "node.pem"]
    key_lines = [path.read_text().partition("PRIVATE KEY-----\n")[2].split("\n")[0] for path in kept]
    join_token = env["LLORCH_JOIN_TOKEN"]
    hidden = [
        join_token,
        join_token.split(".")[2][:43],
        llorch.token,
        llorch.token.split(".")[1][:43],
        prompt,
        *key_lines,
    ]
    engines = descendants(node.pid)
    processes = {control.pid, node.pid} | engines
    assert engines, "there is an engine to look at"
    audit = sorted((llorch.folder / "control" / "audit").glob("*.jsonl"))
    assert audit, "there is an audit log to look at"
    places = {
        "the control's log": control.text(),
        "the node's log": node.text(),
        "a refusal": refusal,
        "the metrics": metrics,
        "the audit log": "".join(path.read_text() for path in audit),
        "the tokens' store": (llorch.folder / "control" / "tokens.json").read_text(),
        "arguments": "".join(Path(f"/proc/{pid}/cmdline").read_text() for pid in processes),
        "engines' environments": "".join(Path(f"/proc/{pid}/environ").read_text() for pid in engines),
        "engines' logs": "".join(
            path.read_text(errors="replace") for path in (llorch.folder / "a" / ".runtime" / "logs").glob("*")
        ),
    }
    for where, text in places.items():
        for number, secret in enumerate(hidden):
            assert secret not in text, f"secret {number} is in {where}"
    assert expected_text(4) not in places["the control's log"] + places["the node's log"] + places["the audit log"]


@pytest.mark.slow
async def test_a_node_comes_back_with_its_certificate_alone(llorch: Cluster) -> None:
    await start_control(llorch)
    env, words = await join_command(llorch)
    argv = [*words, *node_words(llorch, "a")]
    for given in (env, {}, env):  # the token that is left in a unit file does no harm
        node = await llorch.start("a", argv, **given).ready()
        await eventually(lambda node=node: "link.up" in node.text(), within_s=10, what=node.text())  # type: ignore[misc]
        assert await node.stop() == 0
    assert node.text().count("node.joined") == 0


async def test_a_node_without_certificate_and_token_says_what_to_do(llorch: Cluster) -> None:
    node = llorch.start("a", ["node", "--join", "https://127.0.0.1:1", *node_words(llorch, "a")])
    assert await asyncio.to_thread(node.process.wait, 20) == 2
    assert "llorch token join --node a" in node.text()
    assert "Traceback" not in node.text()


@pytest.mark.slow
async def test_a_token_is_made_listed_used_and_revoked_on_the_controls_own_machine(llorch: Cluster) -> None:
    await start_control(llorch)
    code, out, err = await command(llorch, "token", "new", "--name", "ci", "--expires", "90d", *data(llorch))
    assert (code, "shown this once" in err) == (0, True)
    token = out.strip()
    assert token not in err
    authority = llorch.folder / "ca.pem"
    async with llorch.session.get(f"{llorch.url}/cacerts", ssl=False) as response:
        authority.write_bytes(await response.read())
    there = ["--url", llorch.url, "--tls-ca", str(authority)]

    assert (await command(llorch, "node", "ls", *there, LLORCH_TOKEN=token))[0] == 0, "at once"
    code, out, _ = await command(llorch, "token", "ls", "--json", *data(llorch))
    [row] = json.loads(out)
    assert (row["name"], row["state"], row["scopes"]) == ("ci", "valid", ["read", "submit"])
    assert token not in out
    assert (await command(llorch, "token", "revoke", "ci", *data(llorch)))[0] == 0

    async def refused() -> bool:
        return (await command(llorch, "node", "ls", *there, LLORCH_TOKEN=token))[0] == 3

    await eventually(refused, within_s=10)
    assert (await command(llorch, "token", "revoke", "nobody", *data(llorch)))[0] == 4


# ---------------------------------------------------------------- impostors


@contextlib.asynccontextmanager
async def impostor(cacerts: bytes) -> AsyncIterator[tuple[str, list[bytes]]]:
    """Somebody at a control's address, with a certificate of its own; what it was sent, decrypted."""
    seen: list[bytes] = []
    key = pki.make_key()
    signer = pki.Signer(pki.make_authority(key, time.time()), key)
    own = pki.make_key()
    chain = pki.pem_of([signer.issue_control(own.public_key(), "desk", ["127.0.0.1"], time.time(), 3_600)])

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, ssl.SSLError):
            seen.append(await reader.readuntil(b"\r\n\r\n"))
            body = cacerts or pki.pem_of([signer.cert])
            writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            await writer.drain()
            seen.append(await reader.read())
        writer.close()

    context = tls.cluster_server_context(chain, pki.key_pem(own))
    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    try:
        yield f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}", seen
    finally:
        server.close()


@pytest.mark.parametrize("shows", ["its own authority", "the true one, without its key"])
@pytest.mark.slow
async def test_an_impostor_never_sees_the_secret(llorch: Cluster, shows: str) -> None:
    control = await start_control(llorch)
    async with llorch.session.get(f"{control.url}/cacerts", ssl=False) as response:
        true = await response.read()
    env, _ = await join_command(llorch)
    secret = env["LLORCH_JOIN_TOKEN"]
    async with impostor(b"" if shows == "its own authority" else true) as (url, seen):
        node = llorch.start("a", ["node", "--join", url, *node_words(llorch, "a")], **env)
        if shows == "its own authority":
            assert await asyncio.to_thread(node.process.wait, 20) == 2
            assert "the token was not sent" in node.text()
        else:
            await eventually(lambda: "join.failed" in node.text(), within_s=10, what=node.text())
            assert "certificate can't be verified" in node.text()
            assert await node.stop() == 0, "it asks on, until it is told to end"
        heard = b"".join(seen)
    assert heard.startswith(b"GET /cacerts HTTP/1.1")
    assert heard.count(b"HTTP/1.1") == 1
    assert b"uthorization" not in heard
    assert secret.encode() not in heard
    assert secret.split(".")[-1].encode() not in heard
    assert secret not in node.text()


async def test_a_token_that_is_cut_off_is_told_before_anybody_is_asked(llorch: Cluster) -> None:
    await start_control(llorch)
    env, words = await join_command(llorch)
    node = llorch.start("a", [*words, *node_words(llorch, "a")], LLORCH_JOIN_TOKEN=env["LLORCH_JOIN_TOKEN"][:-9])
    assert await asyncio.to_thread(node.process.wait, 20) == 2
    assert "join token" in node.text()
    assert env["LLORCH_JOIN_TOKEN"][:40] not in node.text()


# ---------------------------------------------------------------- several controls


@pytest.mark.slow
async def test_two_controls_trust_the_same_nodes_and_honour_the_same_tokens_and_revocations(llorch: Cluster) -> None:
    """The second one has what `certs export` wrote, and later what has changed since."""
    first = await start_control(llorch)
    second_data = data(llorch, "second")
    bundle = str(llorch.folder / "bundle")
    code, token, _ = await command(llorch, "token", "new", "--name", "ci", *data(llorch))
    assert (await command(llorch, "certs", "export", bundle, *data(llorch)))[0] == 0
    assert Path(bundle).stat().st_mode & 0o777 == 0o600
    assert (await command(llorch, "certs", "import", bundle, *second_data))[0] == 0
    second = await llorch.start("second", ["control", "--bind", "127.0.0.1:0", "--tls", "on", *second_data]).ready()
    env, words = await join_command(llorch)
    words[words.index("--join") + 1] = f"{first.url},{second.url}"
    node = await llorch.start("a", [*words, *node_words(llorch, "a")], **env).ready()
    await eventually(lambda: node.text().count("link.up") == 2, within_s=10, what=node.text())

    async def status(url: str) -> int:
        headers = {"Authorization": f"Bearer {token.strip()}"}
        async with llorch.session.get(f"{url}/v2/nodes/a", headers=headers, ssl=False) as response:
            return response.status

    for url in (first.url, second.url):
        await eventually(lambda url=url: _is(status(url), 200), within_s=10)  # type: ignore[misc]
    assert (await command(llorch, "token", "revoke", "ci", *data(llorch)))[0] == 0
    assert (await command(llorch, "certs", "revoke", "a", *data(llorch)))[0] == 0
    Path(bundle).unlink()
    assert (await command(llorch, "certs", "export", bundle, *data(llorch)))[0] == 0
    assert (await command(llorch, "certs", "import", bundle, *second_data))[0] == 0
    for url in (first.url, second.url):
        await eventually(lambda url=url: _is(status(url), 401), within_s=5)  # type: ignore[misc]
    await eventually(lambda: node.text().count("control.refuses") >= 2, within_s=5, what=node.text())
    assert "llorch token join --node a" in node.text()
    other = str(llorch.folder / "other")
    Authority.open(other, None, time.time())
    code, _, err = await command(llorch, "certs", "import", bundle, "--data-dir", other)
    assert (code, "holds another authority" in err) == (1, True)


async def _is(status: Any, wanted: int) -> bool:
    return bool(await status == wanted)


# ---------------------------------------------------------------- different addresses


@pytest.fixture
def space() -> Iterator[netns.Namespace]:
    reason = netns.impossible()
    if reason is not None:
        pytest.skip(reason)
    with netns.Namespace.made() as space:
        yield space


@pytest.mark.parametrize("dialled", [False, True], ids=["by its link", "dialled at its address"])
@pytest.mark.slow
async def test_control_and_node_on_different_addresses(space: netns.Namespace, llorch: Cluster, dialled: bool) -> None:
    control = await start_control(llorch, "--tls", "auto", bind=f"{space.here}:0")
    env, words = await join_command(llorch)
    assert f"https://{space.here}:" in " ".join(words)
    own = node_words(llorch, "a")
    own[own.index("--bind") + 1] = f"{space.there}:9200"
    if dialled:
        own += ["--address", f"https://{space.there}:9200"]
    node = llorch.start("a", [*words, *own], prefix=("ip", "netns", "exec", space.name), **env)
    await node.ready()
    assert node.url == f"https://{space.there}:9200"
    async with client_of(llorch):
        await llorch.bound("a", 1)
        assert (await llorch.complete(tokens=9))["text"] == expected_text(9)
        async with llorch.session.get(f"{node.url}/health", ssl=False) as response:
            assert response.status == 200, "it has no client certificate, and may ask for this"
        async with llorch.session.get(f"{node.url}/v2/pools", ssl=False) as response:
            assert response.status == 401
    assert "auth.failed" not in control.text()
