"""Who claims an engine: whatever stands in its pid file, a shim believes only what the kernel confirms."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llorch.node.engines.shim_claim import Claim, identity
from llorch.node.engines.shim_linux import start_time

OWN: dict[str, object] = {"pid": 99, "start_time": 6}
ME = {"pid": os.getpid(), "start_time": start_time(os.getpid())}


@pytest.fixture
def claim(tmp_path: Path) -> Iterator[Claim]:
    made = Claim(str(tmp_path / "p-r0.json"), OWN, 10.0, 300.0)
    yield made
    made.agent.close()


def test_it_is_held_while_the_file_names_this_shim_and_a_live_agent(claim: Claim) -> None:
    assert not claim.held(), "there is no file"
    for content, held in (
        ({"shim": OWN, "agent": ME}, True),
        ({"shim": OWN, "agent": None}, False),
        ({"shim": OWN, "agent": ME | {"start_time": 1}}, False),
        ({"shim": OWN | {"start_time": 7}, "agent": ME}, False),
        ({"shim": OWN, "agent": ME}, True),
    ):
        claim.write(content)
        assert claim.held() is held is claim.held(), content


def test_the_graces_are_those_of_the_agent_that_claims_it_now(claim: Claim) -> None:
    claim.write({"shim": OWN, "agent": ME, "stop_grace_s": 1, "orphan_grace_s": 2.5})
    assert claim.held() and (claim.stop_grace_s, claim.orphan_grace_s) == (1.0, 2.5)
    claim.change(stop_grace_s="soon", orphan_grace_s=-1)
    assert claim.held() and (claim.stop_grace_s, claim.orphan_grace_s) == (1.0, 2.5)


HOSTILE = (0, 1, -1, True, None, "1", [], {}, 2**31, 2**70, {"pid": 1}, {"pid": 2**70, "start_time": 1}, {"pid": "a"})


@pytest.mark.parametrize("value", [*HOSTILE, *({"pid": value} for value in HOSTILE)])
def test_whatever_stands_in_the_file_hurts_nobody(claim: Claim, value: Any) -> None:
    assert identity(value) is None
    path = Path(claim.path)
    for content in (value, {"shim": value}, {"shim": OWN, "agent": value}, {"shim": OWN, "agent": ME, "pid": value}):
        path.write_text(json.dumps(content))
        claim.held()
        claim.change(argv_digest="x")
    path.write_bytes(b"[" * 100_000)
    assert not claim.held()


def test_what_is_given_up_is_removed_unless_it_was_claimed_after_all(claim: Claim, tmp_path: Path) -> None:
    other = tmp_path / "key"
    other.touch()
    claim.write({"shim": OWN, "agent": ME})
    claim.give_up(str(other))
    assert other.exists() and Path(claim.path).exists()
    claim.write({"shim": OWN, "agent": None})
    claim.give_up(str(other))
    assert os.listdir(tmp_path) == []
    Path(claim.path).write_text(json.dumps({"shim": OWN | {"pid": 98}}))
    claim.give_up()
    assert Path(claim.path).exists(), "another's"
