"""What the simulated engine was told to do, and what a request asks of it. Pure: flags and bodies in, values out."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

_LAST_TOKEN = re.compile(r"(?:^|\s)t(\d+) $")
_MARKER = re.compile(r"(?:^|\s)#([\w-]{1,64})(?:!(die|hang|truncate|garbage|deaf)@(\d{1,6}))?(?:\s|$)", re.ASCII)


class Fault(StrEnum):
    DIE = "die"
    HANG = "hang"
    TRUNCATE = "truncate"
    GARBAGE = "garbage"
    DEAF = "deaf"  # the whole engine: it takes connections, and nothing moves or is answered any more


class FaultDueError(Exception):
    """A request has come to where the script has a fault."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault)
        self.fault = fault


@dataclass(frozen=True, slots=True)
class Script:
    """What the flags ask for. `faults` says after how many tokens of a request each comes, in place of the next token:
    a request that asks for no more is left alone, so that a pool whose engine dies after 3 tokens can become ready.
    `obey`: a request may name a fault of its own.
    """

    alias: str
    slots: int
    ctx: int
    ttft_ms: float
    delay_ms: float
    tokens: int
    load_s: float
    status: int | None
    faults: Mapping[Fault, int]
    obey: bool

    def check(self, sent: int, ask: Ask) -> None:
        for fault, after in self.faults.items():
            if sent >= after:
                raise FaultDueError(fault)
        if self.obey and ask.fault is not None and sent >= ask.fault_after:
            raise FaultDueError(ask.fault)


@dataclass(frozen=True, slots=True)
class Ask:
    """One generation: where to begin, how far to go, how it ends.

    A word `#NAME` or `#NAME!FAULT@N` in the prompt is a test's own: `marker` names the request in the journal, and an
    engine with `--obey` has that fault after N tokens of it.
    """

    first: int
    count: int
    finish: str  # "stop" or "length"
    prompt_tokens: int
    marker: str | None = None
    fault: Fault | None = None
    fault_after: int = 0


def text_of(content: object) -> str:
    """A message's text: a string, or the text parts of a list."""
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def ask_of(body: dict[str, Any], script: Script) -> Ask:
    prompt = body.get("prompt", body.get("input"))
    last = prompt[0] if isinstance(prompt, list) and prompt else prompt
    words = text_of(last)
    messages = body.get("messages")
    if isinstance(messages, list):
        said = [message for message in messages if isinstance(message, dict)]
        words = text_of(said[-1].get("content")) if said and said[-1].get("role") == "assistant" else ""
        last = " ".join(text_of(message.get("content")) for message in said)
    match = _LAST_TOKEN.search(words)
    bound = next(
        (
            body[name]
            for name in ("max_tokens", "max_completion_tokens", "n_predict", "max_output_tokens")
            if isinstance(body.get(name), int) and body[name] >= 0
        ),
        None,
    )
    if bound == 0:
        bound = 1  # as llama.cpp does
    count = script.tokens if bound is None else min(bound, script.tokens)
    finish = "length" if bound is not None and bound <= script.tokens else "stop"
    said_all = text_of(last)
    ask = Ask(int(match.group(1)) + 1 if match else 0, count, finish, max(1, len(said_all.split())))
    marked = _MARKER.search(said_all)
    if marked is None:
        return ask
    name, fault, after = marked.groups()
    return replace(ask, marker=name, fault=Fault(fault) if fault else None, fault_after=int(after or 0))


# ---------------------------------------------------------------- the flags


def parse(argv: list[str]) -> tuple[Script, argparse.Namespace]:
    parser = argparse.ArgumentParser(prog="simulated_server", allow_abbrev=False)
    parser.add_argument("--host", default="127.0.0.1", choices=("127.0.0.1",))
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--alias", default="simulated")
    parser.add_argument("--model", help="accepted, not used")
    parser.add_argument("--parallel", type=_at_least(1), default=4)
    parser.add_argument("--ctx-size", type=_at_least(1), default=16_384)
    parser.add_argument("--api-key-file")
    parser.add_argument("--ttft-ms", type=float, default=0)
    parser.add_argument("--delay-ms", type=float, default=0)
    parser.add_argument("--tokens", type=_at_least(0), default=16)
    parser.add_argument("--load-s", type=float, default=0)
    parser.add_argument("--status", type=_at_least(400))
    for fault in Fault:
        parser.add_argument(f"--{fault}-after", type=_at_least(0), metavar="TOKENS")
    parser.add_argument("--obey", action="store_true", help="have the faults that prompts name; for tests")
    parser.add_argument("--journal", metavar="FILE", help="a line for what becomes of each request; for tests")
    parser.add_argument("--ignore-sigterm", action="store_true")
    parser.add_argument("--metrics", action="store_true", help="accepted: they are always there")
    given = parser.parse_args(argv)
    script = Script(
        alias=given.alias,
        slots=given.parallel,
        ctx=given.ctx_size,
        ttft_ms=given.ttft_ms,
        delay_ms=given.delay_ms,
        tokens=given.tokens,
        load_s=given.load_s,
        status=given.status,
        faults={fault: after for fault in Fault if (after := getattr(given, f"{fault}_after")) is not None},
        obey=given.obey,
    )
    return script, given


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is less than {least}")
        return value

    return number
