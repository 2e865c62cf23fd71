"""Brings models to this node: one job for each, from wherever it can be had, over restarts and bad lines.

    order ─▶ waits for its turn ─▶ sources one after the other ─▶ each file: room, bytes, digest, header ─▶ staged
                                   other nodes, then its own origin                              └▶ failed, and why

Owns the jobs, their order and their bounds: how many at once, how fast together, how much of the disk stays free. An
order is written into the catalog before its first byte comes, and goes on by itself when the agent starts again. What
a file is said to be never counts before its digest and its header were checked. Never touches a model that is in use.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from llorch import web
from llorch.config_kinds import MODEL_REF
from llorch.errors import Code, ConfigError, LlorchError
from llorch.logs import Log
from llorch.node.catalog import Catalog, LocalModel, check_ref, not_here
from llorch.node.catalog_file import Entry, StoredFile, fault_of_parts, file_name_ok, totals
from llorch.node.engines import gguf
from llorch.node.modelref import DEMO, model_id
from llorch.node.peers import Peers
from llorch.node.staging_http import READ_TIMEOUT_S, Download, Remote, storage_error, wrong_digest
from llorch.node.staging_job import Job, Pace, in_bytes
from llorch.node.staging_partial import Partial
from llorch.node.staging_sources import Source, sources_of
from llorch.tasks import Guard
from llorch.wishes import StageOrder

AT_ONCE = 2  # stagings; more would only share the same line and the same disk
MAX_JOBS = 256  # that wait or run
MAX_TOLD_CHARS = 1_500  # of what all the sources of a model said
SAID_EVERY_S = 1.0

log = Log("node.staging")


@dataclass(frozen=True, slots=True)
class StagingLimits:
    """`rate_bytes_s` of all stagings together, here and from here; None: as fast as it comes."""

    rate_bytes_s: int | None = None
    headroom_bytes: int = 0
    at_once: int = AT_ONCE


class Stager:
    """Use as an async context: entering takes up what an earlier agent left undone. `changed`: the catalog's report is
    another one now.
    """

    def __init__(
        self,
        catalog: Catalog,
        node_id: str,
        limits: StagingLimits,
        peers: Peers,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self.catalog = catalog
        self.node_id = node_id
        self.peers = peers
        self.pace = Pace(limits.rate_bytes_s)
        self._limits = limits
        self._changed = changed
        self._turn = asyncio.Semaphore(limits.at_once)
        self._jobs: dict[str, Job] = {}
        self._verifying: dict[str, asyncio.Task[dict[str, object]]] = {}
        self._guard = Guard("node.staging")
        self._exits = AsyncExitStack()
        self._ended = False
        self.serving = 0  # models that are being fetched here by other nodes
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Stager:
        self._session = await self._exits.enter_async_context(web.client_session(read_timeout_s=READ_TIMEOUT_S))
        self.catalog.stager = self
        for entry in self.catalog.entries():
            if entry.state == "staging":
                self._spawn(Job(entry.id, entry.order or StageOrder(ref=entry.ref or entry.id, model=entry.id)))
        self._guard.loop(self._tell, "progress")
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.catalog.stager, self._ended = None, True
        await self._guard.close()
        await self._exits.aclose()

    async def _tell(self) -> float:
        """While something comes, how far it is."""
        if self._jobs:
            self._changed()
        return SAID_EVERY_S

    def settle(self, limits: StagingLimits) -> None:
        """Limits that were read anew."""
        self._limits = limits
        self.pace.settle(limits.rate_bytes_s)

    # ------------------------------------------------------------ what is asked for

    async def order(self, order: StageOrder) -> dict[str, object]:
        """Have this model here: `{model, state, progress}` as it is now. Idempotent. Raises LlorchError."""
        job = await self._begin(order)
        if job is not None:
            await job.written.wait()
            if job.error is not None:
                raise job.error.copy()
            return {"model": job.id, "state": "staging", "progress": round(job.progress, 4)}
        return {"model": _id_of(order), "state": "staged", "progress": 1.0}

    async def ensure(self, order: StageOrder, said: Callable[[str], None]) -> LocalModel:
        job = await self._begin(order)
        while job is not None and job.task is not None and not job.task.done():
            said(job.words())
            await asyncio.wait({job.task}, timeout=SAID_EVERY_S)
        if job is not None and job.error is not None:
            raise job.error.copy()
        entry = self.catalog.get(_id_of(order))
        found = await asyncio.to_thread(self.catalog.open, entry) if entry is not None and entry.here else None
        if found is None:
            raise LlorchError(Code.MODEL_NOT_AVAILABLE, f"{_id_of(order)} was not staged, or is gone again")
        return found

    async def remove(self, model: str) -> None:
        """A model that is here, or the staging of one. Raises CONFLICT while a pool uses it."""
        await asyncio.to_thread(self.catalog.check_removable, model)
        job = self._jobs.get(model)
        if job is not None:
            job.removed = True
            if job.task is not None:
                job.task.cancel()
                await asyncio.wait({job.task})
        await asyncio.to_thread(self.catalog.forget, model)
        self._changed()

    async def retire(self, model: str) -> Entry:
        entry = await asyncio.to_thread(self.catalog.retire, model)
        self._changed()
        return entry

    def verify(self, model: str) -> asyncio.Task[dict[str, object]]:
        """Read its files again, in the background: `{model, ok, state, sha256?, error?}`. Asked twice, it is one."""
        entry = self.catalog.get(model)
        if entry is None:
            raise not_here(model)
        if entry.state == "staging":
            raise LlorchError(Code.CONFLICT, f"{model} is being staged")
        if model not in self._verifying:
            self._verifying[model] = self._guard.spawn(self._verify(model), f"verify.{model}")
        return self._verifying[model]

    async def _verify(self, model: str) -> dict[str, object]:
        why: str | None = None
        try:
            async with self._turn:
                await asyncio.to_thread(self.catalog.verify, model)
        except LlorchError as error:
            why = f"{error.code.value}: {error.message}"
        finally:
            self._verifying.pop(model, None)
            self._changed()
        entry = self.catalog.get(model)
        said = {"sha256": entry.sha256 if entry is not None else None, "error": why}
        log.info("catalog.verified", model=model, node_id=self.node_id, ok=why is None, reason=why)
        state = entry.state if entry is not None else "removed"
        return {"model": model, "ok": why is None, "state": state} | {key: one for key, one in said.items() if one}

    # ------------------------------------------------------------ jobs

    async def _begin(self, order: StageOrder) -> Job | None:
        """The job that brings it; None if it is here. An order of a model that is on its way joins it."""
        check_ref(order.ref)
        model = _id_of(order)
        self.catalog.folder(model)  # raises where there can be none
        if self._is_on_its_way(model, order):
            return self._jobs[model]
        if await asyncio.to_thread(self._is_here, model, order):
            self._changed()
            return None
        if self._is_on_its_way(model, order):  # another order of it came meanwhile
            return self._jobs[model]
        if len(self._jobs) >= MAX_JOBS:
            raise LlorchError(
                Code.QUEUE_FULL, f"{MAX_JOBS} models are being staged here already", retry_after_ms=30_000
            )
        job = Job(model, order)
        self._spawn(job)  # before anything is waited for: one job for each model
        return job

    def _spawn(self, job: Job) -> None:
        self._jobs[job.id] = job
        self.catalog.progress[job.id] = (0.0, job.order.size_bytes or 0)
        job.task = self._guard.spawn(self._run(job), f"stage.{job.id}")

    def _is_on_its_way(self, model: str, order: StageOrder) -> bool:
        job = self._jobs.get(model)
        if job is None:
            return False
        if order.sha256 is None and order.ref not in (job.order.ref, model):
            raise _taken(model, str(job.order.ref), "is being staged")
        if order.sha256 is not None and job.order.sha256 not in (None, order.sha256):
            raise wrong_digest(f"{model}, which is being staged,", order.sha256, str(job.order.sha256))
        return True

    def _is_here(self, model: str, order: StageOrder) -> bool:
        """Blocking. Raises LlorchError where another model has that name."""
        if order.ref == DEMO or order.ref.startswith("file:"):
            with contextlib.suppress(ConfigError):  # no such file here: it comes from another node
                self.catalog.look(order.ref)
        entry = self.catalog.get(model)
        if entry is None or not entry.here or self.catalog.open(entry) is None:
            return False
        if order.sha256 is not None and entry.sha256 is None:
            self.catalog.digest(model)
            entry = self.catalog.get(model) or entry
        if order.sha256 is not None and entry.sha256 != order.sha256:
            raise wrong_digest(f"{model}, which is here,", order.sha256, entry.sha256 or "none")
        same = entry.ref in (None, order.ref) or order.ref in (model, entry.id)
        if order.sha256 is None and not same:
            raise _taken(model, str(entry.ref), "is here")
        if entry.state == "retired":
            self.catalog.put(entry.model_copy(update={"state": "staged"}))
        return True

    def _remember(self, job: Job) -> None:
        """The order, and what an earlier attempt has brought of it, on disk."""
        entry = self.catalog.get(job.id)
        same = entry is not None and not entry.outside and (entry.order is not None or entry.ref == job.order.ref)
        kept = entry.files if entry is not None and same else []  # each is looked at before it counts
        self.catalog.put(Entry(id=job.id, ref=job.order.ref, state="staging", order=job.order, files=kept))

    async def _run(self, job: Job) -> None:
        try:
            await asyncio.to_thread(self._remember, job)
            job.written.set()
            self._changed()
            async with self._turn:
                log.info("staging.started", model=job.id, node_id=self.node_id, ref=MODEL_REF.show(job.order.ref))
                await self._stage(job)
            log.info("staging.done", model=job.id, node_id=self.node_id, bytes=job.total_bytes)
        except LlorchError as error:
            job.error = error.copy()
        except OSError as error:
            job.error = storage_error(error)
        except asyncio.CancelledError:
            job.error = LlorchError(Code.CANCELED, f"the staging of {job.id} was given up")
            raise
        except Exception:
            log.fault("staging.fault", model=job.id, node_id=self.node_id)
            job.error = LlorchError(Code.INTERNAL, "an unexpected fault on the node; it was logged")
        finally:
            job.written.set()
            if self._jobs.get(job.id) is job:
                del self._jobs[job.id]
        if job.error is not None:
            log.error("staging.failed", model=job.id, node_id=self.node_id, code=job.error.code, why=job.error.message)
            entry = self.catalog.get(job.id)
            if entry is not None and not job.removed:
                failed = entry.model_copy(update={"state": "failed", "error": _in_short(job.error)})
                await asyncio.to_thread(self.catalog.put, failed)
        self._changed()

    async def _stage(self, job: Job) -> None:
        """From the first source that has it. Raises what the most telling of them failed with."""
        assert self._session is not None
        failures: list[LlorchError] = []
        for source in sources_of(job.order, job.id, self._session, self.peers):
            job.step = f"asks {source.label}"
            try:
                files = await source.files()
                await self._take(job, source, files)
                return
            except LlorchError as error:
                if error.code is Code.INSUFFICIENT_STORAGE:
                    raise
                log.warning(
                    "staging.source_failed", model=job.id, source=source.label, code=error.code, why=error.message
                )
                failures.append(error)
        wrong = [error for error in failures if error.code is Code.DIGEST_MISMATCH]
        last = (wrong or failures)[-1]
        told = "; ".join(dict.fromkeys(error.message for error in failures))[:MAX_TOLD_CHARS]
        raise LlorchError(last.code, told, hint=last.hint, retriable=last.retriable, details=last.details)

    # ------------------------------------------------------------ files

    async def _take(self, job: Job, source: Source, files: Sequence[Remote]) -> None:
        """Every file of the model, checked, under its name; then the whole."""
        fault = fault_of_parts([file.name for file in files])
        bad = next((file.name for file in files if not (file_name_ok(file.name) and file.name.endswith(".gguf"))), None)
        if fault is not None or bad is not None:
            raise _unusable(source.label, fault or f"{bad!r:.80} is no name for a GGUF")
        files = [_as_meant(file, job.order) if len(files) == 1 else file for file in files]
        sizes = [file.size_bytes for file in files]
        if all(size is not None for size in sizes):
            job.total_bytes = sum(size or 0 for size in sizes)
            if job.order.size_bytes not in (None, job.total_bytes):
                raise LlorchError(
                    Code.DIGEST_MISMATCH,
                    f"{source.label} has {job.total_bytes} bytes, and {job.order.size_bytes} were meant",
                )
        folder = self.catalog.folder(job.id)
        await asyncio.to_thread(_make_folder, folder)
        stored: list[StoredFile] = []
        for place, file in enumerate(files):
            before = sum(one.size_bytes for one in stored)
            job.at(before)
            stored.append(await self._take_file(job, source, folder, file, first=place == 0, before=before))
            await self._note(job, stored)
        whole = totals(stored)
        if job.order.sha256 not in (None, whole["sha256"]):
            await asyncio.to_thread(shutil.rmtree, folder)
            raise wrong_digest(source.label, str(job.order.sha256), str(whole["sha256"]))
        await asyncio.to_thread(self._finish, job, folder, stored)

    async def _take_file(
        self, job: Job, source: Source, folder: Path, file: Remote, *, first: bool, before: int
    ) -> StoredFile:
        kept = await asyncio.to_thread(self._have, job.id, folder, file)
        if kept is not None:
            job.at(before + kept.size_bytes)
            return kept

        def at(length: int) -> None:
            job.at(before + length)
            self.catalog.progress[job.id] = (job.progress, job.total_bytes)

        def room(size: int, there: int) -> None:
            job.total_bytes = max(job.total_bytes, before + size)
            self._check_room(job, folder, job.total_bytes - before - there)

        assert self._session is not None
        partial = Partial(folder, file.name)
        job.step = "fetches"
        try:
            cached = source.cached.get(file.name)
            given_up = lambda: self._ended or job.removed  # noqa: E731
            if cached is None or not await asyncio.to_thread(_take_cached, cached, file, partial, given_up):
                download = Download(self._session, file, partial, room=room, at=at, pace=self.pace)
                await download.run()
            job.step = "is checked"
            return await asyncio.to_thread(_keep, partial, source.label, first)
        finally:
            await asyncio.shield(asyncio.to_thread(partial.close))

    def _have(self, model: str, folder: Path, file: Remote) -> StoredFile | None:
        """This file, if an earlier attempt brought and checked it, and it is the one that is meant now."""
        entry = self.catalog.get(model)
        known = next((one for one in entry.files if one.name == file.name), None) if entry is not None else None
        if known is None or known.sha256 is None or file.sha256 not in (None, known.sha256):
            return None
        if file.sha256 is None and file.size_bytes != known.size_bytes:
            return None
        try:
            found = (folder / file.name).lstat()
        except OSError:
            return None
        return known if (found.st_ino, found.st_size, found.st_mtime_ns) == known.stamp else None

    async def _note(self, job: Job, stored: Sequence[StoredFile]) -> None:
        entry = self.catalog.get(job.id)
        if entry is not None:
            await asyncio.to_thread(self.catalog.put, entry.model_copy(update={"files": list(stored)}))

    def _finish(self, job: Job, folder: Path, stored: Sequence[StoredFile]) -> None:
        """Blocking. What an earlier attempt or an earlier model of that name has left goes."""
        names = {file.name for file in stored}
        for path in folder.iterdir():
            if path.name not in names and not path.is_dir():
                path.unlink()
        header = gguf.read_header(folder / stored[0].name)
        entry = Entry(id=job.id, ref=job.order.ref, ctx_train=header.ctx_train, **totals(stored))
        self.catalog.put(entry)
        if self.catalog.open(entry) is None:
            raise LlorchError(Code.MODEL_NOT_AVAILABLE, f"{job.id} was staged and can't be opened")

    def _check_room(self, job: Job, folder: Path, missing: int) -> None:
        """Raises INSUFFICIENT_STORAGE unless it fits beside what the other jobs still have to bring."""
        found = os.statvfs(folder)
        free = found.f_bavail * found.f_frsize
        others = sum(other.missing_bytes for other in self._jobs.values() if other is not job)
        wanted = missing + others + self._limits.headroom_bytes
        if free < wanted:
            beside = f", {in_bytes(others)} for other models" if others else ""
            raise LlorchError(
                Code.INSUFFICIENT_STORAGE,
                f"{job.id} needs {in_bytes(missing)} more{beside}, and {in_bytes(free)} are free, of which "
                f"{in_bytes(self._limits.headroom_bytes)} are to stay so",
                hint="`llorch model rm` removes models; or give a larger --data-dir, or a smaller --stage-headroom",
                details={"missing_bytes": missing, "free_bytes": free, "headroom_bytes": self._limits.headroom_bytes},
            )


# ---------------------------------------------------------------- blocking


def _taken(model: str, ref: str, how: str) -> LlorchError:
    return LlorchError(
        Code.CONFLICT,
        f"another model {how} under the name {model}: {MODEL_REF.show(ref)}",
        hint="remove it first: `llorch model rm`",
    )


def _make_folder(folder: Path) -> None:
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.is_symlink():
        raise ConfigError(f"{folder} is a symbolic link", hint="remove it, and stage again")
    folder.mkdir(mode=0o700, exist_ok=True)


def _take_cached(cached: Path, file: Remote, partial: Partial, given_up: Callable[[], bool]) -> bool:
    """A file that another program has fetched already: a second name for it where that can be, for then it takes no
    room; else False, and it is fetched. It has to be what the source says, to the last byte.
    """
    try:
        partial.discard()
        os.link(cached.resolve(strict=True), partial.path)
        return partial.adopt(given_up) == file.sha256 and partial.length == file.size_bytes
    except OSError:
        return False


def _keep(partial: Partial, source: str, first: bool) -> StoredFile:
    """Check what a file says of itself, then give it its name. One that lies is deleted."""
    try:
        gguf.read_header(partial.path, first=first)
    except ValueError as error:
        partial.discard()
        raise _unusable(source, f"what it sent is not a usable GGUF: {error}") from None
    partial.finish()
    found = partial.final.stat()
    return StoredFile(
        name=partial.final.name,
        size_bytes=found.st_size,
        sha256=partial.digest,
        stamp=(found.st_ino, found.st_size, found.st_mtime_ns),
    )


# ---------------------------------------------------------------- words


def _id_of(order: StageOrder) -> str:
    return order.model or model_id(order.ref)


def _as_meant(file: Remote, order: StageOrder) -> Remote:
    """With what the order knows of a model's only file."""
    if order.sha256 is not None and file.sha256 not in (None, order.sha256):
        raise wrong_digest(file.label, order.sha256, str(file.sha256))
    return file.meant(order.sha256, order.size_bytes)


def _unusable(source: str, why: str) -> LlorchError:
    return LlorchError(
        Code.MODEL_NOT_AVAILABLE,
        f"{source}: {why}",
        hint="look at the file there, or give another one",
        retriable=False,
    )


def _in_short(error: LlorchError) -> str:
    return f"{error.code}: {error.message}"[:2_000]
