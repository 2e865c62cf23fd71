"""The commands that talk to nobody, and which control and token the others talk with: contexts, settings, versions."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import yaml

from llorch import __version__
from llorch.cli import submit
from llorch.client.api import LlorchClient
from llorch.tls import server_context
from tests.certificates import certificate
from tests.component.command_line import CommandLine
from tests.component.scripted_control import TASK, ScriptedControl, answer, no_answer, scripted

TOKEN_A, TOKEN_B, TOKEN_ENV = "token-of-context-a", "token-of-context-b", "token-of-the-environment"


@pytest.fixture
def llorch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> CommandLine:
    return CommandLine(monkeypatch, tmp_path)


@pytest.fixture
async def a() -> AsyncIterator[ScriptedControl]:
    async with scripted() as control:
        control.on("GET /v2/nodes", answer({"nodes": [{"node_id": "at-a"}]}))
        yield control


@pytest.fixture
async def b() -> AsyncIterator[ScriptedControl]:
    async with scripted() as control:
        control.on("GET /v2/nodes", answer({"nodes": [{"node_id": "at-b"}]}))
        yield control


def presented(control: ScriptedControl) -> str | None:
    """The token of the last request."""
    return control.requests[-1].headers.get("Authorization", "").removeprefix("Bearer ") or None


async def with_contexts(llorch: CommandLine, a: ScriptedControl, b: ScriptedControl) -> None:
    for name, control, token in (("a", a, TOKEN_A), ("b", b, TOKEN_B)):
        ran = await llorch("context", "add", name, "--url", control.url, "--token", "-", stdin=token.encode())
        assert (ran.code, ran.out, ran.err) == (0, "", f"context {name} is {control.url}\n")


# ---------------------------------------------------------------- contexts


async def test_contexts_are_added_listed_used_shown_and_forgotten(
    llorch: CommandLine, a: ScriptedControl, b: ScriptedControl
) -> None:
    assert (await llorch("context", "ls", "--json")).out == "[]\n"
    await with_contexts(llorch, a, b)
    assert [row["current"] for row in json.loads((await llorch("context", "ls", "--json")).out)] == [True, False]
    assert (await llorch("context", "use", "b")) == (0, "", "now in context b\n")
    assert (await llorch("context", "ls", "-q")).out == "a\nb\n"
    shown = yaml.safe_load((await llorch("context", "show", "-o", "yaml")).out)
    assert (shown["name"], shown["url"], shown["current"]) == ("b", b.url, True)
    assert (await llorch("context", "show", "a", "--token")).out == f"{TOKEN_A}\n"
    assert (await llorch("context", "rm", "b")) == (0, "", "forgot context b\n")
    assert (await llorch("context", "show")).code == 2
    assert (await llorch("context", "ls", "-q")).out == "a\n"


async def test_no_token_is_shown_unless_asked_for(llorch: CommandLine, a: ScriptedControl, b: ScriptedControl) -> None:
    await with_contexts(llorch, a, b)
    for argv in (("ls",), ("ls", "--json"), ("show", "a"), ("show", "a", "-o", "yaml"), ("ls", "-o", "jsonl")):
        ran = await llorch("context", *argv)
        assert "sha256:" in ran.out
        assert TOKEN_A not in ran.out + ran.err


async def test_the_file_of_contexts_is_private(llorch: CommandLine, a: ScriptedControl, b: ScriptedControl) -> None:
    await with_contexts(llorch, a, b)
    file = llorch.home / ".config" / "llorch" / "contexts.json"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert [path.name for path in file.parent.iterdir()] == ["contexts.json"], "no temporary file stays"


async def test_a_token_may_come_as_an_argument_a_file_or_a_pipe(llorch: CommandLine, tmp_path: Path) -> None:
    (llorch.work / "t").write_text("from-a-file\n")
    url = ("--url", "http://127.0.0.1:1")
    ran = await llorch("context", "add", "argument", *url, "--token", "on-the-command-line")
    assert (ran.code, ran.err.splitlines()[0][:40]) == (0, "warning: --token: a secret on the comman")
    assert (await llorch("context", "add", "at", *url, "--token", "@t")).code == 0
    assert (await llorch("context", "add", "file", *url, "--token-file", "t")).code == 0
    assert (await llorch("context", "add", "pipe", *url, "--token-file", "-", stdin=b"from-a-pipe\n")).code == 0
    for name, token in (("argument", "on-the-command-line"), ("at", "from-a-file"), ("file", "from-a-file"),
                        ("pipe", "from-a-pipe")):  # fmt: skip
        assert (await llorch("context", "show", name, "--token")).out == f"{token}\n"
    (llorch.work / "t").write_text("renewed\n")
    assert (await llorch("context", "show", "file", "--token")).out == "renewed\n", "a file is read when it is needed"


async def test_a_context_that_can_not_be_is_refused_and_nothing_is_written(llorch: CommandLine) -> None:
    for argv, stdin in (
        (("x",), b""),
        (("x", "--url", "ftp://h"), b""),
        (("x", "--url", "http://h?q"), b""),
        (("x y", "--url", "http://h"), b""),
        (("x", "--url", "http://h", "--token-file", "missing"), b""),
        (("x", "--url", "http://h", "--token", "-"), b""),
        (("x", "--url", "http://h", "--timeout", "3s"), b""),
    ):
        ran = await llorch("context", "add", *argv, stdin=stdin)
        assert (ran.code, ran.out) == (2, ""), argv
        assert ran.err.startswith("error: ")
    assert not (llorch.home / ".config").exists()


async def test_contexts_that_are_not_there_are_told_with_those_that_are(
    llorch: CommandLine, a: ScriptedControl, b: ScriptedControl
) -> None:
    await with_contexts(llorch, a, b)
    for argv in (("use", "c"), ("rm", "c"), ("show", "c")):
        ran = await llorch("context", *argv)
        assert (ran.code, ran.out) == (2, "")
        assert "hint: `llorch context ls` lists them: a, b" in ran.err
    assert (await llorch("node", "ls", "--context", "c")).code == 2


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"contexts": []}', '{"contexts": {"x": 5}}', '{"contexts": {"x": {"url": 5}}}',
     '{"contexts": {"x": {}}}', '{"contexts": {}, "current": [1]}', "[" * 100_000,
     '{"contexts": {"x": {"url": "ftp://h"}}, "current": "x"}'],
)  # fmt: skip
async def test_a_file_of_contexts_that_is_broken_is_told_in_words(llorch: CommandLine, text: str) -> None:
    folder = llorch.home / ".config" / "llorch"
    folder.mkdir(parents=True)
    (folder / "contexts.json").write_text(text)
    ran = await llorch("node", "ls")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("error: ")


# ---------------------------------------------------------------- whom to talk to, and with which token


async def test_a_contexts_token_goes_to_that_contexts_url_only(
    llorch: CommandLine, a: ScriptedControl, b: ScriptedControl
) -> None:
    await with_contexts(llorch, a, b)

    async def look(*argv: str, at: ScriptedControl) -> str | None:
        before = len(at.requests)
        ran = await llorch("node", "ls", "-q", *argv)
        assert ran.code == 0, ran
        assert len(at.requests) == before + 1
        return presented(at)

    assert await look(at=a) == TOKEN_A  # the current one
    assert await look("--context", "b", at=b) == TOKEN_B
    assert await look("--url", b.url, at=b) is None, "a's token is not b's"
    assert "the token of context a goes to" in (await llorch("node", "ls", "--url", b.url)).err
    assert await look("--url", a.url, at=a) == TOKEN_A
    assert await look("--url", b.url, "--token", "given", at=b) == "given"
    assert await look("--context", "b", "--url", a.url, at=a) is None
    llorch.env(LLORCH_URL=b.url)
    assert await look(at=b) is None
    llorch.env(LLORCH_TOKEN=TOKEN_ENV)
    assert await look(at=b) == TOKEN_ENV
    assert await look("--context", "a", at=a) == TOKEN_A, "--context is stronger than the environment"
    assert await look("--url", a.url, at=a) == TOKEN_ENV
    assert await look("--token", "given", at=b) == "given"


async def test_a_contexts_authority_is_believed_at_that_contexts_url_only(llorch: CommandLine, tmp_path: Path) -> None:
    cert, key = certificate(tmp_path / "tls")
    async with (
        scripted(tls=server_context(str(cert), str(key))) as one,
        scripted(tls=server_context(str(cert), str(key))) as other,
    ):
        for control in (one, other):
            control.on("GET /v2/nodes", answer({"nodes": []}))
        await llorch("context", "add", "one", "--url", one.url, "--tls-ca", str(cert), "--token", TOKEN_A)
        assert (await llorch("node", "ls", "--url", one.url)).code == 0
        llorch.env(LLORCH_URL=one.url)
        assert (await llorch("node", "ls")).code == 0
        assert (await llorch("node", "ls", "--url", other.url)).code == 5
        assert (presented(one), other.requests) == (TOKEN_A, [])


async def test_a_controls_own_token_in_the_environment_is_presented_only_where_there_is_no_better(
    llorch: CommandLine, a: ScriptedControl, b: ScriptedControl
) -> None:
    llorch.env(LLORCH_API_TOKEN="name=first-of-several,second-of-several", LLORCH_URL=a.url)
    assert (await llorch("node", "ls", "-q")).out == "at-a\n"
    assert presented(a) == "first-of-several"
    await with_contexts(llorch, a, b)
    await llorch("node", "ls", "--context", "b")
    assert presented(b) == TOKEN_B
    llorch.env(LLORCH_URL="")
    await llorch("node", "ls")
    assert presented(a) == TOKEN_A, "the context's own is better"
    await llorch("context", "add", "bare", "--url", b.url, "--use")
    await llorch("node", "ls")
    assert presented(b) == "first-of-several"


async def test_a_flag_beats_the_environment_and_that_beats_a_file(
    llorch: CommandLine, a: ScriptedControl, b: ScriptedControl
) -> None:
    (llorch.work / "client.yaml").write_text(f"url: {b.url}\n")
    assert (await llorch("node", "ls", "-q", "--config", "client.yaml")).out == "at-b\n"
    llorch.env(LLORCH_URL=a.url)
    assert (await llorch("node", "ls", "-q", "--config", "client.yaml")).out == "at-a\n"
    assert (await llorch("node", "ls", "-q", "--config", "client.yaml", "--url", b.url)).out == "at-b\n"
    assert (await llorch("node", "ls", "--config", "missing.yaml")).code == 2


async def test_a_cancel_that_gets_no_answer_is_given_up(a: ScriptedControl, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "CANCEL_WITHIN_S", 0.02)
    a.on(f"POST /v2/tasks/{TASK}/cancel", no_answer)
    async with LlorchClient(a.url) as client:
        assert await submit.cancel_quietly(client, TASK) is False
        monkeypatch.undo()
        a.on(f"POST /v2/tasks/{TASK}/cancel", answer({}, 202))
        assert await submit.cancel_quietly(client, TASK) is True
    async with LlorchClient("http://127.0.0.1:1") as client:
        assert await submit.cancel_quietly(client, TASK) is False


# ---------------------------------------------------------------- settings


async def test_config_check_tells_every_fault_at_once_with_its_line(llorch: CommandLine) -> None:
    (llorch.work / "llorch.yaml").write_text("bind: nowhere\nqueue-limt: 5\noffline-after: soon\n")
    for argv in (("control",), ()):
        ran = await llorch("config", "check", *argv)
        assert (ran.code, ran.out) == (2, "")
        for where in ("llorch.yaml:1: bind", "llorch.yaml:2: queue-limt", "llorch.yaml:3: offline-after"):
            assert where in ran.err
        assert "did you mean queue-limit?" in ran.err
    assert (await llorch("config", "check", "client")).code == 0, "no client reads that file"
    (llorch.work / "llorch.yaml").unlink()
    assert await llorch("config", "check", "client") == (0, "", "ok: no settings file; environment and defaults\n")
    assert (await llorch("config", "check", "control")).code == 0, "its tokens can be made later"
    assert (await llorch("config", "check", "node")).code == 2, "a node has to be told whom to join"
    assert (await llorch("config", "check")).code == 0
    assert (await llorch("config", "check", "postman")).code == 2


async def test_config_show_tells_each_value_and_its_origin_and_no_secret(llorch: CommandLine) -> None:
    llorch.env(LLORCH_URL="http://127.0.0.1:9", LLORCH_TOKEN="a-secret-of-this-test")
    rows = {row["name"]: row for row in json.loads((await llorch("config", "show", "--json")).out)}
    assert (rows["url"]["value"], rows["url"]["origin"]) == ("http://127.0.0.1:9", "env LLORCH_URL")
    assert rows["token"]["value"].startswith("sha256:")
    assert rows["timeout"]["origin"] == "default"
    for argv in ((), ("--json",), ("-o", "yaml")):
        assert "a-secret-of-this-test" not in (await llorch("config", "show", *argv)).out
    assert "token\n" in (await llorch("config", "show", "-q")).out


async def test_config_init_makes_a_file_that_config_check_takes_and_never_writes_over_one(llorch: CommandLine) -> None:
    for role in ("control", "node", "client"):
        text = (await llorch("config", "init", role)).out
        assert await llorch("config", "init", role, "-f", f"{role}.yaml") == (0, "", f"wrote {role}.yaml\n")
        file = llorch.work / f"{role}.yaml"
        assert file.read_text() == text
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert (await llorch("config", "init", role, "-f", f"{role}.yaml")).code == 1
        assert (await llorch("config", "check", "client", "--config", f"{role}.yaml")).code == 0
    assert (await llorch("config", "init", "-f", "no/such/folder.yaml")).code == 1
    assert (await llorch("config", "init", "postman")).code == 2


async def test_config_schema_is_a_json_schema(llorch: CommandLine) -> None:
    schema = json.loads((await llorch("config", "schema")).out)
    assert schema["type"] == "object"
    assert {"bind", "join", "url", "pools"} <= set(schema["properties"])
    assert schema["additionalProperties"] is False


# ---------------------------------------------------------------- help and versions


async def test_no_words_at_all_show_the_help_on_standard_error_and_are_2(llorch: CommandLine) -> None:
    for argv in ((), ("pool",), ("task",), ("config",), ("context",)):
        ran = await llorch(*argv)
        assert (ran.code, ran.out) == (2, "")
        assert ran.err.startswith("Usage: llorch")


async def test_help_is_a_result_and_goes_to_standard_output(llorch: CommandLine) -> None:
    for argv in (("--help",), ("-h",), ("submit", "--help"), ("node", "--help"), ("node", "ls", "-h")):
        ran = await llorch(*argv)
        assert (ran.code, ran.err) == (0, "")
        assert ran.out.startswith("Usage: llorch")


async def test_the_version_is_told_in_every_form(llorch: CommandLine) -> None:
    for argv in (("--version",), ("version",)):
        assert await llorch(*argv) == (0, f"llorch {__version__}\n", "")
    assert (await llorch("version", "-q")).out == f"{__version__}\n"
    assert json.loads((await llorch("version", "--json")).out)["version"] == __version__


async def test_words_that_are_no_command_are_told_with_where_to_look(llorch: CommandLine) -> None:
    for argv, hint in (
        (("statsu",), "llorch --help"),
        (("node", "lss"), "llorch node --help"),
        (("pool", "ls", "extra"), "llorch pool ls --help"),
        (("completion", "tcsh"), "llorch completion --help"),
        (("task", "show"), "llorch task show --help"),
    ):
        ran = await llorch(*argv)
        assert (ran.code, ran.out) == (2, "")
        assert ran.err.splitlines()[-1] == f"hint: {hint}"


def test_a_node_takes_no_flags_before_a_command_that_looks_at_nodes(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "llorch", "node", "--slots", "3", "ls"],
        capture_output=True, text=True, check=False, timeout=20, cwd=tmp_path,
    )  # fmt: skip
    assert (ran.returncode, ran.stdout) == (2, "")
    assert "flags of a node mean nothing before ls" in ran.stderr
