"""What `llorch dev` says: while it starts, when it serves, and why it can't.

Owns the words and their measure (a screen of 80 by 24), and what is to be made of looks at the nodes and of logs. Pure:
what there is comes in, text goes out. No token is ever among it: a terminal's scrollback is a log.
"""

from __future__ import annotations

import re
import shlex
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llorch.cli.output import table
from llorch.client.text import one_line

COLUMNS = 80
SHOWN_NODES = 5  # beside the rest of the welcome, on one screen
SHOWN_LINES = 15  # of a log
SHOWN_TASKS = 5  # of those that ended between two looks
SIMULATED = "--engine simulated needs no model and no llama.cpp"
STARTING = "llorch dev: real roles on this machine, for trying out; --allow-cpu is implied\n"

_MEMORY = re.compile(r"insufficient memory|failed to allocate|out of memory|cannot allocate memory|bad_alloc", re.I)
_LIBRARY = re.compile(r"(lib[\w.+-]+\.so[\w.]*): cannot open shared object file")
_PACKAGES = {"libgomp": "libgomp1", "libstdc++": "libstdc++6", "libvulkan": "libvulkan1"}  # Debian's and Ubuntu's
_ENGINE_ERROR = re.compile(r"^[\d.]+ E +")  # llama.cpp's own lines of errors: time, level
_NO_REASON = "the lines above say why"


# ---------------------------------------------------------------- while it starts


def progress(text: str, elapsed_s: float, columns: int) -> str:
    """One line that fits, so that it can be written over."""
    return f"{text} {elapsed_s:.0f} s"[: max(0, columns - 1)]


@dataclass(frozen=True, slots=True)
class Look:
    """What one look at the nodes told. `ended`: nodes whose engine has just ended, each with what it said."""

    text: str
    ready: bool
    model: str
    failed: tuple[str, str] | None
    ended: tuple[tuple[str, str], ...]


@dataclass(slots=True)
class Start:
    """How far the start is, look by look. An engine that ended twice does not start: a third try tells nothing new."""

    names: Sequence[str]
    _down: set[str] = field(default_factory=set)
    _ends: dict[str, int] = field(default_factory=dict)

    def look(self, nodes: Sequence[Mapping[str, Any]]) -> Look:
        """`nodes` as the control lists them."""
        pools = {str(node.get("node_id")): list(node.get("pools") or []) for node in nodes}
        bound = {name: pool for name, each in pools.items() for pool in each if pool.get("bound") and pool.get("model")}
        ended, failed = [], None
        for name, each in pools.items():
            said = next((str(pool.get("last_error") or "") for pool in each if _is_down(pool)), None)
            if said is None:
                self._down.discard(name)
            elif name not in self._down:
                self._down.add(name)
                self._ends[name] = self._ends.get(name, 0) + 1
                ended.append((name, said))
            if said is not None and (self._ends[name] > 1 or any(pool.get("state") == "failed" for pool in each)):
                failed = failed or (name, said)
        total = len(self.names)
        if len(pools) < total:
            text = "starting the node" if total == 1 else f"starting the nodes: {len(pools)} of {total} joined"
        else:
            text = "loading the model" if total == 1 else f"loading the model: {len(bound)} of {total} nodes ready"
        told = (_progress(pool) for each in pools.values() for pool in each)
        text = next((progress for progress in told if progress is not None), text)
        model = str(next(iter(bound.values()))["model"]) if bound else ""
        return Look(text, bool(bound) and len(bound) == total, model, failed, tuple(ended))


def _progress(pool: Mapping[str, Any]) -> str | None:
    """How far a start is that takes its time: a model is fetched first, say."""
    operation = pool.get("operation")
    if not isinstance(operation, Mapping) or operation.get("state") != "running":
        return None
    message = operation.get("message")
    return str(message) if message else None


def _is_down(pool: Mapping[str, Any]) -> bool:
    """Its engine has ended, as it says of itself: what it said before a probe's answer is no end."""
    states = [replica.get("state") for replica in pool.get("replicas") or [] if isinstance(replica, Mapping)]
    return "exited" in states or "failed" in states


# ---------------------------------------------------------------- when it serves


@dataclass(frozen=True, slots=True)
class Serving:
    """`program`: what a person types for llorch. `context_file`: where the token is. `current`: without --context."""

    url: str
    model: str
    nodes: Sequence[Mapping[str, Any]]
    context: str
    current: bool
    context_file: str
    program: str = "llorch"
    tells_tasks: bool = False


def welcome(now: Serving) -> str:
    """What there is and what to type next, on one screen."""
    flag = "" if now.current else f" --context {now.context}"
    several = len(now.nodes) > 1
    tries = [
        (f"{now.program} chat{flag}", "talk with the model"),
        (f'{now.program} submit{flag} "Once upon a time"', "one answer, as it comes"),
        (f"{now.program} explain{flag} --dry-run", "where a task would go, and why")
        if several
        else (f"{now.program} status{flag}", "nodes, pools, free slots"),
    ]
    told = "Each task is told here when it ends. " if now.tells_tasks else ""
    return (
        f"ready: {now.url}  model {one_line(now.model)}, {len(now.nodes)} node{'s' if several else ''}\n"
        + (f"\n{_node_table(now)}" if several else "")
        + "\nTry next, in another terminal:\n"
        + _columns(tries)
        + "\nOpenAI clients, there too:\n"
        + f"  export OPENAI_BASE_URL={now.url}/v1\n"
        + f'  export OPENAI_API_KEY="$({now.program} context show {now.context} --token)"\n'
        + f"\nThe token is made for this run and kept, until it ends, in context {now.context}:\n"
        + f"  {now.context_file} (only you can read it)\n"
        + f"{told}^C ends it and leaves nothing behind.\n"
    )


def _node_table(now: Serving) -> str:
    rows = [
        (node.get("node_id"), node.get("state"), f"{node.get('slots_free', 0)}/{node.get('slots_total', 0)}")
        for node in now.nodes
    ]
    shown = rows if len(rows) <= SHOWN_NODES else rows[: SHOWN_NODES - 1]
    lines = [f"  {line}" for line in table(("node", "state", "slots free"), shown).splitlines(keepends=True)]
    if len(shown) < len(rows):
        lines.append(f"  and {len(rows) - len(shown)} more: {now.program} node ls\n")
    return "".join(lines)


def _columns(rows: Sequence[tuple[str, str]]) -> str:
    """Commands with what they are for, unless that would not fit."""
    width = max(len(command) for command, _ in rows)
    fits = all(2 + width + 3 + len(use) <= COLUMNS for _, use in rows)
    return "".join(f"  {command:<{width}}   {use}\n" if fits else f"  {command}\n" for command, use in rows)


def ended_tasks(lines: Sequence[str]) -> list[str]:
    """One line for each task that ended, by the control's log; a crowd is counted."""
    told = [words for line in lines if (words := _ended_task(line)) is not None]
    more = len(told) - SHOWN_TASKS
    return told if more <= 0 else [*told[:SHOWN_TASKS], f"and {more} more task{'s' if more > 1 else ''}"]


def _ended_task(line: str) -> str | None:
    words = line.split(" ")
    if words[2:3] != ["task.ended"]:
        return None
    fields = dict(word.partition("=")[::2] for word in words[3:])
    outcome = fields.get("code") or fields.get("outcome") or "ended"
    tokens = f", {fields['tokens_out']} tokens" if "tokens_out" in fields and "code" not in fields else ""
    return f"task {fields.get('task_id')}  {fields.get('node_id') or 'no node'}  {outcome}{tokens}"


def answered(node: str, total: int, reason: str | None) -> str:
    """After the one answer of several nodes: which of them gave it. `reason` is the control's."""
    return f"answered by {one_line(node)}, {one_line(reason) if reason else f'one of {total} nodes'}\n"


# ---------------------------------------------------------------- why it can't


@dataclass(frozen=True, slots=True)
class Fault:
    """What a person is told: the lines error, why, hint."""

    message: str
    why: str | None = None
    hint: str | None = None


def exit_words(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"code {code}"


def role_fault(name: str, code: int | None, log: str, why: str | None = None) -> Fault:
    """Why a role did not get ready. Its own error, if it told one; else the end of its log. `code` None: it runs."""
    what = f"{name} did not get ready in time" if code is None else f"{name} ended with {exit_words(code)}"
    lines = log.splitlines()
    errors = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    if code is None or not errors:
        return Fault(what, why or "\n".join(lines[-SHOWN_LINES:]) or None)
    hints = [line.removeprefix("hint: ") for line in lines[errors[-1] + 1 :] if line.startswith("hint: ")]
    rest = [line.removeprefix("why: ") for line in lines[errors[-1] + 1 :] if not line.startswith("hint: ")]
    message = lines[errors[-1]].removeprefix("error: ")
    return Fault(f"{name}: {message}", "\n".join(rest[:SHOWN_LINES]) or None, hints[-1] if hints else None)


def memory_fault(name: str, log: str) -> Fault | None:
    """If the engine's log tells that memory was short; that will not change by another start."""
    told = (line for line in log.splitlines() if _ENGINE_ERROR.match(line) or "bad_alloc" in line)  # not its warnings
    found = next((line for line in told if _MEMORY.search(line)), None)
    if found is None:
        return None
    return Fault(
        f"the engine of {name} found too little memory",
        one_line(_ENGINE_ERROR.sub("", found)),
        "a smaller --ctx or --slots (memory grows with slots x ctx), or a smaller model",
    )


def engine_fault(name: str, said: str, log: str) -> Fault:
    """An engine that does not start, in its own words. `said` is what its node reports."""
    why = said
    if _NO_REASON in said:
        first = next((line for line in log.splitlines() if _ENGINE_ERROR.match(line)), None)
        why = one_line(_ENGINE_ERROR.sub("", first)) if first else said
    hint = f"-v shows what the roles log; {SIMULATED}"
    if "SIGKILL" in said:
        hint = "if the kernel ended it for want of memory: a smaller model, --ctx or --slots"
    return Fault(f"the engine of {name} does not start", why or None, hint)


def wheel_fault(code: int, said: str, install: str) -> Fault | None:
    """What is wrong with xllamacpp, by how `import xllamacpp` ended: exit code, last line. None: nothing is.

    `install` is the command that installs it again.
    """
    if code == 0:
        return None
    last = one_line(said.strip().rpartition("\n")[2])
    library = _LIBRARY.search(said)
    message = "xllamacpp is installed and can't be used"
    if library is not None:
        package = next((name for start, name in _PACKAGES.items() if library[1].startswith(start)), None)
        mend = f"apt install {package} (or what has it on your system)" if package else f"install what has {library[1]}"
        return Fault(message, f"the library {library[1]} is not on this machine", f"{mend}; {SIMULATED}")
    if code == -signal.SIGILL:
        why = "this CPU lacks instructions that it was built with (illegal instruction)"
        return Fault(message, why, f"build it on this machine, or use another machine; {SIMULATED}")
    if code < 0:
        last = f"importing it ends Python with {_signal_name(-code)}"
    return Fault(
        message,
        f"{last or exit_words(code)}: it is damaged, or for another platform or Python",
        f"{install}; {SIMULATED}",
    )


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def install_words(python: str, requirement: str, *, has_pip: bool, again: bool = False) -> str:
    """The command that adds a package to this very installation, however llorch itself came into it."""
    python = shlex.quote(python)
    if has_pip:
        return f"{python} -m pip install {'--force-reinstall ' * again}'{requirement}'"
    return f"uv pip install {'--reinstall ' * again}--python {python} '{requirement}'"


def program_words(typed: str, *, found: bool, python: str, home: str) -> str:
    """How a person calls llorch from any directory. `typed`: the program as an absolute path; `found`: the shell finds
    it by its name alone.
    """
    if typed.endswith(".py"):
        return f"{short_path(python, home)} -m llorch"
    return "llorch" if found else short_path(typed, home)


def short_path(path: str, home: str) -> str:
    """A path for a shell, with ~ where that is as good."""
    quoted = shlex.quote(path)
    under = f"{home.rstrip('/')}/"
    return f"~/{path.removeprefix(under)}" if quoted == path and path.startswith(under) else quoted
