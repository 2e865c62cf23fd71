"""Which `/v1` paths are served: those of the table, letter by letter."""

from __future__ import annotations

from pathlib import Path

import pytest

from llorch.errors import Code, LlorchError
from llorch.openai_paths import SERVED, served

# What engines serve beside these, and other ways to write what is served.
ELSEWHERE = (
    "/invocations", "/pause", "/slots/0", "/props", "/metrics", "/v1/load_lora_adapter", "/v1/models",
    "/v1/chat/completions/render", "/v1/audio/transcriptions", "/v1/responses/resp_1",
    "", "/", "/v1", "/v1/", "v1/chat/completions", "/v1/chat/completions/", "//v1/chat/completions",
    "/v1//chat/completions", "/v1/Chat/completions", "/V1/chat/completions", "/v1/chat/completions?x=1",
    "/v1/chat/completions#x", "/v1/chat%2fcompletions", "/v1/%2e%2e/invocations", "/v1/../invocations",
    "/v1/chat/completions/../../props", "/v1/chat/completions\0", "/v1/chat/completions\r\nHost: x", "/v1/ü",
    "http://127.0.0.1:1/v1/chat/completions", "/v1/" + "a" * 100_000,
)  # fmt: skip


@pytest.mark.parametrize("path", sorted(SERVED))
def test_what_is_served_is_itself(path: str) -> None:
    assert served(path).path == path
    assert path.startswith("/v1/") and path == path.strip().lower() and ".." not in path and "//" not in path


def test_the_readme_has_every_path() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    assert [path for path in SERVED if f"`{path}`" not in readme] == []


@pytest.mark.parametrize("path", ELSEWHERE)
def test_no_other_path_is_served_however_it_is_written(path: str) -> None:
    with pytest.raises(LlorchError) as caught:
        served(path)
    assert caught.value.code is Code.NOT_FOUND
    assert len(caught.value.message) < 200 and caught.value.message.isprintable()
