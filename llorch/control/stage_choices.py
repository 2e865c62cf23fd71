"""From whom a node is to fetch a model now, or what it waits for: one node fetches from outside, the others from it.

Owns that decision. A file that is wanted on many nodes comes over the outer line once, unless who fetches it stalls or
can't be reached; and no node is fetched from by all at once. Of a share it keeps since when its source is missed, and
nothing else. Never asks a node. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping

from llorch.control.stage_shares import Job, Phase, Share
from llorch.control.stage_sources import (
    ADDRESS_HINT,
    Machine,
    Machines,
    free_sources,
    has_it,
    holders,
    reaches,
    shown,
)
from llorch.errors import Code, LlorchError

SOURCE_FOR_S = 600.0  # that all who have it are away
DIGEST_WITHIN_S = 60.0  # a node that has it all tells its digest by then
OWN_DIGEST_WITHIN_S = 1_800.0  # 300 GB at 160 MB/s; then it is asked, and says so itself
AGAIN = "`llorch model stage` again goes on where it was"


def in_turn(job: Job, machines: Machines, now: float) -> list[Share]:
    """Who can be asked now: first who has a part of it, then who can give it to others after that."""
    ready = [
        share
        for share in job.shares.values()
        if share.phase is Phase.WAITING and not share.asking and now >= share.next_at and share.node_id in machines
    ]
    return sorted(ready, key=lambda share: (not share.resumes, machines[share.node_id].url is None, share.node_id))


def choose(
    job: Job, share: Share, machines: Machines, used: Mapping[str, int], now: float
) -> tuple[str, ...] | str | LlorchError:
    """From whom it is to fetch (nobody: from the reference itself), or what it waits for, or why it never can."""
    wanted, machine = job.wanted, machines[share.node_id]
    if wanted.everywhere:
        return ()
    if _reads_its_own(job, share, machine) and now - share.since < OWN_DIGEST_WITHIN_S:
        return "its digest of what it has under that id"
    having = [each for each in holders(wanted, wanted.model, machines) if reaches(machine, each)]
    sources = free_sources(machine, having, used)
    if sources:
        return tuple(each.node_id for each in sources)
    if online := [each.node_id for each in having if each.online]:
        share.source_gone_at = None
        return f"{_some(online)}, from which others fetch it now"
    ahead = _ahead(job, share, machines, now)
    if ahead is not None:
        return f"{ahead}, which fetches it for the others"
    return () if wanted.has_origin else _without_origin(job, share, machines, having, now)


def _reads_its_own(job: Job, share: Share, machine: Machine) -> bool:
    """It has something under the id, and does not know yet whether that is what is wanted."""
    report = machine.report(job.model_at(share))
    return report is not None and report.state == "staged" and report.sha256 is None and job.wanted.sha256 is not None


def _ahead(job: Job, share: Share, machines: Machines, now: float) -> str | None:
    """A node of the same job that will have it, and from which this one can fetch it then."""
    for other in job.shares.values():
        machine = machines.get(other.node_id)
        if machine is None or not machine.online or not reaches(machines[share.node_id], machine):
            continue
        if job.wanted.source not in (None, other.node_id):
            continue
        if other.fetches(now):
            return other.node_id
        untold = other.phase is Phase.STAGED and has_it(machine, job.wanted, job.model_at(other)) is None
        if untold and now - other.since < DIGEST_WITHIN_S:
            return other.node_id
    return None


def _without_origin(job: Job, share: Share, machines: Machines, having: list[Machine], now: float) -> str | LlorchError:
    """Only other nodes have it, and none of them can give it now."""
    name = job.wanted.model or shown(job.wanted.text)
    share.source_gone_at = now if share.source_gone_at is None else share.source_gone_at
    if having and now - share.source_gone_at < SOURCE_FOR_S:
        return f"{_some([each.node_id for each in having])}, which has it, to come back"
    if having:
        words = f"none of the nodes that have {name} came back: {_some([each.node_id for each in having])}"
        return LlorchError(Code.MODEL_NOT_AVAILABLE, words, hint=AGAIN)
    anybody = [each.node_id for each in holders(job.wanted, job.wanted.model, machines)]
    if anybody:
        words = f"{share.node_id} can't fetch {name} from {_some(anybody)}: no address that reaches it"
        return LlorchError(Code.MODEL_NOT_AVAILABLE, words, hint=ADDRESS_HINT)
    return LlorchError(Code.MODEL_NOT_AVAILABLE, f"no node has {name} any more", hint="`llorch model ls` shows who did")


def _some(names: list[str]) -> str:
    """A few names, and how many more."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
