"""One start of one engine: its model found or fetched, its memory judged, its process run to its end.

Owns that order, the words for what goes wrong in it, and what of a start is written down so that the next agent can
tell whether a running engine is still the one that is wanted. Decides nothing about pools. Where models come from and
whether there is memory is asked of `Starts`, which whoever wires the node fills in.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from llorch.config_pools import PoolSpec
from llorch.errors import LlorchError
from llorch.messages import model_id_ok
from llorch.node import pool_events as ev
from llorch.node.engine_process import EngineProcess
from llorch.node.engine_record import Left
from llorch.node.engines.auto import wants_model
from llorch.node.engines.spec import HF, LOOPBACK, Launch
from llorch.node.handoff import Handoff, file_name
from llorch.node.plans import Plan

ROOM_POLL_S = 2.0  # memory of a process that has just ended takes a moment to be free
LOAD_S_PER_GIB = 20.0  # a slow disk's 50 MB/s
GIB = 1 << 30
MASK = "CUDA_VISIBLE_DEVICES"


class LocalModel(Protocol):
    """A model on this machine, as a start sees it."""

    @property
    def path(self) -> object: ...
    @property
    def size_bytes(self) -> int: ...


@dataclass(frozen=True, slots=True)
class NoRoom:
    """Why a model does not fit now. `hopeless`: nor would it on an empty machine."""

    text: str
    hopeless: bool


Said = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Starts:
    """What a start needs of its node.

    `model`: a reference's file, fetched first if need be. `here`: the same without fetching, None if it is not here;
    blocking. `room`: why it does not fit now; None if it does. `beside`: whether it fits beside what runs. `plan`: of a
    pool that could not be planned, anew. `mask`: how CUDA names these GPUs.
    """

    model: Callable[[str, Said], Awaitable[Any]]
    room: Callable[[object, Plan, Any], Awaitable[NoRoom | None]]
    beside: Callable[[Plan, Any], Awaitable[bool]]
    plan: Callable[[PoolSpec], Awaitable[Plan]]
    here: Callable[[str], Any | None]
    mask: Callable[[tuple[int, ...]], str]

    async def same(self, plan: Plan, identity: Identity, left: Left) -> tuple[bool, Any]:
        """Whether a start by today's settings would run just what `left` runs; and its model's file, if it has one.
        Nothing is fetched for that."""
        if plan.engine is None:
            return False, None
        path, model = _named_there(plan, identity.ref), None
        try:
            if path is None and wants_model(plan.engine, plan.spec):
                model = await asyncio.to_thread(self.here, identity.ref)
                if model is None:
                    return False, None
                path = str(model.path)
            launch = self.launch(plan, identity.model, left.port, _key_file(left), path)
        except (LlorchError, OSError):
            return False, None
        return _digest(launch) == identity.launch, model

    def launch(self, plan: Plan, model: str, port: int, key_file: str, path: str | None) -> Launch:
        """What its engine is started with. Raises ConfigError."""
        assert plan.engine is not None  # else there is no plan
        made = plan.engine.launch(plan.spec, model_id=model, port=port, key_file=key_file, model_path=path)
        if not plan.spec.gpus or MASK not in made.env:
            return made
        named = self.mask(plan.spec.gpus)  # parts of a GPU have names of their own
        return replace(made, env={**made.env, MASK: named})

    async def local(self, plan: Plan, ref: str, said: Said) -> Any | None:
        """The model's file, brought here if need be; None where the engine takes none, or fetches its model itself."""
        if plan.engine is None or not wants_model(plan.engine, plan.spec) or _named_there(plan, ref) is not None:
            return None
        return await self.model(ref, said)


def _named_there(plan: Plan, ref: str) -> str | None:
    """What an engine that reads whole folders of the hub's is given: a folder, or the name by which it fetches one."""
    if plan.engine is None or HF not in plan.engine.formats:
        return None
    scheme, _, rest = ref.partition(":")
    if scheme == "hf" and rest.count("/") == 1 and ":" not in rest:
        return rest
    return rest if scheme == "file" and not rest.endswith(".gguf") else None


def _digest(launch: Launch) -> str:
    """Of what a program is started with. The values of its environment may be secret, and this is kept in a file that
    is this user's alone."""
    words = [*launch.argv, *(f"{name}={value}" for name, value in sorted(launch.env.items()))]
    return hashlib.sha256("\0".join(words).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Identity:
    """What an agent wrote down of an engine that it started, for the next one."""

    pool_id: str
    replica_id: str
    model: str
    ref: str
    launch: str
    version: str | None = None

    def handoff(self, plan: Plan, left: Left) -> Handoff:
        return _handoff(plan, self.replica_id, self.model, left.pid, left.port, _key_file(left), self.version)


def _key_file(left: Left) -> str:
    return left.record.api_key_file if left.record is not None else ""


def identity_of(left: Left) -> Identity | None:
    """None if what was written down is not what we write."""
    meta = left.meta
    wanted = ("pool_id", "replica_id", "model", "ref", "launch")
    told = {name: value for name in wanted if isinstance(value := meta.get(name), str)}
    if len(told) < len(wanted) or not model_id_ok(told["model"]):
        return None
    version = meta.get("version")
    identity = Identity(**told, version=version if isinstance(version, str) else None)
    return identity if file_name(identity.pool_id, identity.replica_id) == left.name else None


def _handoff(
    plan: Plan, replica_id: str, model: str, pid: int | None, port: int, key_file: str, version: str | None
) -> Handoff:
    spec: PoolSpec = plan.spec
    return Handoff(
        pool_id=spec.id,
        replica_id=replica_id,
        engine=spec.engine,
        engine_version=version,
        url=f"http://{LOOPBACK}:{port}",
        model=model,
        slots=spec.slots,
        ctx=spec.ctx,
        pid=pid,
        device_mask=",".join(map(str, spec.gpus or ())) or None,
        api_key_file=key_file,
        engine_model=spec.engine_model,
    )


def _load_s(model: LocalModel | None) -> float:
    return 0.0 if model is None else LOAD_S_PER_GIB * model.size_bytes / GIB


@dataclass(frozen=True, slots=True)
class End:
    """How a start ended. `said` is the engine's own last line, `reason` is in our words."""

    reason: str
    said: str = ""
    hopeless: bool = False


class _Ended(Exception):
    """It ended before there was a process."""

    def __init__(self, end: End) -> None:
        self.end = end


@dataclass(slots=True, eq=False)
class EngineStart:
    """`left`: the engine of an earlier agent, which is gone on with instead of a start."""

    spawn: ev.Spawn
    plan: Plan
    left: Left | None = None
    load_timeout_s: float = 300.0
    process: EngineProcess | None = None
    model: Any = None  # its file, where it has one
    released: bool = False
    _ending: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def pid(self) -> int | None:
        return self.process.pid if self.process is not None else None

    def give(self, load_timeout_s: float) -> None:
        """How long it may take to load, beside what its size adds."""
        self.load_timeout_s = load_timeout_s + _load_s(self.model)

    def terminate(self) -> None:
        """Now, or as soon as there is something to end."""
        self._ending.set()
        if self.process is not None:
            self.process.terminate()

    def release(self) -> None:
        """Leave it to the next agent; one that has no process yet ends."""
        self.released = True
        self._ending.set()
        if self.process is not None:
            self.process.release()

    def remove_files(self) -> None:
        if self.process is not None and not self.released:
            self.process.remove_files()

    async def live(
        self,
        starts: Starts,
        make: Callable[[str], EngineProcess],
        take_over: Callable[[Left], EngineProcess],
        env: Mapping[str, str],
        *,
        before: asyncio.Future[Any] | None = None,
        said: Said,
        up: Callable[[Handoff], None],
    ) -> End:
        """To its end. It begins when `before` is done. `said` hears how far it is, `up` that there is a process."""
        try:
            if before is not None:
                await self._unless_ended(asyncio.wait((before,)))
            if self.left is not None:
                self.process = take_over(self.left)
            else:
                await self._start(starts, make, env, said, up)
            assert self.process is not None
            if self._ending.is_set():
                (self.process.release if self.released else self.process.terminate)()
            ended = await self.process.wait()
            return End(ended.how, ended.said)
        except _Ended as ended_early:
            return ended_early.end
        except LlorchError as error:
            return End(error.message, hopeless=not error.retriable)
        except OSError as error:
            return End(f"it could not be started: {error.strerror}")
        except ValueError:  # a NUL in an argument or in the environment
            return End("it could not be started: its arguments can't be given to a program", hopeless=True)

    async def _start(
        self,
        starts: Starts,
        make: Callable[[str], EngineProcess],
        env: Mapping[str, str],
        said: Said,
        up: Callable[[Handoff], None],
    ) -> None:
        spawn = self.spawn
        if self.plan.engine is None:  # of several models one may be why: only this one has to be good
            one = replace(self.plan.spec, model=spawn.ref, models=())
            self.plan = await self._unless_ended(starts.plan(one))
        plan, engine = self.plan, self.plan.engine
        assert engine is not None  # else there is no plan
        path = _named_there(plan, spawn.ref)
        model = await self._unless_ended(starts.local(plan, spawn.ref, said))
        if model is not None:
            path, self.model = str(model.path), model
            self.load_timeout_s += _load_s(model)
            await self._unless_ended(self._room(starts, model, said))
        name = file_name(spawn.pool_id, spawn.replica_id)
        process = self.process = make(name)
        launch = starts.launch(plan, spawn.model, process.port, str(process.key_file), path)
        identity = Identity(spawn.pool_id, spawn.replica_id, spawn.model, spawn.ref, _digest(launch), engine.version)
        meta = {name: value for name in identity.__slots__ if (value := getattr(identity, name)) is not None}
        await process.start(launch, env, meta=meta)
        up(
            _handoff(
                plan,
                spawn.replica_id,
                spawn.model,
                process.pid,
                process.port,
                str(process.key_file),
                engine.version,
            )
        )

    async def _room(self, starts: Starts, model: LocalModel, said: Said) -> None:
        """Wait for memory that others have for now. Raises _Ended where waiting can't help, or did not."""
        waited_s = 0.0
        while (no_room := await starts.room(self, self.plan, model)) is not None:
            if no_room.hopeless or waited_s >= self.load_timeout_s:
                raise _Ended(End(no_room.text, hopeless=no_room.hopeless))
            said(f"it waits for memory: {no_room.text}")
            await asyncio.sleep(ROOM_POLL_S)
            waited_s += ROOM_POLL_S

    async def _unless_ended(self, work: Awaitable[Any]) -> Any:
        doing, ending = asyncio.ensure_future(work), asyncio.ensure_future(self._ending.wait())
        try:
            await asyncio.wait((doing, ending), return_when=asyncio.FIRST_COMPLETED)
            if not doing.done():
                raise _Ended(End("it was told to end before it had started"))
            return await doing
        finally:
            for task in (doing, ending):
                task.cancel()
            await asyncio.gather(doing, ending, return_exceptions=True)
