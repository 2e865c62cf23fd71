"""Plans for the pools of the settings: whole when they are read anew, as far as it goes when a node starts."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llorch.config import NodeSettings
from llorch.config_pools import PoolSpec
from llorch.errors import ConfigError
from llorch.node import planner as module
from llorch.node.catalog import Catalog
from llorch.node.engines.auto import EngineFacts
from llorch.node.planner import Planner

GOOD = PoolSpec(id="good", engine="llamacpp", model="demo")
SIMULATED = PoolSpec(id="s", engine="simulated", model="m")


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """How often the machine was asked for its engines, which takes seconds; it has llama.cpp's wheel."""
    times: list[object] = []

    def detect(*given: Any, **more: Any) -> EngineFacts:
        times.append((given, more))
        return EngineFacts(python="python", xllamacpp_version="1.0")

    monkeypatch.setattr(module, "detect", detect)
    return times


def planner(*pools: PoolSpec, gpus: frozenset[int] = frozenset(), **more: Any) -> tuple[Planner, NodeSettings]:
    settings = NodeSettings(pools=pools, **{"allow_cpu": True} | more)
    return Planner(settings, Catalog(), gpus), settings


def bad(folder: Path) -> PoolSpec:
    (folder / "bad.gguf").write_bytes(b"no model")
    return PoolSpec(id="bad", engine="llamacpp", model=f"file:{folder}/bad.gguf")


def test_at_the_start_a_pool_that_can_not_be_planned_is_listed_with_the_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made, given = planner(bad(tmp_path), GOOD, SIMULATED)
    plans = {plan.spec.id: plan for plan in made.plans(given)}
    assert plans["bad"].engine is None and "not a usable GGUF" in (plans["bad"].refusal or "")
    assert plans["bad"].wanted.choices == {"bad": f"file:{tmp_path}/bad.gguf"}
    assert plans["good"].refusal is None and plans["s"].refusal is None
    assert caplog.text.count("pool.refused") == 1


def test_at_the_start_a_node_without_one_good_pool_is_refused(tmp_path: Path) -> None:
    made, given = planner(bad(tmp_path))
    with pytest.raises(ConfigError, match="not a usable GGUF"):
        made.plans(given)
    with pytest.raises(ConfigError, match="not a usable GGUF"):
        made.plans(given, {"another"})
    [listed] = made.plans(given, {"bad"})
    assert listed.refusal is not None, "an operator may have given it another model"
    made, given = planner()
    assert made.plans(given) == [], "one without pools is not"


def test_read_anew_one_bad_pool_refuses_all_and_the_same_pools_are_no_change(tmp_path: Path) -> None:
    made, given = planner(SIMULATED)
    made.plans(given)
    assert made.other(given) is None
    with pytest.raises(ConfigError, match="pool bad"):
        made.other(replace(given, pools=(SIMULATED, bad(tmp_path))))
    found = made.other(replace(given, pools=(SIMULATED, GOOD)))
    assert found is not None and [plan.spec.id for plan in found] == ["s", "good"]


def test_pools_that_were_planned_and_then_refused_for_another_reason_are_a_change_still() -> None:
    """A certificate beside them could not be used: once it is mended, they are what is new."""
    made, given = planner(SIMULATED)
    made.plans(given)
    new = replace(given, pools=(SIMULATED, GOOD))
    assert made.other(new) is not None
    assert made.other(new) is not None
    made.settled(new)
    assert made.other(new) is None and made.other(given) is not None


def test_the_machine_is_asked_for_its_engines_once_and_only_if_a_pool_needs_one(asked: list[object]) -> None:
    made, given = planner(SIMULATED, replace(SIMULATED, id="t"))
    made.plans(given)
    assert asked == []
    made.other(replace(given, pools=(GOOD, replace(GOOD, id="other"))))
    assert len(asked) == 1


def test_one_that_could_not_be_planned_is_planned_anew_with_what_there_is_then(tmp_path: Path) -> None:
    spec = bad(tmp_path)
    made, given = planner(spec, SIMULATED)
    made.plans(given)
    with pytest.raises(ConfigError, match="pool bad"):
        asyncio.run(made.again(spec))
    assert asyncio.run(made.again(replace(spec, model="demo"))).engine is not None


@pytest.mark.parametrize(
    ("pool", "why"),
    [
        (replace(GOOD, gpus=(3,)), "there is no GPU 3: this machine has 0"),
        (replace(GOOD, model=None), "it needs a model"),
        (replace(GOOD, model="file:/a/../b.gguf"), "leads through"),
        (replace(GOOD, model="-rf"), "model"),
        (replace(GOOD, model="file:/nonexistent/m.gguf"), "can't be read"),
        (replace(GOOD, model="https://a/x.gguf", models=("https://b/x.gguf",)), "both called x"),
        (replace(GOOD, engine="vllm"), "vllm"),
        (replace(GOOD, engine="llama-server"), "llama-server was not found"),
    ],
)  # fmt: skip
def test_what_can_not_be_is_refused_with_the_pools_name(pool: PoolSpec, why: str) -> None:
    made, given = planner(pool, gpus=frozenset({0}))
    with pytest.raises(ConfigError) as caught:
        made.other(given)
    assert caught.value.message.startswith("pool good: ") and why in caught.value.message


def test_what_has_to_be_fetched_is_no_reason_to_refuse_a_pool() -> None:
    made, given = planner(replace(GOOD, model="hf:org/repo:Q4"), replace(GOOD, id="u", model="https://h/m.gguf"))
    assert [plan.refusal for plan in made.plans(given)] == [None, None]
