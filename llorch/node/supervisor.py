"""Does what the pools ask for: starts engines and takes over those that are left, offers them by handoff, ends them.

Surface:
    Supervisor(pools, plans, ...)                    start(), close()
    post(event)                                      tell the pools what happened, and do what follows
    ask(event)                                       the same for what somebody wishes, which may be refused
    configure(plans)                                 other pools in the settings

Owns every engine process and the files that belong to it under the runtime directory, and the one watcher of handoffs.
How a start goes is `engine_start`, whether an engine works is `engine_checks`, which engines there should be `pools`
decides. Never ends a process that llorch did not start.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import random
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import aiohttp

from llorch import web, whole_file
from llorch.errors import Code, ConfigError, LlorchError
from llorch.logs import Log
from llorch.node import adoption
from llorch.node import pool_events as ev
from llorch.node.engine_checks import Checks
from llorch.node.engine_process import EngineProcess, RuntimeDir
from llorch.node.engine_record import Left, Verdict
from llorch.node.engine_start import End, EngineStart, Starts, identity_of
from llorch.node.engines.command import NAME as COMMAND
from llorch.node.handoff import Handoff, Network, file_name, parse, render
from llorch.node.plans import Plan
from llorch.node.pools import Pools
from llorch.node.watcher import Watcher
from llorch.tasks import Guard

TICK_S = 0.2  # what a restart or the end of a drain may come late
STARTING_AGAIN_MS = 1_000
LOCK_TRIES, LOCK_PAUSE_S = 20, 0.1  # an agent that was killed a moment ago may still hold it

log = Log("supervisor")

Key = tuple[str, str]  # pool id, replica id


def _nothing(_said: object) -> None:
    pass


@dataclass(frozen=True, slots=True)
class Told:
    """Who hears of what: notes worth a counter, tasks that got a slot or lose it, wishes that outlive the agent."""

    note: Callable[[ev.Note], None] = _nothing
    seated: Callable[[ev.Seated], None] = _nothing
    end_tasks: Callable[[ev.EndTasks], None] = _nothing
    wishes: Callable[[dict[str, Any]], None] = _nothing
    heard_at: Callable[[str, str], float | None] = field(default=lambda _pool, _replica: None)


class Supervisor:
    """The hands of `pools`."""

    def __init__(
        self,
        pools: Pools,
        plans: Iterable[Plan],
        *,
        runtime_dir: Path,
        starts: Starts,
        node_id: str | None = None,
        stop_grace_s: float = 10.0,
        load_timeout_s: float = 300.0,
        stall_timeout_s: float = 120.0,
        orphan_grace_s: float = 0.0,
        keep_engines: bool = False,
        engine_cidrs: Sequence[Network] = (),
        poll_handoffs: bool = False,
        env: Mapping[str, str] | None = None,
        told: Told | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.pools = pools
        self.files = RuntimeDir(runtime_dir)
        self.plans = {plan.spec.id: plan for plan in plans}
        self.keep_engines = keep_engines
        self._starts = starts
        self._node_id = node_id
        self._stop_grace_s = stop_grace_s
        self._load_timeout_s = load_timeout_s
        self._stall_timeout_s = stall_timeout_s
        self._orphan_grace_s = orphan_grace_s
        self._env = dict(os.environ if env is None else env)
        self._told = told or Told()
        self._clock = clock
        self._watcher = Watcher(self.files.engines, self.post, engine_cidrs=engine_cidrs, polling=poll_handoffs)
        self._guard = Guard("supervisor")
        self._running: dict[Key, EngineStart] = {}
        self._left: dict[Key, tuple[Left, Any]] = {}  # found at the start, to be taken over; with their models' files
        self._ending: dict[str, asyncio.Task[Any]] = {}  # by file name: found at the start, and not wanted
        self._runs: set[asyncio.Task[None]] = set()
        self._unwritten: dict[str, Handoff] = {}  # by file name: offered, and not yet on disk
        self._offered: set[str] = set()  # handoffs of external engines that we wrote
        self._wishes: dict[str, Any] = pools.wishes()
        self._closing = False
        self._settled = False  # what an earlier agent left is taken over, or gone
        self._early: list[ev.Event] = []  # what happened before that
        self._exits = contextlib.AsyncExitStack()
        self._checks: Checks | None = None

    # ------------------------------------------------------------ life

    async def start(self) -> None:
        """Take the runtime directory, go on with what an earlier agent left, start what the settings ask for.

        Raises ConfigError when another agent uses the directory, or when it can't be used at all.
        """
        try:
            self.files.make()
            await self._lock()
        except OSError as error:
            why = "it is no directory" if isinstance(error, FileExistsError) else error.strerror
            raise ConfigError(
                f"the runtime directory can't be used: {error.filename or self.files.root}: {why}",
                hint="make it writable for the agent's user, or give another --runtime-dir",
            ) from None
        http = await self._exits.enter_async_context(web.client_session())
        self._checks = Checks(
            self.pools,
            self._running,
            http,
            self.post,
            clock=self._clock,
            stall_timeout_s=self._stall_timeout_s,
            heard_at=self._told.heard_at,
        )
        await self._take_over(http)
        self._settled = True
        for event in self._early:
            self.post(event)
        await self._watcher.start()
        self.post(ev.Start())
        self._guard.loop(self._tick, "tick")
        self._guard.loop(self._checks.check, "check")
        self._guard.loop(self._checks.watch, "watchdog")

    async def _lock(self) -> None:
        descriptor = os.open(self.files.root / "agent.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        for _ in range(LOCK_TRIES):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                await asyncio.sleep(LOCK_PAUSE_S)
            else:
                self._exits.callback(os.close, descriptor)
                return
        os.close(descriptor)
        raise ConfigError(f"another agent uses {self.files.root}", hint="give each its own --runtime-dir or --data-dir")

    async def close(self) -> None:
        """End every engine of ours and remove its files, or leave them to the next agent where that is wanted. Those
        that were handed over stay as they are."""
        self._closing = True
        await self._watcher.close()
        for start in self._running.values():
            if self.keep_engines:
                start.release()
            else:
                start.terminate()
        if self._runs:
            await asyncio.wait(set(self._runs))
        if self._checks is not None:
            await self._checks.close()
        await self._guard.close()
        for name in self._offered:
            self._withdraw(name)
        await self._exits.aclose()

    def ask(self, wish: ev.Event) -> None:
        """What somebody wants of a pool. Raises LlorchError for a wish that can't be granted."""
        if not self._settled:
            raise LlorchError(Code.RECOVERING, "this node is still starting", retry_after_ms=STARTING_AGAIN_MS)
        self.post(wish)

    def post(self, event: ev.Event) -> None:
        """Tell the pools, and do what they ask for; later, while it is not yet known which engines run already."""
        if self._closing:
            return
        if not self._settled:
            self._early.append(event)
            return
        for action in self.pools.handle(event, self._clock()):
            self._do(action)
        wishes = self.pools.wishes()
        if wishes != self._wishes:
            self._wishes = wishes
            self._told.wishes(wishes)

    def running(self) -> list[EngineStart]:
        """The engines of ours that run or start."""
        return list(self._running.values())

    def loading(self) -> list[EngineStart]:
        """Those of them that are not ready yet."""
        ready = {(pool, replica) for pool, replica, state, _ in self.pools.replicas() if state is ev.ReplicaState.READY}
        return [start for key, start in self._running.items() if key not in ready]

    def _forget(self, pool_id: str) -> None:
        """The logs of a pool's engines, none of which runs."""
        name = re.compile(rf"{re.escape(pool_id)}-r\d+\.log(\.\d+)?")
        try:
            for path in self.files.logs.iterdir():
                if name.fullmatch(path.name):
                    path.unlink(missing_ok=True)
        except OSError as error:
            log.error("logs.not_removed", **self._ids(pool_id, None), reason=error.strerror)

    def configure(self, plans: Iterable[Plan]) -> None:
        """The settings have these pools now, and each of them can be started."""
        plans = tuple(plans)
        there = set(self.pools.ids())  # those that go are needed until they have
        self.plans = {pool_id: plan for pool_id, plan in self.plans.items() if pool_id in there}
        self.plans.update((plan.spec.id, plan) for plan in plans)
        self.post(ev.Configure(tuple(plan.wanted for plan in plans)))

    def _do(self, action: ev.Action) -> None:
        checks = self._checks
        assert checks is not None  # start() came first
        match action:
            case ev.Spawn():
                self._run(EngineStart(action, self.plans[action.pool_id]))
            case ev.Prepare():
                self._guard.spawn(self._prepare(action), f"prepare.{action.pool_id}")
            case ev.TakeOver():
                left, model = self._left.pop((action.pool_id, action.replica_id))
                spawn = ev.Spawn(action.pool_id, action.replica_id, action.run, action.handoff.model, "")
                self._run(EngineStart(spawn, self.plans[action.pool_id], left, model=model))
            case ev.WriteHandoff(handoff):
                self._write(handoff)
            case ev.Withdraw(handoff):
                self._withdraw(handoff.file_name)
            case ev.Probe():
                checks.begin(action)
            case ev.StopProbe(pool_id, replica_id):
                checks.stop((pool_id, replica_id))
            case ev.Terminate(pool_id, replica_id):
                if start := self._running.get((pool_id, replica_id)):
                    start.terminate()
            case ev.Seated():
                self._told.seated(action)
            case ev.EndTasks():
                self._told.end_tasks(action)
            case ev.Forget(pool_id):
                self._forget(pool_id)
            case ev.Note():
                self._note(action)

    def _note(self, note: ev.Note) -> None:
        if note.event == "handoff.invalid":
            log.warning(note.event, node_id=self._node_id, file=note.name, reason=note.reason, code="HANDOFF_INVALID")
        else:
            bad = note.event in ("pool.failed", "engine.stalled", "pool.not_reloaded")
            ended = note.event == "engine.ended" and note.reason != "stopped"
            tell = log.error if bad else log.warning if ended else log.info
            tell(note.event, **self._ids(note.pool_id, note.replica_id), reason=note.reason or None)
        self._told.note(note)

    def _ids(self, pool_id: str | None, replica_id: str | None) -> dict[str, str]:
        """What says in a log line who it is about."""
        known = {"node_id": self._node_id, "pool_id": pool_id, "replica": replica_id}
        return {name: value for name, value in known.items() if value is not None}

    # ------------------------------------------------------------ engines of ours

    def _run(self, start: EngineStart) -> None:
        key = (start.spawn.pool_id, start.spawn.replica_id)
        self._running[key] = start
        task = self._guard.spawn(self._live(key, start), f"engine.{key[0]}.{key[1]}")
        self._runs.add(task)
        task.add_done_callback(self._runs.discard)

    async def _live(self, key: Key, start: EngineStart) -> None:
        """One start of one replica, to its end."""
        spawn = start.spawn
        start.give(self._load_timeout_s)
        if self._closing:
            start.terminate()

        def make(name: str) -> EngineProcess:
            return EngineProcess(
                self.files,
                name,
                stop_grace_s=self._stop_grace_s,
                orphan_grace_s=self._orphan_grace_s,
                ids=self._ids(*key),
            )

        def take_over(left: Left) -> EngineProcess:
            return EngineProcess.adopt(
                self.files,
                left,
                stop_grace_s=self._stop_grace_s,
                orphan_grace_s=self._orphan_grace_s,
                ids=self._ids(*key),
            )

        try:
            end = await start.live(
                self._starts,
                make,
                take_over,
                self._env,
                before=self._ending.get(file_name(*key)),
                said=lambda text: self.post(ev.Progress(spawn.pool_id, spawn.replica_id, spawn.run, text)),
                up=lambda handoff: self.post(ev.Spawned(spawn.run, handoff)),
            )
        except Exception:  # whatever it is, the pool has to hear that nothing runs
            log.fault("engine.fault", **self._ids(*key))
            end = End("an unexpected fault of the agent; it was logged")
        finally:
            self._running.pop(key, None)
            self._unwritten.pop(file_name(*key), None)
            start.remove_files()
        self.post(ev.Exited(*key, spawn.run, end.reason, random.random(), end.said, end.hopeless))

    async def _prepare(self, wish: ev.Prepare) -> None:
        """Have the model of a reload here, and see whether there is room for it beside what runs."""
        plan = self.plans[wish.pool_id]

        def said(text: str) -> None:
            self.post(ev.Progress(wish.pool_id, None, 0, text))

        beside, refusal = False, None
        try:
            model = await self._starts.local(plan, wish.ref, said)
            beside = await self._starts.beside(plan, model)
        except LlorchError as error:
            refusal = error.message
        except Exception:
            log.fault("prepare.fault", **self._ids(wish.pool_id, None))
            refusal = "an unexpected fault of the agent; it was logged"
        self.post(ev.Prepared(wish.pool_id, wish.model, ref=wish.ref, beside=beside, refusal=refusal))

    # ------------------------------------------------------------ what an earlier agent left

    async def _take_over(self, http: aiohttp.ClientSession) -> None:
        """Its engines go on if they are what the settings ask for. The others are ended, which may take its time: only
        what is to be started in their place waits for that. Strangers are left alone."""
        lefts = await adoption.look(self.files)
        await asyncio.gather(*(self._judge(left, http) for left in lefts))
        adoption.clear_strays(self.files)

    async def _judge(self, left: Left, http: aiohttp.ClientSession) -> None:
        if left.verdict in (Verdict.GONE, Verdict.STRANGER):
            adoption.forget(self.files, left)
            return
        why_not = left.why if left.verdict is Verdict.UNTENDED else await self._why_not(left, http)
        if why_not is not None:
            ending = adoption.end(self.files, replace(left, why=why_not), self._stop_grace_s)
            self._ending[left.name] = self._guard.spawn(ending, f"ending.{left.name}")

    async def _why_not(self, left: Left, http: aiohttp.ClientSession) -> str | None:
        """Why a running engine is not taken over; None if it now is."""
        identity = identity_of(left)
        plan = self.plans.get(identity.pool_id) if identity is not None else None
        if identity is None or plan is None:
            return "no pool of the settings wants it"
        same, model = await self._starts.same(plan, identity, left)
        if not same:
            return "the settings ask for another engine than this one"
        why_not = await adoption.challenge(http, left, keyed=plan.spec.engine != COMMAND)
        if why_not is not None:
            return why_not
        key = (identity.pool_id, identity.replica_id)
        handoff = identity.handoff(plan, left)
        try:
            parse(handoff.file_name, render(handoff))
        except ValueError as error:
            return f"what was written down of it is not so: {error}"
        self._left[key] = (left, model)
        actions = self.pools.handle(ev.Adopted(identity.model, identity.ref, handoff), self._clock())
        for action in actions:
            self._do(action)
        if not actions:
            del self._left[key]
            return "no pool of the settings wants it any more"
        return None

    # ------------------------------------------------------------ handoffs

    def _write(self, handoff: Handoff) -> None:
        """Offer an engine of the settings. A full disk is tried again at each tick."""
        name = handoff.file_name
        try:
            if handoff.pid is None:  # external: remembered as ours to withdraw, should this agent be killed
                self._offered.add(name)
                whole_file.replace(self.files.pids / name, b'{"pid": null}\n', durable=False)
            whole_file.replace(self.files.engines / name, render(handoff), durable=False)
            self._unwritten.pop(name, None)
        except OSError as error:
            told, self._unwritten[name] = name in self._unwritten, handoff
            if not told:
                log.error("handoff.unwritten", node_id=self._node_id, file=name, reason=error.strerror)
                self.post(ev.HandoffBad(name, f"it can't be written: {error.strerror}"))

    def _withdraw(self, name: str) -> None:
        self._unwritten.pop(name, None)
        for folder in (self.files.engines, self.files.pids):
            try:
                (folder / name).unlink(missing_ok=True)
            except OSError as error:
                log.error("handoff.not_removed", node_id=self._node_id, file=name, reason=error.strerror)

    async def _tick(self) -> float:
        for handoff in list(self._unwritten.values()):
            self._write(handoff)
        self.post(ev.Tick())
        return TICK_S
