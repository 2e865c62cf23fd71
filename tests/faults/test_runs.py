"""Runs over real processes, none of which breaks a promise. The long run is a command: `python -m tests.faults.run`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.certified import Certified, authority_of
from tests.faults.harness import Plan, run
from tests.faults.plans import PLANS
from tests.faults.run import told
from tests.faults.validator import judge
from tests.faults.verdict import Verdict


async def passes(plan: Plan, folder: Path, *, certified: bool = False) -> Verdict:
    with_tls = (Certified, authority_of(folder)) if certified else ()
    verdict = judge(await run(plan, folder, *with_tls))
    lines = [told(plan.seed, verdict, 0.0), *verdict.invalid, *map(str, verdict.violations[:20]), str(folder)]
    assert verdict.passed, "\n".join(lines)
    assert sum(verdict.faults.values()) >= plan.faults - 2  # some part may not have been whole in time to be hit
    return verdict


@pytest.mark.timeout(120)
@pytest.mark.slow
async def test_six_faults_break_no_promise(tmp_path: Path) -> None:
    await passes(Plan(1, 6, clients=8, gap_s=(0.2, 0.4), calm_first_s=0.5, min_rate=1.0), tmp_path / "run")


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", [101, 102])
async def test_forty_faults_break_no_promise(seed: int, tmp_path: Path) -> None:
    await passes(Plan(seed, 40), tmp_path / "run")


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_agents_that_go_in_the_midst_of_tasks_break_no_promise(tmp_path: Path) -> None:
    """Of half of them the engines stay and are taken over, of the others they end."""
    verdict = await passes(PLANS["agents"], tmp_path / "run")
    assert verdict.engines["taken over"] > 2 and verdict.engines["ended with its agent"] > 2, verdict.engines


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_forty_faults_break_no_promise_with_certificates_on_every_way(tmp_path: Path) -> None:
    await passes(Plan(103, 40), tmp_path / "run", certified=True)
