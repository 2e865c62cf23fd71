"""The model in the box is what its script makes, and what its card says."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from llorch import demo
from llorch.node.engines.gguf import Header, read_header

MAX_BYTES = 700_000


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_script_makes_the_committed_file(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    from tests import make_demo_model

    made = tmp_path / "demo.gguf"
    make_demo_model.write(made)
    assert sha256(made) == sha256(Path(demo.model_path()))


def test_its_header_says_what_a_node_needs_to_know() -> None:
    header = read_header(Path(demo.model_path()))
    assert header == Header(3, 21, "llama", "llorch demo (random weights)", 2048, "F16", True)


def test_it_stays_small_and_its_path_is_absolute() -> None:
    path = Path(demo.model_path())
    assert path.is_absolute()
    assert path.stat().st_size <= MAX_BYTES


def test_its_card_names_the_vocabulary_it_has() -> None:
    pytest.importorskip("gguf")
    from tests import make_demo_model

    card = Path(demo.model_path()).with_name("README.md").read_text()
    assert f"{len(make_demo_model.pieces()):,} pieces" in card
