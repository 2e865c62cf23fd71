"""`llorch doctor` from a client: the control that commands here talk to, the way there, and what the token may do."""

from __future__ import annotations

import asyncio
import os
import uuid

from llorch import tls
from llorch.cli import doctor_client_findings as said
from llorch.cli import doctor_findings as common
from llorch.cli.contexts import contexts_path
from llorch.cli.doctor_client_findings import Aim
from llorch.cli.doctor_findings import Finding
from llorch.cli.doctor_machine import look_at_secrets
from llorch.cli.doctor_reach_findings import Peer, Trust
from llorch.cli.doctor_visit import Look, asking, believed, connected, control_there, on_disk, visit
from llorch.cli.target import Target
from llorch.config_kinds import plain_http_abroad


async def look(target: Target) -> list[Finding]:
    aim = Aim(target.url, target.url_from, target.token, target.withheld, target.warnings)

    async def settings(into: list[Finding]) -> None:
        into += said.aim(aim)

    async def control(into: list[Finding]) -> None:
        await _control(target, aim, into)

    async def secrets(into: list[Finding]) -> None:
        """The contexts hold tokens; a machine without them has nothing to say here."""
        files = await on_disk(lambda: look_at_secrets([], [str(contexts_path(os.environ))]))
        if files:
            into += common.secret_files(files)

    return await visit([Look("settings", settings), Look("secrets", secrets), Look("control", control)])


async def _control(target: Target, aim: Aim, into: list[Finding]) -> None:
    peer, context, trust = Peer(target.url, "--url"), None, Trust.SYSTEM
    if peer.secure:
        context = await on_disk(lambda: tls.client_context(target.tls_ca, only=target.pinned))
        trust = Trust.PIN if target.pinned else Trust.FILE if target.tls_ca else Trust.SYSTEM
    address = await connected(peer, into)
    if address is None or not await believed(peer, address, context, trust, into):
        return
    async with asking(peer, address, context) as asker:
        if not await control_there(asker, into):
            return
        unsent = said.unsent(aim, open_network=plain_http_abroad(target.url))
        if unsent is not None:
            into.append(unsent)
            return
        shows = {"Authorization": f"Bearer {target.token}"}
        read = submit = stranger = await asker.ask("/v2/nodes", shows)
        if read.status in (200, 403):  # a token that is refused is not tried again: refusals are counted
            unknown = f"/v2/tasks/{uuid.uuid4()}"
            submit, stranger = await asyncio.gather(asker.ask("/v1/models", shows), asker.ask(unknown, shows))
        into += said.token(said.Granted(read, submit, stranger))
        models = said.models(submit)
        if models is not None:
            into.append(models)
