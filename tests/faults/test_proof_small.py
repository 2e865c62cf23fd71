"""The proofs, small: the same code as `python -m tests.faults.proofs NAME`, in seconds. `-m long` runs all, whole.

Two need long phases to say anything, and are small elsewhere: fair shares in virtual time (`test_fairness`), a stalled
reader's bytes (`test_slow_readers`).
"""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from tests.faults.proofs import PROOFS

SMALL = (
    pytest.param("node_killed", marks=pytest.mark.slow),  # a reader whose node is gone is told after 5 s
    pytest.param("control_killed", marks=pytest.mark.slow),
    pytest.param("rotation", marks=pytest.mark.slow),
    "leaving",
)


@pytest.mark.parametrize("name", SMALL)
async def test_the_proof_holds_at_a_small_size(name: str, tmp_path: Path) -> None:
    proof = importlib.import_module(f"tests.faults.proof_{name}")
    verdict = await proof.prove(tmp_path, proof.SMALL)
    assert verdict.holds, verdict.text()


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", PROOFS)
async def test_the_proof_holds_at_its_full_size(name: str, tmp_path: Path) -> None:
    proof = importlib.import_module(f"tests.faults.proof_{name}")
    verdict = await proof.prove(tmp_path, proof.FULL)
    assert verdict.holds, verdict.text()
