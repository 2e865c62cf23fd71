"""Settings through the real commands: where values come from, what is refused, and that a refusal starts nothing."""

from __future__ import annotations

import asyncio
import secrets
import socket
import ssl
import subprocess
import sys
from pathlib import Path

import aiohttp
import pytest
from cryptography.hazmat.primitives import serialization

from llorch import tls
from llorch.cli import sources
from llorch.config import ControlSettings
from llorch.errors import ConfigError
from tests.certificates import certificate
from tests.cluster import Cluster

SECRET = f"S3CRET{secrets.token_hex(16)}"


async def refused(llorch: Cluster, argv: list[str], data_dir: Path | None = None, **env: str) -> str:
    """What a role says that does not start: exit 2, and neither a listener nor a directory was made."""
    data_dir = data_dir or llorch.folder / secrets.token_hex(4)
    running = llorch.start(argv[0], [*argv, "--data-dir", str(data_dir)], **env)
    assert await asyncio.to_thread(running.process.wait, 20) == 2, running.text()
    text = running.text()
    assert "ready url" not in text
    assert "Traceback" not in text
    assert not data_dir.exists()
    for token in (*llorch.tokens.values(), SECRET):
        assert token not in text
    return text


CONTROL = ["control", "--bind", "127.0.0.1:0"]
NODE = ["node", "--bind", "127.0.0.1:0", "--join", "http://127.0.0.1:1"]


async def test_everything_that_is_wrong_anywhere_is_told_at_once(llorch: Cluster) -> None:
    home = llorch.folder / "home" / ".config" / "llorch"
    home.mkdir(parents=True)
    (home / "config.yaml").write_text("\nqueue-timeout: soon\n")
    (llorch.folder / "llorch.yaml").write_text(
        f"heartbeat-intervall: 4s\nmax-body: 3 parsecs\n\nadmin-token: {SECRET}\npools: [{{id: a, slot: 1}}]\n"
    )
    text = await refused(llorch, ["control", "--bind", "8080"], **llorch.tokens, LLORCH_QUEUE_LIMIT="many")
    for words in (
        "error: 7 faults in the settings; nothing was started",
        "flag --bind: '8080' is not host:port",
        "env LLORCH_QUEUE_LIMIT: queue-limit: 'many' is not a whole number",
        "llorch.yaml:1: heartbeat-intervall: not a setting\n    hint: did you mean heartbeat-interval?",
        "llorch.yaml:2: max-body: ",
        "llorch.yaml:4: admin-token: a secret may not stand in a settings file",
        "admin-token-file: PATH",
        "llorch.yaml:5: pools[0]: 'slot' is not a field of a pool\n    hint: did you mean slots?",
        f"{home}/config.yaml:2: queue-timeout: ",
    ):
        assert words in text, text


async def test_no_tokens_short_ones_and_no_tls_are_refused(llorch: Cluster) -> None:
    short = {**llorch.tokens, "LLORCH_SERVICE_TOKEN": SECRET[:31]}
    none, no_tls, *too_short = await asyncio.gather(
        refused(llorch, NODE),
        refused(llorch, ["node", "--bind", "0.0.0.0:0", *NODE[3:]], **llorch.tokens),
        refused(llorch, CONTROL, **short),
        refused(llorch, NODE, **short),
    )
    assert "token" in none
    assert "openssl rand -hex 32" in none
    assert "0.0.0.0:0 is reachable from outside this machine, and there is no TLS" in no_tls
    assert "--tls-cert" in no_tls
    for text in too_short:
        assert "env LLORCH_SERVICE_TOKEN: service-token: token 1 is shorter than 32 characters" in text
        assert SECRET[:31] not in text


async def test_what_only_the_machine_can_tell_is_refused_as_well(llorch: Cluster) -> None:
    cert, key = certificate(llorch.folder / "pki")
    (llorch.folder / "other").mkdir()
    _, other = certificate(llorch.folder / "other")
    (llorch.folder / "file").write_text("not a directory")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        here = str(llorch.folder)
        told = await asyncio.gather(
            refused(llorch, ["control", "--bind", f"127.0.0.1:{port}"], **llorch.tokens),
            refused(llorch, [*CONTROL, "--tls-cert", str(cert), "--tls-key", str(other)], **llorch.tokens),
            refused(llorch, [*CONTROL, "--tls-cert", f"{here}/no", "--tls-key", str(key)], **llorch.tokens),
            refused(llorch, [*CONTROL, "--tls-ca", str(key)], **llorch.tokens),
            refused(llorch, [*CONTROL, "--api-token-file", f"{here}/absent"], **llorch.tokens),
            refused(llorch, [*CONTROL, "--config", f"{here}/absent.yaml"], **llorch.tokens),
            refused(llorch, NODE, llorch.folder / "file" / "x", **llorch.tokens),
        )
    for words, text in zip(
        (
            "can't be listened on",
            "not a matching, unencrypted PEM pair",
            "No such file",
            "no PEM certificate in it",
            "the file it names can't be read: No such file",
            "absent.yaml can't be read: No such file",
            "can't be used: Not a directory",
        ),
        told,
        strict=True,
    ):
        assert words in text, text
        assert text.count("\n") < 12, text


def test_an_encrypted_key_is_refused_in_words(tmp_path: Path) -> None:
    cert, key = certificate(tmp_path)
    loaded = serialization.load_pem_private_key(key.read_bytes(), None)
    lock = serialization.BestAvailableEncryption(b"a pass phrase")
    key.write_bytes(loaded.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, lock))
    with pytest.raises(ConfigError, match="unencrypted"):
        tls.server_context(str(cert), str(key))


async def test_secrets_from_argv_a_file_standard_input_and_a_reference_all_count_and_argv_is_warned_of(
    llorch: Cluster,
) -> None:
    cert, key = certificate(llorch.folder)
    argv_token, file_token, piped_token, referred_token = (secrets.token_hex(16) for _ in range(4))
    (llorch.folder / "file").write_text(f"# rotated in May\n{file_token}\n{secrets.token_hex(16)}\n")
    (llorch.folder / "referred").write_text(f"ops={referred_token}")
    log = llorch.folder / "control.log"
    argv = [
        sys.executable, "-m", "llorch", "control", "--bind", "127.0.0.1:0", "--data-dir", str(llorch.folder / "c"),
        "--api-token", f"ci={argv_token}", "--service-token-file", str(llorch.folder / "file"), "--node-token", "-",
        "--admin-token", f"@{llorch.folder / 'referred'}",
    ]  # fmt: skip
    env = llorch.env(ORCHESTRATORD_TLS_CERT=str(cert), ORCHESTRATORD_TLS_KEY=str(key))
    with log.open("wb") as stderr:
        control = subprocess.Popen(argv, env=env, stdin=subprocess.PIPE, stderr=stderr, cwd=llorch.folder)
    assert control.stdin is not None
    with control.stdin as pipe:
        pipe.write(piped_token.encode() + b"\n")
    try:
        url = await ready(log, control)
        assert url.startswith("https://")
        trusting = ssl.create_default_context(cafile=str(cert))
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=trusting)) as session:

            async def status(token: str, method: str, path: str) -> int:
                headers = {"Authorization": f"Bearer {token}"}
                async with session.request(method, url + path, headers=headers, data=b"{}") as response:
                    return response.status

            assert await status(argv_token, "GET", "/v2/nodes") == 200
            assert await status(piped_token, "POST", "/v2/nodes/register") == 400  # admitted; the body says nothing
            assert await status(referred_token, "GET", "/metrics") == 200
            assert await status(file_token, "GET", "/v2/nodes") == 401
    finally:
        control.terminate()
        assert await asyncio.to_thread(control.wait, 20) == 0
    text = log.read_text()
    warnings = [line for line in text.splitlines() if line.startswith("warning:")]
    assert len(warnings) == 1
    assert "--api-token: a secret on the command line shows in the list of processes" in warnings[0]
    for token in (argv_token, file_token, piped_token, referred_token):
        assert token not in text


async def ready(log: Path, process: subprocess.Popen[bytes]) -> str:
    for _ in range(1_000):
        for line in log.read_text().splitlines():
            if line.startswith("ready url="):
                return line.removeprefix("ready url=")
        if process.poll() is not None:
            break
        await asyncio.sleep(0.02)
    pytest.fail(log.read_text())


async def test_the_nodes_older_names_for_certificates_work(llorch: Cluster) -> None:
    cert, key = certificate(llorch.folder)
    node = await llorch.start(
        "node", [*NODE, "--data-dir", str(llorch.folder / "n")], **llorch.tokens,
        POOL_MANAGERD_TLS_CERT=str(cert), POOL_MANAGERD_TLS_KEY=str(key),
    ).ready()  # fmt: skip
    assert node.url.startswith("https://")


def test_a_flag_beats_the_environment_beats_the_near_file_beats_the_users_beats_the_machines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The five places, as the command finds them; the system's file is looked for elsewhere here."""
    user, system, given = tmp_path / "xdg" / "llorch", tmp_path / "etc.yaml", tmp_path / "given.yaml"
    user.mkdir(parents=True)
    monkeypatch.setattr(sources, "SYSTEM_FILE", system)
    monkeypatch.chdir(tmp_path)
    for name in (name for name in sources.os.environ if name.startswith("LLORCH_")):
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("LLORCH_ADMIN_TOKEN", secrets.token_hex(16))
    monkeypatch.setenv("LLORCH_SERVICE_TOKEN", secrets.token_hex(16))

    def limit(config: str | None = None, **flags: str) -> tuple[int | None, str]:
        found = sources.resolve_here(ControlSettings, flags, config=config, local=True)
        return found.settings.queue_limit, found.origin["queue-limit"]

    assert limit() == (None, "default")
    system.write_text("queue-limit: 5\n")
    assert limit() == (5, f"{system}:1")
    (user / "config.yaml").write_text("queue-limit: 4\n")
    assert limit() == (4, f"{user / 'config.yaml'}:1")
    (tmp_path / "llorch.yaml").write_text("queue-limit: 3\n")
    assert limit() == (3, "llorch.yaml:1")
    given.write_text("\nqueue-limit: 33\n")
    assert limit(config=str(given)) == (33, f"{given}:2")  # in the place of ./llorch.yaml
    given.write_text("")
    assert limit(config=str(given)) == (4, f"{user / 'config.yaml'}:1")
    monkeypatch.setenv("LLORCH_QUEUE_LIMIT", "2")
    assert limit(config=str(given)) == (2, "env LLORCH_QUEUE_LIMIT")
    assert limit(**{"queue-limit": "1"}) == (1, "flag --queue-limit")
