"""Staging jobs: a model that is wanted on some nodes, how far each of them is, and whom to ask for what next.

Owns the state of every job and what changes it: what nodes report, what becomes of the orders to them, time. A report
is the truth about a node; an answer only begins it. Never asks a node or reads a clock: `step` is given the facts and
returns orders, and what becomes of those is told to it. Pure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from llorch.backoff import Backoff
from llorch.control.stage_choices import AGAIN, choose, in_turn
from llorch.control.stage_shares import Job, Order, Phase, Share
from llorch.control.stage_sources import Machine, Machines, Wanted, short
from llorch.errors import MEANINGS, Code, LlorchError
from llorch.messages import ModelReport
from llorch.wishes import StageAnswer

MAX_JOBS = 100  # remembered; of ended ones the oldest go first
ENDED_KEPT_S = 3_600.0  # long enough for whoever asked to come back and look
MAX_JOB_S = 24 * 3_600.0  # 1 TB at 12 MB/s: whatever takes longer is asked for again
OFFLINE_FOR_S = 900.0  # a machine that is started anew is back by then
SETTLES_S = 2.0  # a report that was under way when the node took the order may say what was before
ABSENT_S = 45.0  # four full beats that say nothing of a model that was ordered
ORDER_TRIES = 6  # in a row that are not taken, about a minute; or that nothing is heard of afterwards
ORDER_BACKOFF = Backoff(first_s=1.0, most_s=30.0)
MOST_ASKED = 32  # nodes at a time, of all jobs

_ASK_LATER = frozenset(
    {Code.NODE_LOST, Code.ALL_SLOTS_BUSY, Code.DRAINING, Code.RATE_LIMITED, Code.QUEUE_FULL, Code.REQUEST_TIMEOUT}
)


_MENDED_THERE = frozenset({"INSUFFICIENT_STORAGE", "DIGEST_MISMATCH"})


class StageJobs:
    """Every job that is remembered, the oldest first."""

    def __init__(self) -> None:
        self._jobs: dict[str, Job] = {}

    @property
    def all(self) -> list[Job]:
        return list(self._jobs.values())

    @property
    def running(self) -> list[Job]:
        return [job for job in self._jobs.values() if job.ended_at is None]

    def get(self, job_id: str) -> Job | None:
        return self._jobs.get(job_id)

    def create(
        self, job_id: str, wanted: Wanted, nodes: Mapping[str, bool], *, everyone: bool, now: float, wall: str
    ) -> Job:
        """A new job for `nodes` (by id: whether it is online), or the one that already does exactly this.

        `everyone`: nobody was named, so those that are offline do not count until they are back. Raises NODE_NOT_FOUND
        where there is no node, QUEUE_FULL where no more jobs can run.
        """
        for job in self.running:
            if (job.wanted.text, job.wanted.source, set(job.shares)) == (wanted.text, wanted.source, set(nodes)):
                return job
        if not any(online or not everyone for online in nodes.values()):
            raise LlorchError(Code.NO_CAPACITY, "no node is online", hint="`llorch node ls` shows what there is")
        if len(self._jobs) >= MAX_JOBS:
            ended = [job for job in self._jobs.values() if job.ended_at is not None]
            if not ended:
                raise LlorchError(
                    Code.QUEUE_FULL, f"{MAX_JOBS} staging jobs are running", retry_after_ms=10_000,
                    hint="`llorch model ls` shows how far they are",
                )  # fmt: skip
            del self._jobs[min(ended, key=lambda job: job.ended_at or 0.0).job_id]
        shares = {
            node_id: Share(
                node_id, online or not everyone, now, Phase.WAITING if online else Phase.OFFLINE, moved_at=now
            )
            for node_id, online in sorted(nodes.items())
        }
        job = self._jobs[job_id] = Job(job_id, wanted, now, wall, shares)
        return job

    # ---- what happens

    def step(self, now: float, machines: Machines) -> list[Order]:
        """Take over what the nodes report, and decide whom to ask. Of every order `answered` or `refused` is told."""
        for job in self.running:
            for share in job.shares.values():
                _observe(job, share, machines.get(share.node_id), now)
            _pin(job)
        asked = [share for job in self.running for share in job.shares.values() if share.asking]
        room = MOST_ASKED - len(asked)
        used = Counter(
            share.sources[0]
            for job in self.running
            for share in job.shares.values()
            if share.sources and share.fetches(now)
        )
        orders: list[Order] = []
        for job in self.running:
            for share in in_turn(job, machines, now):
                if len(orders) >= room:
                    share.waits_for = "its turn to be asked"
                    continue
                order = _order(job, share, machines, used, now)
                if order is not None:
                    orders.append(order)
            _settle(job, now)
        for job_id in [
            job_id
            for job_id, job in self._jobs.items()
            if job.ended_at is not None and now - job.ended_at > ENDED_KEPT_S
        ]:
            del self._jobs[job_id]
        return orders

    def answered(self, order: Order, answer: StageAnswer, machine: Machine | None, now: float) -> None:
        """The node has taken the order; `machine` as it is now."""
        job, share = self._asked(order)
        if job is None or share is None:
            return
        share.model = answer.model
        if job.wanted.model is None and not job.wanted.everywhere:
            job.wanted = replace(job.wanted, model=answer.model)
        share.lease_id, share.resumes = order.lease_id, True
        share.answered_at = share.heard_at = share.moved_at = now
        if answer.state == "failed":
            share.fail(_told(answer.error), now)
            return
        report = None if machine is None else machine.report(answer.model)
        if answer.state == "staged":
            share.before = None  # whatever it reports of it is this
            if report is None or report.state != "staged":
                _staged(job, share, None, now)
                return
        share.move(answer.progress, job.wanted.size_bytes, now)

    def refused(self, order: Order, error: LlorchError, now: float) -> None:
        """The node did not take the order, or could not be asked."""
        _, share = self._asked(order)
        if share is None:
            return
        share.tries += 1
        if error.code in _ASK_LATER and share.tries < ORDER_TRIES:
            share.next_at = now + ORDER_BACKOFF.delay_s(share.tries, 1.0)
            share.waits_for = f"the next time it is asked: {error.message}"
        else:
            share.fail(error, now)

    def _asked(self, order: Order) -> tuple[Job | None, Share | None]:
        """The share that an order was for, if it still waits for what becomes of that."""
        job = self._jobs.get(order.job_id)
        share = None if job is None else job.shares.get(order.node_id)
        if share is not None:
            share.asking = False
        waits = share is not None and share.phase is Phase.WAITING
        return (job, share) if waits else (None, None)

    def removed(self, node_id: str, model: str, now: float) -> None:
        """Somebody had the model removed from a node: it is not to be asked for it again."""
        for job in self.running:
            share = job.shares.get(node_id)
            if share is not None and not share.over and job.model_at(share) == model:
                share.fail(LlorchError(Code.CANCELED, f"{model} was removed from {node_id} meanwhile"), now)


# ---------------------------------------------------------------- what nodes report


def _observe(job: Job, share: Share, machine: Machine | None, now: float) -> None:
    if share.over:
        return
    if now - job.created_at >= MAX_JOB_S:
        share.fail(LlorchError(Code.DEADLINE_EXCEEDED, "it was not staged within a day", hint=AGAIN), now)
        return
    if machine is None or not machine.online:
        _away(share, now)
        return
    if share.phase is Phase.OFFLINE:
        share.counts, share.tries = True, 0
        share.to_be_asked(now)
    if share.lease_id is not None and share.lease_id != machine.lease_id:
        share.tries = 0
        share.to_be_asked(now)  # it was started anew: it goes on where it was, if it is told to
    _read(job, share, machine.report(job.model_at(share)), now)


def _away(share: Share, now: float) -> None:
    if share.phase is not Phase.OFFLINE:
        share.to_be_asked(now)
        share.turn(Phase.OFFLINE, now)
    share.waits_for = "it to come back"
    if share.counts and now - share.since >= OFFLINE_FOR_S:
        minutes = round(OFFLINE_FOR_S / 60)
        share.fail(
            LlorchError(Code.NODE_LOST, f"{share.node_id} has been offline for {minutes} minutes", hint=AGAIN), now
        )


def _read(job: Job, share: Share, report: ModelReport | None, now: float) -> None:
    """What an online node reports of the model."""
    if share.lease_id is None:
        if report is not None and not share.asking:
            _read_unasked(job, share, report, now)
        return
    if report is None or _stale(share, report, now) or report.state == "retired":
        if now - share.heard_at >= ABSENT_S:
            share.tries += 1
            share.to_be_asked(now)
            if share.tries >= ORDER_TRIES:
                words = f"{share.node_id} takes the order, and reports nothing of it"
                share.fail(LlorchError(Code.NODE_LOST, words, hint="look at that node's log"), now)
        return
    share.before, share.heard_at, share.tries = None, now, 0
    if report.state == "staged":
        _staged(job, share, report, now)
    elif report.state == "failed":
        share.fail(_told(report.error), now)
    else:
        share.move(report.progress, report.size_bytes or job.wanted.size_bytes, now)


def _read_unasked(job: Job, share: Share, report: ModelReport, now: float) -> None:
    """One that has it already need not be asked; one that has something else under the id is not to lose it."""
    wanted = job.wanted
    if report.state != "staged" or wanted.everywhere or wanted.sha256 is None or report.sha256 is None:
        return
    _staged(job, share, report, now)


def _stale(share: Share, report: ModelReport, now: float) -> bool:
    """Whether it was said before the order was taken."""
    return share.before is not None and (
        report is share.before or (report == share.before and now - share.answered_at < SETTLES_S)
    )


def _staged(job: Job, share: Share, report: ModelReport | None, now: float) -> None:
    wanted, digest = job.wanted, None if report is None else report.sha256
    if wanted.sha256 is not None and digest not in (None, wanted.sha256):
        model, theirs, ours = job.model_at(share), short(digest or ""), short(wanted.sha256)
        share.fail(
            LlorchError(
                Code.CONFLICT,
                f"{share.node_id} has other content as {model}: sha256 {theirs}, not {ours}",
                hint=f"llorch model rm {model} --nodes {share.node_id}, and stage it again",
            ),
            now,
        )
        return
    share.turn(Phase.STAGED, now)
    share.sha256 = digest or wanted.sha256
    share.progress = 1.0
    share.bytes_total = (report.size_bytes if report is not None else 0) or wanted.size_bytes
    share.bytes_done = float(share.bytes_total or 0)


def _told(text: str | None) -> LlorchError:
    """What a node says of why it failed: `CODE: words`, or words."""
    code, colon, words = (text or "").partition(": ")
    known = Code(code) if colon and code in Code.__members__ else None
    mended = known in _MENDED_THERE  # what is said of the other codes is said of tasks
    return LlorchError(
        known or Code.MODEL_NOT_AVAILABLE,
        (words if known is not None else text) or "the node does not say why",
        hint=MEANINGS[known].hint if known is not None and mended else f"that node's log says more; {AGAIN}",
    )


def _pin(job: Job) -> None:
    """What the first node has, the others are to have, byte for byte."""
    if job.wanted.sha256 is None and not job.wanted.everywhere:
        for share in job.shares.values():
            if share.phase is Phase.STAGED and share.sha256 is not None:
                job.wanted = replace(job.wanted, sha256=share.sha256, size_bytes=share.bytes_total)
                return


def _settle(job: Job, now: float) -> None:
    if job.ended_at is None and all(share.over for share in job.shares.values() if share.counts):
        job.ended_at = now


def _order(job: Job, share: Share, machines: Machines, used: Counter[str], now: float) -> Order | None:
    machine = machines[share.node_id]
    choice = choose(job, share, machines, used, now)
    if isinstance(choice, LlorchError):
        share.fail(choice, now)
        return None
    if isinstance(choice, str):
        share.waits_for = choice
        return None
    share.asking, share.sources, share.before = True, choice, machine.report(job.model_at(share))
    share.waits_for, share.moved_at, share.source_gone_at = None, now, None
    if choice:
        used[choice[0]] += 1
    return Order(job.job_id, share.node_id, machine.lease_id, job.wanted, choice)
