"""Which files of a Hugging Face repository a reference means.

    hf:org/repo            its one GGUF; of several the Q4_K_M, as llama.cpp takes it
    hf:org/repo:Q8_0       the GGUF of that quantisation, all parts of it if it is split
    hf:org/repo/a/b.gguf   that file, or all the parts of which it is the first

Owns that choice, from the repository's list of files. Never asks anybody. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llorch.errors import Code, LlorchError
from llorch.node.catalog_file import part_of

USUAL = "Q4_K_M"  # what `llama-server -hf` takes where nothing is said
MOST_SHOWN = 12  # of the files in a message
_REF = re.compile(r"hf:(?P<repo>[^/:]+/[^/:]+)(?::(?P<quant>[^/]+)|/(?P<file>.+))?")
_PART_ENDING = re.compile(r"-\d{5}-of-\d{5}$")
_BESIDE = re.compile(r"(^|[/_.-])(mmproj|imatrix)", re.I)  # what comes with a model and is none


@dataclass(frozen=True, slots=True)
class HubRef:
    repo: str
    quant: str | None = None
    file: str | None = None


@dataclass(frozen=True, slots=True)
class HubFile:
    """One file as the hub lists it. `sha256`: of what is kept outside of git, as models are."""

    path: str
    size_bytes: int | None
    sha256: str | None


def parse_hub(ref: str) -> HubRef:
    """Raises ValueError."""
    found = _REF.fullmatch(ref)
    if found is None:
        raise ValueError("no Hugging Face reference")
    return HubRef(found["repo"], found["quant"], found["file"])


def choose(files: Sequence[HubFile], wish: HubRef) -> tuple[HubFile, ...]:
    """The files of the model that is meant, in the order of their parts. Raises MODEL_NOT_FOUND with what there is."""
    models = _models(files)
    if wish.file is not None:
        key = _key(wish.file)
        if key in models and models[key][0].path == wish.file:
            return models[key]
        raise _none(f"{wish.repo} has no {wish.file}", models)
    quant = wish.quant or USUAL
    fitting = [key for key in models if _is_of(key, quant)]
    if wish.quant is None and len(models) == 1:
        fitting = list(models)
    if len(fitting) == 1:
        return models[fitting[0]]
    if fitting:
        raise _none(f"{wish.repo} has {len(fitting)} models of {quant}", {key: models[key] for key in fitting})
    if wish.quant is None:
        raise (
            _none(f"{wish.repo} has several GGUFs and none of {USUAL}", models)
            if models
            else _none(f"{wish.repo} has no GGUF", models)
        )
    raise _none(f"{wish.repo} has no GGUF of {quant}", models)


def _models(files: Sequence[HubFile]) -> dict[str, tuple[HubFile, ...]]:
    """The whole models among the files, by what their names have in common."""
    found: dict[str, list[HubFile]] = {}
    for file in sorted(files, key=lambda file: file.path):
        if file.path.endswith(".gguf") and not _BESIDE.search(file.path):
            found.setdefault(_key(file.path), []).append(file)
    whole = {}
    for key, parts in found.items():
        numbers = [part_of(part.path) for part in parts]
        if numbers == [(number, len(parts)) for number in range(1, len(parts) + 1)] or numbers == [None]:
            whole[key] = tuple(parts)
    return whole


def _key(path: str) -> str:
    return _PART_ENDING.sub("", path.removesuffix(".gguf"))


def _is_of(key: str, quant: str) -> bool:
    """Q4_K is not Q4_K_M, nor is F16 in BF16."""
    return re.search(rf"(^|[^A-Za-z0-9]){re.escape(quant)}($|[^A-Za-z0-9_])", key, re.I) is not None


def _none(what: str, models: Mapping[str, Sequence[HubFile]]) -> LlorchError:
    names = [parts[0].path for parts in models.values()]
    shown = ", ".join(names[:MOST_SHOWN]) + (", ..." if len(names) > MOST_SHOWN else "")
    hint = f"give one of its files, hf:org/repo/FILE: {shown}" if names else "look at its files; only GGUFs are staged"
    return LlorchError(Code.MODEL_NOT_FOUND, what, hint=hint)
