"""What of a start is written down, what the next agent makes of it, and with what an engine is started."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llorch.config_pools import PoolSpec
from llorch.errors import ConfigError
from llorch.node.engine_record import Left, Named, Record, Verdict
from llorch.node.engine_start import EngineStart, Identity, Starts, _digest, identity_of
from llorch.node.engines.command import Command
from llorch.node.engines.llama_server import LlamaServer
from llorch.node.engines.simulated import Simulated
from llorch.node.engines.vllm import Vllm
from llorch.node.handoff import parse, render
from llorch.node.plans import Plan
from llorch.node.pool_events import Spawn
from tests.starts import STARTS

META = {"pool_id": "p", "replica_id": "r0", "model": "m", "ref": "m", "launch": "abc"}


def left(meta: Any, name: str = "p-r0.json") -> Left:
    record = Record(Named(100, 1), Named(99, 1), None, "", 4321, "/run/keys/p-r0-00000000.key", meta)
    return Left(name, Verdict.OURS, "", record)


def plan(**changes: Any) -> Plan:
    return Plan(PoolSpec(id="p", engine="simulated", model="m", **changes), Simulated("python"), {"m": "m"})


def same(one: Plan, meta: Any, starts: Starts = STARTS) -> bool:
    found = left(meta)
    identity = identity_of(found)
    return identity is not None and asyncio.run(starts.same(one, identity, found))[0]


def written(one: Plan, starts: Starts, model: str, ref: str, path: str | None) -> dict[str, str]:
    """What an agent would have written down of a start."""
    launch = starts.launch(one, model, 4321, "/run/keys/p-r0-00000000.key", path)
    return META | {"model": model, "ref": ref, "launch": _digest(launch)}


# ---------------------------------------------------------------- identities


def test_what_was_written_down_is_known_again_and_offered_as_it_was() -> None:
    identity = identity_of(left(META | {"version": "b9000"}))
    assert identity == Identity("p", "r0", "m", "m", "abc", "b9000")
    handoff = identity.handoff(plan(slots=3), left(META))
    assert parse("p-r0.json", render(handoff)) == handoff
    assert (handoff.url, handoff.slots, handoff.pid) == ("http://127.0.0.1:4321", 3, 100)


@pytest.mark.parametrize(
    "meta",
    [{}, META | {"model": "../x"}, META | {"model": 7}, META | {"ref": None}, META | {"pool_id": "q"},
     META | {"replica_id": "r1"}, META | {"pool_id": ["p"]}, {**META, "launch": {"a": 1}}],
)  # fmt: skip
def test_what_nobody_wrote_is_no_engine_of_ours(meta: Any) -> None:
    assert identity_of(left(meta)) is None


@settings(max_examples=100, deadline=None)
@given(
    meta=st.dictionaries(
        st.sampled_from([*META, "version", "x"]),
        st.none() | st.integers() | st.text(max_size=20) | st.lists(st.text(max_size=5), max_size=2),
    )
)
def test_any_meta_is_an_identity_or_none(meta: Any) -> None:
    identity = identity_of(left(meta))
    assert identity is None or f"{identity.pool_id}-{identity.replica_id}.json" == "p-r0.json"


# ---------------------------------------------------------------- the same engine


def test_an_engine_is_the_same_while_its_start_would_be_word_for_word() -> None:
    starts, one = STARTS, plan(slots=2)
    meta = written(one, starts, "m", "m", None)
    assert same(one, meta)
    for other in (plan(slots=3), plan(slots=2, args=("--delay-ms", "5")), plan(slots=2, env=(("A", "b"),))):
        assert not same(other, meta)
    assert not same(replace(one, engine=None), meta), "it can't be planned any more"


def test_the_value_of_a_secret_in_its_environment_makes_it_another_and_is_not_written_down() -> None:
    starts, one = STARTS, plan(env=(("TOKEN", "s3cret"),))
    meta = written(one, starts, "m", "m", None)
    assert same(one, meta) and not same(plan(env=(("TOKEN", "other"),)), meta)
    assert "s3cret" not in str(meta)


def test_whether_it_is_the_same_is_found_out_without_fetching_its_model(tmp_path: Path) -> None:
    async def fetch(_ref: str, _said: Any) -> Any:
        raise AssertionError("a node that starts must not wait for gigabytes")

    file = SimpleNamespace(path=tmp_path / "m.gguf", size_bytes=1)
    spec = PoolSpec(id="p", engine="llama-server", model="hf:org/m")
    one = Plan(spec, LlamaServer("/usr/bin/llama-server", "b1"), {"org/m": "hf:org/m"})
    here = replace(STARTS, model=fetch, here=lambda _ref: file)
    meta = written(one, here, "org/m", "hf:org/m", str(file.path))
    assert same(one, meta, here)
    assert not same(one, meta, replace(here, here=lambda _ref: None)), "its file is gone"
    assert not same(one, meta, replace(here, here=lambda _ref: SimpleNamespace(path=tmp_path / "other.gguf")))

    def refused(_ref: str) -> Any:
        raise ConfigError("it is no GGUF any more")

    assert not same(one, meta, replace(here, here=refused))


# ---------------------------------------------------------------- launches


def test_parts_of_a_gpu_are_named_as_cuda_knows_them_and_no_gpus_are_no_mask() -> None:
    spec = PoolSpec(id="p", engine="command", model="m", command=("/bin/serve", "{gpus}"), gpus=(0, 1))
    starts = replace(STARTS, mask=lambda gpus: ",".join(f"MIG-{gpu}" for gpu in gpus))
    one = Plan(spec, Command(), {"m": "m"})
    assert starts.launch(one, "m", 1, "/k", None).env["CUDA_VISIBLE_DEVICES"] == "MIG-0,MIG-1"
    none = replace(one, spec=replace(spec, gpus=()))
    assert starts.launch(none, "m", 1, "/k", None).env["CUDA_VISIBLE_DEVICES"] == ""
    own = replace(one, spec=replace(spec, gpus=None))
    assert "CUDA_VISIBLE_DEVICES" not in starts.launch(own, "m", 1, "/k", None).env


@pytest.mark.parametrize(
    ("ref", "path"), [("hf:org/repo", "org/repo"), ("file:/models/folder", "/models/folder"),
                      ("hf:org/repo:Q4", None), ("hf:org/repo/a.gguf", None), ("file:/m/a.gguf", None)]
)  # fmt: skip
def test_an_engine_that_fetches_by_itself_is_given_the_name(ref: str, path: str | None) -> None:
    fetched: list[str] = []

    async def fetch(one: str, _said: Any) -> Any:
        fetched.append(one)
        return SimpleNamespace(path="/staged", size_bytes=1)

    spec = PoolSpec(id="p", engine="vllm", model=ref)
    found = asyncio.run(
        replace(STARTS, model=fetch).local(Plan(spec, Vllm(("vllm",), "1"), {"m": ref}), ref, lambda _text: None)
    )
    assert fetched == ([] if path else [ref])
    assert (found is None) is (path is not None)


# ---------------------------------------------------------------- a start that does not come to a process


def live(start: EngineStart, starts: Starts) -> Any:
    def never(*_args: Any) -> Any:
        raise AssertionError("there is to be no process")

    return asyncio.run(start.live(starts, never, never, {}, said=lambda _text: None, up=never))


def test_a_pool_that_could_not_be_planned_is_planned_for_the_model_that_is_to_start() -> None:
    """Another of its models may be the one that is broken."""
    asked: list[PoolSpec] = []

    async def again(spec: PoolSpec) -> Plan:
        asked.append(spec)
        raise ConfigError("pool p: still not", hint="mend it")

    spec = PoolSpec(id="p", engine="llamacpp", model="file:/bad.gguf", models=("file:/worse.gguf",))
    start = EngineStart(Spawn("p", "r0", 1, "good", "file:/good.gguf"), Plan(spec, None, {}))
    end = live(start, replace(STARTS, plan=again))
    assert (end.reason, end.hopeless) == ("pool p: still not", True)
    assert [(one.model, one.models) for one in asked] == [("file:/good.gguf", ())]


def test_a_start_that_was_told_to_end_before_it_began_fetches_nothing_more() -> None:
    async def fetch(_ref: str, _said: Any) -> Any:
        await asyncio.Event().wait()

    spec = PoolSpec(id="p", engine="llama-server", model="hf:org/m")
    start = EngineStart(Spawn("p", "r0", 1, "m", "hf:org/m"), Plan(spec, LlamaServer("/x", "b1"), {"m": "hf:org/m"}))
    start.terminate()
    end = live(start, replace(STARTS, model=fetch))
    assert "told to end" in end.reason and not end.hopeless
