"""Does what the pools ask for: starts engines, offers them by handoff, probes them, watches them, ends them.

Surface:
    Supervisor(pools, plans, ...)                    start(), close()
    post(event)                                      tell the pools what happened, and do what follows
    tail(pool_id, lines)                             the last lines of a pool's engine logs

Owns every engine process, their files under the runtime directory, the probes, and the one watcher of handoffs. Decides
nothing about pools: `pools` does. Never ends a process that it did not start.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import aiohttp

from llorch import web, whole_file
from llorch.errors import ConfigError, LlorchError
from llorch.logs import Log
from llorch.node import pool_events as ev
from llorch.node import probing
from llorch.node.adoption import clear_strays, end, forget, look
from llorch.node.engine_log import tail
from llorch.node.engine_process import EngineProcess, RuntimeDir
from llorch.node.engine_record import Verdict
from llorch.node.engines.spec import LOOPBACK
from llorch.node.handoff import Handoff, Network, file_name, render
from llorch.node.listeners import exposed
from llorch.node.plans import Plan
from llorch.node.pools import Pools
from llorch.node.watcher import Watcher
from llorch.tasks import Guard

TICK_S = 0.2  # what a restart or the end of a drain may come late
CHECK_S = 5.0  # how often a ready engine is asked whether it is still there
CHECKS_LOST = 2  # in a row: one refused connection may be a full backlog
PROBE_FIRST_S, PROBE_MOST_S = 0.05, 0.5  # between two questions; a handoff is to be routable within 2 s
QUIET_S = 3.0  # an engine that isn't there yet is no news before this
SHOWN_ADDRESSES = 3  # of an engine that listens where it should not

log = Log("supervisor")

Key = tuple[str, str]  # pool id, replica id


class Supervisor:
    """The hands of `pools`. `on_note` hears what is worth a counter."""

    def __init__(
        self,
        pools: Pools,
        plans: Iterable[Plan],
        *,
        runtime_dir: Path,
        node_id: str | None = None,
        stop_grace_s: float = 10.0,
        load_timeout_s: float = 300.0,
        engine_cidrs: Sequence[Network] = (),
        poll_handoffs: bool = False,
        env: Mapping[str, str] | None = None,
        on_note: Callable[[ev.Note], None] = lambda _note: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.pools = pools
        self.files = RuntimeDir(runtime_dir)
        self._node_id = node_id
        self._plans = {plan.spec.id: plan for plan in plans}
        self._stop_grace_s = stop_grace_s
        self._load_timeout_s = load_timeout_s
        self._env = dict(os.environ if env is None else env)
        self._on_note = on_note
        self._clock = clock
        self._watcher = Watcher(self.files.engines, self.post, engine_cidrs=engine_cidrs, polling=poll_handoffs)
        self._guard = Guard("supervisor")
        self._running: dict[Key, EngineProcess] = {}
        self._doomed: set[Key] = set()  # to be ended, perhaps before its start has begun
        self._runs: set[asyncio.Task[None]] = set()
        self._probes: dict[Key, asyncio.Task[None]] = {}
        self._unwritten: dict[str, Handoff] = {}  # by file name: offered, and not yet on disk
        self._offered: set[str] = set()  # handoffs of external engines that we wrote
        self._missed: dict[Key, int] = {}
        self._closing = False
        self._exits = contextlib.AsyncExitStack()
        self._http: aiohttp.ClientSession | None = None

    # ------------------------------------------------------------ life

    async def start(self) -> None:
        """Take the runtime directory, clear what an earlier agent left, start what the settings ask for.

        Raises ConfigError when another agent uses the directory.
        """
        self.files.make()
        self._lock()
        for left in await look(self.files):
            if left.verdict in (Verdict.OURS, Verdict.UNTENDED):
                await end(self.files, left, self._stop_grace_s)
            else:
                forget(self.files, left)
        clear_strays(self.files)
        self._http = await self._exits.enter_async_context(web.client_session())
        await self._watcher.start()
        self.post(ev.Start())
        self._guard.loop(self._tick, "tick")
        self._guard.loop(self._check, "check")

    def _lock(self) -> None:
        descriptor = os.open(self.files.root / "agent.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            raise ConfigError(
                f"another agent uses {self.files.root}", hint="give each its own --runtime-dir or --data-dir"
            ) from None
        self._exits.callback(os.close, descriptor)

    async def close(self) -> None:
        """End every engine of ours and remove its files. Those that were handed over stay as they are."""
        self._closing = True
        await self._watcher.close()
        for process in self._running.values():
            process.terminate()
        if self._runs:
            await asyncio.wait(set(self._runs))
        await self._guard.close()
        for name in self._offered:
            (self.files.engines / name).unlink(missing_ok=True)
            (self.files.pids / name).unlink(missing_ok=True)
        await self._exits.aclose()

    def post(self, event: ev.Event) -> None:
        """Tell the pools, and do what they ask for."""
        if self._closing:
            return
        for action in self.pools.handle(event, self._clock()):
            self._do(action)

    def _do(self, action: ev.Action) -> None:
        match action:
            case ev.Spawn(pool_id, replica_id, run):
                task = self._guard.spawn(self._run(pool_id, replica_id, run), f"engine.{pool_id}.{replica_id}")
                self._runs.add(task)
                task.add_done_callback(self._runs.discard)
            case ev.WriteHandoff(handoff):
                self._write(handoff)
            case ev.Probe():
                self._stop_probe((action.pool_id, action.replica_id))
                task = self._guard.spawn(self._probe(action), f"probe.{action.pool_id}.{action.replica_id}")
                self._probes[action.pool_id, action.replica_id] = task
            case ev.StopProbe(pool_id, replica_id):
                self._stop_probe((pool_id, replica_id))
            case ev.Terminate(pool_id, replica_id):
                self._doomed.add((pool_id, replica_id))
                if process := self._running.get((pool_id, replica_id)):
                    process.terminate()
            case ev.Note():
                self._note(action)

    def _note(self, note: ev.Note) -> None:
        if note.event == "handoff.invalid":
            log.warning(note.event, node_id=self._node_id, file=note.name, reason=note.reason, code="HANDOFF_INVALID")
        else:
            tell = log.error if note.event == "pool.failed" else log.info
            tell(note.event, **self._ids(note.pool_id, note.replica_id), reason=note.reason or None)
        self._on_note(note)

    def _ids(self, pool_id: str | None, replica_id: str | None) -> dict[str, str]:
        """What says in a log line who it is about."""
        known = {"node_id": self._node_id, "pool_id": pool_id, "replica": replica_id}
        return {name: value for name, value in known.items() if value is not None}

    # ------------------------------------------------------------ engines of ours

    async def _run(self, pool_id: str, replica_id: str, run: int) -> None:
        """One start of one replica, to its end."""
        key = (pool_id, replica_id)
        plan = self._plans[pool_id]
        process: EngineProcess | None = None
        said = ""
        try:
            ids = self._ids(pool_id, replica_id)
            process = EngineProcess(
                self.files, file_name(pool_id, replica_id), stop_grace_s=self._stop_grace_s, orphan_grace_s=0, ids=ids
            )
            self._running[key] = process
            if self._closing or key in self._doomed:
                process.terminate()
            launch = plan.engine.launch(
                plan.spec,
                model_id=plan.model_id,
                port=process.port,
                key_file=str(process.key_file),
                model_path=plan.model_path,
            )
            await process.start(launch, self._env)
            self.post(ev.Spawned(run, self._handoff(plan, replica_id, process)))
            ended = await process.wait()
            reason, said = ended.how, ended.said
        except LlorchError as error:
            reason = error.message
        except OSError as error:
            reason = f"it could not be started: {error.strerror}"
        except ValueError:  # a NUL in an argument or in the environment
            reason = "it could not be started: its arguments can't be given to a program"
        finally:
            self._running.pop(key, None)
            self._doomed.discard(key)
            self._unwritten.pop(file_name(pool_id, replica_id), None)
            if process is not None:
                process.remove_files()
        self.post(ev.Exited(pool_id, replica_id, run, reason, random.random(), said))

    def _handoff(self, plan: Plan, replica_id: str, process: EngineProcess) -> Handoff:
        spec = plan.spec
        return Handoff(
            pool_id=spec.id,
            replica_id=replica_id,
            engine=plan.engine.name,
            engine_version=plan.engine.version,
            url=f"http://{LOOPBACK}:{process.port}",
            model=plan.model_id,
            slots=spec.slots,
            ctx=spec.ctx,
            pid=process.pid,
            device_mask=",".join(map(str, spec.gpus or ())) or None,
            api_key_file=str(process.key_file),
        )

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
            if name not in self._unwritten:
                log.error("handoff.unwritten", node_id=self._node_id, file=name, reason=error.strerror)
            self._unwritten[name] = handoff

    async def _tick(self) -> float:
        for handoff in list(self._unwritten.values()):
            self._write(handoff)
        self.post(ev.Tick())
        return TICK_S

    # ------------------------------------------------------------ probes

    def _stop_probe(self, key: Key) -> None:
        if task := self._probes.pop(key, None):
            task.cancel()

    async def _probe(self, probe: ev.Probe) -> None:
        """Ask until it works. An engine of ours has until the load timeout; another has as long as it is offered."""
        assert self._http is not None  # start() came first
        key = (probe.pool_id, probe.replica_id)
        began, pause_s = self._clock(), PROBE_FIRST_S
        said: str | None = None
        while True:
            answer, reason = None, ""
            try:
                answer = await probing.generates(self._http, probe.handoff)
            except probing.NotYet as error:
                reason = str(error)
            if reason != said and (where := await self._exposed(key)):  # its sockets changed only if its answers did
                reached = f"it listens on {', '.join(where)}: engines listen on loopback only"
                self.post(ev.ProbeFailed(*key, probe.probe, reached, gave_up=True))
                return
            if answer is not None:
                self._missed.pop(key, None)
                self.post(ev.ProbeOk(*key, probe.probe, slots=answer.slots, ctx=answer.ctx))
                return
            said, waited_s = reason, self._clock() - began
            if key in self._running and waited_s > self._load_timeout_s:
                late = f"it was not ready within {self._load_timeout_s:.0f} s: {reason}"
                self.post(ev.ProbeFailed(*key, probe.probe, late, gave_up=True))
                return
            if waited_s > QUIET_S:
                self.post(ev.ProbeFailed(*key, probe.probe, reason))
            await asyncio.sleep(pause_s)
            pause_s = min(PROBE_MOST_S, pause_s * 2)

    async def _exposed(self, key: Key) -> list[str]:
        """Where an engine of ours can be reached from other machines. Others' engines are their owners' to judge."""
        process = self._running.get(key)
        if process is None or process.pid is None:
            return []
        return (await asyncio.to_thread(exposed, process.pid))[:SHOWN_ADDRESSES]

    async def _check(self) -> float:
        """Whether the ready engines are still there. The end of our own is seen at once; this is for the others."""
        ready = [
            (pool_id, replica_id, handoff)
            for pool_id, replica_id, state, handoff in self.pools.replicas()
            if state is ev.ReplicaState.READY and handoff is not None
        ]
        await asyncio.gather(*(self._check_one(*replica) for replica in ready))
        return CHECK_S

    async def _check_one(self, pool_id: str, replica_id: str, handoff: Handoff) -> None:
        assert self._http is not None  # start() came first
        key = (pool_id, replica_id)
        reason = await probing.lost(self._http, handoff)
        if reason is None:
            self._missed.pop(key, None)
            return
        self._missed[key] = self._missed.get(key, 0) + 1
        if self._missed[key] >= CHECKS_LOST:
            self._missed.pop(key)
            self.post(ev.EngineLost(pool_id, replica_id, reason))

    # ------------------------------------------------------------ for people

    def tail(self, pool_id: str, lines: int = 200) -> list[str]:
        """The last lines of the logs of a pool's own replicas. Blocking, and short. Raises POOL_NOT_FOUND."""
        self.pools.health(pool_id)
        spec = self._plans[pool_id].spec if pool_id in self._plans else None
        names = [f"{pool_id}-r{number}.log" for number in range(spec.replicas if spec else 0)]
        return [line for name in names for line in tail(self.files.logs / name, lines)]
