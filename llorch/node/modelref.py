"""What a model reference is called: the id that clients name.

Owns that rule: `demo` is demo, a file is its stem, `hf:` and `https:` refs are what they point to, anything else is an
id already. Pure.
"""

from __future__ import annotations

import re

from llorch.messages import model_id_ok

DEMO = "demo"
MAX_ID_CHARS = 128
_PART = re.compile(r"-\d{5}-of-\d{5}$")  # llama.cpp's name for the pieces of a split model


def model_id(ref: str) -> str:
    scheme, colon, rest = ref.partition(":")
    if scheme == "hf" and colon:
        return _safe(rest.removesuffix(".gguf"))
    if scheme in ("file", "http", "https") and colon:
        name = rest.partition("?")[0].rstrip("/").rpartition("/")[2]
        return _safe(_PART.sub("", name.removesuffix(".gguf")))
    return ref if model_id_ok(ref) else _safe(ref)


def _safe(text: str) -> str:
    """`text` with what an id may not have made `-`."""
    text = re.sub(r"\.{2,}", ".", re.sub(r"[^A-Za-z0-9._:/@-]", "-", text))
    return text.lstrip("._:/@-")[:MAX_ID_CHARS] or "model"
