"""The files of a chat: what was typed, kept for the next time, and conversations that a person saves.

Owns the history file (private: 0600 in a directory of 0700; bounded), and that a saved file is whole or not there. A
history that can't be kept is told once and costs nothing else.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path

from llorch import whole_file
from llorch.cli.output import Failure

HISTORY_ENTRIES = 1000  # kept; the file may grow to twice that before it is cut
HISTORY_BYTES = 1024 * 1024
ENTRY_BYTES = 64 * 1024  # a pasted book is no line that somebody looks for again


def state_home(env: Mapping[str, str]) -> Path:
    """$XDG_STATE_HOME/llorch. A relative path there means nothing, as the XDG specification says."""
    given = env.get("XDG_STATE_HOME", "")
    return (Path(given) if Path(given).is_absolute() else Path.home() / ".local" / "state") / "llorch"


def history_path(env: Mapping[str, str]) -> Path | None:
    """None where there is no home."""
    try:
        return state_home(env) / "chat_history"
    except RuntimeError:
        return None


class History:
    """What was typed, the oldest first, one JSON string a line: a line that a crash tore is skipped, no more."""

    def __init__(self, path: Path | None, warn: Callable[[str], None]) -> None:
        self._path = path
        self._warn = warn

    def load(self) -> list[str]:
        if self._path is None:
            return []
        try:
            with contextlib.closing(_Opened(self._path, os.O_RDONLY)) as opened:
                raw = opened.read_last(2 * HISTORY_BYTES)
        except FileNotFoundError:
            return []
        except OSError as error:
            self._give_up("read", error)
            return []
        entries = _entries(raw)
        kept = _newest(entries)
        if len(kept) < len(entries) and (len(entries) > 2 * HISTORY_ENTRIES or len(raw) > HISTORY_BYTES):
            self._store(kept)
        return kept

    def append(self, text: str) -> None:
        line = _line(text)
        if self._path is None or len(line) > ENTRY_BYTES:
            return
        try:
            _private(self._path.parent)
            with contextlib.closing(_Opened(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND)) as opened:
                size = opened.append(line)
        except OSError as error:
            self._give_up("written", error)
            return
        if size > 2 * HISTORY_BYTES:
            self.load()  # which cuts it

    def _store(self, entries: list[str]) -> None:
        assert self._path is not None
        try:
            whole_file.replace(self._path, b"".join(map(_line, entries)))
        except OSError as error:
            self._give_up("written", error)

    def _give_up(self, what: str, error: OSError) -> None:
        self._warn(f"the history in {self._path} can't be {what}: {error.strerror or type(error).__name__}")
        self._path = None


def _private(folder: Path) -> None:
    """Make `folder` one that nobody else looks into."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if stat.S_IMODE(folder.stat().st_mode) & 0o077:
        folder.chmod(0o700)


class _Opened:
    """A regular file of the user's own, by its descriptor: never a pipe that would hang, never readable by others."""

    def __init__(self, path: Path, flags: int) -> None:
        self._fd = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
        try:
            status = os.fstat(self._fd)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(0, "it is not a file")
            if status.st_uid != os.geteuid():
                raise OSError(0, "it is another user's")
            if stat.S_IMODE(status.st_mode) & 0o077:
                os.fchmod(self._fd, 0o600)
            self._size = status.st_size
        except BaseException:
            self.close()
            raise

    def read_last(self, most_bytes: int) -> bytes:
        os.lseek(self._fd, max(0, self._size - most_bytes), os.SEEK_SET)
        with os.fdopen(self._fd, "rb", closefd=False) as file:
            return file.read(most_bytes)

    def append(self, line: bytes) -> int:
        """In one call, so that two chats at a time do not mix their lines; the size after it."""
        if self._size and os.pread(self._fd, 1, self._size - 1) != b"\n":
            line = b"\n" + line  # the last one was torn
        if os.write(self._fd, line) < len(line):
            raise OSError(0, "the disk is full")
        return self._size + len(line)

    def close(self) -> None:
        os.close(self._fd)


def _line(text: str) -> bytes:
    return json.dumps(text).encode() + b"\n"


def _entries(raw: bytes) -> list[str]:
    found = []
    for line in raw.splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            text = json.loads(line)
            if isinstance(text, str):
                found.append(text)
    return found


def _newest(entries: list[str]) -> list[str]:
    """As many of the newest as the bounds allow, the oldest first."""
    kept: list[str] = []
    size = 0
    for text in reversed(entries[-HISTORY_ENTRIES:]):
        size += len(_line(text))
        if size > HISTORY_BYTES // 2:
            break
        kept.append(text)
    return kept[::-1]


# ---------------------------------------------------------------- saving


def save(name: str, text: str, *, force: bool) -> Path:
    """Write `text` to the file of that name, whole or not at all; where it is. Raises Failure for what can't be."""
    try:
        path = Path(name).expanduser()
        path = path.resolve() if path.is_symlink() else path  # a link stays one
        status = path.stat() if path.exists() else None
        if status is not None and not stat.S_ISREG(status.st_mode):
            raise Failure(f"{name} is not a file", hint="give the name of a file")
        if status is not None and not force:
            raise _exists(name)
        mode = stat.S_IMODE(status.st_mode) if status is not None else None
        _put(path, text.encode(), mode, only_new=not force)
    except FileExistsError:  # since we looked
        raise _exists(name) from None
    except (OSError, RuntimeError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "there is no such place"
        raise Failure(f"{name} can't be written: {why}", hint="nothing is lost; give another name") from None
    return path


def _exists(name: str) -> Failure:
    return Failure(f"{name} exists", hint=f"/save! {name} replaces it")


def _put(path: Path, content: bytes, mode: int | None, *, only_new: bool) -> None:
    """Where a file system knows no links, looking first is the best there is."""
    try:
        whole_file.replace(path, content, mode=mode, only_new=only_new)
    except FileExistsError:
        raise
    except OSError:
        if not only_new:
            raise
        if path.exists():
            raise FileExistsError from None
        whole_file.replace(path, content, mode=mode)
