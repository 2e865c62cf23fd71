"""A node that is cut off from its control by the network, in a namespace where the machine allows one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.certificates import certificate
from tests.faults import netns
from tests.faults.harness import Plan, run
from tests.faults.plans import PARTITIONED
from tests.faults.validator import judge

pytestmark = pytest.mark.slow


@pytest.fixture
def space() -> Iterator[netns.Namespace]:
    reason = netns.impossible()
    if reason is not None:
        pytest.skip(reason)
    with netns.Namespace.made() as space:
        yield space


@pytest.mark.parametrize("how", ["partition", "blackout"])
async def test_a_node_that_is_cut_off_breaks_no_promise(space: netns.Namespace, how: str, tmp_path: Path) -> None:
    cert = certificate(tmp_path, space.here)
    made = type("Made", (netns.InNamespace,), {"space": space, "cert": cert})
    plan: Plan = PARTITIONED[how]
    history = await run(plan, tmp_path / "run", made, str(cert[0]))
    verdict = judge(history)
    assert verdict.passed, "\n".join([*verdict.invalid, *map(str, verdict.violations[:20])])
    assert verdict.faults == {f"link.{how}": plan.faults}
    # What is back before it was waited for long enough costs nobody anything. Else who was there is told, though one
    # that asks again until the node is back has its whole answer in the end.
    told = {entry.get("code") or (entry.get("data") or {}).get("code") for entry in history}
    assert ("NODE_LOST" in told) is (how == "blackout"), verdict.outcomes
