"""A conversation: who said what, as messages for a model and as text for a file. Pure, and its values never change."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum


@dataclass(frozen=True, slots=True)
class Turn:
    """`stopped`: the answer is the part that was said before it was stopped."""

    question: str
    answer: str
    model: str
    stopped: bool = False


@dataclass(frozen=True, slots=True)
class Conversation:
    system: str | None = None
    turns: tuple[Turn, ...] = ()

    def messages(self, question: str | None = None) -> list[dict[str, str]]:
        """Everything that was said, and `question` as what is asked now."""
        found = [_message("system", self.system)] if self.system is not None else []
        for turn in self.turns:
            found += [_message("user", turn.question), _message("assistant", turn.answer)]
        return found + ([_message("user", question)] if question is not None else [])

    def with_turn(self, turn: Turn) -> Conversation:
        return replace(self, turns=(*self.turns, turn))

    def without_last(self) -> Conversation:
        return replace(self, turns=self.turns[:-1])

    def cleared(self) -> Conversation:
        return replace(self, turns=())

    def with_system(self, system: str | None) -> Conversation:
        return replace(self, system=system)


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


# ---------------------------------------------------------------- as a file


class Form(StrEnum):
    MARKDOWN = "md"
    JSON = "json"
    TEXT = "txt"


def form_of(name: str) -> Form:
    """By the end of a file's name; plain text, if it says nothing."""
    _, _, end = name.lower().rpartition(".")
    return {"md": Form.MARKDOWN, "markdown": Form.MARKDOWN, "json": Form.JSON}.get(end, Form.TEXT)


def transcript(conversation: Conversation, form: Form) -> str:
    if form is Form.JSON:
        return json.dumps(conversation.messages(), ensure_ascii=False, indent=2) + "\n"
    head = "## {}\n\n{}\n" if form is Form.MARKDOWN else "{}:\n{}\n"
    return "\n".join(head.format(who, text.strip("\n")) for who, text in _parts(conversation))


def _parts(conversation: Conversation) -> Iterator[tuple[str, str]]:
    if conversation.system is not None:
        yield "System", conversation.system
    for turn in conversation.turns:
        yield "You", turn.question
        yield turn.model + (" (stopped)" if turn.stopped else ""), turn.answer
