"""What a node's memory says to a start, and who else wants it, from GPUs and RAM of the test's own."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llorch.config_hours import parse
from llorch.config_pools import PoolSpec
from llorch.messages import Gpu
from llorch.node.catalog import LocalModel
from llorch.node.engine_start import EngineStart
from llorch.node.engines import gguf
from llorch.node.engines.llama_server import LlamaServer
from llorch.node.engines.simulated import Simulated
from llorch.node.gpu import GpuInventory
from llorch.node.machine import Machine
from llorch.node.plans import Plan
from llorch.node.ram import Ram
from tests import gguf_bytes

GIB = 1 << 30
SPEC = PoolSpec(id="p", engine="llama-server", model="demo", gpus=(0,), slots=1, ctx=256)


def gpu(index: int = 0, used: int = 0, foreign: int = 0, total: int = 80 * GIB, **more: Any) -> Gpu:
    return Gpu(
        index=index, uuid=f"GPU-{index}", name="H200", vram_total_bytes=total, vram_used_bytes=used,
        vram_foreign_bytes=foreign, utilization=0.0, **more,
    )  # fmt: skip


class Cards:
    """Stands in for the inventory."""

    def __init__(self, *gpus: Gpu) -> None:
        self.gpus = list(gpus)
        self.asked: list[frozenset[int]] = []
        self.held: int | None = None

    def read(self, own_pids: Any = ()) -> list[Gpu]:
        self.asked.append(frozenset(own_pids))
        return list(self.gpus)

    def held_bytes(self, _pids: Any) -> int | None:
        return self.held

    def close(self) -> None:
        pass


def machine(folder: Path, cards: Cards, ram: int = 64 * GIB, at: str = "2026-01-05T12:00", now: Any = None) -> Machine:
    made = Machine(
        folder,
        inventory=cast(GpuInventory, cards),
        read_ram=lambda: Ram(total_bytes=ram, available_bytes=ram),
        clock=now or (lambda: 0.0),
        wall=lambda: datetime.fromisoformat(at),
    )
    made.read()
    return made


def header() -> gguf.Header:
    keys = [gguf_bytes.key("general.architecture", gguf_bytes.STRING, gguf_bytes.text("llama"))]
    return gguf.parse_header(gguf_bytes.file(*keys))


def model(size: int, head: gguf.Header | None = None) -> LocalModel:
    path = Path("/m.gguf")
    return LocalModel("m", "demo", path, (path,), size, head or header(), None, "a" * 64)


def plan(**changes: Any) -> Plan:
    return Plan(replace(SPEC, **changes), LlamaServer("/usr/bin/llama-server", "b1"), {"m": "demo"})


def room(made: Machine, one: Plan, size: int, start: object = None) -> Any:
    """For a start that is then over, unless it is given."""
    found = asyncio.run(made.room(start or object(), one, model(size)))
    if start is None:
        made.loading(())
    return found


def test_what_fits_has_room_what_is_full_has_none_now_and_what_never_fits_is_hopeless(tmp_path: Path) -> None:
    cards = Cards(gpu(used=70 * GIB))
    made = machine(tmp_path, cards)
    assert room(made, plan(), 4 * GIB) is None
    full = room(made, plan(), 40 * GIB)
    assert full is not None and not full.hopeless
    assert "GPU 0 has 10.0 GiB free of 80.0" in full.text and "free memory on GPU 0" in full.text
    never = room(made, plan(), 100 * GIB)
    assert never is not None and never.hopeless and "80.0 GiB in all" in never.text


def test_a_measured_peak_is_believed_more_than_the_estimate(tmp_path: Path) -> None:
    cards = Cards(gpu(used=70 * GIB))
    made = machine(tmp_path, cards)
    start = EngineStart(cast(Any, None), plan(), model=model(40 * GIB))
    start.process = cast(Any, type("Process", (), {"pid": 1})())
    cards.held = 6 * GIB
    made.learn([start])
    assert room(made, plan(), 40 * GIB) is None
    made.close()
    again = machine(tmp_path, cards)
    assert room(again, plan(), 40 * GIB) is None, "it outlives the agent"
    assert room(again, plan(ctx=512), 40 * GIB) is not None, "another context is another engine"


def test_an_engine_that_chooses_its_gpus_itself_is_not_judged_and_ram_only_by_all_there_is(tmp_path: Path) -> None:
    made = machine(tmp_path, Cards(gpu(used=80 * GIB)), ram=8 * GIB)
    assert room(made, plan(gpus=None), 500 * GIB) is None
    assert room(made, plan(gpus=()), 6 * GIB) is None
    never = room(made, plan(gpus=()), 20 * GIB)
    assert never is not None and never.hopeless and "GiB of RAM" in never.text
    blind = machine(tmp_path, Cards(gpu(total=0)))
    assert room(blind, plan(), 500 * GIB) is None, "a driver that tells nothing refuses nothing"
    without = machine(tmp_path, Cards(), ram=8 * GIB)
    assert room(without, plan(gpus=None), 20 * GIB).hopeless


def beside(made: Machine, one: Plan, found: LocalModel | None) -> bool:
    return asyncio.run(made.beside(one, found))


def test_a_second_model_goes_beside_the_first_only_where_all_its_engines_fit(tmp_path: Path) -> None:
    made = machine(tmp_path, Cards(gpu(used=50 * GIB)))
    assert beside(made, plan(), model(20 * GIB)) and not beside(made, plan(replicas=2), model(20 * GIB))
    assert not beside(made, plan(gpus=None), model(GIB)), "nobody knows where it would go"
    assert not beside(made, plan(), None), "a model that nobody has seen"
    simulated = Plan(replace(SPEC, engine="simulated"), Simulated("python"), {"m": "m"})
    assert beside(made, simulated, None)
    small = machine(tmp_path, Cards(), ram=4 * GIB)
    assert beside(small, plan(gpus=()), model(3 * GIB)) and not beside(small, plan(gpus=()), model(5 * GIB))


def test_what_a_start_will_take_is_kept_for_it_until_it_is_seen_to_hold_it(tmp_path: Path) -> None:
    """Two that begin at once would else both be let in, and one of them die in the driver."""
    made, first, second = machine(tmp_path, Cards(gpu(0), gpu(1))), object(), object()
    assert room(made, plan(), 50 * GIB, first) is None
    assert room(made, plan(), 50 * GIB, first) is None, "it is not in its own way"
    refused = room(made, plan(), 50 * GIB, second)
    assert refused is not None and not refused.hopeless
    assert room(made, plan(gpus=(1,)), 50 * GIB, second) is None
    assert not beside(made, plan(), model(50 * GIB)) and beside(made, plan(), model(20 * GIB))
    made.loading([second])
    assert room(made, plan(), 50 * GIB, object()) is None


COUNT = st.integers(0, 2**63)


@settings(max_examples=60, deadline=None)
@given(
    ctx=st.integers(1, 2**31), slots=st.integers(1, 65_536), size=COUNT, blocks=st.integers(0, 2**32 - 1),
    heads=st.lists(st.integers(0, 2**32 - 1), max_size=4), length=st.integers(0, 2**32 - 1),
    gpus=st.sampled_from([(0,), ()]),
)  # fmt: skip
def test_a_header_that_says_anything_is_judged_and_never_worse(
    tmp_path_factory: pytest.TempPathFactory, ctx: int, slots: int, size: int, blocks: int, heads: list[int],
    length: int, gpus: tuple[int, ...],
) -> None:  # fmt: skip
    keys = [
        gguf_bytes.key("general.architecture", gguf_bytes.STRING, gguf_bytes.text("llama")),
        gguf_bytes.number("llama.block_count", blocks),
        gguf_bytes.number("llama.embedding_length", length),
        gguf_bytes.number("llama.attention.key_length", length),
        gguf_bytes.numbers("llama.attention.head_count_kv", heads),
    ]
    try:
        head = gguf.parse_header(gguf_bytes.file(*keys))
    except ValueError:
        return
    made = machine(tmp_path_factory.getbasetemp(), Cards(gpu()))
    found = asyncio.run(made.room(None, plan(ctx=ctx, slots=slots, gpus=gpus), model(size, head)))
    assert found is None or ("GiB" in found.text and len(found.text) < 500)


def test_pools_without_hours_and_owners_are_told_nothing_and_the_others_both(tmp_path: Path) -> None:
    seconds = [0.0]
    cards = Cards(gpu())
    made = machine(tmp_path, cards, at="2026-01-05T07:00", now=lambda: seconds[0])
    hours = replace(SPEC, id="h", hours=parse("mon-fri 08:00-18:00"))
    yields = replace(SPEC, id="y", yield_to_owner=True)
    assert made.holds([SPEC]) == []

    def holds() -> dict[tuple[str, str], str | None]:
        return {(hold.pool_id, hold.who): hold.why for hold in made.holds([SPEC, hours, yields])}

    assert holds() == {
        ("h", "owner"): None, ("h", "hours"): "it serves again from mon 08:00", ("y", "owner"): None,
        ("y", "hours"): None,
    }  # fmt: skip
    cards.gpus = [gpu(used=20 * GIB, foreign=20 * GIB)]
    made.read()
    assert holds()[("y", "owner")] is None, "not at once"
    seconds[0] = 11.0
    assert holds()[("y", "owner")] == "20.0 GiB of GPU 0 are used by other programs"
    assert holds()[("h", "owner")] is None, "it does not yield"


def test_the_gpus_are_asked_with_all_that_our_engines_started(tmp_path: Path) -> None:
    import os

    cards = Cards(gpu())
    machine(tmp_path, cards).read([os.getpid()])
    assert os.getpid() in cards.asked[-1]


def test_peaks_that_are_torn_or_strange_are_no_peaks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "peaks.json").write_bytes(b'{"version": 1, "peaks": {"' + b"x" * 32 + b'": 1e308}}')
    made = machine(tmp_path, Cards(gpu()))
    assert room(made, plan(), 4 * GIB) is None and "peaks.unreadable" in caplog.text
