"""The models on this machine: from a reference to a checked local file, and what a report says of each.

    demo, file:/abs/path    somebody's own files, looked at where they lie and never written
    hf:, https:, an id      staged files under <data>/models, which `staging` brings

Owns `catalog.json`, the look at the files (there, regular, a GGUF, how large) and their digests, which are computed
once, on demand, for large files take minutes. Never fetches: `ensure` has the stager do that. Blocking but for
`ensure`: call it off the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import shutil
import stat
import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from llorch import demo, whole_file
from llorch.config_kinds import MODEL_REF, BadValue
from llorch.errors import Code, ConfigError, LlorchError
from llorch.logs import Log
from llorch.messages import ModelReport
from llorch.node.catalog_file import (
    MAX_CATALOG_BYTES,
    MAX_MODELS,
    Entry,
    StoredFile,
    dump,
    fault_of_parts,
    file_name_ok,
    folder_name,
    id_of_folder,
    load,
    part_of,
    totals,
)
from llorch.node.engines import gguf
from llorch.node.modelref import DEMO, model_id
from llorch.private import stamp
from llorch.wishes import StageOrder

CHUNK_BYTES = 4 * 1024 * 1024
FILE_NAME, FOLDER_NAME = "catalog.json", "models"
MAX_ERROR_CHARS = 1_000  # of a model's report
STAGE_HINT = "`llorch model stage REF --nodes NODE` brings it here"

log = Log("node.catalog")


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A model that can be given to an engine. `parts` are all its files; `path` is the first, and `header` is its."""

    id: str
    ref: str
    path: Path
    parts: tuple[Path, ...]
    size_bytes: int
    header: gguf.Header
    ctx_train: int | None
    sha256: str | None = None


class Stages(Protocol):
    """Who brings models here (staging.Stager)."""

    async def ensure(self, order: StageOrder, said: Callable[[str], None]) -> LocalModel: ...


class Catalog:
    """Every model that is here or on its way, by its id. `in_use`: the ids that pools have.

    Without a `data_dir` nothing is staged and nothing kept; one that is not to be `kept` is only looked at.
    """

    def __init__(
        self,
        data_dir: str | Path | None = None,
        *,
        in_use: Callable[[], Collection[str]] = frozenset,
        kept: bool = True,
    ) -> None:
        self._data = Path(data_dir).expanduser() if data_dir is not None else None
        self._kept = kept
        self._in_use = in_use
        self._lock = threading.RLock()
        self._closed = threading.Event()
        self._looked: dict[str, tuple[tuple[object, ...], LocalModel]] = {}
        self.progress: dict[str, tuple[float, int]] = {}  # of what is being staged: 0 to 1, of how many bytes
        self.stager: Stages | None = None
        self._entries = self._load()

    # ------------------------------------------------------------ from a reference to a file

    def find(self, ref: str) -> str:
        """The path of the model that `ref` means. Raises ConfigError with what to do."""
        found = self.look(ref)
        if found is not None:
            return str(found.path)
        staged = ref.startswith(("hf:", "https:", "http:"))
        shown, entry = MODEL_REF.show(ref), self.meant(ref)
        what = (
            f"the model {shown} is not staged here" if staged else f"there is no model {shown} in this node's catalog"
        )
        if entry is not None:
            what = f"the model {shown} is {entry.state} here" + (f": {entry.error}" if entry.error else "")
        hint = STAGE_HINT if staged or entry else "model: demo, file:/abs/path.gguf, hf:org/repo or https://..."
        raise ConfigError(what, hint=hint)

    def look(self, ref: str) -> LocalModel | None:
        """The model that `ref` means, if it is here and can be used. Raises ConfigError for a reference that is none,
        and for a `file:` that can't be used."""
        check_ref(ref)
        if ref == DEMO:
            return self._look_outside(ref, Path(demo.model_path()))
        if ref.startswith("file:"):
            return self._look_outside(ref, Path(ref.removeprefix("file:")))
        entry = self.meant(ref)
        return self.open(entry) if entry is not None and entry.here else None

    async def ensure(self, ref: str, said: Callable[[str], None]) -> LocalModel:
        """The model that `ref` means, staged if it is not here. `said`: hears how it goes, about once a second.

        Raises LlorchError, ConfigError among them.
        """
        found = await asyncio.to_thread(self.look, ref)
        if found is not None:
            return found
        if self.stager is None:
            raise ConfigError(f"the model {MODEL_REF.show(ref)} is not staged here", hint=STAGE_HINT)
        entry = self.meant(ref)
        order = entry.order if entry is not None and entry.order is not None else None
        return await self.stager.ensure(order or StageOrder(ref=ref, model=model_id(ref)), said)

    def meant(self, ref: str) -> Entry | None:
        """What is remembered under this reference, or under this id. A reference of one model is not another's id."""
        with self._lock:
            named = self._entries.get(ref)
            if named is not None:
                return named
            for entry in self._entries.values():
                if entry.ref == ref:
                    return entry
            other = self._entries.get(model_id(ref))  # found by a scan, which tells no references
            return other if other is not None and other.ref is None else None

    def open(self, entry: Entry) -> LocalModel | None:
        """The files of an entry, looked at. None, and the entry failed, where they are not what they were."""
        try:
            paths = self.paths(entry)
            stamps = tuple(stamp(path) for path in paths)
            held = self._looked.get(entry.id)
            if held is not None and held[0] == (stamps, entry.sha256):
                return held[1]
            _, header = _look_at(paths)
            sizes = [path.stat().st_size for path in paths]
            if sizes != [file.size_bytes for file in entry.files]:
                raise ConfigError(f"the files of {entry.id} are not as long as they were")
        except (ConfigError, OSError) as error:
            why = error.message if isinstance(error, ConfigError) else f"its files: {error.strerror}"
            log.error("catalog.model_failed", model=entry.id, reason=why)
            self.put(entry.model_copy(update={"state": "failed", "error": why}))
            return None
        ref = entry.ref or entry.id
        model = LocalModel(
            entry.id, ref, paths[0], paths, entry.size_bytes, header, header.ctx_train, entry.sha256
        )  # fmt: skip
        self._looked[entry.id] = ((stamps, entry.sha256), model)
        return model

    def paths(self, entry: Entry) -> tuple[Path, ...]:
        """Where its files are. Raises ConfigError for one that leads out of the models' directory."""
        if entry.outside:
            return tuple(Path(file.name) for file in entry.files)
        folder = self.folder(entry.id)
        paths = tuple(folder / file.name for file in entry.files)
        for path in paths:
            if path.is_symlink() or folder.is_symlink():
                raise ConfigError(f"{path} is a symbolic link; staged files are not", hint="remove it, and stage again")
        return paths

    def folder(self, model: str) -> Path:
        """Raises ConfigError where nothing is kept, or for what is no id."""
        if self._data is None:
            raise ConfigError("this catalog has no directory")
        try:
            return self._data / FOLDER_NAME / folder_name(model)
        except ValueError as error:
            raise ConfigError(f"{model!r:.80}: {error}") from None

    def _look_outside(self, ref: str, path: Path) -> LocalModel:
        """Somebody's own file. It is remembered for its digest, under its id, unless that is a staged model's."""
        paths = _parts(path)
        size, header = _look_at(paths)
        called = model_id(ref)
        model = LocalModel(called, ref, path, paths, size, header, header.ctx_train)
        files = [StoredFile(name=str(part), size_bytes=part.stat().st_size, stamp=stamp(part)) for part in paths]
        with self._lock:
            known = self._entries.get(called)
            if known is not None and not known.outside and known.state != "failed":
                return model
            if known is not None and _same_files(known, files) and known.here:
                return _with_digest(model, known)
            self.put(Entry(id=called, ref=ref, ctx_train=header.ctx_train, **totals(files)))
        return model

    # ------------------------------------------------------------ what is remembered

    def get(self, model: str) -> Entry | None:
        with self._lock:
            return self._entries.get(model)

    def entries(self) -> list[Entry]:
        """Never waits: a disk that is slow to take the catalog is nothing to who reports it."""
        return list(self._entries.values())

    def put(self, entry: Entry) -> None:
        """Remember it, on disk where there is one. A disk that takes nothing is told, and costs nobody anything."""
        with self._lock:
            if entry.id not in self._entries and len(self._entries) >= MAX_MODELS:
                raise LlorchError(Code.CONFLICT, f"this node has {MAX_MODELS} models already", hint="llorch model rm")
            self._entries[entry.id] = entry
            if entry.state != "staging":
                self.progress.pop(entry.id, None)
            self._save()

    def forget(self, model: str) -> None:
        """Its entry and its staged files; somebody's own files stay."""
        with self._lock:
            entry = self._entries.pop(model, None)
            self._looked.pop(model, None)
            self.progress.pop(model, None)
            self._save()
        if self._data is not None and (entry is None or not entry.outside):
            folder = self.folder(model)
            if folder.is_symlink():
                folder.unlink()
            elif folder.is_dir():
                shutil.rmtree(folder)

    def report(self) -> list[ModelReport]:
        return [self._report(entry) for entry in self.entries()]

    def _report(self, entry: Entry) -> ModelReport:
        progress, size_bytes = None, entry.size_bytes
        if entry.state == "staging":
            progress, size_bytes = self.progress.get(entry.id, (0.0, 0))
        return ModelReport(
            id=entry.id,
            ref=MODEL_REF.show(entry.ref) if entry.ref is not None else None,
            size_bytes=size_bytes,
            sha256=entry.sha256,
            format="gguf",
            state=entry.state,
            progress=None if progress is None else round(progress, 4),
            error=entry.error[:MAX_ERROR_CHARS] if entry.error is not None else None,
            ctx_train=entry.ctx_train,
        )

    # ------------------------------------------------------------ digests

    def digest_all(self) -> bool:
        """Compute the digests that are missing; True if there is a new one. `close` from another thread ends it."""
        missing = [entry.id for entry in self.entries() if entry.here and entry.sha256 is None]
        return sum(map(self.digest, missing)) > 0

    def digest(self, model: str) -> bool:
        """Compute the digest of one model, if it is missing; True if it is there now and was not."""
        entry = self.get(model)
        if entry is None or entry.sha256 is not None or not entry.here:
            return False
        files = self._digested(entry)
        with self._lock:
            if files is None or self._entries.get(model) != entry:
                return False
            self.put(entry.model_copy(update=totals(files)))
        return True

    def verify(self, model: str) -> None:
        """Read its files again. Raises DIGEST_MISMATCH, or what else is wrong, and then it is `failed`."""
        entry = self.get(model)
        if entry is None:
            raise not_here(model)
        if not entry.files or entry.state == "staging":
            raise LlorchError(Code.CONFLICT, f"{model} is not here yet", hint=STAGE_HINT)
        files = self._digested(entry)
        if self._closed.is_set():
            raise LlorchError(Code.DRAINING, "this node is stopping")
        why: str | None = "its files can't be read"
        if files is not None:
            pairs = [(old.sha256, new.sha256) for old, new in zip(entry.files, files, strict=True)]
            bad = next(((old, new) for old, new in pairs if old is not None and old != new), None)
            why = None if bad is None else f"it has the digest {str(bad[1])[:12]}..., and had {str(bad[0])[:12]}..."
        if why is None and self.open(entry) is None:  # its header, too
            why = "its header is not that of a usable GGUF"
        with self._lock:
            now = self._entries.get(model)
            if now is None or [file.name for file in now.files] != [file.name for file in entry.files]:
                raise LlorchError(Code.CONFLICT, f"{model} became another one meanwhile", hint="verify it again")
            if why is None and files is not None:
                state = "staged" if now.state == "failed" else now.state
                self.put(now.model_copy(update={**totals(files), "state": state, "error": None}))
                return
            self.put(now.model_copy(update={"state": "failed", "error": f"verified: {why}"}))
        log.error("catalog.verify_failed", model=model, reason=why)
        raise LlorchError(Code.DIGEST_MISMATCH, f"{model}: {why}", hint=STAGE_HINT)

    def retire(self, model: str) -> Entry:
        """Its files stay, and no control sends it tasks any more. Staging it again takes that back."""
        with self._lock:
            entry = self._entries.get(model)
            if entry is None:
                raise not_here(model)
            if not entry.here:
                raise LlorchError(Code.CONFLICT, f"{model} is {entry.state}", hint="llorch model rm, without --retire")
            retired = entry.model_copy(update={"state": "retired"})
            self.put(retired)
            return retired

    def check_removable(self, model: str) -> None:
        """Raises CONFLICT while a pool uses it."""
        if self.get(model) is None:
            raise not_here(model)
        if model in self._in_use():
            raise LlorchError(
                Code.CONFLICT, f"a pool of this node has {model}", hint="take it out of the node's settings first"
            )

    def close(self) -> None:
        self._closed.set()

    def _digested(self, entry: Entry) -> list[StoredFile] | None:
        """Its files with their digests, read now. None if they can't be read, or it was given up."""
        try:
            return [self._digest_of(file, path) for file, path in zip(entry.files, self.paths(entry), strict=True)]
        except (OSError, ConfigError, InterruptedError):
            return None

    def _digest_of(self, file: StoredFile, path: Path) -> StoredFile:
        digest, before = hashlib.sha256(), stamp(path)
        with path.open("rb") as opened:
            while chunk := opened.read(CHUNK_BYTES):
                if self._closed.is_set():
                    raise InterruptedError
                digest.update(chunk)
        return file.model_copy(update={"sha256": digest.hexdigest(), "stamp": before})

    # ------------------------------------------------------------ on disk

    def _save(self) -> None:
        if self._data is None or not self._kept:
            return
        try:
            self._data.mkdir(mode=0o700, parents=True, exist_ok=True)
            whole_file.replace(self._data / FILE_NAME, dump(self._entries.values()))
        except OSError as error:
            log.error("catalog.unsaved", path=str(self._data / FILE_NAME), reason=error.strerror)

    def _load(self) -> dict[str, Entry]:
        if self._data is None:
            return {}
        path = self._data / FILE_NAME
        try:
            if not stat.S_ISREG(path.stat().st_mode):  # a FIFO would keep the node waiting for ever
                raise ValueError("it is not a regular file")
            with path.open("rb") as file:
                entries = load(file.read(MAX_CATALOG_BYTES))
        except FileNotFoundError:
            return self._scan()
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else str(error)
            log.error("catalog.torn", path=str(path), reason=why, then="rebuilt from the files there are")
            return self._scan()
        return {key: kept for key, entry in entries.items() if (kept := self._still(entry)) is not None}

    def _still(self, entry: Entry) -> Entry | None:
        """What a start finds of it. Somebody's own file is forgotten with its digest once it is another."""
        if entry.outside:
            return entry if _unchanged(entry) else None
        if entry.here and not self._are_there(entry):
            return entry.model_copy(update={"state": "failed", "error": "found at the start: its files are not there"})
        return entry

    def _are_there(self, entry: Entry) -> bool:
        try:
            sizes = [path.stat().st_size for path in self.paths(entry)]
        except (OSError, ConfigError):
            return False
        return bool(sizes) and sizes == [file.size_bytes for file in entry.files]

    def _scan(self) -> dict[str, Entry]:
        """What lies in the models' directory, as far as it is whole. References and digests are not told by files."""
        found: dict[str, Entry] = {}
        folder = self._data / FOLDER_NAME if self._data is not None else Path()
        with contextlib.suppress(OSError):
            for one in sorted(folder.iterdir())[:MAX_MODELS]:
                called = id_of_folder(one.name)
                if called is not None and one.is_dir() and not one.is_symlink():
                    found[called] = _scanned(called, one)
        return found


def _scanned(model: str, folder: Path) -> Entry:
    try:
        names = sorted(path.name for path in folder.iterdir() if file_name_ok(path.name))
        if not names:
            raise ConfigError("it was not staged to its end")
        fault = fault_of_parts(names)
        if fault is not None:
            raise ConfigError(fault)
        paths = tuple(folder / name for name in names)
        if any(path.is_symlink() for path in paths):
            raise ConfigError("a symbolic link is among its files")
        _, header = _look_at(paths)
        files = [StoredFile(name=path.name, size_bytes=path.stat().st_size) for path in paths]
    except (ConfigError, OSError) as error:
        why = error.message if isinstance(error, ConfigError) else str(error.strerror)
        return Entry(id=model, state="failed", error=f"found at the start: {why}")
    return Entry(id=model, ctx_train=header.ctx_train, **totals(files))


# ---------------------------------------------------------------- looks


def check_ref(ref: str) -> str:
    """Raises ConfigError for what is no reference to a model."""
    try:
        if ref.startswith("-") or any(ord(char) < 32 or ord(char) == 127 for char in ref) or len(ref) > 4_096:
            raise BadValue("a model reference has no leading `-` and no control characters", "for example demo")
        if not ref.isascii() and ref != ref.encode("utf-8", "replace").decode():
            raise BadValue("a model reference is UTF-8", "rename the file")
        return MODEL_REF.parse(ref)
    except BadValue as error:
        raise ConfigError(f"model: {error}", hint=error.hint) from None


def not_here(model: str) -> LlorchError:
    return LlorchError(
        Code.MODEL_NOT_FOUND, f"{model!r:.140} is not in this node's catalog", hint="`llorch model ls` lists them"
    )


def _look_at(paths: Sequence[Path]) -> tuple[int, gguf.Header]:
    """The size of all files, and the header of the first. Raises ConfigError."""
    looks = [_look(path, first=place == 0) for place, path in enumerate(paths)]
    return sum(size for size, _ in looks), looks[0][1]


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


def _parts(path: Path) -> tuple[Path, ...]:
    """The files of a split model, of which an engine is given the first."""
    part = part_of(path.name)
    if part is None:
        return (path,)
    number, count = part
    if count < number:
        raise ConfigError(f"{path} is part {number} of {count}")
    if number != 1:
        raise ConfigError(f"{path} is part {number} of a split model", hint="give its first part")
    stem = path.name[: path.name.rindex("-00001-of-")]
    return tuple(path.with_name(f"{stem}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1))


def _same_files(entry: Entry, files: Iterable[StoredFile]) -> bool:
    return [(one.name, one.stamp) for one in entry.files] == [(one.name, one.stamp) for one in files]


def _unchanged(entry: Entry) -> bool:
    return all(file.stamp is not None and stamp(Path(file.name)) == file.stamp for file in entry.files)


def _with_digest(model: LocalModel, entry: Entry) -> LocalModel:
    if entry.sha256 is None:
        return model
    return LocalModel(
        model.id, model.ref, model.path, model.parts, model.size_bytes, model.header, model.ctx_train, entry.sha256
    )
