"""What `llorch dev` makes of its words, what it looks at first, and what its roles are given; nothing is started."""

from __future__ import annotations

import asyncio
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from llorch.cli import dev, dev_checks, dev_cluster
from llorch.cli.contexts import Context, Contexts
from llorch.cli.keeper import is_alive, process_start
from llorch.cli.output import Failure
from llorch.errors import ConfigError

WORDS: dict[str, Any] = {
    "nodes": 1, "engine": "simulated", "prompt": None, "max_tokens": None, "model": "demo", "slots": None, "ctx": None,
    "port": 0, "verbose": False,
}  # fmt: skip


def asked(monkeypatch: pytest.MonkeyPatch, **words: Any) -> Any:
    """The task that is to be answered."""
    monkeypatch.setattr(dev._Dev, "run", lambda _self, body: body)
    return dev._run({**WORDS, **words})


def test_an_answer_goes_on_to_its_end_unless_a_length_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    assert asked(monkeypatch) is None
    assert asked(monkeypatch, prompt="Hello") == {"prompt": "Hello"}
    assert asked(monkeypatch, prompt="Hello", max_tokens=5) == {"prompt": "Hello", "max_tokens": 5}


@pytest.mark.parametrize("words", [{"prompt": " \n"}, {"engine": "vllm"}, {"max_tokens": 5}])
def test_words_that_mean_nothing_are_refused(monkeypatch: pytest.MonkeyPatch, words: dict[str, Any]) -> None:
    with pytest.raises(Failure) as caught:
        asked(monkeypatch, **words)
    assert caught.value.code == 2


def test_flags_of_a_node_are_checked_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    for words in ({"slots": "none"}, {"ctx": "-1"}, {"slots": "0"}):
        with pytest.raises(ConfigError):
            asked(monkeypatch, **words)


def test_a_name_is_free_if_nobody_has_it_or_its_keeper_is_gone() -> None:
    living = f"1:{process_start(1)}"
    taken = {"dev": Context("u"), "dev-2": Context("u", keeper=living)}
    assert dev_cluster._free_name(Contexts({})) == "dev"
    assert dev_cluster._free_name(Contexts(taken)) == "dev-3"
    assert dev_cluster._free_name(Contexts({**taken, "dev-2": Context("u", keeper="1:0")})) == "dev-2"


def test_a_process_is_known_by_its_id_and_its_start_and_nothing_else_is_one() -> None:
    assert is_alive(f"1:{process_start(1)}")
    for stranger in ("1:0", "0:0", "999999999:5", "", "x:y", ":", "-1:5"):
        assert not is_alive(stranger)


def test_roles_get_tokens_by_environment_and_none_of_this_machines_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "LLORCH_BIND",
        "LLORCH_ADMIN_TOKEN",
        "ORCHESTRATORD_TLS_CERT",
        "POOL_MANAGERD_TLS_KEY",
        "NOTIFY_SOCKET",
    ):
        monkeypatch.setenv(name, "this machine's")
    tokens = dev_cluster.Tokens.make()
    cluster = dev_cluster.Cluster(None, {"state": "/s", "keeper": "1:2"}, tokens)  # type: ignore[arg-type]
    env = cluster.environment()
    assert "this machine's" not in env.values()
    assert {env["LLORCH_API_TOKEN"], env["LLORCH_SERVICE_TOKEN"], env["LLORCH_NODE_TOKEN"]} == {
        tokens.api, tokens.service, tokens.node,
    }  # fmt: skip
    assert tokens.api not in repr(tokens)


# ---------------------------------------------------------------- what is looked at before anything starts


def test_without_the_wheel_a_person_is_told_how_to_add_it_to_this_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dev_checks, "WHEEL", "xllamacpp_that_nobody_has")
    with pytest.raises(Failure) as caught:
        asked(monkeypatch, engine="llamacpp")
    assert caught.value.code == 2
    assert "xllamacpp_that_nobody_has, which is not installed" in caught.value.message
    assert f"{sys.executable} -m pip install 'xllamacpp_that_nobody_has'" in str(caught.value.hint)
    assert "--engine simulated" in str(caught.value.hint)
    assert asked(monkeypatch, engine="simulated") is None, "which needs none"


def test_the_requirement_is_the_one_of_the_extra() -> None:
    assert "'xllamacpp>=" in dev_checks._install()


def test_a_model_that_no_engine_could_open_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "notes.gguf"
    text.write_text("not one")
    monkeypatch.chdir(tmp_path)
    for ref, message, hint in (
        ("file:/no/such.gguf", "/no/such.gguf can't be read: No such file", "-m demo, or -m file:/abs/path.gguf"),
        (f"file:{text}", "is not a usable GGUF", "-m demo, or"),
        (f"file:{tmp_path}", "is not a file", "-m demo, or"),
        ("notes.gguf", "no model notes.gguf", f"-m file:{text}"),
        ("hf:org/../repo", "Hugging Face model", "-m demo, or"),
    ):
        with pytest.raises(ConfigError) as caught:
            dev_checks.check_model(ref)
        assert message in caught.value.message
        assert hint in str(caught.value.hint)
    for fetched_by_the_node in ("demo", "hf:org/repo", "https://models.example/m.gguf"):
        dev_checks.check_model(fetched_by_the_node)


def test_a_port_is_kept_for_the_control_and_given_to_nobody_else() -> None:
    with dev_checks.held_port(0) as port, socket.socket() as stranger, socket.socket() as control:
        with pytest.raises(OSError, match="in use"):
            stranger.bind(("127.0.0.1", port))
        control.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as every listener of llorch has it
        control.bind(("127.0.0.1", port))
        control.listen()
        with pytest.raises(Failure) as caught, dev_checks.held_port(port):
            pass
    assert caught.value.code == 2
    assert f"port {port} of 127.0.0.1" in caught.value.message
    assert "in use" in str(caught.value.why)
    assert "--port" in str(caught.value.hint)


def test_a_place_where_no_context_can_be_kept_is_told_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    dev_checks.check_context_place(tmp_path / "not" / "there" / "yet.json")
    assert not (tmp_path / "not").exists(), "a look leaves nothing"
    with pytest.raises(Failure) as caught:
        dev_checks.check_context_place(tmp_path / "file" / "llorch" / "contexts.json")
    assert caught.value.code == 2
    assert caught.value.why == f"{tmp_path / 'file'} is not a directory"
    (tmp_path / "contexts.json").write_text("nonsense")
    with pytest.raises(ConfigError):
        dev_checks.check_context_place(tmp_path / "contexts.json")


def test_a_directory_that_is_read_only_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dev_checks.os, "access", lambda path, mode: False)  # who runs as root may write anywhere
    with pytest.raises(Failure) as caught:
        dev_checks.check_context_place(tmp_path / "llorch" / "contexts.json")
    assert caught.value.why == f"{tmp_path} can't be written"
    assert "-p PROMPT" in str(caught.value.hint)


@pytest.mark.parametrize("name", ["LLORCH_URL", "LLORCH_TOKEN", "LLORCH_TOKEN_FILE", "LLORCH_TLS_CA"])
def test_a_shell_with_settings_of_its_own_needs_the_context_named(name: str) -> None:
    assert dev_checks.is_current({"PATH": "/bin", "LLORCH_API_TOKEN": "x"})
    assert not dev_checks.is_current({name: "x"})


def test_a_program_that_is_no_file_and_a_user_without_a_home_still_get_their_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.setattr(sys, "argv", ["-c", "dev"])
    assert dev_checks.program() == f"{sys.executable} -m llorch"
    assert dev_checks.shown_path(Path("/etc/x")) == "/etc/x"


# ---------------------------------------------------------------- the line that waits


async def test_the_line_that_waits_is_written_over_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dev, "PROGRESS_EVERY_S", 0.0)
    written: list[str] = []
    waiting = dev.Waiting(written.append)
    async with waiting.shown():
        for text in ("starting the control", "loading the model"):
            waiting.text = text
            before = len(written)
            async with asyncio.timeout(5.0):
                while len(written) == before:
                    await asyncio.sleep(0)
    assert [line.rpartition(" ")[0].rpartition(" ")[0] for line in written[-3:-1]] == [
        "\r\x1b[Kstarting the control", "\r\x1b[Kloading the model",
    ]  # fmt: skip
    assert written[-1] == "\r\x1b[K"
    assert not any("\n" in line for line in written)


async def test_without_a_terminal_nothing_is_said_of_waiting() -> None:
    async with dev.Waiting(None).shown():
        names = {task.get_name() for task in asyncio.all_tasks()}
    assert "dev.waiting" not in names


# ---------------------------------------------------------------- roles that ended


def test_a_role_that_had_no_room_for_its_log_says_so(tmp_path: Path) -> None:
    hello = {"state": str(tmp_path), "keeper": "1:2"}
    cluster = dev_cluster.Cluster(None, hello, dev_cluster.Tokens.make())  # type: ignore[arg-type]
    cluster._tails["control"] = cluster.tail("control")
    cluster._heard({"ended": "control", "code": 127, "why": "No space left on device"})
    failure = cluster.failure("control")
    assert (failure.message, failure.why) == ("control ended with code 127", "No space left on device")


def test_the_log_of_an_engine_is_there_with_the_one_before_it(tmp_path: Path) -> None:
    logs = tmp_path / "dev-1.d" / ".runtime" / "logs"
    logs.mkdir(parents=True)
    (logs / "default-r0.log").write_text("second\n")
    (logs / "default-r0.log.1").write_text("first\n")
    hello = {"state": str(tmp_path), "keeper": "1:2"}
    cluster = dev_cluster.Cluster(None, hello, dev_cluster.Tokens.make())  # type: ignore[arg-type]
    assert cluster.engine_log("dev-1") == "first\nsecond\n"
    assert cluster.engine_log("dev-2") == ""
