"""What `llorch dev` says while it starts, when it serves, and when it can't."""

from __future__ import annotations

import signal
from typing import Any

import pytest

from llorch.cli import dev_words as words


def node(
    name: str, *, bound: bool = True, state: str = "ready", replica: str = "ready", said: str = ""
) -> dict[str, Any]:
    pool = {"bound": bound, "model": "demo" if bound else None, "state": state, "last_error": said or None}
    pool["replicas"] = [{"id": "r0", "state": replica}]
    return {"node_id": name, "state": "online", "slots_free": 4, "slots_total": 4, "pools": [pool]}


def loading(name: str) -> dict[str, Any]:
    return node(name, bound=False, state="loading", replica="probing")


def down(name: str, said: str = "exited with code 1", state: str = "starting") -> dict[str, Any]:
    return node(name, bound=False, state=state, replica="exited", said=said)


# ---------------------------------------------------------------- while it starts


def test_a_start_is_told_step_by_step_until_every_node_is_ready() -> None:
    start = words.Start(["dev-1", "dev-2"])
    looks = [
        start.look(nodes)
        for nodes in (
            [],
            [loading("dev-1")],
            [loading("dev-1"), loading("dev-2")],
            [node("dev-1"), loading("dev-2")],
            [node("dev-1"), node("dev-2")],
        )
    ]
    assert [look.text for look in looks] == [
        "starting the nodes: 0 of 2 joined",
        "starting the nodes: 1 of 2 joined",
        "loading the model: 0 of 2 nodes ready",
        "loading the model: 1 of 2 nodes ready",
        "loading the model: 2 of 2 nodes ready",
    ]
    assert [look.ready for look in looks] == [False, False, False, False, True]
    assert looks[-1].model == "demo"
    assert not any(look.failed or look.ended for look in looks)


def test_one_node_is_not_counted() -> None:
    start = words.Start(["dev-1"])
    assert [start.look(nodes).text for nodes in ([], [loading("dev-1")])] == ["starting the node", "loading the model"]


def test_an_engine_may_end_once_and_is_looked_into_each_time() -> None:
    start = words.Start(["dev-1"])
    first = start.look([down("dev-1")])
    assert (first.ended, first.failed) == ((("dev-1", "exited with code 1"),), None)
    again = start.look([down("dev-1")])
    assert (again.ended, again.failed) == ((), None), "it is the same end"
    assert not start.look([loading("dev-1")]).ended
    second = start.look([down("dev-1", "killed by SIGILL")])
    assert second.failed == ("dev-1", "killed by SIGILL")


def test_a_pool_that_gave_up_is_believed_at_once() -> None:
    assert words.Start(["dev-1"]).look([down("dev-1", state="failed")]).failed == ("dev-1", "exited with code 1")


def test_two_engines_that_end_once_each_are_no_failure() -> None:
    start = words.Start(["dev-1", "dev-2"])
    assert start.look([down("dev-1"), loading("dev-2")]).failed is None
    assert start.look([loading("dev-1"), down("dev-2")]).failed is None


def test_an_engine_that_only_takes_its_time_has_not_ended() -> None:
    slow = node("dev-1", bound=False, state="loading", replica="probing", said="its health check answers 503")
    look = words.Start(["dev-1"]).look([slow])
    assert (look.ended, look.failed) == ((), None)


@pytest.mark.parametrize("columns", [80, 20, 5, 1, 0])
def test_the_line_that_waits_never_wraps(columns: int) -> None:
    line = words.progress("loading the model: 1 of 3 nodes ready", 12.4, columns)
    assert len(line) < max(columns, 1)
    assert "loading the model: 1 of 3 nodes ready 12 s".startswith(line)


# ---------------------------------------------------------------- when it serves


def serving(nodes: int = 1, **more: Any) -> words.Serving:
    listed = [node(f"dev-{number}") for number in range(1, nodes + 1)]
    given = {"context": "dev", "current": True, "context_file": "~/.config/llorch/contexts.json", **more}
    return words.Serving("http://127.0.0.1:54321", "demo", listed, **given)


@pytest.mark.parametrize("nodes", [1, 2, 3, 5, 6, 64])
@pytest.mark.parametrize("context", ["dev", "dev-999"])
@pytest.mark.parametrize("program", ["llorch", "~/src/llorch/.venv/bin/llorch"])
def test_the_welcome_fits_a_screen(nodes: int, context: str, program: str) -> None:
    text = words.welcome(serving(nodes, context=context, current=False, program=program, tells_tasks=True))
    lines = (words.STARTING + text).splitlines()
    assert len(lines) < 24
    assert max(map(len, lines)) <= 80 or program != "llorch"


def test_the_welcome_says_what_there_is_and_what_to_type_next() -> None:
    text = words.welcome(serving())
    assert text.startswith("ready: http://127.0.0.1:54321  model demo, 1 node\n")
    for command in ("  llorch chat  ", '  llorch submit "Once upon a time"  ', "  llorch status  "):
        assert command in text
    assert "  export OPENAI_BASE_URL=http://127.0.0.1:54321/v1\n" in text
    assert '  export OPENAI_API_KEY="$(llorch context show dev --token)"\n' in text
    assert "~/.config/llorch/contexts.json (only you can read it)" in text
    assert "NODE" not in text
    assert "told here" not in text


def test_a_context_that_is_not_current_is_named_in_every_command() -> None:
    text = words.welcome(serving(3, context="dev-2", current=False))
    for command in ("chat --context dev-2", 'submit --context dev-2 "Once', "explain --context dev-2 --dry-run"):
        assert f"  llorch {command}" in text
    assert "$(llorch context show dev-2 --token)" in text


def test_several_nodes_are_shown_with_their_slots_and_how_to_see_a_placement() -> None:
    text = words.welcome(serving(3, tells_tasks=True))
    assert "  NODE   STATE   SLOTS FREE\n  dev-1  online  4/4\n" in text
    assert text.count("online") == 3
    assert "llorch explain --dry-run " in text
    assert "Each task is told here" in text
    many = words.welcome(serving(64))
    assert many.count("online") == 4
    assert "  and 60 more: llorch node ls\n" in many


LOG = "2026-11-24T11:39:04.308Z INFO task.ended task_id=1f-2 request_id=r node_id=dev-2 pool_id=default"


def test_a_task_that_ended_is_one_line_with_its_node() -> None:
    lines = [
        "2026-11-24T11:39:04.308Z INFO node.registered node_id=dev-1",
        f"{LOG} outcome=done attempts=1 tokens_out=41",
        f"{LOG} outcome=failed code=NODE_LOST attempts=1 tokens_out=3",
        "2026-11-24T11:39:04.308Z INFO task.ended task_id=7 request_id=r outcome=failed code=NO_CAPACITY attempts=0",
        "Traceback",
        "",
    ]
    assert words.ended_tasks(lines) == [
        "task 1f-2  dev-2  done, 41 tokens",
        "task 1f-2  dev-2  NODE_LOST",
        "task 7  no node  NO_CAPACITY",
    ]


def test_a_crowd_of_tasks_is_counted() -> None:
    line = f"{LOG} outcome=done attempts=1"
    assert len(words.ended_tasks([line] * 5)) == 5
    assert words.ended_tasks([line] * 7)[5:] == ["and 2 more tasks"]
    assert words.ended_tasks([line] * 6)[5:] == ["and 1 more task"]


def test_who_answered_is_told_with_the_controls_reason() -> None:
    assert words.answered("dev-2", 3, "the least loaded of 3") == "answered by dev-2, the least loaded of 3\n"
    assert words.answered("dev-2", 3, None) == "answered by dev-2, one of 3 nodes\n"
    assert words.answered("dev-2", 3, "a\x1b[2J\nb") == "answered by dev-2, a[2J b\n"


# ---------------------------------------------------------------- why it can't


def test_a_role_that_ended_is_told_by_its_own_error_and_hint() -> None:
    log = "2026 INFO gpu.none\nerror: pool default: no room\nwhy: it is full\nhint: make some\n"
    assert words.role_fault("dev-1", 2, log) == words.Fault("dev-1: pool default: no room", "it is full", "make some")


def test_a_role_that_told_no_error_is_told_by_the_end_of_its_log() -> None:
    log = "\n".join(f"line {number}" for number in range(40))
    fault = words.role_fault("control", -9, log)
    assert fault.message == "control ended with signal 9"
    assert fault.why == "\n".join(f"line {number}" for number in range(25, 40))
    late = words.role_fault("control", None, "error: an earlier one\nand more")
    assert (late.message, late.why) == ("control did not get ready in time", "error: an earlier one\nand more")
    assert words.role_fault("control", 127, "", "No space left on device").why == "No space left on device"
    assert words.role_fault("control", 1, "").why is None


ENGINE_LOG = (
    "0.22.761.322 E ggml_aligned_malloc: insufficient memory (attempted to allocate 65536.00 MB)\n"
    "0.23.178.336 E srv          init: exiting due to model loading error\n"
    "llamacpp_server: llama.cpp did not start /m.gguf on port 1; the lines above say why\n"
)


def test_an_engine_without_memory_is_told_so_and_what_takes_less() -> None:
    fault = words.memory_fault("dev-1", ENGINE_LOG)
    assert fault is not None
    assert fault.message == "the engine of dev-1 found too little memory"
    assert fault.why == "ggml_aligned_malloc: insufficient memory (attempted to allocate 65536.00 MB)"
    assert "--ctx" in str(fault.hint)
    assert words.memory_fault("dev-1", "0.1 E load: unknown model architecture: 'x'\n") is None
    warned = "0.1 W failed to mlock 1 MB: Cannot allocate memory\n0.2 E load: unknown model architecture: 'x'\n"
    assert words.memory_fault("dev-1", warned) is None


def test_an_engine_is_quoted_where_it_says_why() -> None:
    log = "0.01.002.003 E llama_model_load: unknown model architecture: 'x'\n0.02 E srv init: exiting\n"
    said = "exited with code 1: llamacpp_server: it did not start; the lines above say why"
    fault = words.engine_fault("dev-1", said, log)
    assert fault.why == "llama_model_load: unknown model architecture: 'x'"
    assert "--engine simulated" in str(fault.hint)
    assert words.engine_fault("dev-1", said, "").why == said
    assert words.engine_fault("dev-1", "exited with code 3", log).why == "exited with code 3"
    assert "memory" in str(words.engine_fault("dev-1", "killed by SIGKILL", "").hint)


def test_a_wheel_that_can_not_be_imported_is_told_with_what_mends_it() -> None:
    install = "/v/bin/python -m pip install --force-reinstall 'xllamacpp>=1'"
    assert words.wheel_fault(0, "", install) is None
    library = "Traceback\nImportError: libgomp.so.1: cannot open shared object file: No such file or directory\n"
    fault = words.wheel_fault(1, library, install)
    assert fault is not None
    assert (fault.why, "apt install libgomp1" in str(fault.hint)) == (
        "the library libgomp.so.1 is not on this machine",
        True,
    )
    other = words.wheel_fault(1, library.replace("libgomp.so.1", "libodd.so.7"), install)
    assert other is not None
    assert "install what has libodd.so.7" in str(other.hint)
    illegal = words.wheel_fault(-signal.SIGILL, "", install)
    assert illegal is not None
    assert "illegal instruction" in str(illegal.why)
    for code, said, why in (
        (
            1,
            "Traceback\nImportError: _x.so: invalid ELF header\n",
            "ImportError: _x.so: invalid ELF header: it is damaged",
        ),
        (-11, "", "importing it ends Python with SIGSEGV: it is damaged"),
        (1, "", "code 1: it is damaged"),
    ):
        foreign = words.wheel_fault(code, said, install)
        assert foreign is not None
        assert str(foreign.why).startswith(why)
        assert str(foreign.hint).startswith(
            "/v/bin/python -m pip install --force-reinstall 'xllamacpp>=1'; --engine simu"
        )


def test_the_package_is_added_to_the_very_installation_that_runs() -> None:
    assert words.install_words("/v/bin/python", "x>=1", has_pip=True) == "/v/bin/python -m pip install 'x>=1'"
    assert words.install_words("/v/bin/python", "x>=1", has_pip=False) == "uv pip install --python /v/bin/python 'x>=1'"
    again = words.install_words("/my src/python", "x", has_pip=True, again=True)
    assert again == "'/my src/python' -m pip install --force-reinstall 'x'"


def test_llorch_is_called_as_it_can_be_from_anywhere() -> None:
    def said(typed: str, *, found: bool = False) -> str:
        return words.program_words(typed, found=found, python="/home/me/v/bin/python", home="/home/me")

    assert said("/usr/bin/llorch", found=True) == "llorch"
    assert said("/home/me/src/.venv/bin/llorch") == "~/src/.venv/bin/llorch"
    assert said("/opt/v/bin/llorch") == "/opt/v/bin/llorch"
    assert said("/home/me/my src/bin/llorch") == "'/home/me/my src/bin/llorch'"
    assert said("/x/llorch/__main__.py") == "~/v/bin/python -m llorch"
