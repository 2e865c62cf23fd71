"""Why a task goes where it goes: the dry run, per pool, filter by filter, term by term."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator

import pytest

from tests.cluster import Cluster, simulated
from tests.e2e.shared import kept, visiting


@pytest.fixture(scope="module")
def one_for_all(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    async def start(cluster: Cluster) -> None:
        await cluster.start_control()
        await asyncio.gather(
            cluster.start_node("a", [simulated("p0", "sim", 4), simulated("p1", "other", 2)]),
            cluster.start_node("b", [simulated("p0", "sim", 2)]),
        )

    with kept(tmp_path_factory.mktemp("explain"), start) as cluster:
        yield cluster


@pytest.fixture
async def llorch(one_for_all: Cluster) -> AsyncIterator[Cluster]:
    async with visiting(one_for_all) as cluster:
        yield cluster


async def test_the_dry_run_gives_every_filters_verdict_and_every_score_term_per_pool(llorch: Cluster) -> None:
    status, decision = await llorch.post(
        "/v2/placement", {"model": "sim", "prompt": "x", "placement": {"avoid": ["b"], "prefer": ["a/p0"]}}
    )
    assert status == 200
    assert (decision["outcome"], decision["node_id"], decision["pool_id"]) == ("placed", "a", "p0")
    pools = {(pool["node_id"], pool["pool_id"]): pool for pool in decision["pools"]}
    assert set(pools) == {("a", "p0"), ("a", "p1"), ("b", "p0")}
    names = [check["name"] for check in pools["a", "p0"]["filters"]]
    for pool in pools.values():
        assert [check["name"] for check in pool["filters"]] == names
        assert {"avoided", "preferred", "load", "vram_free_bytes"} <= set(pool["score"])
        assert pool["facts_age_ms"] >= 0
    refused = pools["a", "p1"]
    assert (refused["code"], refused["reason"]) == ("model", "it serves other")
    assert pools["b", "p0"]["score"]["avoided"] is True
    assert (await llorch.get("/v2/nodes/a"))["in_flight"] == 0  # a dry run takes nothing


async def test_a_refused_task_names_a_reason_per_pool(llorch: Cluster) -> None:
    for placement, status, code in (
        ({"pin": "nowhere"}, 404, "NODE_NOT_FOUND"),
        ({"pin": "a/p9"}, 404, "POOL_NOT_FOUND"),
        ({"avoid": ["a", "b"], "allow_fallback": False}, 503, "MODEL_NOT_AVAILABLE"),
        ({"zone": "mars"}, 503, "MODEL_NOT_AVAILABLE"),
    ):
        got, body = await llorch.post("/v2/tasks", {"model": "sim", "prompt": "x", "placement": placement})
        assert (got, body["error"]["code"]) == (status, code)
        assert body["error"]["hint"]


async def test_explain_prints_it_for_a_person(llorch: Cluster) -> None:
    task = await llorch.complete()

    async def explain(*argv: str) -> str:
        ran = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-m", "llorch", "explain", *argv],
            env=llorch.client_env(),
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
        return ran.stdout

    for text in await asyncio.gather(explain("--dry-run", "-m", "sim"), explain(task["task_id"])):
        assert "a/p0" in text
        assert "a/p1" in text
        assert "it serves other" in text
        assert "load" in text
