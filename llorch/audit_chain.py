"""The audit log as lines: what a record is, how each line vouches for those before it, and how that is checked.

A line is one JSON object in ASCII. Its last member `mac` is HMAC-SHA256(key, mac of the line before || the line without
it), so whoever has the key finds the first line that is not as it was written. Some lines are checkpoints: they hold a
SHA-256 over every byte before them and are signed with Ed25519, so whoever has only the public key can check all that
comes before one. Each file of a log begins with a checkpoint, which also names the mac before it.

Found: any edit, deletion, insertion, repetition or reordering of lines; and of what is before a checkpoint that was
exported and kept elsewhere, its removal too. Not found: lines cut off the end after the last exported checkpoint; what
somebody changes there who holds both keys, or after the last checkpoint who holds the key of the macs; and what the
control never wrote. Owns the format, the chain and the verdict. Never reads a file or a clock.
"""

from __future__ import annotations

import datetime
import hashlib
import hmac
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic_core import to_json

KEY_BYTES = 32  # of the macs: as long as their hash
CHECKPOINT_EVERY_RECORDS = 1_000  # at a start, what comes after the last one is checked: a few ms
CHECKPOINT_EVERY_S = 60.0  # so an export covers all but the last minute of a control that runs
MAX_VALUE_CHARS = 256  # of each value: names and ids are shorter, and whoever sends longer ones chose them
MAX_LINE_BYTES = 128 * 1024  # 22 values of 256 characters, each written as two escapes of 6 bytes, are half of that
EXPORT_FORMAT = 1
MAX_EXPORT_BYTES = 256 * 1024

CHECKPOINT = "checkpoint"
GAP = "audit.gap"  # `count` records before it could not be written
TORN = "audit.torn"  # what a crash left of a line was cut off and kept in `file`
REMOVED = "audit.removed"  # the oldest file went, as its owner wished, and with it all up to `to_seq`

# All that a record can say, in the order in which it says it. There is no place for a prompt, a token or a body.
FIELDS = (
    "principal", "fingerprint", "scope", "peer", "node_id", "request_id", "task_id", "decision", "reason", "owner",
    "method", "path", "model", "detach", "version", "bind", "tls", "count", "bytes", "sha256", "file", "to_seq",
    "token_id", "name", "kind", "pool_id", "deadline_ms", "why",
    "nodes", "source",
)  # fmt: skip

Value: TypeAlias = str | int | None

_GENESIS = bytes(32)
_SIGNED = b"llorch audit checkpoint 1\0"  # what is signed can't be taken for anything else that is ever signed
_HEAD = rb'\{"time":"([0-9TZ:.-]{24})","seq":([1-9][0-9]{0,15}),"event":'
_LINE = re.compile(rb"(" + _HEAD + rb'"([a-z._]{1,64})"[\x20-\x7e]*),"mac":"([0-9a-f]{64})"\}\n')
_CHECKPOINT = re.compile(
    rb"(" + _HEAD + rb'"checkpoint","chain":"([0-9a-f]{32})","prev":"([0-9a-f]{64})","digest":"([0-9a-f]{64})"'
    rb',"key":"([0-9a-f]{16})"),"signature":"([0-9a-f]{128})"'
)
_dumps = json.JSONEncoder(separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode


def rfc3339(wall_s: float) -> str:
    """Seconds since the epoch, for people."""
    return datetime.datetime.fromtimestamp(wall_s, datetime.UTC).isoformat(timespec="milliseconds")[:-6] + "Z"


def key_fingerprint(public: Ed25519PublicKey) -> str:
    return hashlib.sha256(public.public_bytes_raw()).hexdigest()[:16]


def _plain(value: str | int) -> str | int:
    """`value`, bounded. What is not Unicode (half of a surrogate pair) becomes a question mark."""
    if isinstance(value, int):
        return value
    text = str(value)  # a value of any other kind must not stop the log
    text = text if len(text) <= MAX_VALUE_CHARS else text[: MAX_VALUE_CHARS - 3] + "..."
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def _encode(record: Mapping[str, str | int]) -> bytes:
    quick = to_json(record)  # the same, where no character has to be escaped that UTF-8 could write
    return quick if quick.isascii() and b"\x7f" not in quick else _dumps(record).encode("ascii")


@lru_cache(maxsize=256)  # there are some dozen events, each with fields of its own
def _in_order(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in FIELDS if name in names)


# ---------------------------------------------------------------- writing


@dataclass(slots=True)
class Position:
    """Where a chain stands: all that its next line depends on."""

    chain: str
    running: hashlib._Hash  # over the last checkpoint's digest and every line from that checkpoint on
    seq: int = 0
    mac: bytes = _GENESIS
    since: int = 0  # lines after the last checkpoint

    @classmethod
    def start(cls, chain: str) -> Position:
        """Before the first line of the chain with this id."""
        return cls(chain, hashlib.sha256(_GENESIS))

    def copy(self) -> Position:
        return Position(self.chain, self.running.copy(), self.seq, self.mac, self.since)

    def advance(self, line: bytes, mac: bytes) -> None:
        self.seq, self.mac, self.since = self.seq + 1, mac, self.since + 1
        self.running.update(line)

    def restart(self, digest: bytes, line: bytes, seq: int, mac: bytes) -> None:
        """A checkpoint is the last line now."""
        self.running = hashlib.sha256(digest)
        self.running.update(line)
        self.seq, self.mac, self.since = seq, mac, 0


class Chain:
    """The writing end. What it returns has to be written in this order, or `rewind` is to be called."""

    def __init__(self, key: bytes, signer: Ed25519PrivateKey, at: Position) -> None:
        self._key = key
        self._signer = signer
        self.fingerprint = key_fingerprint(signer.public_key())
        self._at = at

    @property
    def position(self) -> Position:
        return self._at.copy()

    @property
    def seq(self) -> int:
        return self._at.seq

    @property
    def since(self) -> int:
        """Lines after the last checkpoint."""
        return self._at.since

    def rewind(self, to: Position) -> None:
        """Lines that were made after `to` have not been written."""
        self._at = to.copy()

    def record(self, wall_s: float, event: str, fields: Mapping[str, Value]) -> bytes:
        """The next line. `fields` are some of FIELDS; those that are None are left out."""
        record: dict[str, str | int] = {"time": rfc3339(wall_s), "seq": self._at.seq + 1, "event": event}
        for name in _in_order(tuple(fields)):
            value = fields[name]
            if value is not None:
                record[name] = _plain(value)
        line, mac = self._sealed(_encode(record))
        self._at.advance(line, mac)
        return line

    def checkpoint(self, wall_s: float) -> bytes:
        """A line that vouches, by signature, for all lines before it."""
        digest, seq = self._at.running.digest(), self._at.seq + 1
        body = _encode(
            {
                "time": rfc3339(wall_s),
                "seq": seq,
                "event": CHECKPOINT,
                "chain": self._at.chain,
                "prev": self._at.mac.hex(),
                "digest": digest.hex(),
                "key": self.fingerprint,
            }
        )
        signature = self._signer.sign(_SIGNED + body)
        line, mac = self._sealed(body[:-1] + b',"signature":"' + signature.hex().encode() + b'"}')
        self._at.restart(digest, line, seq, mac)
        return line

    def _sealed(self, body: bytes) -> tuple[bytes, bytes]:
        mac = hmac.digest(self._key, self._at.mac + body, "sha256")
        return body[:-1] + b',"mac":"' + mac.hex().encode() + b'"}\n', mac


# ---------------------------------------------------------------- checking


@dataclass(frozen=True, slots=True)
class Fault:
    """The first thing that is wrong: at which line of those given (from 1; 0: with all of them), and in words."""

    line: int
    what: str


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint line whose signature has been checked."""

    line: bytes
    time: str
    seq: int
    chain: str
    prev: bytes
    digest: bytes
    key: str


@dataclass(frozen=True, slots=True)
class Exported:
    """What a person keeps elsewhere: the newest checkpoint of each chain, and the key that they are signed with."""

    public: Ed25519PublicKey
    checkpoints: tuple[Checkpoint, ...]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is known of a log. `unproven` lines after the last checkpoint could not be checked without the key."""

    lines: int
    chain: str | None
    first_seq: int
    last_seq: int
    last_time: str | None
    checkpoint: Checkpoint | None
    unproven: int
    lost: int  # records that the log itself says could not be written
    fault: Fault | None

    @property
    def whole(self) -> bool:
        return self.fault is None


def read_checkpoint(line: bytes, public: Ed25519PublicKey) -> Checkpoint:
    """Raises ValueError that says what is wrong with it."""
    found = _CHECKPOINT.match(line)
    if found is None or _LINE.fullmatch(line) is None:
        raise ValueError("it is no checkpoint")
    body, time, seq, chain, prev, digest, key, signature = found.groups()
    if key.decode() != key_fingerprint(public):
        raise ValueError(f"its checkpoint names key {key.decode()}, which is not the one to check with")
    try:
        public.verify(bytes.fromhex(signature.decode()), _SIGNED + body + b"}")
    except InvalidSignature:
        raise ValueError("its signature is not that of the control's key") from None
    return Checkpoint(
        line, time.decode(), int(seq), chain.decode(), bytes.fromhex(prev.decode()),
        bytes.fromhex(digest.decode()), key.decode(),
    )  # fmt: skip


class Verifier:
    """Takes the lines of one chain in order, each with its newline, and stops believing at the first fault.

    Without the `key` of the macs, lines are checked by the checkpoints after them. `anywhere`: the first line may be
    any checkpoint, as for whoever goes on writing; otherwise lines that are missing before it must be accounted for.
    """

    def __init__(
        self,
        public: Ed25519PublicKey,
        key: bytes | None = None,
        *,
        exported: Iterable[Checkpoint] = (),
        anywhere: bool = False,
    ) -> None:
        self._public = public
        self._key = key
        self._exported = tuple(exported)
        self._anywhere = anywhere
        self._kept: dict[int, Checkpoint] = {}  # of the exported ones, those of this chain
        self._at: Position | None = None
        self._lines = self._first_seq = self._said_removed_to = self._removed_to = self._lost = 0
        self._time: str | None = None
        self._checkpoint: Checkpoint | None = None
        self._fault: Fault | None = None

    @property
    def position(self) -> Position | None:
        """Behind the last line that was taken."""
        return self._at

    @property
    def fault(self) -> Fault | None:
        return self._fault

    def take(self, line: bytes) -> bool:
        """False once there is a fault."""
        if self._fault is None:
            self._lines += 1
            what = self._look(line)
            if what is not None:
                self._fault = Fault(self._lines, what)
        return self._fault is None

    def finish(self) -> Verdict:
        """There are no more lines."""
        if self._fault is None:
            what = self._look_back()
            if what is not None:
                self._fault = Fault(0, what)
        at, checkpoint = self._at, self._checkpoint
        unproven = at.since if at is not None and self._key is None else 0
        return Verdict(
            self._lines, at.chain if at is not None else None, self._first_seq, at.seq if at is not None else 0,
            self._time, checkpoint, unproven, self._lost, self._fault,
        )  # fmt: skip

    def _look(self, line: bytes) -> str | None:
        """What is wrong with the next line."""
        found = _LINE.fullmatch(line)
        if found is None:
            if not line.endswith(b"\n"):
                return "the line is not complete: it was cut, torn by a crash, or is being written now"
            return "this is no line of an audit log: it was changed or put here"
        body, time, seq, event, mac = found.groups()
        checkpoint = None
        if event.decode() == CHECKPOINT:
            try:
                checkpoint = read_checkpoint(line, self._public)
            except ValueError as error:
                return str(error)
        what = self._begin(checkpoint) if self._at is None else None
        if what is not None:
            return what
        assert self._at is not None
        what = self._check(int(seq), body, bytes.fromhex(mac.decode()), checkpoint)
        if what is not None:
            return what
        kept = self._kept.get(int(seq))
        if kept is not None and kept.line != line:
            return "here stood a checkpoint that was exported, and this is another line"
        self._time = time.decode()
        if checkpoint is not None:
            self._checkpoint = checkpoint
            self._at.restart(checkpoint.digest, line, checkpoint.seq, bytes.fromhex(mac.decode()))
            self._removed_to = self._said_removed_to
        else:
            self._at.advance(line, bytes.fromhex(mac.decode()))
            self._note(event.decode(), line)
        return None

    def _begin(self, checkpoint: Checkpoint | None) -> str | None:
        """The first line: a checkpoint, which says where it stands."""
        if checkpoint is None:
            return "the log does not begin with a checkpoint: lines before it are missing"
        if checkpoint.seq == 1:
            self._at = Position.start(checkpoint.chain)
        else:
            self._at = Position(checkpoint.chain, hashlib.sha256(), checkpoint.seq - 1, checkpoint.prev)
        self._first_seq = checkpoint.seq
        self._kept = {each.seq: each for each in self._exported if each.chain == checkpoint.chain}
        return None

    def _check(self, seq: int, body: bytes, mac: bytes, checkpoint: Checkpoint | None) -> str | None:
        at = self._at
        assert at is not None
        due = at.seq + 1
        proven = self._key is None or hmac.compare_digest(hmac.digest(self._key, at.mac + body + b"}", "sha256"), mac)
        if not proven or seq != due:
            if seq == due:
                return f"its mac does not fit: record {seq} was changed, or written with another key"
            if seq > due:
                return f"record {seq} stands where {due} is due: lines are missing, or it was moved or changed"
            return f"record {seq} stands where {due} is due: it is repeated, moved or changed"
        if checkpoint is None:
            return None
        known = self._lines > 1 or checkpoint.seq == 1
        if known and not hmac.compare_digest(at.running.digest(), checkpoint.digest):
            return f"of the {at.since} lines before this checkpoint one is not as it was when this was signed"
        return None

    def _note(self, event: str, line: bytes) -> None:
        """What the log says of itself."""
        if event == GAP:
            self._lost += _number(line, b"count")
        elif event == REMOVED:  # believed once it is signed: it excuses that something is missing
            self._said_removed_to = max(self._said_removed_to, _number(line, b"to_seq"))

    def _look_back(self) -> str | None:
        if self._at is None:
            return "there is no line at all"
        last = max(self._kept, default=0)
        if last > self._at.seq:
            return (
                f"its end is cut off: it ends at record {self._at.seq}, and a checkpoint was exported of record {last}"
            )
        if not self._anywhere and self._first_seq > self._removed_to + 1:
            return f"records 1 to {self._first_seq - 1} are missing, and the log does not say that they were removed"
        return None


def _number(line: bytes, name: bytes) -> int:
    found = re.search(rb'"' + name + rb'":([0-9]{1,15})[,}]', line)
    return int(found[1]) if found is not None else 0


def missing_chains(exported: Iterable[Checkpoint], verdicts: Iterable[Verdict]) -> list[Checkpoint]:
    """Exported checkpoints of chains of which nothing is there any more."""
    there = {verdict.chain for verdict in verdicts}
    return [each for each in exported if each.chain not in there]


def verify(
    lines: Iterable[bytes],
    public: Ed25519PublicKey,
    key: bytes | None = None,
    *,
    exported: Iterable[Checkpoint] = (),
) -> Verdict:
    """The verdict over the lines of one chain, in order, each with its newline."""
    verifier = Verifier(public, key, exported=exported)
    for line in lines:
        if not verifier.take(line):
            break
    return verifier.finish()


# ---------------------------------------------------------------- what is kept elsewhere


def encode_export(exported: Exported, wall_s: float) -> str:
    """A small JSON document; `decode_export` takes it back."""
    document = {
        "llorch_audit": EXPORT_FORMAT,
        "exported_at": rfc3339(wall_s),
        "public_key": exported.public.public_bytes_raw().hex(),
        "fingerprint": key_fingerprint(exported.public),
        "checkpoints": [each.line.decode("ascii").rstrip("\n") for each in exported.checkpoints],
    }
    return json.dumps(document, indent=2) + "\n"


def decode_export(raw: bytes) -> Exported:
    """Raises ValueError that says why it can't be used."""
    try:
        document = json.loads(raw)
        public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(document["public_key"]))
        lines = [line.encode("ascii") + b"\n" for line in document["checkpoints"]]
        known = document["llorch_audit"] == EXPORT_FORMAT
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError("it is no exported checkpoint") from None
    if not known or not lines:
        raise ValueError("it is no exported checkpoint of a form that is known here")
    return Exported(public, tuple(read_checkpoint(line, public) for line in lines))
