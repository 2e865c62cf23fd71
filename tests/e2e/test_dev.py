"""`llorch dev`: a whole cluster for as long as it runs, and nothing afterwards, whatever ended it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from llorch.cli import contexts
from tests.cluster import Cluster, Running, alive, descendants, eventually, expected_text


class Dev:
    """One `llorch dev`, and what must be gone when it is."""

    def __init__(self, llorch: Cluster) -> None:
        self.llorch = llorch
        self.temporary = llorch.folder / "tmp"
        self.temporary.mkdir()
        self.below: set[int] = set()
        self.url = ""

    def env(self) -> dict[str, str]:
        return self.llorch.env(TMPDIR=str(self.temporary))

    @property
    def contexts(self) -> contexts.Contexts:
        return contexts.load(self.file)

    @property
    def file(self) -> Path:
        return contexts.contexts_path(self.llorch.env())

    def start(self, *argv: str) -> Running:
        return self.llorch.start("dev", ["dev", *argv], TMPDIR=str(self.temporary))

    async def ready(self, *argv: str) -> Running:
        dev = self.start(*argv)
        await eventually(lambda: "ready: http" in dev.text(), within_s=30.0, what="dev is ready")
        found = re.search(r"ready: (http://\S+)", dev.text())
        assert found
        self.url = found.group(1)
        self.below = descendants(dev.pid)
        return dev

    def run(self, *argv: str, program: tuple[str, ...] = (sys.executable, "-m", "llorch")) -> tuple[int, str, str]:
        ran = subprocess.run(
            [*program, *argv], env=self.env(), cwd=self.llorch.folder, capture_output=True, text=True, timeout=45,
            check=False,
        )  # fmt: skip
        return ran.returncode, ran.stdout, ran.stderr

    async def nothing_is_left(self) -> None:
        await eventually(lambda: not list(filter(alive, self.below)), within_s=15.0, what="every process gone")
        await eventually(lambda: not list(self.temporary.iterdir()), within_s=5.0, what="its state gone")
        assert [name for name in self.contexts.named if name.startswith("dev")] == []
        if self.url:
            with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", self.port), 5):
                pass

    @property
    def port(self) -> int:
        return urlsplit(self.url).port or 0


@pytest.fixture
def dev(llorch: Cluster) -> Dev:
    return Dev(llorch)


# ---------------------------------------------------------------- one answer


@pytest.mark.llama
@pytest.mark.slow
async def test_dev_with_a_prompt_tells_a_story_to_its_end_or_as_far_as_it_is_told(dev: Dev) -> None:
    words = ("dev", "-p", "Once upon a time")
    (code, long, _), (other, short, _) = await asyncio.gather(
        asyncio.to_thread(dev.run, *words), asyncio.to_thread(dev.run, *words, "--max-tokens", "2")
    )
    assert (code, other) == (0, 0)
    assert len(long.split()) > 30
    assert long.rstrip()[-1] in '.!?"'
    assert 0 < len(short) < len(long) / 4
    await dev.nothing_is_left()


async def test_dev_with_a_prompt_prints_the_answer_alone_and_ends(dev: Dev) -> None:
    (dev.llorch.folder / "llorch.yaml").write_text("nonsense: true\n")  # meant for this machine's own roles
    code, out, err = await asyncio.to_thread(dev.run, "dev", "--engine", "simulated", "-p", "go", "--max-tokens", "3")
    assert (code, out) == (0, expected_text(3))
    assert err == "llorch dev: real roles on this machine, for trying out; --allow-cpu is implied\n"
    assert not dev.file.exists(), "an answer needs no context"
    await dev.nothing_is_left()


@pytest.mark.slow
async def test_dev_with_a_prompt_and_several_nodes_says_which_of_them_answered(dev: Dev) -> None:
    words = ("dev", "--engine", "simulated", "--nodes", "2", "-p", "go", "--max-tokens", "3")
    code, out, err = await asyncio.to_thread(dev.run, *words)
    assert (code, out) == (0, expected_text(3))
    assert re.search(r"^answered by dev-[12], the least loaded of 2 that could take it$", err, re.MULTILINE), err
    await dev.nothing_is_left()


async def test_dev_whose_reader_leaves_is_141_and_leaves_nothing(dev: Dev) -> None:
    command = f"{sys.executable} -m llorch dev --engine simulated -p go | true; echo ${{PIPESTATUS[0]}}"
    code, out, err = await asyncio.to_thread(dev.run, command, program=("bash", "-c"))
    assert (code, out) == (0, "141\n")
    assert "Traceback" not in err
    await dev.nothing_is_left()


# ---------------------------------------------------------------- a cluster


async def test_dev_that_is_killed_leaves_nothing_behind(dev: Dev) -> None:
    running = await dev.ready("--engine", "simulated")
    assert len(dev.below) >= 4, "keeper, control, node and engine, whatever wraps them"
    assert dev.contexts.named["dev"].url == dev.url
    running.kill()
    await dev.nothing_is_left()


@pytest.mark.slow
async def test_dev_with_several_nodes_serves_whoever_follows_its_words(dev: Dev) -> None:
    running = await dev.ready("--nodes", "2", "--engine", "simulated", "--slots", "2")
    assert stat.S_IMODE(dev.file.stat().st_mode) == 0o600
    assert dev.contexts.current == "dev", "it was the first"
    token = dev.contexts.named["dev"].token
    assert token
    assert token not in running.text()

    async def llorch(*argv: str) -> tuple[int, str, str]:
        return await asyncio.to_thread(dev.run, *argv)

    assert await llorch("submit", "Hello", "--max-tokens", "4") == (0, expected_text(4), "")
    code, out, _ = await llorch("status", "--json")
    assert (code, [node["node_id"] for node in json.loads(out)["nodes"]]) == (0, ["dev-1", "dev-2"])
    assert [pool["slots_total"] for pool in json.loads(out)["pools"]] == [2, 2]
    exports = "\n".join(re.findall(r"  (export OPENAI_.*)\n", running.text()))
    exports = re.sub(r"\$\(.* context show", f"$({sys.executable} -m llorch context show", exports)
    ask = 'curl -sf "$OPENAI_BASE_URL/models" -H "Authorization: Bearer $OPENAI_API_KEY"'
    code, out, _ = await asyncio.to_thread(dev.run, f"{exports}\n{ask}", program=("bash", "-c"))
    assert (code, [model["id"] for model in json.loads(out)["data"]]) == (0, ["demo"])
    assert "task " not in running.text(), "without a terminal it says no more than it must"
    assert "starting" not in running.text()
    assert await running.stop(signal.SIGINT) == 0, "^C is how it is meant to end"
    await dev.nothing_is_left()
    assert dev.contexts.current is None


@pytest.mark.slow
async def test_on_a_terminal_it_says_what_it_waits_for_and_where_each_task_went(dev: Dev) -> None:
    leader, follower = os.openpty()
    running = subprocess.Popen(
        [sys.executable, "-m", "llorch", "dev", "--engine", "simulated", "--nodes", "2"],
        env=dev.env(), cwd=dev.llorch.folder, stdin=follower, stdout=follower, stderr=follower, start_new_session=True,
    )  # fmt: skip
    os.close(follower)
    os.set_blocking(leader, False)
    shown = ""

    def sees(pattern: str) -> re.Match[str] | None:
        nonlocal shown
        with contextlib.suppress(BlockingIOError, OSError):  # nothing new, or the other side is gone
            shown += os.read(leader, 65536).decode()
        return re.search(pattern, shown)

    try:
        found = await eventually(lambda: sees(r"ready: (http://\S+)[\s\S]*leaves nothing behind"), within_s=30.0)
        dev.url, dev.below = found.group(1), descendants(running.pid)
        lines = shown.replace("\r\n", "\n").split("\n")
        assert any(line.startswith("\r\x1b[Kstarting the control") for line in lines)
        assert any(re.search(r"\x1b\[Kready: http", line) for line in lines), "nothing is left of the line that waits"
        ran = await asyncio.to_thread(dev.run, "submit", "Hello", "--max-tokens", "3")
        assert ran[:2] == (0, expected_text(3))
        try:
            await eventually(lambda: sees(r"task [0-9a-f-]{36}  dev-[12]  done, 3 tokens"), what="its task is told")
        except AssertionError as error:
            raise AssertionError(shown) from error
        running.send_signal(signal.SIGINT)
        assert await asyncio.to_thread(running.wait, 20) == 0
    finally:
        if running.poll() is None:
            running.kill()
            running.wait()
        os.close(leader)
    await dev.nothing_is_left()


@pytest.mark.slow
async def test_a_node_that_dies_is_told_and_the_rest_goes_on_until_none_is_left(dev: Dev) -> None:
    running = await dev.ready("--nodes", "2", "--engine", "simulated")

    def node(number: int) -> int:
        for pid in dev.below:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if f"dev-{number}".encode() in words and b"node" in words:
                return pid
        raise AssertionError(f"no dev-{number}")

    pids = node(1), node(2)
    os.kill(pids[0], signal.SIGKILL)
    await eventually(lambda: "dev-1 has ended (signal 9); 1 of 2 nodes left" in running.text())
    assert running.process.poll() is None
    os.kill(pids[1], signal.SIGKILL)
    await eventually(lambda: running.process.poll() is not None)
    assert running.process.returncode == 1
    await dev.nothing_is_left()


@pytest.mark.slow
async def test_dev_whose_keeper_is_killed_cleans_up_itself(dev: Dev) -> None:
    running = await dev.ready("--engine", "simulated")
    keeper = dev.contexts.named["dev"].keeper
    assert keeper
    os.kill(int(keeper.partition(":")[0]), signal.SIGKILL)
    await eventually(lambda: running.process.poll() is not None, within_s=15.0)
    assert running.process.returncode == 1
    assert "error: the keeper has ended" in running.text()
    await dev.nothing_is_left()


@pytest.mark.slow
async def test_dev_takes_another_name_where_its_own_is_taken_and_changes_no_current_context(dev: Dev) -> None:
    with contexts.changing(dev.file) as known:
        known.named["dev"] = contexts.Context("http://127.0.0.1:1", token="somebody-elses")
        known.named["dev-2"] = contexts.Context("http://127.0.0.1:2", keeper="999999:1")  # its keeper was killed
        known.current = "dev"
    running = await dev.ready("--engine", "simulated")
    assert set(dev.contexts.named) == {"dev", "dev-2"}
    assert dev.contexts.named["dev-2"].url == dev.url
    assert dev.contexts.current == "dev"
    assert 'llorch submit --context dev-2 "Once' in running.text()
    assert await running.stop(signal.SIGTERM) == 0
    assert set(dev.contexts.named) == {"dev"}
    contexts.remove(dev.file, "dev")
    await dev.nothing_is_left()


# ---------------------------------------------------------------- a start that fails


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGHUP, signal.SIGKILL], ids=lambda ending: ending.name)
async def test_dev_that_is_ended_while_it_starts_leaves_nothing(dev: Dev, ending: signal.Signals) -> None:
    running = dev.start("--engine", "simulated")
    await eventually(lambda: len(descendants(running.pid)) >= 2, what="the keeper and a role")
    dev.below = descendants(running.pid)
    running.process.send_signal(ending)
    assert running.process.wait(20) == (-ending if ending is signal.SIGKILL else 130)
    await dev.nothing_is_left()


@pytest.mark.llama
async def test_a_wheel_that_is_broken_is_told_after_one_try_and_leaves_nothing(dev: Dev) -> None:
    broken = dev.llorch.folder / "broken" / "xllamacpp"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGILL)\n")
    command = f"PYTHONPATH={broken.parent}:$PYTHONPATH {sys.executable} -m llorch dev -p x"
    code, out, err = await asyncio.to_thread(dev.run, command, program=("bash", "-c"))
    assert (code, out) == (1, "")
    assert "error: xllamacpp is installed and can't be used\n" in err
    assert "illegal instruction" in err
    assert "--engine simulated" in err
    await dev.nothing_is_left()


async def test_what_can_be_known_before_anything_starts_is_told_then(dev: Dev) -> None:
    (dev.llorch.folder / "file").write_text("")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for words, said in (
            (f"dev --engine simulated --port {port}", "in use"),
            ("dev -m file:/no/such/model.gguf -p x", "/no/such/model.gguf"),
        ):
            code, out, err = await asyncio.to_thread(dev.run, *words.split())
            assert (code, out) == (2, ""), err
            assert err.startswith("error: "), "not a word before it"
            assert said in err
            assert "hint: " in err
    command = f"XDG_CONFIG_HOME={dev.llorch.folder}/file {sys.executable} -m llorch dev --engine simulated"
    code, _, err = await asyncio.to_thread(dev.run, command, program=("bash", "-c"))
    assert (code, "is not a directory" in err) == (2, True)
    await dev.nothing_is_left()


def test_words_that_are_wrong_are_told_before_anything_starts(dev: Dev) -> None:
    for argv in (
        ("--engine", "vllm"), ("--slots", "none"), ("--max-tokens", "5"),
    ):  # fmt: skip
        code, out, err = dev.run("dev", *argv)
        assert (code, out) == (2, ""), argv
        assert err.startswith("error: "), err
    assert list(dev.temporary.iterdir()) == []


def test_help_says_how_an_answer_is_bounded(dev: Dev) -> None:
    code, out, _ = dev.run("dev", "--help")
    assert code == 0
    assert re.search(r"--max-tokens N\s+End -p's answer after this many tokens\.", " ".join(out.split()))
