"""The catalog of a node as a file: what is remembered of each model, and of each file that is only partly here.

    <data>/catalog.json                     every model: its files, digests, state, and an order not yet carried out
    <data>/models/<id as one name>/<file>   a staged model's files, each of them whole
                                  .partial, .partial.json    behind the name of one that is on its way; where from

Owns how these are written, read and named. What is read is checked as if a stranger had written it: a disk may have
torn it. Never opens a file. Pure.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, field_validator

from llorch.errors import LlorchError
from llorch.messages import Count, M, ModelId, Wire, decode_object, model_id_ok, parse
from llorch.wishes import StageOrder

MAX_FILES = 1_024  # of one model; the largest published ones have some hundred parts
MAX_MODELS = 4_096  # as many as a registration may tell of
MAX_NAME_BYTES = 200  # of a file: what is put behind it has to fit into a name, too
MAX_CATALOG_BYTES = 64 * 1024 * 1024
MAX_PARTIAL_STATE_BYTES = 16 * 1024
PARTIAL, PARTIAL_STATE = ".partial", ".partial.json"

Sha256 = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]
_FILE_NAME = re.compile(r"[A-Za-z0-9][\w. +@=-]*", re.A)
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
# No id has these, so that a name leads back to its id, and no id leads to a folder within another's.
_TO_NAME, _TO_ID = str.maketrans("/:", "+="), str.maketrans("+=", "/:")


class StoredFile(Wire):
    """One file. `name`: in the model's folder; or an absolute path, which is somebody's own file and not ours.

    `stamp`: inode, size and time of change when `sha256` was computed: another one, and the digest is worth nothing.
    """

    name: Annotated[str, StringConstraints(min_length=1, max_length=4_096)]
    size_bytes: Count
    sha256: Sha256 | None = None
    stamp: tuple[int, int, int] | None = None

    @field_validator("name")
    @classmethod
    def _leads_nowhere_else(cls, name: str) -> str:
        if not (file_name_ok(name) or (name.startswith("/") and "\0" not in name and ".." not in name.split("/"))):
            raise ValueError("neither a file's name nor an absolute path")
        return name


class Entry(Wire):
    """One model of this node. `order`: what was asked for, while that is not done; its tickets open other nodes."""

    id: ModelId
    ref: Annotated[str, StringConstraints(max_length=4_096)] | None = None
    files: list[StoredFile] = Field(default_factory=list, max_length=MAX_FILES)
    size_bytes: Count = 0
    sha256: Sha256 | None = None
    state: Literal["staged", "staging", "failed", "retired"] = "staged"
    error: Annotated[str, StringConstraints(max_length=2_000)] | None = None
    ctx_train: Count | None = None
    order: StageOrder | None = None

    @property
    def here(self) -> bool:
        return self.state in ("staged", "retired")

    @property
    def outside(self) -> bool:
        """Its files are somebody's own, given by their path: never written, never deleted."""
        return bool(self.files) and self.files[0].name.startswith("/")


class BlobFile(Wire):
    name: Annotated[str, StringConstraints(min_length=1, max_length=MAX_NAME_BYTES)]
    size_bytes: Count
    sha256: Sha256


class BlobListing(Wire):
    """GET /v2/catalog/{model}/blob?list=1: what another node may fetch here, file by file."""

    model: ModelId
    sha256: Sha256
    files: list[BlobFile] = Field(min_length=1, max_length=MAX_FILES)


class PartialState(Wire):
    """What is known of a file that is on its way. `source`: a digest of its URL, which may hold a signature that opens
    it. `validator`: its ETag or its date there. `synced`: so many bytes are on disk, whatever happens to the machine.
    """

    source: Sha256
    validator: Annotated[str, StringConstraints(max_length=1_024)] | None = None
    sha256: Sha256 | None = None
    size_bytes: Count
    synced: Count = 0
    boot: Annotated[str, StringConstraints(max_length=64)] = ""

    def continues(self, other: PartialState) -> bool:
        """Whether bytes fetched for `other` are the beginning of this file."""
        if self.size_bytes != other.size_bytes:
            return False
        if self.sha256 is not None and other.sha256 is not None:
            return self.sha256 == other.sha256
        return self.source == other.source and self.validator is not None and self.validator == other.validator


def dump(entries: Iterable[Entry]) -> bytes:
    models = [entry.model_dump(exclude_none=True, by_alias=True) for entry in entries]
    return json.dumps({"version": 1, "models": models}, indent=1).encode()


def load(data: bytes) -> dict[str, Entry]:
    """Raises ValueError for what is torn or was never a catalog."""
    try:
        models = decode_object(data).get("models")
        if not isinstance(models, list) or len(models) > MAX_MODELS:
            raise ValueError("it has no list of models")
        entries = [_parsed(Entry, model) for model in models]
    except LlorchError as error:
        raise ValueError(error.message) from None
    for entry in entries:
        if not model_id_ok(entry.id) or (entry.order and entry.order.model and not model_id_ok(entry.order.model)):
            raise ValueError("an id that leads somewhere else")
        if len({file.name.startswith("/") for file in entry.files}) > 1:
            raise ValueError("a model that is ours in part")
    found = {entry.id: entry for entry in entries}
    if len(found) != len(entries):
        raise ValueError("it has a model twice")
    return found


def dump_partial(state: PartialState) -> bytes:
    return json.dumps(state.model_dump(exclude_none=True)).encode()


def load_partial(data: bytes) -> PartialState:
    """Raises ValueError."""
    try:
        return _parsed(PartialState, decode_object(data))
    except LlorchError as error:
        raise ValueError(error.message) from None


def _parsed(model: type[M], value: Any) -> M:
    if not isinstance(value, dict):
        raise ValueError("it has what is no object")
    return parse(model, value)


# ---------------------------------------------------------------- names


def folder_name(model: str) -> str:
    """The one name under which a model's files lie. Raises ValueError for what is no id."""
    if not model_id_ok(model):
        raise ValueError("no model id")
    return model.translate(_TO_NAME)


def id_of_folder(name: str) -> str | None:
    model = name.translate(_TO_ID)
    return model if model_id_ok(model) and folder_name(model) == name else None


def file_name_ok(name: str) -> bool:
    """Whether a file of a model may be called so: nothing that leads elsewhere, and none of our own endings."""
    if len(name.encode("utf-8", "replace")) > MAX_NAME_BYTES or ".." in name:
        return False
    return _FILE_NAME.fullmatch(name) is not None and not name.endswith((PARTIAL, PARTIAL_STATE))


def part_of(name: str) -> tuple[int, int] | None:
    """(number, of how many), of a file of a split model; None for one that is whole."""
    split = _PART.search(name)
    return (int(split[1]), int(split[2])) if split else None


def fault_of_parts(names: Sequence[str]) -> str | None:
    """What is wrong with these files as the files of one model, in their order; None if nothing is."""
    if len(set(names)) != len(names):
        return "two of its files have one name"
    parts = [part_of(name) for name in names]
    if len(names) == 1 and parts[0] in (None, (1, 1)):
        return None
    if parts != [(number, len(names)) for number in range(1, len(names) + 1)]:
        return "its files are not all the parts of one split model"
    if len({_PART.sub("", name) for name in names}) != 1:
        return "its files are parts of several models"
    return None


def whole_digest(digests: Sequence[str]) -> str:
    """The digest of a model by those of its files: its one file's; of a split one, the digest of their list.

    So a part that is there need never be read again for the digest of the whole.
    """
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()


def totals(files: Sequence[StoredFile]) -> Mapping[str, Any]:
    """What an entry says of its files together."""
    digests = [file.sha256 for file in files if file.sha256 is not None]
    whole = whole_digest(digests) if files and len(digests) == len(files) else None
    return {"files": list(files), "size_bytes": sum(file.size_bytes for file in files), "sha256": whole}
