"""Where a redirect may lead, and how a staging reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from llorch.errors import LlorchError
from llorch.node.staging_http import Download, Remote
from llorch.node.staging_job import Job, in_bytes
from llorch.node.staging_partial import Partial
from llorch.wishes import StageOrder

HTTPS, LOCAL = "https://models.example/m.gguf", "http://127.0.0.1:8000/m.gguf"


def download(url: str) -> Download:
    nothing = cast(Any, None)
    return Download(
        nothing, Remote("m.gguf", url, "there"), Partial(Path("/"), "m"), room=nothing, at=nothing, pace=nothing
    )


@pytest.mark.parametrize(
    ("url", "location", "leads_to"),
    [
        (HTTPS, "/other.gguf?a=%2F", "https://models.example/other.gguf?a=%2F"),
        (HTTPS, "https://cdn.example/x", "https://cdn.example/x"),
        (LOCAL, "/x", "http://127.0.0.1:8000/x"),
        (LOCAL, "http://localhost:1/x", "http://localhost:1/x"),
        (LOCAL, "https://cdn.example/x", "https://cdn.example/x"),
    ],
)
def test_a_redirect_leads_on(url: str, location: str, leads_to: str) -> None:
    assert download(url)._redirect(url, location) == leads_to


@pytest.mark.parametrize(
    ("url", "location", "why"),
    [
        (HTTPS, "http://models.example/m.gguf", "plain HTTP"),
        (HTTPS, "http://127.0.0.1/admin", "plain HTTP"),
        (LOCAL, "http://10.0.0.1/x", "plain HTTP"),
        (HTTPS, "https://127.0.0.1/admin", "this machine itself"),
        (HTTPS, "https://[::ffff:127.0.0.1]/admin", "this machine itself"),
        (HTTPS, "https://localhost/admin", "this machine itself"),
        (HTTPS, "file:///etc/passwd", "no URL"),
        (HTTPS, "https://user:password@models.example/x", "no URL"),
        (HTTPS, "https://models.example:99999/x", "no URL"),
        (HTTPS, "https://[::1", "no URL"),
        (HTTPS, "https://models.example/a b", "no URL"),
        (HTTPS, "https://models.example/\u00e4", "no URL"),
    ],
)
def test_a_redirect_that_leads_astray_is_not_followed(url: str, location: str, why: str) -> None:
    with pytest.raises(LlorchError, match=why) as refused:
        download(url)._redirect(url, location)
    assert "password" not in refused.value.message and not refused.value.retriable


def test_how_far_a_staging_is_reads_like_this() -> None:
    job = Job("m", StageOrder(ref="https://h/m.gguf?sig=secret"))
    assert job.words() == "staging https://h/m.gguf: waits for its turn" and job.progress == 0
    job.step, job.total_bytes = "fetches", 8 << 30
    job.at(2 << 30)
    assert job.words() == "staging https://h/m.gguf: 25 % of 8.0 GiB, 0 B/s"
    assert [in_bytes(count) for count in (0, 1023, 1024, 1 << 20, 150 << 20, 3 << 40)] == [
        "0 B", "1023 B", "1 KiB", "1.0 MiB", "150 MiB", "3072 GiB",
    ]  # fmt: skip
