"""The model in the box is what its card says, and small."""

from __future__ import annotations

from pathlib import Path

import pytest

from llorch import demo
from llorch.node.engines.gguf import read_header

MAX_BYTES = 2_000_000


def test_its_header_says_what_a_node_needs_to_know() -> None:
    header = read_header(Path(demo.model_path()))
    assert (header.version, header.architecture, header.name) == (3, "llama", "llorch demo")
    assert (header.ctx_train, header.file_type, header.has_chat_template) == (2048, "Q8_0", True)


def test_it_stays_small_and_its_path_is_absolute() -> None:
    path = Path(demo.model_path())
    assert path.is_absolute()
    assert path.stat().st_size <= MAX_BYTES


def test_its_card_tells_its_size_and_its_vocabulary() -> None:
    path = Path(demo.model_path())
    card = path.with_name("README.md").read_text()
    assert f"{path.stat().st_size:,} bytes" in card
    gguf = pytest.importorskip("gguf")
    tokens = gguf.GGUFReader(path).fields["tokenizer.ggml.tokens"]
    assert f"{len(tokens.data):,} pieces" in card


def test_its_card_tells_how_it_is_sampled_where_a_request_does_not_say() -> None:
    gguf = pytest.importorskip("gguf")
    path = Path(demo.model_path())
    min_p = float(gguf.GGUFReader(path).fields["general.sampling.min_p"].contents())
    assert f"min_p {min_p:.2f}" in path.with_name("README.md").read_text()
