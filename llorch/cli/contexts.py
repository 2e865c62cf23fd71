"""Contexts: names for controls, each with its URL, its token and its authority.

Owns `contexts.json` under the user's configuration: private (0600 in a 0700 directory), replaced whole, changed under a
lock, so that two commands at a time lose nothing. A context's token is meant for that context's URL and for no other.
Never prints a token. Light to import: the keeper of `llorch dev` uses it too.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llorch import whole_file
from llorch.errors import ConfigError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
MAX_FILE_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Context:
    """`keeper` is set for a context that a running `llorch dev` made: "pid:start" of the process that removes it."""

    url: str
    token: str | None = field(default=None, repr=False)
    token_file: str | None = None
    tls_ca: str | None = None
    ca_pin: str | None = None  # `tls_ca` is then a file of ours, and the only authority
    keeper: str | None = None


@dataclass(slots=True)
class Contexts:
    named: dict[str, Context]
    current: str | None = None

    def get(self, name: str) -> Context:
        if name not in self.named:
            known = ", ".join(sorted(self.named)) or "there is none"
            raise ConfigError(f"no context {name!r}", hint=f"`llorch context ls` lists them: {known}")
        return self.named[name]


def authority_path(contexts_file: Path, name: str) -> Path:
    """Where the authority of a context with a pin is kept."""
    return contexts_file.parent / "authorities" / f"{name}.pem"


def config_home(env: Mapping[str, str]) -> Path:
    """Where the user's configuration is: $XDG_CONFIG_HOME/llorch. A relative path there means nothing, as the XDG
    specification says.
    """
    given = env.get("XDG_CONFIG_HOME", "")
    return (Path(given) if Path(given).is_absolute() else Path.home() / ".config") / "llorch"


def contexts_path(env: Mapping[str, str]) -> Path:
    return config_home(env) / "contexts.json"


def load(path: Path) -> Contexts:
    """What is there; nothing, if there is no file. Raises ConfigError for one that can't be read."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES)
    except FileNotFoundError:
        return Contexts({})
    except OSError as error:
        raise ConfigError(f"the contexts in {path} can't be read: {error.strerror}") from None
    try:
        stored = json.loads(raw)
        named = {str(name): _context(entry) for name, entry in stored["contexts"].items()}
        current = stored.get("current") if stored.get("current") in named else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ConfigError(
            f"{path} is not a file of contexts", hint="move it away; `llorch context add` makes a new one"
        ) from None
    return Contexts(named, current)


def _context(entry: Mapping[str, Any]) -> Context:
    known = {name: entry[name] for name in Context.__dataclass_fields__ if entry.get(name) is not None}
    if not all(isinstance(value, str) for value in known.values()):
        raise ValueError("a field that is no text")
    return Context(**known)


@contextlib.contextmanager
def changing(path: Path) -> Iterator[Contexts]:
    """The contexts, to be changed: written back when the block ends without an exception."""
    import fcntl

    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise ConfigError(f"contexts can't be kept in {path.parent}: {error.strerror}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of the directory: it needs no file of its own that would stay behind
        contexts = load(path)
        yield contexts
        if contexts.named:
            _store(path, contexts)
        else:
            _remove(path)
    finally:
        os.close(lock)


def _store(path: Path, contexts: Contexts) -> None:
    stored = {
        "current": contexts.current if contexts.current in contexts.named else None,
        "contexts": {
            name: {key: value for key, value in asdict(context).items() if value is not None}
            for name, context in sorted(contexts.named.items())
        },
    }
    try:
        whole_file.replace(path, json.dumps(stored, indent=2).encode() + b"\n")
    except OSError as error:
        raise ConfigError(f"the contexts in {path} can't be written: {error.strerror}") from None


def _remove(path: Path) -> None:
    """No file where there was none before the first context."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"the contexts in {path} can't be removed: {error.strerror}") from None


def remove(path: Path, name: str, *, keeper: str | None = None) -> bool:
    """Forget a context; with `keeper`, only if it is still that keeper's. True if there was one."""
    with changing(path) as contexts:
        found = contexts.named.get(name)
        if found is None or (keeper is not None and found.keeper != keeper):
            return False
        if found.ca_pin is not None:
            with contextlib.suppress(OSError):
                authority_path(path, name).unlink()
        del contexts.named[name]
        if contexts.current == name:
            contexts.current = None
        return True
