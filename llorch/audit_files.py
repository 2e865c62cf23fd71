"""The audit log on disk: the folder, the keys, and one chain's files, written at their end and nowhere else.

    <data>/audit/mac.key, signing.key     made at the first start; without them a log can't be gone on with
    <data>/audit/audit.jsonl              the file that is written
    <data>/audit/audit-00000001.jsonl ... those before it, the oldest first
    <data>/audit/2/...                    the chain of a second control on the same data directory, and so on

Owns permissions, the lock that gives each control a chain of its own, what a crash leaves behind, and rotation. Never
changes or drops a line: what can't be gone on with is refused, in words.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import secrets
import stat
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from llorch import whole_file
from llorch.audit_chain import KEY_BYTES, MAX_LINE_BYTES, Chain, Position, Verifier
from llorch.errors import ConfigError
from llorch.logs import Log

FOLDER, CURRENT, LOCK = "audit", "audit.jsonl", "lock"
MAC_KEY, SIGNING_KEY = "mac.key", "signing.key"
MAX_KEY_FILE_BYTES = 4 * 1024
MAX_CONTROLS = 16  # on one data directory at a time; each has a chain
TAIL_BYTES = 512 * 1024  # read first to find the last checkpoint; 1,000 records are 350 KB
_ROTATED = re.compile(r"audit-([0-9]{8})\.jsonl")
_FIRST = re.compile(rb'\{"time":"[^"]*","seq":([0-9]{1,16}),"event":"checkpoint","chain":"([0-9a-f]{32})"')
_OTHERS = stat.S_IRWXG | stat.S_IRWXO

log = Log("audit")


class AuditBroken(ConfigError):
    """A log that can't be gone on with: its end is not what was written."""


class Keys:
    """The keys of all chains in one audit folder."""

    def __init__(self, mac: bytes, signer: Ed25519PrivateKey) -> None:
        self.mac = mac
        self.signer = signer

    @property
    def public(self) -> Ed25519PublicKey:
        return self.signer.public_key()

    @classmethod
    def read(cls, folder: Path) -> Keys:
        """Raises ConfigError if they are missing, can be read by others, or are no keys; FileNotFoundError never."""
        try:
            mac = bytes.fromhex(_read_private(folder / MAC_KEY).decode("ascii").strip())
            signer = serialization.load_pem_private_key(_read_private(folder / SIGNING_KEY), password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            raise ConfigError(f"the keys of the audit log in {folder} are damaged", hint=_RESTORE) from None
        if len(mac) != KEY_BYTES or not isinstance(signer, Ed25519PrivateKey):
            raise ConfigError(f"the keys of the audit log in {folder} are damaged", hint=_RESTORE)
        return cls(mac, signer)

    @classmethod
    def read_or_make(cls, folder: Path) -> Keys:
        """Those there are; new ones only where there is no log yet. Two that come at once get the same."""
        begun = next(_chain_folders(folder), None) is not None  # before the keys, which are made before any log
        for name, made in ((MAC_KEY, _new_mac_key), (SIGNING_KEY, _new_signing_key)):
            if not (folder / name).exists():
                if begun:
                    raise ConfigError(f"{folder / name} is missing, and there is an audit log", hint=_RESTORE)
                _make_private(folder / name, made())
        return cls.read(folder)


_RESTORE = "restore them from a backup; or move the folder away, and a new log begins"


def _new_mac_key() -> bytes:
    return secrets.token_hex(KEY_BYTES).encode() + b"\n"


def _new_signing_key() -> bytes:
    return Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _read_private(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if mode & _OTHERS:
                raise ConfigError(f"{path} can be read or changed by others", hint=f"chmod 600 {path}")
            return file.read(MAX_KEY_FILE_BYTES)
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror}") from None


def _make_private(path: Path, content: bytes) -> None:
    """Whole or not at all, and never over another's."""
    try:
        with contextlib.suppress(FileExistsError):
            whole_file.replace(path, content, only_new=True)
        whole_file.sync_directory(path.parent)
    except OSError as error:
        raise ConfigError(f"{path} can't be made: {error.strerror}", hint="give another --data-dir") from None


def make_folder(path: Path, *, others_may_change: bool = False) -> None:
    """0700 if it is new. Raises ConfigError if others may change what is in it, unless that is no matter."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        mode = path.stat().st_mode
    except OSError as error:
        raise ConfigError(
            f"the directory {path} can't be used: {error.strerror}", hint="give another --data-dir"
        ) from None
    if mode & (stat.S_IWGRP | stat.S_IWOTH) and not others_may_change:
        raise ConfigError(f"others may change what is in {path}", hint=f"chmod 700 {path}")


# ---------------------------------------------------------------- reading


def chain_files(folder: Path) -> list[Path]:
    """The files of the chain in one folder, in order."""
    rotated = sorted(path for path in folder.glob("audit-*.jsonl") if _ROTATED.fullmatch(path.name))
    current = folder / CURRENT
    return [*rotated, current] if current.exists() else rotated


def _chain_folders(root: Path) -> Iterator[Path]:
    for number in range(1, MAX_CONTROLS + 1):
        folder = root if number == 1 else root / str(number)
        if chain_files(folder):
            yield folder


def chains(root: Path) -> list[list[Path]]:
    """Every chain of an audit folder, as its files in order."""
    return [chain_files(folder) for folder in _chain_folders(root)]


def read_lines(path: Path) -> Iterator[bytes]:
    """The lines of a file with their newlines. One without end comes in pieces, which are no lines of a log."""
    with path.open("rb") as file:
        while line := file.readline(MAX_LINE_BYTES):
            yield line


def first_seq(path: Path) -> int:
    """The number of a file's first record. Raises OSError if it has none: it is not one of ours."""
    found = first_checkpoint(path)
    if found is None:
        raise OSError(errno.EINVAL, "it does not begin with a checkpoint", str(path))
    return found[1]


def first_checkpoint(path: Path) -> tuple[str, int] | None:
    """The chain and the number that a file's first line names, as it says; nothing of it is checked."""
    found = _FIRST.match(next(read_lines(path), b""))
    return None if found is None else (found[2].decode(), int(found[1]))


# ---------------------------------------------------------------- one chain, to write to


class ChainFiles:
    """The files of one chain, locked. Every method but `close` and `undo` may raise OSError; what was appended is on
    disk after `sync`.
    """

    def __init__(self, folder: Path, lock: int) -> None:
        self.folder = folder
        self._lock = lock
        self._fd = -1
        self._length = 0
        self._dirty = False  # the file may be longer than what was appended

    @classmethod
    def take(cls, root: Path) -> ChainFiles:
        """The first chain that no other process writes. Raises ConfigError if there is none."""
        for number in range(1, MAX_CONTROLS + 1):
            folder = root if number == 1 else root / str(number)
            make_folder(folder)
            try:
                lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
            except OSError as error:
                raise ConfigError(f"{folder / LOCK} can't be used: {error.strerror}") from None
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(lock)
                continue
            except OSError as error:
                os.close(lock)
                raise ConfigError(f"{folder / LOCK} can't be locked: {error.strerror}") from None
            return cls(folder, lock)
        raise ConfigError(f"{MAX_CONTROLS} other controls use {root.parent}", hint="give another --data-dir")

    @property
    def length(self) -> int:
        """Bytes of the file that is written; 0: its first line is due."""
        return self._length

    def resume(self, keys: Keys) -> tuple[Chain, bytes]:
        """The chain at its end, and what a crash left of a line there; the next `append` puts its lines in that place.
        Raises AuditBroken.
        """
        self._fd = os.open(self.folder / CURRENT, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        end = os.fstat(self._fd).st_size
        torn = self._torn(end)
        self._length = end - len(torn)
        *before, _ = chain_files(self.folder)
        if self._length:
            position = self._end_of(self._fd, self._length, self.folder / CURRENT, keys)
        elif before:
            with before[-1].open("rb") as file:
                position = self._end_of(file.fileno(), os.fstat(file.fileno()).st_size, before[-1], keys)
        else:
            position = Position.start(secrets.token_hex(16))
        self._dirty = bool(torn)
        return Chain(keys.mac, keys.signer, position), torn

    def _torn(self, end: int) -> bytes:
        """What comes after the last newline, if it is less than a line: a crash tears one at most."""
        tail = os.pread(self._fd, MAX_LINE_BYTES, max(0, end - MAX_LINE_BYTES))
        rest = tail[tail.rfind(b"\n") + 1 :]
        return rest if len(rest) < MAX_LINE_BYTES else b""

    def _end_of(self, fd: int, length: int, path: Path, keys: Keys) -> Position:
        """Check everything from the last checkpoint of a file on."""
        size = min(TAIL_BYTES, length)
        while True:
            tail = os.pread(fd, size, length - size)
            start = tail.rfind(b'"event":"checkpoint"')
            start = tail.rfind(b"\n", 0, start) + 1 if start >= 0 else -1
            if start > 0 or (start == 0 and size == length):
                break
            if size == length:
                raise AuditBroken(f"there is no checkpoint in {path}", hint=_BROKEN)
            size = min(size * 4, length)
        verifier = Verifier(keys.public, keys.mac, anywhere=True)
        for line in tail[start:-1].split(b"\n"):
            verifier.take(line + b"\n")
        if verifier.fault is not None:
            number = _count_lines(fd, length - size + start) + verifier.fault.line
            raise AuditBroken(f"the audit log is broken: {path}:{number}: {verifier.fault.what}", hint=_BROKEN)
        assert verifier.position is not None
        return verifier.position

    def keep_torn(self, torn: bytes) -> str | None:
        """Put it into a file of its own before its place is taken; its name, or None where it can't be kept."""
        name = f"torn-{hashlib.sha256(torn).hexdigest()[:16]}"
        try:
            with os.fdopen(os.open(self.folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(torn)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            log.error("audit.torn_not_kept", path=self.folder / name, reason=error.strerror)
            return None
        return name

    def append(self, data: bytes) -> None:
        """After an error a part of it may be there, until `undo`."""
        self._cut()
        self._dirty = True
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(self._fd, rest) :]
        self._dirty = False
        self._length += len(data)

    def undo(self, to_length: int) -> None:
        """Take back what was appended since the file had this length: at once, or before anything else is."""
        self._length, self._dirty = to_length, True
        with contextlib.suppress(OSError):
            self._cut()

    def _cut(self) -> None:
        if self._dirty:
            os.ftruncate(self._fd, self._length)
            self._dirty = False

    def sync(self) -> None:
        os.fsync(self._fd)

    def rotate(self) -> None:
        """Close the file under a number, and begin another. After an error the same file is written."""
        current, new = self.folder / CURRENT, self.folder / f".{CURRENT}"
        rotated = [found for path in chain_files(self.folder) if (found := _ROTATED.fullmatch(path.name))]
        numbered = self.folder / f"audit-{int(rotated[-1][1]) + 1 if rotated else 1:08d}.jsonl"
        self._cut()
        os.fsync(self._fd)
        fd = os.open(new, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC, 0o600)
        try:
            current.rename(numbered)
            try:
                new.rename(current)
            except OSError:
                numbered.rename(current)
                raise
        except OSError:
            os.close(fd)
            raise
        os.close(self._fd)
        self._fd, self._length, self._dirty = fd, 0, False
        whole_file.sync_directory(self.folder)

    def surplus(self, keep: int) -> list[tuple[Path, int]]:
        """The oldest files, where there are more than `keep`, each with the number of its last record."""
        files = chain_files(self.folder)
        return [(path, first_seq(after) - 1) for path, after in pairwise(files[: max(1, len(files) - keep + 1)])]

    def close(self) -> None:
        for fd in (self._fd, self._lock):
            if fd >= 0:
                os.close(fd)


_BROKEN = "`llorch audit verify` says what is wrong; move the .jsonl files away, and a new log begins"


def _count_lines(fd: int, length: int) -> int:
    count = offset = 0
    while offset < length:
        data = os.pread(fd, min(1 << 20, length - offset), offset)
        if not data:
            break
        count, offset = count + data.count(b"\n"), offset + len(data)
    return count
