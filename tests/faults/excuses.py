"""Which fault explains which error: the table that an error, a break or an answer has to be found in. Pure.

An error that no fault of the history explains is a violation. Each entry says, for a code, what must have happened.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tests.faults.story import Conn, Story
from tests.faults.timeline import LATE_S, Facts

RETRIES_LOOK_BACK_S = 3.0  # an engine that was hit may still be failing tasks then
MOST_LOSSES = 3
MOST_ATTEMPTS = 3
CANCEL_SLACK_S = 0.7
FIRST_TOKEN_S = 0.06  # of the simulated engines
NATIVE_TOKEN_BYTES, OPENAI_TOKEN_BYTES = 70, 250  # at most, in a log


@dataclass(frozen=True, slots=True)
class Case:
    """An error that a client was told, at a time. `output`: it had seen something of the task before."""

    story: Story
    facts: Facts
    at: float
    output: bool

    @property
    def since(self) -> float:
        return self.story.since

    def pool(self) -> str | None:
        """Where it ran, as far as its client was told; else, where it was last."""
        runs = [run.pool for run in self.facts.executions.get(self.story.marker, ()) if run.start < self.at]
        return self.story.pool_at(self.at) or (runs[-1] if runs else None)


def _node_lost(case: Case) -> bool:
    """With output: its node was killed, or out of reach for as long as it is waited for. Without: three losses, or
    nowhere else to go."""
    facts, pool = case.facts, case.pool()
    if pool is not None and (case.output or _begun_unseen(case, pool)):
        node = pool.partition("/")[0]
        if facts.hit(case.since, case.at, parts=("node",), hows=("kill", "term"), node=node):
            return True
        return facts.away(node, case.since, case.at + LATE_S) >= facts.promises["reconnect_s"] - LATE_S
    losses = facts.hit(case.since, case.at, parts=("node", "link"))
    return len(losses) >= MOST_LOSSES or _nowhere(case)


def _begun_unseen(case: Case, pool: str) -> bool:
    """Who comes back reads the log beside the run, and a native answer in one piece is collected from it: it had begun
    there, and may not begin elsewhere, if its engine was asked for longer than a first token takes before its node was
    hit. That reader may not have seen a byte yet."""
    runs = [run for run in case.facts.executions.get(case.story.marker, ()) if run.pool == pool]
    hits = case.facts.hit(case.since, case.at, parts=("node", "link"), node=pool.partition("/")[0], late_s=0.0)
    first = [run.start + FIRST_TOKEN_S for run in runs]
    beside = any(conn.op == "events" or conn.replayed for conn in case.story.reading() if conn.sent < case.at)
    from_log = case.story.native and (case.story.ask["form"] == "native-json" or beside)
    drained = any(hit.how == "term" for hit in hits) and any(run.tokens for run in runs)  # it ran on until the grace
    return from_log and (drained or any(at <= hit.start for at in first for hit in hits))


def _nowhere(case: Case) -> bool:
    """Every pool of its model was in trouble since shortly before it was sent."""
    pools = case.facts.pools_of(case.story.ask["model"])
    return all(case.facts.bad(pool, case.since - RETRIES_LOOK_BACK_S, case.at) for pool in pools)


def _engine_failed(case: Case) -> bool:
    """With output: the engine it came from was hit, or did what the request told it. Without: so did or were all that
    could have been tried."""
    facts, story, script = case.facts, case.story, case.story.ask.get("script")
    since = case.since - RETRIES_LOOK_BACK_S

    def failing(pool: str) -> bool:
        if script is not None and facts.pools[pool]["obeys"]:
            return True
        return facts.bad(pool, since, case.at)

    pool = case.pool()
    if pool in facts.pools and (case.output or not story.streamed):  # an answer in one piece is begun before it is seen
        return failing(pool)
    return all(failing(pool) for pool in facts.pools_of(story.ask["model"]))


def _no_capacity(case: Case) -> bool:
    return _nowhere(case)


def _model_not_found(case: Case) -> bool:
    """A control that has just started has never heard of what no node of now has; nor is what a node had that has
    signed off, with its pools and its catalog.
    """
    facts, since = case.facts, case.since - RETRIES_LOOK_BACK_S
    pools = facts.pools_of(case.story.ask["model"])
    signed_off = {hit.node for hit in facts.hit(since, case.at, parts=("node",), hows=("term",))}
    gone = all(facts.pools[pool]["node"] in signed_off for pool in pools)
    return _nowhere(case) and (gone or bool(facts.restarted(0.0, case.at)))


def _recovering(case: Case) -> bool:
    """A control has just started; or the node that ran this before is away, and may bring it back."""
    since = case.at - case.facts.promises["recovery_s"]
    if case.facts.restarted(since, case.at) or case.facts.began >= since:
        return True
    facts, offline_s = case.facts, case.facts.promises["offline_s"]
    # Its last attempt may not have come as far as an engine, wherever that was to be.
    nodes = {facts.pools[pool]["node"] for pool in facts.pools_of(case.story.ask["model"])}
    return any(facts.hit(case.at - offline_s, case.at, parts=("node", "link"), node=node) for node in nodes)


def _draining(case: Case) -> bool:
    return bool(case.facts.hit(case.at, case.at, parts=("control",), hows=("term",), late_s=2.0))


def _deadline(case: Case) -> bool:
    deadline_s = case.story.ask.get("deadline_s")
    return deadline_s is not None and (not case.output or case.at - case.since >= deadline_s - LATE_S / 2)


def _gap(case: Case) -> bool:
    """Only a log that outgrew what is kept of one has a gap."""
    token_bytes = NATIVE_TOKEN_BYTES if case.story.native else OPENAI_TOKEN_BYTES
    return bool(case.story.ask["tokens"] * token_bytes > case.facts.promises["log_limit"])


def _canceled(case: Case) -> bool:
    return was_canceled(case.story, case.facts, case.at)


def _not_found(case: Case) -> bool:
    """Its submission was never answered; or its node, which alone remembers it, was hit; or it never came to one, or
    had left the last one with nothing shown, and waited at a control that died with it."""
    story, facts = case.story, case.facts
    if not any(conn.status in (200, 202) for conn in story.reading() if (conn.answered or case.at) < case.at):
        return True
    runs = [run for run in facts.executions.get(story.marker, ()) if run.start < case.at]
    if not runs:
        return bool(facts.restarted(case.since, case.at))
    if not runs[-1].tokens and facts.restarted(runs[-1].end, case.at):
        return True
    return all(
        facts.hit(case.since, case.at, parts=("node",), hows=("kill", "term"), node=run.node)
        or facts.away(run.node, case.since, case.at + LATE_S) >= facts.promises["recovery_s"] - LATE_S
        for run in runs[-1:]
    )


EXPLAINED: dict[str, Callable[[Case], bool]] = {
    "NODE_LOST": _node_lost,
    "ENGINE_FAILED": _engine_failed,
    "ENGINE_STALLED": _engine_failed,
    "MODEL_NOT_AVAILABLE": _no_capacity,
    "NO_CAPACITY": _no_capacity,
    "MODEL_NOT_FOUND": _model_not_found,
    "RECOVERING": _recovering,
    "DRAINING": _draining,
    "DEADLINE_EXCEEDED": _deadline,
    "GAP": _gap,
    "CANCELED": _canceled,
    "TASK_NOT_FOUND": _not_found,
}


def explained(code: str | None, case: Case) -> bool:
    rule = EXPLAINED.get(code or "")
    return rule is not None and rule(case)


def was_canceled(story: Story, facts: Facts, at: float) -> bool:
    """Whether somebody wanted it canceled: its client said so, or was away for too long."""
    asked = story.cancel_sent_at()
    if asked is not None and asked <= at:
        return True
    if story.ask["form"] == "detach" and any(conn.status == 202 for conn in story.conns):
        return False
    if not story.native:
        return any(went(conn, facts) and conn.until <= at for conn in story.reading())
    return story.longest_absence() >= facts.promises["grace_s"] - CANCEL_SLACK_S


def went(conn: Conn, facts: Facts) -> bool:
    """Whether a reader may be taken for one that left. Not where it was the control that went: its tasks live on."""
    if conn.how != "broken" or conn.stalled or facts.hit(conn.sent, conn.until, parts=("client",)):
        return conn.how != "end"
    return not facts.hit(conn.until, conn.until, parts=("control",), hows=("kill", "term"))


def broken(conn: Conn, story: Story, facts: Facts) -> bool:
    """Whether a fault explains that a connection broke, could not be made, or fell silent."""
    if conn.stalled and conn.how != "silent":
        return True  # a client that takes nothing is let go; when it reads again, it is told so
    if facts.hit(conn.sent, conn.until, parts=("control", "client")):
        return True
    waiting = not any(event["id"] is not None for event in conn.events)  # of a task that has not begun there is no word
    if conn.how == "silent" and ((conn.op != "post" and waiting) or "hang" in (story.ask.get("script") or "")):
        return True
    # A reader that came back is let go without a word when its node is lost: the task may live on.
    ways = ("node", "link", "engine") if conn.how == "silent" else ("node", "link")
    back = conn.op != "post" or conn.replayed
    return (back or conn.how == "silent") and bool(facts.hit(conn.sent, conn.until, parts=ways))
