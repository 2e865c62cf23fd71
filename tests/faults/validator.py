"""The validator: a history in, violations of the promises out. Pure.

bytes         streams.py: what is shown is one log, whole, once and in order, with one end
errors        excuses.py: an error, a break or an answer is one that a fault explains
executions    here: one that is seen, none after a replay, none beside another, none beyond the slots
time          here: cancels and readers that leave free their slots; every task ends once all is healed
engines       here: those of an agent that went are taken over or end with it, as its life has it
what is left  here: no claim, no slot, no waiter, no process
logs          here: no role logged a bug of its own, none took another for a liar
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from tests.faults import story as stories
from tests.faults import streams
from tests.faults.excuses import Case, broken, explained, was_canceled, went
from tests.faults.story import Conn, Story
from tests.faults.timeline import FOREVER, HOLDING, HOLDS, LATE_S, REBIND_S, Execution, Facts, Hit
from tests.faults.verdict import Verdict, Violation

FREED_WITHIN_S = 1.0 + 0.75  # promised within 1 s; the rest is for two observers under load
SWEEP_S = 0.5  # of a node, for readers that did not come back
LEAST_DONE = 0.5  # of the tasks that ended: a run in which most fail shows little
GIVEN_UP = "failed"  # the state of a pool whose engine died too often
V1_LOG_S = 30.0


def judge(history: Sequence[dict[str, Any]]) -> Verdict:
    entries = sorted(history, key=lambda entry: entry["at"])
    facts = Facts(entries)
    verdict = Verdict()
    told = stories.read(entries)
    for story in told.values():
        for rule in (streams.check, _ends, _answers, _cancel, _left, _executions):
            verdict.violations += rule(story, facts)
    verdict.violations += _slots(facts)
    verdict.violations += _engines(facts, entries, verdict.engines)
    verdict.violations += _what_is_left(facts, entries)
    verdict.violations += (
        Violation(entry["what"], None, entry["at"], entry["line"])
        for entry in entries
        if entry["what"] in ("struck", "bug")
    )
    verdict.violations.sort(key=lambda violation: violation.at)
    _count(verdict, told, facts, entries)
    return verdict


def _count(verdict: Verdict, told: dict[str, Story], facts: Facts, entries: Sequence[dict[str, Any]]) -> None:
    ends = {marker: story.end() for marker, story in told.items()}
    verdict.tasks = len(told)
    verdict.ended = sum(end is not None for end in ends.values())
    verdict.outcomes = Counter(
        f"{end[1]} {end[2]}" if end is not None else str(told[marker].over) for marker, end in ends.items()
    )
    verdict.faults = Counter(entry["kind"] for entry in entries if entry["what"] == "fault")
    whats = {entry["what"]: entry["at"] for entry in entries}
    if not {"run", "calm", "stopped", "final"} <= set(whats):
        verdict.invalid.append("the run was not brought to its end")
        return
    first = min((story.since for story in told.values()), default=whats["stopped"])
    verdict.rate = verdict.ended / max(0.001, whats["stopped"] - first)
    if verdict.rate < facts.promises["min_rate"]:
        verdict.invalid.append(f"{verdict.rate:.1f} tasks/s ended, fewer than {facts.promises['min_rate']:g}")
    done = sum(end is not None and end[1] == "end" for end in ends.values())
    if done < LEAST_DONE * verdict.ended:
        verdict.invalid.append(f"only {done} of {verdict.ended} tasks came to a good end")


# ---------------------------------------------------------------- ends


def _ends(story: Story, facts: Facts) -> Iterator[Violation]:
    """Every connection ends in a way that is allowed, and so does the task."""
    for conn in story.conns:
        streaming = conn.status == 200 and conn.body is None
        if conn.how == "end" and streaming and not conn.terminals():
            stopped = facts.hit(conn.sent, conn.until, parts=("control",), hows=("term",))
            if not (story.native and stopped):
                yield Violation("cut or whole", story.marker, conn.until, f"connection {conn.number} ends with no end")
        if conn.how in ("broken", "unreachable", "silent") and not broken(conn, story, facts):
            yield Violation(
                "unexplained break", story.marker, conn.until, f"connection {conn.number} ({conn.op}): {conn.how}"
            )
        if conn.how in ("broken", "silent") and conn.terminals() and story.native:
            continue  # it has shown all there is
    if story.over == "abandoned":
        yield Violation("stuck", story.marker, story.until, "not over when all was healed long ago")
    elif story.over in ("unknown", "client fault"):
        case = Case(story, facts, story.until, story.output_at() is not None)
        if not (explained("TASK_NOT_FOUND", case) or (story.over == "client fault" and _long_away(story, facts))):
            yield Violation("lost task", story.marker, story.until, f"its client gave it up ({story.over})")
    for conn in story.conns:
        for chunk in conn.chunks:
            if chunk["kind"] == "error":
                case = Case(story, facts, chunk["at"], story.output_at() is not None)
                if not explained(chunk.get("code"), case):
                    yield Violation("unexplained error", story.marker, chunk["at"], f"{chunk.get('code')} in a frame")


def _long_away(story: Story, facts: Facts) -> bool:
    """Whether there was no way to the control for so long that a client may give up."""
    spans = facts.hit(story.since, story.until, parts=("control", "client"))
    return sum(min(hit.end, story.until) - max(hit.start, story.since) for hit in spans) >= 10.0


def _answers(story: Story, facts: Facts) -> Iterator[Violation]:
    """Every status that is not the hoped-for one is explained."""
    for conn in story.conns + story.asides:
        if conn.answered is None or conn.status in (200, 202) or not conn.status:
            continue
        at = conn.answered
        if conn.status == 204 and conn.op in ("events", "reread"):
            if conn.op == "events" and not any(one.terminals() for one in story.conns if one.number < conn.number):
                yield Violation("lost end", story.marker, at, "204: nothing is left, yet no end was shown")
            continue
        if conn.op == "mismatch" and conn.code == "IDEMPOTENCY_MISMATCH" and story.ask.get("key"):
            continue
        output = story.output_at()
        case = Case(story, facts, at, output is not None and output <= at)
        if conn.op in ("reread", "cancel", "mismatch") and _aside_excused(conn, case):
            continue
        if not explained(conn.code, case):
            yield Violation("unexplained error", story.marker, at, f"{conn.op} answered {conn.status} {conn.code}")
    yield from _mismatches(story, facts)


def _aside_excused(conn: Conn, case: Case) -> bool:
    """What is asked of a task beside its stream may also fail with its node, its control or its queue."""
    story, facts = case.story, case.facts
    pool = story.pool_at(case.at)
    return conn.code in ("TASK_NOT_FOUND", "NODE_LOST", "MODEL_NOT_AVAILABLE", "NO_CAPACITY") and bool(
        facts.touched(story.since, case.at, pool=pool)
    )


def _mismatches(story: Story, facts: Facts) -> Iterator[Violation]:
    """Another body under a key whose task is there is refused."""
    output, end = story.output_at(), story.end()
    for one in story.asides:
        if one.op != "mismatch" or one.status not in (200, 202) or one.answered is None:
            continue
        known = output is not None and output < one.sent
        free = bool(story.left) or story.cancel_sent_at() is not None or (end is not None and end[0] < one.answered)
        if known and not free and not facts.touched(story.since, one.answered):
            yield Violation("mismatch", story.marker, one.answered, f"another body under its key: {one.status}")


# ---------------------------------------------------------------- time


def _cancel(story: Story, facts: Facts) -> Iterator[Violation]:
    """After 202 the engine stops, no token comes, and the end says canceled, or came before."""
    accepted = story.canceled_at()
    if accepted is None:
        return
    if any(conn.op == "post" and conn.sent > accepted - LATE_S for conn in story.conns[1:]):
        return  # it was asked for anew: a key is free when its task was canceled before it had shown anything
    until = accepted + FREED_WITHIN_S
    for run in facts.executions.get(story.marker, ()):
        if run.end > until and not facts.touched(accepted - LATE_S, until, pool=run.pool):
            yield Violation(
                "cancel", story.marker, until, f"{run.pool} runs it until {run.end:.3f}, canceled {accepted:.3f}"
            )
    end = story.end()
    if facts.touched(accepted - LATE_S, until) or facts.hit(accepted, until, parts=("client",)):
        return
    live = [conn for conn in story.reading() if conn.sent < accepted]  # one who comes back reads what came before
    late = [event for conn in live for event in conn.events if event["kind"] == "token" and event["at"] > until]
    if late and not any(conn.stalled for conn in story.conns):
        yield Violation("cancel", story.marker, late[0]["at"], f"{len(late)} tokens after the cancel of {accepted:.3f}")
    before = end is not None and any(conn.sent >= accepted for conn in story.reading() if conn.until >= end[0])
    before = before and any(run.step == "finished" and run.end <= until for run in facts.executions[story.marker])
    if end is not None and end[0] > until and not before and end[2] not in ("canceled", "CANCELED"):
        case = Case(story, facts, end[0], story.output_at() is not None)
        if end[1] == "end" or not explained(end[2], case):
            yield Violation("cancel", story.marker, end[0], f"it ends as {end[2]}, canceled at {accepted:.3f}")


def _left(story: Story, facts: Facts) -> Iterator[Violation]:
    """A client that goes for good frees its slot: at once for /v1, after the grace for a native task."""
    for at, back in story.left:
        if back or story.ask["form"] == "detach":
            continue
        output = story.output_at()
        early = (output is None or output > at) and (story.native or story.ask.get("key"))
        grace_s = 0.0
        if early:
            grace_s = max(facts.promises["early_grace_s"], facts.promises["grace_s"])
        elif story.native:
            grace_s = facts.promises["grace_s"]
        until = at + grace_s + (SWEEP_S if grace_s else 0.0) + FREED_WITHIN_S
        for run in facts.executions.get(story.marker, ()):
            away = facts.hit(at - LATE_S, until, parts=("client",))
            if run.start < until < run.end and not away and not facts.touched(at - LATE_S, until, pool=run.pool):
                what = f"{run.pool} runs it until {run.end:.3f}, its client left at {at:.3f}"
                yield Violation("reader gone", story.marker, until, what)


# ---------------------------------------------------------------- executions


def _executions(story: Story, facts: Facts) -> Iterator[Violation]:
    """A second execution only where the first has shown nothing, or can't be found any more."""
    shown = story.shown_from()
    runs = [
        replace(run, asked=run.start) if run.pool in shown else run for run in facts.executions.get(story.marker, ())
    ]
    for first, second in pairwise(sorted(runs, key=lambda run: run.asked)):
        yield from _fence(story, facts, first, second)
        if _may_run_again(story, facts, first, second):
            continue
        how = "beside" if first.end > second.start else "after"
        yield Violation(
            "one execution", story.marker, second.start,
            f"runs on {second.pool} {how} {first.pool} ({first.step}, {first.start:.3f} to {first.end:.3f})",
        )  # fmt: skip


def _fence(story: Story, facts: Facts, first: Execution, second: Execution) -> Iterator[Violation]:
    """An attempt that was overtaken is ended: at once where its own node was asked for the next one."""
    back = second.start
    if first.node != second.node:
        back = max([back, *(hit.end for hit in _between(facts, first, second))]) + REBIND_S
    until = back + FREED_WITHIN_S
    parts = ("node", "engine") if first.node == second.node else ("node", "engine", "control", "link")
    excused = facts.hit(back, until, parts=parts, node=first.node, pool=first.pool)
    if first.end > until and not excused:
        what = f"{first.pool} runs an attempt until {first.end:.3f} that was overtaken at {second.start:.3f}"
        yield Violation("fence", story.marker, until, what)


def _between(facts: Facts, first: Execution, second: Execution) -> list[Hit]:
    """What kept an overtaken attempt from being told."""
    until = second.start + REBIND_S
    return facts.hit(first.asked, until, parts=("control", "node", "link"), node=first.node)


def _may_run_again(story: Story, facts: Facts, first: Execution, second: Execution) -> bool:
    since, at = first.asked - LATE_S, second.start
    lost = facts.hit(since, at, parts=("node", "link"), node=first.node)
    output = story.output_at(first.start)  # what an earlier execution on the same pool has shown is not of this one
    seen = output is not None and output < at and story.pool_at(at) == first.pool and first.start < at
    ended = first.end <= at + LATE_S
    # An engine may have said its last word just as the task was cancelled, for its reader had left. What stood still
    # meanwhile was told late.
    held = facts.hit(first.start, at, parts=HOLDING, hows=HOLDS, node=first.node, pool=first.pool)
    ends = [hit.end for hit in held if hit.end < FOREVER]
    told = max([first.end, *ends])
    left = not story.native and any(went(conn, facts) and _cut_at(conn, facts) <= told for conn in story.reading())
    if not seen:
        if story.ask.get("script") and facts.pools[first.pool]["obeys"]:
            return True  # it failed because it was told to
        if lost or facts.hit(since, at, parts=("engine",), pool=first.pool):
            return True
        if ended and (first.step in ("aborted", "killed") or left):
            return True  # it failed before it showed anything, or was fenced, or cancelled
        return facts.slow(since, at) or bool(facts.hit(since, at, parts=("control",), hows=("stop",)))
    gone = facts.hit(since, at, parts=("node",), hows=("kill", "term"), node=first.node)
    if gone or facts.away(first.node, first.start, at) >= facts.promises["reconnect_s"] - LATE_S:
        return True
    window_s = facts.promises["recovery_s"] - LATE_S
    if any(facts.unheard(first.node, hit.end, at) >= window_s for hit in facts.restarted(first.start, at)):
        return True
    ended = ended or any(first.end <= end + LATE_S for end in ends)
    if ended and (first.step == "aborted" or left) and was_canceled(story, facts, at):
        return True
    return not story.native and first.end + V1_LOG_S <= at


def _cut_at(conn: Conn, facts: Facts) -> float:
    """When a connection ended: its client notices a while after it was cut."""
    cuts = facts.hit(conn.sent, conn.until, parts=("client",), hows=("cut", "reset"), late_s=0.0)
    return max((hit.start for hit in cuts), default=conn.until)


def _slots(facts: Facts) -> Iterator[Violation]:
    """No engine is sent more than its slots, but for the moment in which it learns that one was freed."""
    by_engine: dict[tuple[str, int], list[tuple[float, int]]] = {}
    for runs in facts.executions.values():
        for run in runs:
            steps = by_engine.setdefault((run.pool, run.pid), [])
            steps.append((run.start, 1))
            if run.end < FOREVER:
                steps.append((run.end, -1))
    for (pool, _), steps in by_engine.items():
        slots, count, over_since = facts.pools[pool]["slots"], 0, None
        for at, step in sorted(steps):
            count += step
            if count > slots:
                over_since = over_since if over_since is not None else at
            elif over_since is not None:
                if at - over_since > FREED_WITHIN_S and not facts.touched(over_since - LATE_S, at, pool=pool):
                    yield Violation(
                        "slots", None, over_since, f"{pool} has more than {slots} for {at - over_since:.1f} s"
                    )
                over_since = None
    for at, pools in facts.samples:
        for pool, (total, free, claimed, bound, *_) in pools.items():
            # One whose engine has died has no slots, though the tasks that it had are only about to end.
            if ((bound or total) and claimed > total) or not 0 <= free <= total:
                yield Violation("slots", None, at, f"{pool}: {claimed} claimed, {free} free, of {total}")


# ---------------------------------------------------------------- engines


def _engines(facts: Facts, entries: Sequence[dict[str, Any]], fates: Counter[str]) -> Iterator[Violation]:
    """An engine whose agent goes is the next one's, the same process, or ends; never both, and never is there another
    beside it."""
    went: dict[str, dict[str, Any]] = {}
    began: dict[str, float] = {}  # its latest life
    died: set[int] = set()  # as a request had told them to
    for entry in entries:
        if entry["what"] == "engine" and entry["step"] == "dead":
            died.add(entry["pid"])
        if entry["what"] == "went":
            went[entry["node"]] = entry
        elif entry["what"] == "life":
            began[entry["node"]] = entry["at"]
        if entry["what"] != "back" or entry["node"] not in went:
            continue
        if began.get(entry["node"], entry["at"]) < went[entry["node"]]["at"]:
            continue  # it went again before its last return was noticed
        before, at = went.pop(entry["node"]), entry["at"]
        for pool, now in entry["engines"].items():
            had = before["engines"].get(pool, [])
            if any(pid in died for pid in had):
                fates["died as told"] += len(had)
            elif facts.hit(before["at"], at, parts=("engine",), node=entry["node"], pool=pool, late_s=REBIND_S):
                fates["hit itself"] += len(had)
            elif not before["keeps"]:
                fates["ended with its agent"] += len(had)
                if set(had) & set(now):
                    yield Violation("engines", None, at, f"{pool}: {had} outlived its agent, now there are {now}")
            else:
                fates["taken over"] += len(had)
                if had and now != had:
                    yield Violation("engines", None, at, f"{pool}: {had} was to be taken over, now there are {now}")
    for entry in entries:
        if entry["what"] == "ended" and entry["left"]:
            yield Violation("left over", None, entry["at"], f"processes that did not end: {entry['left']}")


# ---------------------------------------------------------------- what is left


def _what_is_left(facts: Facts, entries: Sequence[dict[str, Any]]) -> Iterator[Violation]:
    final = next((entry for entry in entries if entry["what"] == "final"), None)
    if final is None:
        return
    at = final["at"]

    def bad(what: str) -> Violation:
        return Violation("left over", None, at, what)

    for pool, known in facts.pools.items():
        total, free, claimed, bound, state = final["pools"].get(pool, (0, 0, 0, False, "unknown"))
        given_up = state == GIVEN_UP
        if not bound and not given_up:
            yield bad(f"{pool} is {state} and takes no task, though all is healed")
        if claimed or (bound and (free != total or total != known["slots"])):
            yield bad(f"{pool}: {claimed} claimed, {free} free, of {known['slots']}")
        engines = final["engines"].get(pool, 0)
        if engines != 1 and not given_up:
            yield bad(f"{pool} has {engines} engine processes")
    if final["queued"]:
        yield bad(f"{final['queued']:g} tasks wait")
    if final["tasks"]:
        yield bad(f"{len(final['tasks'])} tasks are not over: {final['tasks'][:3]}")
    if final["strangers"]:
        yield bad(f"processes of nobody: {final['strangers']}")
    for marker, runs in facts.executions.items():
        for run in runs:
            # The engine of a pool that was given up has died, and none has come after it to say so.
            if run.end == FOREVER and run.start < at and final["engines"].get(run.pool, 0):
                yield Violation("left over", marker, at, f"{run.pool} still runs it, since {run.start:.3f}")
