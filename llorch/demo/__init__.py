"""The model in the box: a tiny one with random weights, so that everything can be tried with nothing to download.

Owns where it lies. Its text is noise on purpose; its card is README.md beside this file.
"""

from __future__ import annotations

from pathlib import Path


def model_path() -> str:
    """The absolute path of the demo model, a GGUF."""
    return str(Path(__file__).resolve().with_name("demo.gguf"))
