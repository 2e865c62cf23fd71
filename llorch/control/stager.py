"""The staging and verifying of models across nodes: what `stage_jobs` decides, done.

Owns the calls to nodes and the tickets that they carry, one loop that looks at what nodes report, and the log's word of
ids that stand for two contents. Keeps no state but that of its jobs: a control that starts anew has forgotten them, and
nodes go on. Decides nothing.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import quote

from llorch import tickets
from llorch.control import verify_jobs
from llorch.control.access import Access
from llorch.control.digest_conflicts import DigestConflicts
from llorch.control.node_client import NodeClient
from llorch.control.registry import Registry
from llorch.control.stage_jobs import StageJobs
from llorch.control.stage_shares import Job, Order, job_view
from llorch.control.stage_sources import Machine, resolve, shown
from llorch.control.verify_jobs import Check, Outcome, VerifyJob
from llorch.errors import Code, LlorchError
from llorch.logs import Log
from llorch.messages import parse
from llorch.tasks import Guard
from llorch.wishes import StageAnswer, StageOrder, StageSource, StageWish, VerifyWish

STEP_S = 0.25  # as early as a node tells of a change
IDLE_STEP_S = 1.0  # nothing is staged: only conflicts are looked for
TICKET_LIFE_S = 12 * 3_600.0  # a large model over a slow line; a node that is asked again gets new ones
ORDER_TIMEOUT_S = 15.0  # a node answers once it has written the order down
REMOVE_TIMEOUT_S = 60.0  # deleting a large file on a slow disk
VERIFY_TIMEOUT_S = 3 * 3_600.0  # 1 TB at 100 MB/s

log = Log("control.stager")


def model_path(model: str, more: str = "") -> str:
    """A node's route for one model: its id, which may hold `/`, is one segment."""
    return f"/v2/catalog/{quote(model, safe='')}{more}"


class Stager:
    def __init__(
        self, registry: Registry, nodes: NodeClient, access: Access, guard: Guard, wall_time: Callable[[], str]
    ) -> None:
        self.jobs = StageJobs()
        self.verifications: dict[str, VerifyJob] = {}
        self._registry = registry
        self._nodes = nodes
        self._access = access
        self._guard = guard
        self._wall_time = wall_time
        self._conflicts = DigestConflicts()

    # ---- what is asked of it

    def check(self, wish: StageWish) -> None:
        """Raises what `stage` would for a wish that can't be granted."""
        self._named(wish.nodes)
        resolve(wish.model, self._machines(), wish.source)

    def checks(self, wish: VerifyWish) -> tuple[list[Check], list[str]]:
        """What there is to be read, and the nodes that are passed over as they are offline."""
        machines, everyone = self._machines(), wish.nodes == "all"
        nodes = self._named(wish.nodes)
        asked = [node_id for node_id in nodes if not everyone or machines[node_id].online]
        checks = verify_jobs.checks_of(wish.model, asked, machines, everyone=everyone)
        return checks, sorted(set(nodes) - set(asked))

    def stage(self, wish: StageWish) -> Job:
        """Begin a job, or find the one that does this already. Raises what `resolve` and `StageJobs.create` do."""
        machines = self._machines()
        everyone = wish.nodes == "all"
        nodes = self._named(wish.nodes)
        wanted = resolve(wish.model, machines, wish.source)
        job = self.jobs.create(
            f"stage-{secrets.token_hex(6)}",
            wanted,
            {node_id: machines[node_id].online for node_id in nodes},
            everyone=everyone,
            now=time.monotonic(),
            wall=self._wall_time(),
        )
        log.info("stage.asked", job=job.job_id, model=shown(wish.model), nodes=len(nodes))
        self._look(time.monotonic())
        return job

    def verify(self, wish: VerifyWish) -> VerifyJob:
        """Begin to have models read again. Raises NODE_NOT_FOUND, MODEL_NOT_FOUND, QUEUE_FULL."""
        now = time.monotonic()
        checks, offline = self.checks(wish)
        verify_jobs.make_room(self.verifications, now)
        job = VerifyJob(f"verify-{secrets.token_hex(6)}", now, self._wall_time(), tuple(checks), tuple(offline))
        self.verifications[job.job_id] = job
        log.info("verify.asked", job=job.job_id, model=wish.model, checks=len(checks))
        self._guard.spawn(self._verify(job), f"verify.{job.job_id}")
        return job

    async def remove(self, node_id: str, model: str, *, retire: bool) -> Any:
        """Have a node remove a model, or only no longer offer it. Raises what the node answers."""
        path = model_path(model, "?retire=true" if retire else "")
        answer = await self._nodes.call(node_id, "DELETE", path, timeout_s=REMOVE_TIMEOUT_S)
        self.jobs.removed(node_id, model, time.monotonic())
        log.info("model.removed", node_id=node_id, model=model, retire=retire)
        return answer

    def view(self, job: Job) -> dict[str, Any]:
        return job_view(job, time.monotonic())

    # ---- the loop

    async def step(self) -> float:
        self._look(time.monotonic())
        for event in self._conflicts.look({node.node_id: node.catalog for node in self._registry.nodes.values()}):
            log.warning(event.word, **event.fields)
        return STEP_S if self.jobs.running else IDLE_STEP_S

    def _look(self, now: float) -> None:
        running = self.jobs.running
        if not running:
            return
        for order in self.jobs.step(now, self._machines()):
            self._guard.spawn(self._ask(order), f"stage.{order.node_id}")
        for job in running:
            if job.ended_at is not None:
                log.info("stage.ended", job=job.job_id, model=shown(job.wanted.text), state=job.state)

    def _machines(self) -> dict[str, Machine]:
        return {node_id: Machine.of(node) for node_id, node in self._registry.nodes.items()}

    def _named(self, nodes: Sequence[str]) -> list[str]:
        """The ids that `nodes` means. Raises NODE_NOT_FOUND."""
        known: Mapping[str, object] = self._registry.nodes
        if nodes == "all":
            return sorted(known)
        for node_id in nodes:
            if node_id not in known:
                raise LlorchError(Code.NODE_NOT_FOUND, f"no node {node_id}", param="nodes")
        return sorted(set(nodes))

    # ---- asking

    async def _ask(self, order: Order) -> None:
        """One order to one node, and what becomes of it."""
        error = LlorchError(Code.NODE_LOST, "it could not be asked")
        answer: StageAnswer | None = None
        try:
            body = self._order(order).model_dump_json(exclude_none=True).encode()
            wire = await self._nodes.call(order.node_id, "POST", "/v2/catalog/stage", body, timeout_s=ORDER_TIMEOUT_S)
            answer = parse(StageAnswer, wire)
        except LlorchError as refused:
            error = refused
        finally:
            now = time.monotonic()
            if answer is None:
                self.jobs.refused(order, error, now)
            else:
                node = self._registry.nodes.get(order.node_id)
                self.jobs.answered(order, answer, None if node is None else Machine.of(node), now)
        if answer is None:
            log.warning("stage.refused", node_id=order.node_id, job=order.job_id, code=error.code)
        else:
            log.info(
                "stage.ordered", node_id=order.node_id, job=order.job_id, model=answer.model, state=answer.state,
                sources=",".join(order.sources) or None,
            )  # fmt: skip

    def _order(self, order: Order) -> StageOrder:
        wanted, sources = order.wanted, []
        for node_id in order.sources:
            node = self._registry.nodes.get(node_id)
            if node is None or node.url is None or wanted.sha256 is None:
                continue  # gone since a moment ago
            ticket = tickets.mint(
                self._ticket_key(certified=node.certified),
                model=wanted.model or "",
                digest=wanted.sha256,
                source=node_id,
                destination=order.node_id,
                expires_at=time.time() + TICKET_LIFE_S,
            )
            sources.append(StageSource(node_id=node_id, url=node.url, ticket=ticket))
        return StageOrder(
            ref=wanted.ref, model=wanted.model, sha256=wanted.sha256, size_bytes=wanted.size_bytes, sources=sources
        )

    def _ticket_key(self, *, certified: bool) -> str:
        """What the source checks with: who has shown a certificate was told the cluster's key."""
        if certified and self._access.authority is not None:
            return self._access.authority.trust.ticket_key
        return tickets.key_of(self._access.service_token())

    # ---- verifying

    async def _verify(self, job: VerifyJob) -> None:
        """Every node on its own, one model after the other: its disk is what takes the time."""
        nodes = dict.fromkeys(check.node_id for check in job.checks)
        try:
            await asyncio.gather(*(self._verify_at(job, node_id) for node_id in nodes))
        finally:
            job.ended_at = time.monotonic()
        log.info("verify.ended", job=job.job_id, state=job.state)

    async def _verify_at(self, job: VerifyJob, node_id: str) -> None:
        for check in job.of_node(node_id):
            check.state = Outcome.READING
            try:
                answer = await self._nodes.call(
                    node_id, "POST", model_path(check.model, "/verify"), timeout_s=VERIFY_TIMEOUT_S
                )
            except LlorchError as error:
                check.fail(error)
            else:
                verify_jobs.answered(check, answer)
            if check.state is Outcome.FAILED:
                log.warning(
                    "model.unverified", node_id=node_id, model=check.model, code=check.error and check.error.code
                )
