"""YAML in which every value knows its line, so that a fault can say where it is.

Owns the small part of YAML that a settings file may use: one document, mappings, lists and plain values. Refuses what
could surprise or cost: anchors and aliases (a bomb in ten lines), tags, keys given twice. Keeps a scalar as the text
that was written, so `10:30` is not 630 and `no` is not False before a setting says what it wants. Never opens a file
and never quotes a value, for it may be a secret.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from yaml.events import Event, MappingStartEvent, NodeEvent, ScalarEvent, SequenceStartEvent

MAX_CHARS = 256 * 1024  # the parser is slow; settings for hundreds of pools fit in a tenth of this
MAX_DEPTH = 8  # pools are a list of mappings of mappings: four
_NULLS = frozenset({"", "~", "null", "Null", "NULL"})


@dataclass(frozen=True, slots=True)
class Scalar:
    """One value as written. `null` is a plain empty value, `~` or `null`; `refused` has been reported already."""

    line: int
    text: str = field(repr=False)
    null: bool = False
    refused: bool = False


@dataclass(frozen=True, slots=True)
class Items:
    line: int
    items: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Entry:
    """One `key: value`, at the key's own line."""

    line: int
    key: str
    value: Node


@dataclass(frozen=True, slots=True)
class Table:
    line: int
    entries: tuple[Entry, ...]


Node: TypeAlias = Scalar | Items | Table


@dataclass(frozen=True, slots=True)
class YamlFault:
    line: int
    message: str
    hint: str | None = None
    key: str = ""


def read_yaml(text: str) -> tuple[Table, list[YamlFault]]:
    """The document's top-level table, and all that is wrong with it. Only a syntax error ends the reading."""
    import yaml  # 22 ms, and `llorch --help` reads no file

    empty = Table(1, ())
    if len(text) > MAX_CHARS:
        return empty, [YamlFault(1, f"the file is longer than {MAX_CHARS // 1024} KiB")]
    builder = _Builder()
    try:
        return builder.document(yaml.parse(text, Loader=yaml.SafeLoader)) or empty, builder.faults
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        fault = YamlFault(line, "a character that YAML does not allow", "save the file as plain UTF-8 text")
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        fault = YamlFault(mark.line + 1 if mark else 1, f"not valid YAML: {_quiet(error.problem)}", _syntax_hint(error))
    except _Refused as error:
        fault = error.fault
    return empty, [*builder.faults, fault]


def _quiet(problem: str | None) -> str:
    """The parser's own words without longer pieces of the file, which may be part of a secret."""
    return re.sub(r"'[^'\s]{9,}'", "...", problem or "syntax error")


def _syntax_hint(error: Exception) -> str | None:
    if "\\t" in str(getattr(error, "problem", "")):
        return "indent with spaces; YAML does not allow tabs there"
    return "quote values with special characters: key: 'value'"


def _line(event: Event) -> int:
    return event.start_mark.line + 1 if event.start_mark else 1


class _Refused(Exception):
    """A structure that is not read any further."""

    def __init__(self, fault: YamlFault) -> None:
        super().__init__(fault.message)
        self.fault = fault


class _Builder:
    """Events in, nodes out."""

    def __init__(self) -> None:
        self.faults: list[YamlFault] = []

    def document(self, events: Iterator[Event]) -> Table | None:
        from yaml import events as ev

        root: Node | None = None
        documents = 0
        for event in events:
            if isinstance(event, ev.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise _Refused(YamlFault(_line(event), "a second document in one file", "remove ---"))
            elif isinstance(event, ev.NodeEvent):
                root = self.node(event, events, 0)
        if root is None or (isinstance(root, Scalar) and root.null):
            return None
        if not isinstance(root, Table):
            raise _Refused(YamlFault(root.line, "expected `key: value` lines"))
        return root

    def node(self, event: NodeEvent, events: Iterator[Event], depth: int) -> Node:
        from yaml import events as ev

        line = _line(event)
        if depth > MAX_DEPTH:
            raise _Refused(YamlFault(line, f"nested deeper than {MAX_DEPTH} levels"))
        if isinstance(event, ev.AliasEvent):
            self.faults.append(YamlFault(line, "aliases (*name) are not allowed", "write the value out, or quote it"))
            return Scalar(line, "", refused=True)
        if event.anchor is not None:
            self.faults.append(YamlFault(line, "anchors (&name) are not allowed", "write the value out, or quote it"))
        if getattr(event, "tag", None) is not None:
            self.faults.append(YamlFault(line, "tags (!name) are not allowed", "write the value alone, or quote it"))
        if isinstance(event, ev.SequenceStartEvent):
            return self.sequence(event, events, depth)
        if isinstance(event, ev.MappingStartEvent):
            return self.mapping(event, events, depth)
        assert isinstance(event, ev.ScalarEvent)
        return self.scalar(event)

    def scalar(self, event: ScalarEvent) -> Scalar:
        return Scalar(_line(event), event.value, null=event.style is None and event.value in _NULLS)

    def sequence(self, start: SequenceStartEvent, events: Iterator[Event], depth: int) -> Items:
        from yaml import events as ev

        items: list[Node] = []
        while not isinstance(event := next(events), ev.SequenceEndEvent):
            assert isinstance(event, ev.NodeEvent)
            items.append(self.node(event, events, depth + 1))
        return Items(_line(start), tuple(items))

    def mapping(self, start: MappingStartEvent, events: Iterator[Event], depth: int) -> Table:
        from yaml import events as ev

        entries: dict[str, Entry] = {}
        while not isinstance(event := next(events), ev.MappingEndEvent):
            assert isinstance(event, ev.NodeEvent)
            key = self.node(event, events, depth + 1)
            value_event = next(events)
            assert isinstance(value_event, ev.NodeEvent)
            value = self.node(value_event, events, depth + 1)
            if not isinstance(key, Scalar):
                self.faults.append(YamlFault(key.line, "a key must be a plain word"))
            elif key.text in entries:
                first = entries[key.text].line
                self.faults.append(YamlFault(key.line, f"given twice; first at line {first}", None, key.text))
            else:
                entries[key.text] = Entry(key.line, key.text, value)
        return Table(_line(start), tuple(entries.values()))
