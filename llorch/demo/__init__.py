"""The model in the box: a very small story teller, so that everything can be tried with nothing to download.

Owns where it lies. What it is and how it was made: README.md beside this file, and `examples/demo-model/`.
"""

from __future__ import annotations

from pathlib import Path


def model_path() -> str:
    """The absolute path of the demo model, a GGUF."""
    return str(Path(__file__).resolve().with_name("demo.gguf"))
