"""`llorch doctor` from a client, against servers that are as they should be, and others that are not."""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import json
import socket
import ssl
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import web

from llorch import __version__, pki, tls
from llorch.cli import doctor_client, doctor_probes, doctor_visit
from llorch.cli.doctor_findings import Finding, ok
from llorch.cli.doctor_visit import Look, visit
from llorch.errors import Code, ConfigError
from llorch.tokens import ID_BYTES, SECRET_BYTES, write_token
from tests.component.command_line import CommandLine, Ran
from tests.component.scripted_control import (
    TASK,
    Asked,
    ScriptedControl,
    answer,
    hang_up,
    no_answer,
    refusal,
    scripted,
)

DAY = 86_400.0
TOKEN = write_token(bytes(range(ID_BYTES + SECRET_BYTES)))[1]
HEALTH = {"status": "ok", "version": __version__, "role": "control"}


@pytest.fixture
def llorch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> CommandLine:
    return CommandLine(monkeypatch, tmp_path)


@pytest.fixture(scope="module")
def signer() -> pki.Signer:
    key = pki.make_key()
    return pki.Signer(pki.make_authority(key, time.time() - 100 * DAY), key)


@pytest.fixture
def authority(signer: pki.Signer, tmp_path: Path) -> str:
    path = tmp_path / "ca.pem"
    path.write_bytes(pki.pem_of([signer.cert]))
    return str(path)


def shows(
    signer: pki.Signer, *names: str, since_days: float = 1, life_days: float = 30
) -> ssl.SSLContext:  # fmt: skip
    """A listener with a certificate for these names."""
    key = pki.make_key()
    since = time.time() - since_days * DAY
    cert = signer.issue(key.public_key(), tls.Role.CONTROL, "desk", names or ("127.0.0.1",), since, life_days * DAY)
    return tls.cluster_server_context(pki.pem_of([cert]), pki.key_pem(key))


def healthy(control: ScriptedControl) -> None:
    control.on("GET /health", answer(HEALTH))
    control.on("GET /readyz", answer(HEALTH))
    control.on("GET /v2/nodes", answer({"nodes": []}))
    control.on("GET /v1/models", answer({"data": [{"id": "m"}]}))


@pytest.fixture
async def control() -> AsyncIterator[ScriptedControl]:
    async with scripted() as control:
        healthy(control)
        yield control


async def doctor(llorch: CommandLine, *argv: str, token: str | None = TOKEN) -> tuple[Ran, dict[str, dict[str, str]]]:
    """(what ran, its findings by check: the worst one of each)."""
    if token is not None:
        llorch.env(LLORCH_TOKEN=token)
    ran = await llorch("doctor", "--json", *argv)
    found: dict[str, dict[str, str]] = {}
    for row in json.loads(ran.out) if ran.out else []:
        assert set(row) == {"check", "state", "found", "mend"}
        if found.get(row["check"], {"state": "ok"})["state"] == "ok":
            found[row["check"]] = row
    if token is not None:
        assert token not in ran.out + ran.err
        assert token.split(".")[-1] not in ran.out + ran.err
    return ran, found


def states(found: dict[str, dict[str, str]]) -> dict[str, str]:
    return {check: row["state"] for check, row in found.items()}


# ---------------------------------------------------------------- all is well


async def test_where_all_is_well_everything_is_ok(llorch: CommandLine, signer: pki.Signer, authority: str) -> None:
    async with scripted(shows(signer)) as control:
        healthy(control)
        ran, found = await doctor(llorch, "--url", control.url, "--tls-ca", authority)
    assert ran.code == 0
    checks = ("settings", "dns", "tcp", "tls", "http", "ready", "clock", "token", "models")
    assert states(found) == dict.fromkeys(checks, "ok")
    assert "from flag --url" in found["settings"]["found"]
    assert "signed by llorch cluster" in found["tls"]["found"]
    assert {asked.method for asked in control.requests} == {"GET"}, "it changes nothing"


async def test_a_table_has_a_line_for_what_mends_and_q_names_what_is_not_well(
    llorch: CommandLine, control: ScriptedControl
) -> None:
    ran = await llorch("doctor", "--url", control.url)
    assert ran.code == 1
    lines = ran.out.splitlines()
    assert lines[0].split() == ["CHECK", "STATE", "FOUND"]
    [at] = [place for place, line in enumerate(lines) if line.startswith("token ")]
    assert lines[at].split()[1] == "fail"
    assert lines[at + 1].strip().startswith("mend: `llorch token new`")
    assert (await llorch("doctor", "client", "--url", control.url, "-q")).out == "token\n"


async def test_the_context_in_use_is_named_and_a_token_of_another_url_is_not_sent(
    llorch: CommandLine, control: ScriptedControl
) -> None:
    async with scripted() as other:
        healthy(other)
        await llorch("context", "add", "lab", "--url", other.url, "--token", "-", stdin=TOKEN.encode())
        _, found = await doctor(llorch, token=None)
        assert f"{other.url}, from context lab" in found["settings"]["found"]
        assert (found["token"]["state"], found["secrets"]["state"]) == ("ok", "ok")
        contexts = llorch.home / ".config" / "llorch" / "contexts.json"
        contexts.chmod(0o644)
        _, found = await doctor(llorch, token=None)
        assert (found["secrets"]["state"], found["secrets"]["mend"]) == ("warn", f"chmod 600 {contexts}")
        ran, found = await doctor(llorch, "--url", control.url, token=None)
    assert ran.code == 1
    assert "goes to" in found["token"]["found"]
    assert not any("Authorization" in asked.headers for asked in control.requests)


async def test_settings_that_cannot_be_used_are_2_and_flags_before_a_role_are_told(llorch: CommandLine) -> None:
    assert (await llorch("doctor", "--url", "nonsense")).code == 2
    assert (await llorch("doctor", "control", "--bind", "nonsense")).code == 2
    assert (await llorch("doctor", "node")).code == 2
    ran = await llorch("doctor", "--json", "control")
    assert (ran.code, "before control" in ran.err) == (2, True)


# ---------------------------------------------------------------- the way there


async def test_a_name_that_does_not_resolve_ends_it_there(llorch: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(doctor_probes, "socket", SimpleNamespace(getaddrinfo=nobody, SOCK_STREAM=socket.SOCK_STREAM))
    ran, found = await doctor(llorch, "--url", "https://desk.invalid:8080")
    assert (ran.code, states(found)) == (1, {"settings": "ok", "dns": "fail"})
    assert "name or service not known" in found["dns"]["found"]


async def test_a_resolver_that_hangs_is_left(llorch: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()
    stub = SimpleNamespace(getaddrinfo=lambda *_, **__: over.wait(20), SOCK_STREAM=socket.SOCK_STREAM)
    monkeypatch.setattr(doctor_probes, "socket", stub)
    monkeypatch.setattr(doctor_probes, "LOOKUP_S", 0.1)
    started = time.monotonic()
    _, found = await doctor(llorch, "--url", "https://desk.invalid:8080")
    over.set()
    assert "no answer within" in found["dns"]["found"]
    assert time.monotonic() - started < 5


async def test_a_port_where_nothing_listens(llorch: CommandLine) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # and not listened on
        ran, found = await doctor(llorch, "--url", f"http://127.0.0.1:{bound.getsockname()[1]}")
    assert (ran.code, found["tcp"]["state"]) == (1, "fail")
    assert "nothing listens" in found["tcp"]["found"]


async def test_packets_that_are_dropped_are_a_firewall(llorch: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backlog that is full drops a connection's first packet, as a firewall does."""
    monkeypatch.setattr(doctor_probes, "CONNECT_S", 0.2)
    with socket.socket() as full, contextlib.ExitStack() as waiting:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(4):
            client = waiting.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(full.getsockname())
        _, found = await doctor(llorch, "--url", f"https://127.0.0.1:{full.getsockname()[1]}")
    assert "a firewall drops it" in found["tcp"]["found"]
    assert "llorch config firewall control" in found["tcp"]["mend"]


# ---------------------------------------------------------------- TLS

BROKEN: dict[str, tuple[dict[str, Any], bool, str]] = {
    "expired": ({"since_days": 40, "life_days": 10}, True, "expired 30 days ago"),
    "not yet": ({"since_days": -2}, True, "clock is likely wrong"),
    "another name": ({"names": ("elsewhere.example",)}, True, "is for elsewhere.example, and not for 127.0.0.1"),
    "unknown authority": ({}, False, "is by an authority that is not known here"),
}


@pytest.mark.parametrize(("how", "trusted", "words"), BROKEN.values(), ids=BROKEN)
async def test_a_certificate_that_is_not_believed_says_why_and_nothing_is_asked(
    llorch: CommandLine, signer: pki.Signer, authority: str, how: dict[str, Any], trusted: bool, words: str
) -> None:
    how = dict(how)
    async with scripted(shows(signer, *how.pop("names", ()), **how)) as control:
        healthy(control)
        flags = ("--tls-ca", authority) if trusted else ()
        ran, found = await doctor(llorch, "--url", control.url, *flags)
        assert control.requests == []
    assert (ran.code, found["tls"]["state"]) == (1, "fail")
    assert words in found["tls"]["found"]
    assert "http" not in found


async def test_a_certificate_that_ends_soon_is_a_warning(
    llorch: CommandLine, signer: pki.Signer, authority: str
) -> None:
    async with scripted(shows(signer, since_days=25)) as control:
        healthy(control)
        ran, found = await doctor(llorch, "--url", control.url, "--tls-ca", authority)
    assert (ran.code, found["tls"]["state"]) == (0, "warn")
    assert "expires in 5 days" in found["tls"]["found"]


async def test_plain_http_on_a_port_that_should_speak_tls(llorch: CommandLine, control: ScriptedControl) -> None:
    _, found = await doctor(llorch, "--url", control.url.replace("http:", "https:"))
    assert "plain text instead of TLS" in found["tls"]["found"]
    assert control.requests == []


async def test_tls_on_a_port_that_should_speak_plain_http(llorch: CommandLine, signer: pki.Signer) -> None:
    async with scripted(shows(signer)) as control:
        _, found = await doctor(llorch, "--url", control.url.replace("https:", "http:"))
    assert found["http"]["state"] == "fail"
    assert f"{control.url} in --url if it serves with TLS" in found["http"]["mend"]


@contextlib.asynccontextmanager
async def black_hole() -> AsyncIterator[int]:
    """Takes connections and says nothing. Its port."""
    open_now: set[asyncio.StreamWriter] = set()

    async def take(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        open_now.add(writer)

    server = await asyncio.start_server(take, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for writer in open_now:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


@pytest.mark.parametrize(("scheme", "check", "words"), [("https", "tls", "handshake"), ("http", "http", "in time")])
async def test_a_black_hole_is_left_after_its_limit(
    llorch: CommandLine, monkeypatch: pytest.MonkeyPatch, scheme: str, check: str, words: str
) -> None:
    monkeypatch.setattr(doctor_probes, "HANDSHAKE_S", 0.2)
    monkeypatch.setattr(doctor_probes, "ANSWER_S", 0.2)
    started = time.monotonic()
    async with black_hole() as port:
        ran, found = await doctor(llorch, "--url", f"{scheme}://127.0.0.1:{port}")
    assert (ran.code, found[check]["state"]) == (1, "fail")
    assert words in found[check]["found"]
    assert time.monotonic() - started < 5


# ---------------------------------------------------------------- HTTP


Say = Callable[[Asked, web.Request], Awaitable[web.StreamResponse]]


@pytest.mark.parametrize(
    ("say", "words"),
    [
        (answer(b"<html>", 404), "is not llorch (status 404"),
        (answer(b"[" * 100_000, 200), "is not llorch (status 200"),
        (answer({**HEALTH, "role": "node"}), "is a node, not a control"),
        (hang_up, "closed the connection"),
        (answer(b"x" * (5 << 20)), "is not llorch"),
    ],
)
async def test_what_answers_and_is_no_control(
    llorch: CommandLine, control: ScriptedControl, say: Say, words: str
) -> None:
    control.on("GET /health", say)
    ran, found = await doctor(llorch, "--url", control.url)
    assert (ran.code, found["http"]["state"]) == (1, "fail")
    assert words in found["http"]["found"]
    assert not any("Authorization" in asked.headers for asked in control.requests)


async def test_one_that_drains_or_does_not_say_is_a_warning(llorch: CommandLine, control: ScriptedControl) -> None:
    control.on("GET /readyz", answer({**HEALTH, "status": "draining"}, 503))
    _, found = await doctor(llorch, "--url", control.url)
    assert (found["ready"]["state"], "draining" in found["ready"]["found"]) == ("warn", True)


@pytest.mark.parametrize(
    ("ahead_s", "state"), [(0, "ok"), (-30, "warn"), (30, "warn"), (-120, "fail"), (7_200, "fail")]
)
async def test_a_clock_that_is_wrong_shows_in_the_date_header(
    llorch: CommandLine, control: ScriptedControl, ahead_s: float, state: str
) -> None:
    date = email.utils.formatdate(time.time() + ahead_s, usegmt=True)
    control.on("GET /health", answer(HEALTH, headers={"Date": date}))
    ran, found = await doctor(llorch, "--url", control.url)
    assert found["clock"]["state"] == state
    assert ran.code == (state == "fail")
    if ahead_s:
        assert ("this one is behind" if ahead_s > 0 else "this one is ahead") in found["clock"]["mend"]


@pytest.mark.parametrize("date", ["yesterday", "Thu, 99 Foo 2026 00:00:00 GMT", "Thu, 01 Jan 99999 00:00:00 GMT"])
async def test_a_date_that_is_none_says_nothing(llorch: CommandLine, control: ScriptedControl, date: str) -> None:
    control.on("GET /health", answer(HEALTH, headers={"Date": date}))
    assert "clock" not in (await doctor(llorch, "--url", control.url))[1]


# ---------------------------------------------------------------- the token


async def test_a_token_that_is_refused_is_tried_once(llorch: CommandLine, control: ScriptedControl) -> None:
    control.on("GET /v2/nodes", refusal(Code.UNAUTHENTICATED, "no valid token was presented"))
    ran, found = await doctor(llorch, "--url", control.url)
    assert (ran.code, found["token"]["state"]) == (1, "fail")
    assert "no valid token was presented" in found["token"]["found"]
    assert len([asked for asked in control.requests if "Authorization" in asked.headers]) == 1


async def test_a_token_for_reading_alone_is_a_warning(llorch: CommandLine, control: ScriptedControl) -> None:
    control.on("GET /v1/models", refusal(Code.FORBIDDEN))
    ran, found = await doctor(llorch, "--url", control.url)
    assert (ran.code, found["token"]["found"]) == (0, "good for read, not for submit")
    assert "models" not in found


@pytest.mark.parametrize(
    ("token", "words"),
    [(TOKEN[:-3], "cut off"), (TOKEN[:-1] + "x", "cut off"), (write_token(bytes(37), bytes(32))[1], "a join token")],
)
async def test_a_token_that_can_be_no_good_is_not_sent(
    llorch: CommandLine, control: ScriptedControl, token: str, words: str
) -> None:
    _, found = await doctor(llorch, "--url", control.url, token=token)
    assert (found["token"]["state"], words in found["token"]["found"]) == ("fail", True)
    assert not any("Authorization" in asked.headers for asked in control.requests)


async def test_a_control_that_has_just_started_and_one_without_models_are_warnings(
    llorch: CommandLine, control: ScriptedControl, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor_client, "uuid", SimpleNamespace(uuid4=lambda: TASK))
    control.on("GET /v1/models", answer({"data": []}))
    _, found = await doctor(llorch, "--url", control.url)
    assert (found["models"]["state"], found["token"]["state"]) == ("warn", "ok")
    assert "recovery" not in found
    control.on(f"GET /v2/tasks/{TASK}", refusal(Code.RECOVERING, "wait"))
    _, found = await doctor(llorch, "--url", control.url)
    assert found["recovery"]["state"] == "warn"


# ---------------------------------------------------------------- how it looks


async def test_a_look_that_never_ends_says_so_and_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_visit, "LIMIT_S", 0.1)
    over = threading.Event()

    async def hangs(into: list[Finding]) -> None:
        into.append(ok("first", "that far"))
        await doctor_probes.in_thread(lambda: over.wait(20), 10)

    async def quick(into: list[Finding]) -> None:
        into.append(ok("quick", "done"))

    started = time.monotonic()
    found = await visit([Look("disk", hangs), Look("quick", quick)])
    over.set()
    assert [(one.check, one.state) for one in found] == [("first", "ok"), ("disk", "fail"), ("quick", "ok")]
    assert time.monotonic() - started < 2


@pytest.mark.parametrize(
    ("fault", "words", "mend"),
    [
        (PermissionError(13, "Permission denied", "/data/x"), "/data/x: permission denied", "as the user"),
        (ConfigError("it lies open", hint="chmod 600 it"), "it lies open", "chmod 600 it"),
        (ConfigError("it is locked"), "it is locked", "llorch config show"),
        (TimeoutError(), "no answer within", "run it again"),
    ],
)
async def test_a_fault_of_this_machine_is_a_finding(fault: Exception, words: str, mend: str) -> None:
    async def fails(_: list[Finding]) -> None:
        raise fault

    [finding] = await visit([Look("disk", fails)])
    assert (words in finding.found, mend in finding.mend) == (True, True)


async def test_a_fault_of_the_program_is_not_hidden() -> None:
    async def fails(_: list[Finding]) -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        await visit([Look("disk", fails)])


async def test_everything_together_has_one_limit(
    llorch: CommandLine, control: ScriptedControl, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor_visit, "LIMIT_S", 0.3)
    control.on("GET /health", no_answer)
    ran, found = await doctor(llorch, "--url", control.url)
    assert (ran.code, found["control"]["state"]) == (1, "fail")
    assert found["tcp"]["state"] == "ok", "what was found until then is told"
