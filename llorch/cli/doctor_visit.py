"""How `llorch doctor` looks: at everything at once, within one limit, and what the roles' visits have in common.

A look that can't be finished says so, and a fault of this machine is a finding, not an end. Judgement is the pure
modules' (`doctor_*findings`).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from llorch import __version__, web
from llorch.cli import doctor_findings as said
from llorch.cli import doctor_reach_findings as reach
from llorch.cli.doctor_findings import Finding, State, fail
from llorch.cli.doctor_machine import hard_file_limit, look_at_directory, look_at_secrets
from llorch.cli.doctor_probes import Asker, connect, handshake, in_thread, lookup
from llorch.cli.doctor_reach_findings import Answer, Met, Peer, Trust
from llorch.config import ControlSettings, NodeSettings, Resolved, RoleSettings
from llorch.errors import LlorchError

if TYPE_CHECKING:
    import ssl

LIMIT_S = 9.5  # for everything together
DISK_S = 3.0  # a mount whose server is gone blocks for ever

S = TypeVar("S", bound=RoleSettings)
T = TypeVar("T")
Work = Callable[[list[Finding]], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Look:
    """`work` appends what it finds, as it finds it. `check`: what is said to be unknown if it is not done in time."""

    check: str
    work: Work


async def visit(looks: Sequence[Look], *, spent_s: float = 0.0) -> list[Finding]:
    """All looks at once; what they found in their own order. `spent_s`: what of the limit has gone before."""
    found: list[list[Finding]] = [[] for _ in looks]
    tasks = [
        asyncio.create_task(_finished(look, into), name=f"doctor.{look.check}")
        for look, into in zip(looks, found, strict=True)
    ]
    _, late = await asyncio.wait(tasks, timeout=LIMIT_S - spent_s)
    for task in late:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for look, task, into in zip(looks, tasks, found, strict=True):
        if task in late:
            into.append(said.unseen(look.check, LIMIT_S))
        else:
            task.result()  # a fault of this program is one
    return [finding for into in found for finding in into]


async def _finished(look: Look, into: list[Finding]) -> None:
    try:
        await look.work(into)
    except TimeoutError:
        into.append(said.unseen(look.check, DISK_S))
    except LlorchError as error:
        into.append(fail(look.check, error.message, error.hint or "`llorch config show` says which files are meant"))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        why = (error.strerror or type(error).__name__).lower()
        into.append(fail(look.check, f"{where}{why}", "run this as the user that runs llorch"))


# ---------------------------------------------------------------- what several roles have in common


async def on_disk(work: Callable[[], T]) -> T:
    return await in_thread(work, DISK_S)


def settings_look(resolved: Resolved[S], files: tuple[str, ...]) -> Look:
    async def work(into: list[Finding]) -> None:
        into += said.settings(files, resolved.warnings, resolved.settings.role)

    return Look("settings", work)


def directory_look(data_dir: str) -> Look:
    async def work(into: list[Finding]) -> None:
        facts = await on_disk(lambda: look_at_directory(Path(data_dir)))
        into.append(said.directory("data-dir", facts, "--data-dir"))
        room = said.disk(facts, "--data-dir")
        if room is not None:
            into.append(room)

    return Look("data-dir", work)


def secrets_look(own: Sequence[Path], resolved: Resolved[ControlSettings] | Resolved[NodeSettings]) -> Look:
    given = [*resolved.files_read, *filter(None, [resolved.settings.tls_key])]

    async def work(into: list[Finding]) -> None:
        into += said.secret_files(await on_disk(lambda: look_at_secrets(own, given)))

    return Look("secrets", work)


def files_look() -> Look:
    async def work(into: list[Finding]) -> None:
        into.append(said.open_files(hard_file_limit()))

    return Look("files", work)


@contextlib.asynccontextmanager
async def asking(
    peer: Peer, address: str, context: ssl.SSLContext | None, server_name: str | None = None
) -> AsyncIterator[Asker]:
    async with web.client_session(tls=context) as session:
        yield Asker(session, peer, address, server_name)


async def connected(peer: Peer, into: list[Finding]) -> str | None:
    """As far as the connection."""
    found = await lookup(peer.host)
    into.append(reach.dns(peer, found))
    if not found.addresses:
        return None
    tries = await connect(found.addresses, peer.port)
    into.append(reach.tcp(peer, tries))
    return next((one.address for one in tries if one.met is Met.OPEN), None)


async def believed(
    peer: Peer,
    address: str,
    context: ssl.SSLContext | None,
    trust: Trust,
    into: list[Finding],
    server_name: str | None = None,
) -> bool:
    """Whether the certificate there is believed, where there is to be one."""
    if context is None or not peer.secure:
        return True
    facts = await handshake(address, peer.port, context, server_name or peer.host)
    finding = reach.tls(peer, facts, trust, time.time())
    if finding.state is State.FAIL or trust is not Trust.NOBODY:
        into.append(finding)
    return finding.state is not State.FAIL


async def control_there(asker: Asker, into: list[Finding]) -> bool:
    """Whether it is a control that answers, how it is, and what its clock says."""
    health = await asker.ask("/health")
    ready = await asker.ask("/readyz") if health.status == 200 else Answer()
    findings = reach.llorch(asker.peer, health, ready, __version__)
    into += findings
    if health.skew_s is not None:
        into.append(said.clock(health.skew_s, asker.peer.host))
    return findings[0].state is not State.FAIL
