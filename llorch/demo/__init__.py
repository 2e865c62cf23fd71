"""The model in the box: a tiny llama with random weights, so that a first task runs offline and without a download.

Owns where that file is. Never reads it: `tests/make_demo_model.py` made it, an engine opens it.
"""

from __future__ import annotations

from importlib.resources import files


def model_path() -> str:
    """The absolute path of the GGUF."""
    return str(files(__name__) / "demo.gguf")
