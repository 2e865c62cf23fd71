"""Staging from the web: what comes is what was meant, however the line breaks, and what is not is told and not kept."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from llorch.errors import Code, ConfigError, LlorchError
from llorch.node.catalog import Catalog, LocalModel
from llorch.node.peers import Peers
from llorch.node.staging import Stager, StagingLimits
from llorch.wishes import StageOrder
from tests.cluster import eventually
from tests.gguf_files import small
from tests.standins.blob_server import BlobServer, blob_server

SIZE = 3_000_000


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@contextlib.asynccontextmanager
async def staging(data: Path, limits: StagingLimits | None = None) -> AsyncIterator[Stager]:
    async with Stager(Catalog(data), "here", limits or StagingLimits(), Peers()) as stager:
        yield stager


@pytest.fixture
async def place() -> AsyncIterator[BlobServer]:
    async with blob_server() as served:
        yield served


async def ensure(stager: Stager, ref: str, **order: object) -> LocalModel:
    said: list[str] = []
    return await stager.ensure(StageOrder(ref=ref, **order), said.append)  # type: ignore[arg-type]


def partials(data: Path) -> list[str]:
    return sorted(path.name for path in (data / "models").rglob("*") if ".partial" in path.name)


async def test_a_model_is_staged_once_and_reported_with_its_digest(tmp_path: Path, place: BlobServer) -> None:
    data = place.files["/a/my-model.gguf"] = small(SIZE, ctx=777)
    ref = f"{place.url}/a/my-model.gguf"
    async with staging(tmp_path) as stager:
        found, again = await asyncio.gather(ensure(stager, ref), ensure(stager, ref))
        assert found.path.read_bytes() == data and again.path == found.path
        assert (found.id, found.sha256, found.ctx_train) == ("my-model", sha256(data), 777)
        [report] = stager.catalog.report()
        assert (report.state, report.sha256, report.ref, report.size_bytes) == ("staged", sha256(data), ref, SIZE)
        assert (await stager.order(StageOrder(ref=ref)))["state"] == "staged"
        assert stager.catalog.find(ref) == stager.catalog.find("my-model") == str(found.path)
    assert place.sent == SIZE and len(place.requests) == 1
    assert partials(tmp_path) == []
    assert [report.sha256 for report in Catalog(tmp_path).report()] == [sha256(data)]


async def test_a_line_that_breaks_again_and_again_is_gone_on_with(tmp_path: Path, place: BlobServer) -> None:
    data = place.files["/m.gguf"] = small(SIZE)
    place.cuts.extend([1_400_000, 10, 800_000])
    place.statuses.append(503)
    async with staging(tmp_path) as stager:
        found = await ensure(stager, f"{place.url}/m.gguf", sha256=sha256(data), size_bytes=SIZE)
        assert found.path.read_bytes() == data
    assert place.sent - SIZE < 1_000_000  # what a broken connection still held
    assert len(place.requests) == 5 and place.requests[-1][1]["If-Range"] == '"v1"'


async def test_without_a_validator_and_without_a_digest_nothing_is_pieced_together(
    tmp_path: Path, place: BlobServer
) -> None:
    data = place.files["/m.gguf"] = small(SIZE)
    place.etag = None
    place.cuts.append(2_000_000)
    async with staging(tmp_path) as stager:
        assert (await ensure(stager, f"{place.url}/m.gguf")).path.read_bytes() == data
    assert place.sent == SIZE + 2_000_000


async def test_a_file_that_changes_on_the_way_is_fetched_anew(tmp_path: Path, place: BlobServer) -> None:
    place.files["/m.gguf"] = small(SIZE)
    place.hold_at = 1_900_000
    place.cuts.append(2_000_000)
    async with staging(tmp_path) as stager:
        fetching = asyncio.create_task(ensure(stager, f"{place.url}/m.gguf"))
        await eventually(lambda: place.sent >= 1_800_000)
        data = place.files["/m.gguf"] = small(SIZE)
        place.etag = '"v2"'
        place.hold_at = None
        place.go.set()
        assert (await fetching).path.read_bytes() == data


@pytest.mark.parametrize("known", [True, False])
async def test_an_agent_that_stops_goes_on_where_it_was(tmp_path: Path, place: BlobServer, known: bool) -> None:
    data = place.files["/m.gguf"] = small(SIZE)
    place.hold_at = 2_500_000
    order = StageOrder(ref=f"{place.url}/m.gguf", model="org/other:name", sha256=sha256(data) if known else None)
    async with staging(tmp_path) as stager:
        assert await stager.order(order) == {"model": "org/other:name", "state": "staging", "progress": 0.0}
        await eventually(lambda: stager.catalog.report()[0].progress or 0.0 > 0.6)
        await eventually(lambda: place.sent >= 2_400_000)
    assert partials(tmp_path) == ["m.gguf.partial", "m.gguf.partial.json"]
    place.hold_at, sent = None, place.sent
    async with staging(tmp_path) as stager:
        assert stager.catalog.report()[0].state == "staging"
        await eventually(lambda: stager.catalog.report()[0].state == "staged")
        assert Path(stager.catalog.find("org/other:name")).read_bytes() == data
    assert place.sent - sent < 1_300_000 and place.ranges_asked()[-1] is not None


async def test_a_wrong_digest_leaves_nothing_and_says_both(tmp_path: Path, place: BlobServer) -> None:
    data = place.files["/m.gguf"] = small(SIZE)
    async with staging(tmp_path) as stager:
        with pytest.raises(LlorchError, match="has the digest") as failed:
            await ensure(stager, f"{place.url}/m.gguf", sha256="ab" * 32)
        assert failed.value.code is Code.DIGEST_MISMATCH and failed.value.status == 422
        assert "abababababab..." in failed.value.message and sha256(data)[:12] in failed.value.message
        [report] = stager.catalog.report()
        assert report.state == "failed"
        entry = stager.catalog.get("m")
        assert entry is not None and entry.error is not None and "DIGEST_MISMATCH" in entry.error
        assert stager.catalog.look("m") is None
        assert [path for path in (tmp_path / "models").rglob("*") if path.is_file()] == []
        with pytest.raises(LlorchError, match="were meant"):
            await ensure(stager, f"{place.url}/m.gguf", model="n", size_bytes=5)
        assert (await ensure(stager, f"{place.url}/m.gguf")).sha256 == sha256(data)  # and what is right still comes
        place.files["/m.gguf"] = LYING
        with pytest.raises(LlorchError, match="has the digest"):  # nothing reads what is not what was meant
            await ensure(stager, f"{place.url}/m.gguf", model="o", sha256="ab" * 32)


LYING = small(4096)[:8] + b"\xff" * 8 + small(4096)[16:]
TRUNCATED = small(4096)[:60]


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"<html>not found</html>" * 10, "is not a GGUF"),
        (LYING, "claims"),
        (TRUNCATED, "cut short"),
        (b"GGUF" + bytes(4), "its version is 0"),
    ],
    ids=["a page", "lying counts", "truncated", "a stub"],
)
async def test_what_is_no_usable_model_is_not_kept(tmp_path: Path, place: BlobServer, body: bytes, why: str) -> None:
    place.files["/m.gguf"] = body
    async with staging(tmp_path) as stager:
        with pytest.raises(LlorchError, match=why) as failed:
            await ensure(stager, f"{place.url}/m.gguf")
        assert failed.value.code is Code.MODEL_NOT_AVAILABLE and not failed.value.retriable
        assert stager.catalog.report()[0].state == "failed"
    assert list((tmp_path / "models").rglob("*.gguf")) == []


async def test_what_a_place_may_not_do(tmp_path: Path, place: BlobServer) -> None:
    place.files["/m.gguf"] = small()
    ref = f"{place.url}/m.gguf"
    async with staging(tmp_path) as stager:
        for change, why in (
            ({"encoding": "gzip"}, "packed"),
            ({"length": False}, "does not say how long"),
            ({"redirects": {"/m.gguf": "http://models.example/m.gguf"}}, "plain HTTP"),
            ({"redirects": {"/m.gguf": "file:///etc/passwd"}}, "no URL"),
            ({"redirects": {"/m.gguf": "/m.gguf"}}, "more than 5 times"),
        ):
            before = {name: getattr(place, name) for name in change}
            for name, value in change.items():
                setattr(place, name, value)
            with pytest.raises(LlorchError, match=why):
                await ensure(stager, ref)
            for name, value in before.items():
                setattr(place, name, value)
        place.statuses.append(404)
        with pytest.raises(LlorchError, match="no such file") as failed:
            await ensure(stager, ref)
        assert failed.value.code is Code.MODEL_NOT_FOUND
        place.redirects = {"/first.gguf": place.url.replace("127.0.0.1", "localhost") + "/m.gguf"}
        assert (await ensure(stager, f"{place.url}/first.gguf?sig=secret")).size_bytes == 4096
        shown = stager.catalog.report()
        assert "secret" not in json.dumps([one.model_dump() for one in shown])


async def test_a_full_disk_is_refused_before_the_first_byte_and_told_in_numbers(
    tmp_path: Path, place: BlobServer
) -> None:
    place.files["/m.gguf"] = small(SIZE)
    async with staging(tmp_path, StagingLimits(headroom_bytes=1 << 60)) as stager:
        with pytest.raises(LlorchError, match=r"needs 2\.9 MiB more.*GiB are free") as failed:
            await ensure(stager, f"{place.url}/m.gguf")
    assert failed.value.status == 507 and "--stage-headroom" in str(failed.value.hint)
    assert partials(tmp_path) == []


async def test_a_disk_that_becomes_full_keeps_what_is_there(
    tmp_path: Path, place: BlobServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno
    import os

    data = place.files["/m.gguf"] = small(SIZE)
    real, room = os.pwrite, 2_000_000

    def full(descriptor: int, view: memoryview, offset: int) -> int:
        if offset + len(view) > room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, view, offset)

    monkeypatch.setattr(os, "pwrite", full)
    async with staging(tmp_path) as stager:
        with pytest.raises(LlorchError) as failed:
            await ensure(stager, f"{place.url}/m.gguf")
        assert failed.value.code is Code.INSUFFICIENT_STORAGE
        assert partials(tmp_path) == ["m.gguf.partial", "m.gguf.partial.json"]
        monkeypatch.setattr(os, "pwrite", real)
        asked = len(place.requests)
        assert (await ensure(stager, f"{place.url}/m.gguf")).path.read_bytes() == data
        assert str(place.requests[asked][1]["Range"]).removeprefix("bytes=") != "0-"


async def test_a_rate_is_kept_by_all_together(tmp_path: Path, place: BlobServer) -> None:
    refs = []
    for name in ("a", "b"):
        place.files[f"/{name}.gguf"] = small(1_000_000)
        refs.append(f"{place.url}/{name}.gguf")
    started = asyncio.get_running_loop().time()
    async with staging(tmp_path, StagingLimits(rate_bytes_s=2_000_000)) as stager:
        await asyncio.gather(*(ensure(stager, ref) for ref in refs))
    assert asyncio.get_running_loop().time() - started >= (2_000_000 - 262_144) / 2_000_000 - 0.05


async def test_no_more_are_staged_at_once_than_may(tmp_path: Path, place: BlobServer) -> None:
    place.hold_at = 65_536
    for number in range(3):
        place.files[f"/m{number}.gguf"] = small(200_000)
    async with staging(tmp_path, StagingLimits(at_once=2)) as stager:
        waits = [asyncio.create_task(ensure(stager, f"{place.url}/m{number}.gguf")) for number in range(3)]
        await eventually(lambda: place.sent >= 2 * 65_536)
        assert len(place.requests) == 2
        place.go.set()
        await asyncio.gather(*waits)


async def test_what_is_being_staged_can_be_given_up(tmp_path: Path, place: BlobServer) -> None:
    place.files["/m.gguf"] = small(SIZE)
    place.hold_at = 1_500_000
    async with staging(tmp_path) as stager:
        waits = asyncio.create_task(ensure(stager, f"{place.url}/m.gguf"))
        await eventually(lambda: place.sent >= 1_400_000)
        await stager.remove("m")
        with pytest.raises(LlorchError, match="given up"):
            await waits
        assert stager.catalog.report() == []
    assert list((tmp_path / "models").iterdir()) == []


async def test_a_name_is_one_model_and_another_is_refused(tmp_path: Path, place: BlobServer) -> None:
    place.files["/a/m.gguf"], place.files["/b/m.gguf"] = small(), small()
    async with staging(tmp_path) as stager:
        await ensure(stager, f"{place.url}/a/m.gguf")
        assert stager.catalog.look(f"{place.url}/b/m.gguf") is None
        with pytest.raises(LlorchError, match="another model is here") as failed:
            await ensure(stager, f"{place.url}/b/m.gguf")
        assert failed.value.code is Code.CONFLICT
        with pytest.raises(LlorchError, match="which is here") as failed:
            await ensure(stager, "m", sha256="ab" * 32)
        assert failed.value.code is Code.DIGEST_MISMATCH


@pytest.mark.parametrize("ref", ["hf:../x", "file:/a/../b", "-x", "a\0b", "http://models.example/m.gguf", "file:rel"])
async def test_what_is_no_reference_is_refused(tmp_path: Path, ref: str) -> None:
    async with staging(tmp_path) as stager:
        with pytest.raises(ConfigError) as failed:
            await stager.order(StageOrder(ref=ref))
        assert failed.value.code is Code.INVALID_REQUEST
        with pytest.raises(ConfigError):
            await stager.order(StageOrder(ref="demo", model="a..b"))


async def test_progress_is_said_in_words(tmp_path: Path, place: BlobServer) -> None:
    place.files["/m.gguf"] = small(SIZE)
    place.hold_at, said = 1_500_000, list[str]()
    async with staging(tmp_path) as stager:
        waits = asyncio.create_task(stager.catalog.ensure(f"{place.url}/m.gguf", said.append))
        await eventually(lambda: any(" % of 2.9 MiB, " in text for text in said))
        place.go.set()
        await waits
    assert said[0] == f"staging {place.url}/m.gguf: waits for its turn"
