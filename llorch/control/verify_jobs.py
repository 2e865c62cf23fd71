"""Verification: which models on which nodes are read again and compared with their digests, and what came out.

Owns those jobs. What a node has read is its word; of one that can't be asked nothing is said but that. Never asks a
node or reads a clock. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from llorch.control.stage_sources import Machines
from llorch.errors import Code, LlorchError
from llorch.messages import model_id_ok

MAX_JOBS = 50  # remembered; of ended ones the oldest go first
ENDED_KEPT_S = 3_600.0  # long enough for whoever asked to come back and look
MAX_CHECKS = 10_000  # of one job: every model of a large cluster


class Outcome(StrEnum):
    WAITING = "waiting"
    READING = "reading"
    OK = "ok"
    FAILED = "failed"


@dataclass(slots=True)
class Check:
    node_id: str
    model: str
    state: Outcome = Outcome.WAITING
    sha256: str | None = None
    error: LlorchError | None = None

    def fail(self, error: LlorchError) -> None:
        self.state, self.error = Outcome.FAILED, error.copy()

    def view(self) -> dict[str, Any]:
        error = self.error
        told = error and {
            "code": error.code, "message": error.message, "hint": error.hint, "retriable": error.retriable
        }  # fmt: skip
        return {
            "node_id": self.node_id, "model": self.model, "state": self.state.value, "sha256": self.sha256,
            "error": told,
        }  # fmt: skip


@dataclass(slots=True)
class VerifyJob:
    """`offline`: nodes that were not asked, as nobody named them."""

    job_id: str
    created_at: float
    created_wall: str
    checks: tuple[Check, ...]
    offline: tuple[str, ...]
    ended_at: float | None = None

    @property
    def state(self) -> str:
        if self.ended_at is None:
            return "running"
        return "failed" if any(check.state is not Outcome.OK for check in self.checks) else "done"

    def of_node(self, node_id: str) -> list[Check]:
        return [check for check in self.checks if check.node_id == node_id]

    def view(self) -> dict[str, Any]:
        return {
            "job": self.job_id,
            "state": self.state,
            "created_at": self.created_wall,
            "checks": [check.view() for check in self.checks],
            "offline": list(self.offline),
        }


def checks_of(model: str | None, nodes: Iterable[str], machines: Machines, *, everyone: bool) -> list[Check]:
    """What is to be read. Raises MODEL_NOT_FOUND if there is nothing such on these nodes."""
    found = [
        Check(node_id, report.id)
        for node_id in sorted(nodes)
        for report in (machines[node_id].catalog or {}).values()
        if report.state in ("staged", "retired") and model in (None, report.id) and model_id_ok(report.id)
    ]
    if not found or len(found) > MAX_CHECKS:
        what = "no model" if model is None else f"no model {model}"
        where = "any online node" if everyone else "these nodes"
        words = f"{what} is staged on {where}" if not found else f"that is more than {MAX_CHECKS} models"
        code = Code.MODEL_NOT_FOUND if not found else Code.INVALID_REQUEST
        raise LlorchError(code, words, param="model", hint="`llorch model ls` shows what is where")
    return found


def answered(check: Check, answer: object) -> None:
    """Take over what the node says: `{model, ok, sha256, error?}`."""
    said: Mapping[str, Any] = answer if isinstance(answer, Mapping) else {}
    digest, words, ok = said.get("sha256"), said.get("error"), said.get("ok")
    check.sha256 = digest[:128] if isinstance(digest, str) else None
    if ok is True:
        check.state = Outcome.OK
        return
    if ok is not False:
        words = "the node does not say what it has found"
        check.fail(LlorchError(Code.INTERNAL, words, hint="install the same llorch there as here"))
        return
    told = words[:1_000] if isinstance(words, str) else "its bytes are not those that it was staged with"
    mend = f"llorch model rm {check.model} --nodes {check.node_id}, and stage it again"
    code, _, text = told.partition(": ")
    known = code in Code.__members__
    check.fail(LlorchError(Code[code] if known else Code.DIGEST_MISMATCH, text if known else told, hint=mend))


def make_room(jobs: dict[str, VerifyJob], now: float) -> None:
    """Forget what is old. Raises QUEUE_FULL where no more can run."""
    for job in list(jobs.values()):
        if job.ended_at is not None and now - job.ended_at > ENDED_KEPT_S:
            del jobs[job.job_id]
    if len(jobs) >= MAX_JOBS:
        ended = [job for job in jobs.values() if job.ended_at is not None]
        if not ended:
            raise LlorchError(Code.QUEUE_FULL, f"{MAX_JOBS} verifications are running", retry_after_ms=10_000)
        del jobs[min(ended, key=lambda job: job.ended_at or 0.0).job_id]
