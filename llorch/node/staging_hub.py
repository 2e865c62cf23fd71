"""Models of the Hugging Face hub: which files a reference means there, and where their bytes are.

Owns the use of `huggingface_hub` (the extra `hub`): endpoint, token and cache are its own, by its own environment
(HF_ENDPOINT, HF_TOKEN, HF_HOME). It is asked for a repository's files, their sizes and digests. The bytes are fetched
by `staging_http`, as all others are: one rate for all of them, one way of going on, one account of what has come. What
its cache holds already is taken from there. Blocking: call it off the event loop.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llorch.errors import Code, LlorchError
from llorch.node.hub_files import HubFile, choose, parse_hub
from llorch.node.staging_http import MAX_FILE_BYTES, Remote

TIMEOUT_S = 30.0
INSTALL = 'pip install "llorch[hub]"'
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class HubModel:
    """`cached`: files that the library's own cache has, by their names here."""

    files: tuple[Remote, ...]
    cached: Mapping[str, Path]


def find_on_hub(ref: str) -> HubModel:
    """The files that `ref` means. Raises LlorchError."""
    try:
        import huggingface_hub as hub
        from huggingface_hub import constants
    except ImportError:
        raise LlorchError(
            Code.MODEL_NOT_AVAILABLE,
            "models of Hugging Face need the package huggingface_hub, which is not installed on this node",
            hint=INSTALL,
            retriable=False,
        ) from None
    wish = parse_hub(ref)
    token = hub.get_token()
    revision, listed = _listing(hub, wish.repo)
    chosen = choose(listed, wish)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    remotes, cached = [], {}
    for file in chosen:
        name = file.path.rpartition("/")[2]
        url = hub.hf_hub_url(wish.repo, file.path, revision=revision, endpoint=constants.ENDPOINT)
        remotes.append(
            Remote(
                name=name,
                url=url,
                label=f"hf:{wish.repo}/{file.path}",
                headers=headers,
                size_bytes=file.size_bytes,
                sha256=file.sha256,
            )
        )
        there = hub.try_to_load_from_cache(wish.repo, file.path, revision=revision)
        if isinstance(there, str):
            cached[name] = Path(there)
    return HubModel(tuple(remotes), cached)


def _listing(hub: Any, repo: str) -> tuple[str, list[HubFile]]:
    """The commit that the repository is at, and its files. Whatever the library raises means that it can't be had."""
    from huggingface_hub import errors

    try:
        found = hub.HfApi().model_info(repo, files_metadata=True, timeout=TIMEOUT_S)
        revision = found.sha
        files = [_file(one) for one in found.siblings or ()]
    except (errors.RepositoryNotFoundError, errors.GatedRepoError) as error:
        gated = isinstance(error, errors.GatedRepoError)
        raise LlorchError(
            Code.MODEL_NOT_AVAILABLE if gated else Code.MODEL_NOT_FOUND,
            f"hf:{repo} wants its licence accepted first" if gated else f"there is no hf:{repo}, or not for this token",
            hint="HF_TOKEN has to hold a token of an account that may read it, where this node runs",
            retriable=False,
        ) from None
    except Exception as error:  # of a library that raises those of several HTTP clients, by its version
        raise LlorchError(
            Code.MODEL_NOT_AVAILABLE,
            f"the hub does not tell the files of hf:{repo}: {type(error).__name__}",
            hint="can this node reach HF_ENDPOINT (https://huggingface.co if it is not set)?",
        ) from None
    if not isinstance(revision, str) or not re.fullmatch(r"[0-9A-Za-z._-]{1,64}", revision):
        raise LlorchError(Code.MODEL_NOT_AVAILABLE, f"the hub does not say at which revision hf:{repo} is")
    return revision, files


def _file(listed: Any) -> HubFile:
    lfs = getattr(listed, "lfs", None)
    sha256 = getattr(lfs, "sha256", None)
    size = getattr(listed, "size", None)
    return HubFile(
        path=str(listed.rfilename),
        size_bytes=size if isinstance(size, int) and 0 <= size <= MAX_FILE_BYTES else None,
        sha256=sha256 if isinstance(sha256, str) and _SHA256.fullmatch(sha256) else None,
    )
