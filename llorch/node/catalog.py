"""The models on this machine: from a reference to a checked local file, and what a report says of each.

Owns the look at the file (there, a GGUF, how large) and its digest, which is computed once, on demand, for large files
take minutes. Never downloads. Blocking: call it off the event loop.
"""

from __future__ import annotations

import hashlib
import re
import stat
import threading
from dataclasses import dataclass
from pathlib import Path

from llorch import demo
from llorch.errors import ConfigError
from llorch.messages import ModelReport
from llorch.node.engines import gguf
from llorch.node.modelref import DEMO, model_id

CHUNK_BYTES = 4 * 1024 * 1024
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A model file that can be given to an engine. `parts` are all its files; `path` is the first."""

    id: str
    ref: str
    path: Path
    parts: tuple[Path, ...]
    size_bytes: int
    ctx_train: int | None


class Catalog:
    """Every model that was asked for on this node, by reference."""

    def __init__(self) -> None:
        self._models: dict[str, LocalModel] = {}
        self._digests: dict[str, str] = {}
        self._closed = threading.Event()

    def find(self, ref: str) -> str:
        """The path of the model that `ref` means. Raises ConfigError with what to do."""
        if ref not in self._models:
            self._models[ref] = _local(ref)
        return str(self._models[ref].path)

    def report(self) -> list[ModelReport]:
        return [
            ModelReport(
                id=model.id,
                ref=model.ref,
                size_bytes=model.size_bytes,
                sha256=self._digests.get(model.ref),
                format="gguf",
                state="staged",
                ctx_train=model.ctx_train,
            )
            for model in list(self._models.values())
        ]

    def digest_all(self) -> bool:
        """Compute the digests that are missing; True if there is a new one. `close` from another thread ends it."""
        news = False
        for ref, model in list(self._models.items()):
            if ref not in self._digests and (digest := self._digest(model)) is not None:
                self._digests[ref] = digest
                news = True
        return news

    def close(self) -> None:
        self._closed.set()

    def _digest(self, model: LocalModel) -> str | None:
        """sha256 of the file, or of its parts one after the other. None if it can't be read, or was given up."""
        digest = hashlib.sha256()
        try:
            for part in model.parts:
                with part.open("rb") as file:
                    while chunk := file.read(CHUNK_BYTES):
                        if self._closed.is_set():
                            return None
                        digest.update(chunk)
        except OSError:
            return None
        return digest.hexdigest()


def _local(ref: str) -> LocalModel:
    path = _path(ref)
    parts = _parts(path)
    sizes, headers = zip(*(_look(part, first=part == parts[0]) for part in parts), strict=True)
    return LocalModel(model_id(ref), ref, path, parts, sum(sizes), headers[0].ctx_train)


def _look(path: Path, *, first: bool) -> tuple[int, gguf.Header]:
    """Size and header of one file: an engine opens every part, so each is checked. Never waits, as for a FIFO."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise ConfigError(f"the model {path} is not a file")
        return found.st_size, gguf.read_header(path, first=first)
    except OSError as error:
        raise ConfigError(f"the model {path} can't be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"the model {path} is not a usable GGUF: {error}") from None


def _path(ref: str) -> Path:
    if ref == DEMO:
        return Path(demo.model_path())
    scheme, colon, rest = ref.partition(":")
    if scheme == "file" and colon:
        return Path(rest)
    if scheme in ("hf", "http", "https") and colon:
        raise ConfigError(
            "staging of hf: and https: refs is not available yet", hint="download it, then model: file:/abs/path.gguf"
        )
    raise ConfigError(f"there is no model {ref} in this node's catalog", hint="model: demo, or file:/abs/path.gguf")


def _parts(path: Path) -> tuple[Path, ...]:
    """The files of a split model, of which an engine is given the first."""
    split = _PART.search(path.name)
    if split is None:
        return (path,)
    if int(split[1]) != 1:
        raise ConfigError(f"{path} is part {int(split[1])} of a split model", hint="give its first part")
    stem = path.name[: split.start()]
    return tuple(path.with_name(f"{stem}-{number:05}-of-{split[2]}.gguf") for number in range(1, int(split[2]) + 1))
