"""How much memory engines were measured to take at most, so that the next start need not guess.

    peaks = Peaks(data_dir / "peaks.json")
    peaks.learn(key, bytes)     while an engine runs, as often as it is measured
    peaks.peak(key)             before the next one starts
    peaks.save(now)             now and then, off the event loop

Owns the file: bounded, written whole and not often, and if it is torn or strange, forgotten. It holds sizes under
digests, no name of a model and no argument. Never measures.
"""

from __future__ import annotations

import hashlib
import json
import stat
import threading
from dataclasses import astuple, dataclass
from pathlib import Path

from llorch import whole_file
from llorch.logs import Log

VERSION = 1
MAX_ENTRIES = 512  # models times settings that a machine has tried; the oldest go first
MAX_FILE_BYTES = 256 * 1024
MAX_BYTES = 1 << 50  # of one engine: no measurement
SAVE_EVERY_S = 60.0

log = Log("peaks")


@dataclass(frozen=True, slots=True)
class PeakKey:
    """All that the memory of an engine depends on. `model`: the digest of its file, or size and id where there is none
    yet; `gpus`: their UUIDs, () for RAM.
    """

    model: str
    engine: str
    engine_version: str | None
    ctx: int
    slots: int
    gpus: tuple[str, ...] = ()
    args: tuple[str, ...] = ()

    def digest(self) -> str:
        return hashlib.sha256(json.dumps(astuple(self)).encode()).hexdigest()[:32]


class Peaks:
    """Any thread may call it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._sizes = _read(path)
        self._changed = False
        self._saved_at: float | None = None

    def peak(self, key: PeakKey) -> int | None:
        with self._lock:
            return self._sizes.get(key.digest())

    def learn(self, key: PeakKey, size: int) -> None:
        """`size`: what one engine holds now; only the most counts. None of it, and what can't be, is no measurement."""
        if not 0 < size <= MAX_BYTES:
            return
        digest = key.digest()
        with self._lock:
            before = self._sizes.pop(digest, 0)  # it is the youngest now
            self._sizes[digest] = max(size, before)
            while len(self._sizes) > MAX_ENTRIES:
                del self._sizes[next(iter(self._sizes))]
            self._changed |= size > before

    def save(self, now: float, *, at_once: bool = False) -> bool:
        """Whether it was written: if something has changed, and not again within SAVE_EVERY_S unless `at_once`. `now`:
        seconds that only grow. A disk that is full is logged, and tried again. Blocking.
        """
        with self._lock:
            due = self._saved_at is None or now - self._saved_at >= SAVE_EVERY_S
            if not self._changed or not (due or at_once):
                return False
            data = json.dumps({"version": VERSION, "peaks": self._sizes}).encode()
            self._saved_at, self._changed = now, False
        try:
            whole_file.replace(self._path, data, durable=False)
        except OSError as error:
            log.warning("peaks.not_saved", reason=error.strerror)
            with self._lock:
                self._changed = True
            return False
        return True


def _read(path: Path) -> dict[str, int]:
    """What can be read of the file; nothing of one that is not as `save` writes it."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode) or found.st_size > MAX_FILE_BYTES:
            raise ValueError
        value = json.loads(path.read_bytes())
        sizes = value["peaks"]
        good = value["version"] == VERSION and all(map(_plausible, sizes, sizes.values()))
        if not good or len(sizes) > MAX_ENTRIES:
            raise ValueError
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        log.warning("peaks.unreadable", reason=type(error).__name__)
        return {}
    return dict(sizes)


def _plausible(digest: object, size: object) -> bool:
    return isinstance(digest, str) and len(digest) == 32 and type(size) is int and 0 < size <= MAX_BYTES
