"""Which files of a repository a reference means."""

from __future__ import annotations

import pytest

from llorch.errors import Code, LlorchError
from llorch.node.hub_files import HubFile, HubRef, choose, parse_hub


def files(*paths: str) -> list[HubFile]:
    return [HubFile(path, 1, None) for path in paths]


MANY = files(
    "README.md",
    "model-BF16.gguf",
    "model-F16.gguf",
    "model-Q4_K.gguf",
    "model-Q4_K_M.gguf",
    "model.Q8_0.gguf",
    "mmproj-F16.gguf",
    "Q6_K/model-Q6_K-00002-of-00002.gguf",
    "Q6_K/model-Q6_K-00001-of-00002.gguf",
    "broken-Q5_0-00001-of-00003.gguf",
)


@pytest.mark.parametrize(
    ("ref", "chosen"),
    [
        ("hf:o/r", ["model-Q4_K_M.gguf"]),
        ("hf:o/r:q4_k_m", ["model-Q4_K_M.gguf"]),
        ("hf:o/r:Q4_K", ["model-Q4_K.gguf"]),
        ("hf:o/r:F16", ["model-F16.gguf"]),
        ("hf:o/r:Q8_0", ["model.Q8_0.gguf"]),
        ("hf:o/r:Q6_K", ["Q6_K/model-Q6_K-00001-of-00002.gguf", "Q6_K/model-Q6_K-00002-of-00002.gguf"]),
        ("hf:o/r/model-BF16.gguf", ["model-BF16.gguf"]),
        (
            "hf:o/r/Q6_K/model-Q6_K-00001-of-00002.gguf",
            ["Q6_K/model-Q6_K-00001-of-00002.gguf", "Q6_K/model-Q6_K-00002-of-00002.gguf"],
        ),
    ],
)
def test_a_reference_means_these(ref: str, chosen: list[str]) -> None:
    assert [file.path for file in choose(MANY, parse_hub(ref))] == chosen


@pytest.mark.parametrize(
    ("ref", "why"),
    [
        ("hf:o/r:Q2_K", "no GGUF of Q2_K"),
        ("hf:o/r:Q5_0", "no GGUF of Q5_0"),  # two of its three parts are missing
        ("hf:o/r/other.gguf", "no other.gguf"),
        ("hf:o/r/Q6_K/model-Q6_K-00002-of-00002.gguf", "no Q6_K"),
        ("hf:o/r/README.md", "no README.md"),
    ],
)
def test_what_is_not_there_is_told_with_what_is(ref: str, why: str) -> None:
    with pytest.raises(LlorchError, match=why) as failed:
        choose(MANY, parse_hub(ref))
    assert failed.value.code is Code.MODEL_NOT_FOUND and "model-F16.gguf" in str(failed.value.hint)


def test_the_only_one_is_meant_and_of_several_a_person_says_which() -> None:
    assert choose(files("a.gguf", "b.txt"), HubRef("o/r"))[0].path == "a.gguf"
    with pytest.raises(LlorchError, match="several GGUFs and none of Q4_K_M"):
        choose(files("a-Q8_0.gguf", "a-F16.gguf"), HubRef("o/r"))
    with pytest.raises(LlorchError, match="has 2 models of Q8_0") as failed:
        choose(files("a-Q8_0.gguf", "b-Q8_0.gguf"), HubRef("o/r", "Q8_0"))
    assert failed.value.hint == "give one of its files, hf:org/repo/FILE: a-Q8_0.gguf, b-Q8_0.gguf"
    with pytest.raises(LlorchError, match="has no GGUF"):
        choose(files("model.safetensors"), HubRef("o/r"))
