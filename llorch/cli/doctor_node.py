"""`llorch doctor node`, on a GPU machine: who it is, whether each control takes it, its GPUs, engines and handoffs.

Meets controls as the node would, with the same certificate and under the same name. A join token is compared and never
sent; a node token is sent where the node would send it.
"""

from __future__ import annotations

import dataclasses
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from llorch import tls
from llorch.auth import parse_tokens
from llorch.cli import doctor_findings as common
from llorch.cli import doctor_node_findings as said
from llorch.cli.doctor_findings import Finding, Use
from llorch.cli.doctor_machine import look_at_port, look_at_watch
from llorch.cli.doctor_node_findings import By, Member
from llorch.cli.doctor_probes import addresses_of, connect, lookup
from llorch.cli.doctor_reach_findings import Met, Peer, Trust
from llorch.cli.doctor_visit import (
    Look,
    Work,
    asking,
    believed,
    connected,
    control_there,
    directory_look,
    files_look,
    on_disk,
    secrets_look,
    settings_look,
    visit,
)
from llorch.config import NodeSettings, Resolved
from llorch.config_kinds import is_loopback
from llorch.errors import LlorchError
from llorch.node.app import default_node_id
from llorch.tokens import read_join_token

if TYPE_CHECKING:
    from llorch.node.certificate import NodeCertificate

_NODE_FILE = Path("pki") / "node.pem"


async def look(resolved: Resolved[NodeSettings], files: tuple[str, ...]) -> list[Finding]:
    settings = resolved.settings
    started = time.monotonic()
    try:
        visited = await on_disk(lambda: Visit.of(settings))
    except OSError as error:  # TimeoutError is one
        why = f"{settings.data_dir} can't be looked at: {(error.strerror or 'it does not answer').lower()}"
        visited = Visit(settings, Member(settings.node_id or default_node_id(), By.NOTHING, why=why), None)
    return await visit(
        [
            settings_look(resolved, files),
            directory_look(settings.data_dir),
            secrets_look([Path(settings.data_dir) / _NODE_FILE], resolved),
            Look("member", visited.member),
            *(Look("control", visited.control(url)) for url in settings.join),
            Look("port", visited.port),
            Look("driver", visited.engines),
            Look("inotify", visited.inotify),
            files_look(),
        ],
        spent_s=time.monotonic() - started,
    )


@dataclass(frozen=True, slots=True)
class Showing:
    """What a control is shown, and what it is believed for."""

    by: By
    trust: Trust
    context: ssl.SSLContext | None
    server_name: str | None
    headers: Mapping[str, str]


class Visit:
    """The looks that need the settings. Use `of`."""

    def __init__(self, settings: NodeSettings, facts: Member, certificate: NodeCertificate | None) -> None:
        self.settings = settings
        self.facts = facts
        self.certificate = certificate

    @classmethod
    def of(cls, settings: NodeSettings) -> Visit:
        """Blocking. What the node would make of its certificate and its join token."""
        node_id = settings.node_id or default_node_id()
        secure = any(url.startswith("https:") for url in settings.join)
        if not secure:
            return cls(settings, Member(node_id, By.TOKENS, secure=False), None)
        from llorch import pki
        from llorch.node.certificate import NodeCertificate

        token = settings.join_token
        by = By.TOKENS if settings.service_token is not None else By.NOTHING
        try:
            held = NodeCertificate.load(settings.data_dir, node_id)
            unused = token is not None and (held is None or not held.came_with(token))
            if token is not None and unused:
                read_join_token(token)
                by = By.JOIN_TOKEN
        except LlorchError as error:
            return cls(settings, Member(node_id, by, why=error.message, hint=error.hint), None)
        if held is None or (by is not By.NOTHING and held.expired(time.time())):
            return cls(settings, Member(node_id, by), None)
        begins = pki.begins(held.holding.cert)
        return cls(settings, Member(node_id, By.CERTIFICATE, begins, held.ends, unused), held)

    async def member(self, into: list[Finding]) -> None:
        into.append(said.member(self.facts, time.time()))

    # ------------------------------------------------------------ each control

    def control(self, url: str) -> Work:
        async def work(into: list[Finding]) -> None:
            peer = Peer(url, "--join")
            if peer.secure and self.facts.by is By.JOIN_TOKEN:
                await self._before_joining(peer, into)
                return
            shows = await on_disk(lambda: self._shows(peer))
            context, name = shows.context, shows.server_name
            address = await connected(peer, into)
            if address is None or (peer.secure and (self.facts.why or self.facts.by is By.NOTHING)):
                return  # what it can't show or believe has been told
            if not await believed(peer, address, context, shows.trust, into, name):
                return
            async with asking(peer, address, context, name) as asker:
                if await control_there(asker, into) and (peer.secure or is_loopback(peer.host)):
                    answer = await asker.ask(f"/v2/nodes/{quote(self.facts.node_id)}/link", shows.headers)
                    into.append(said.accepted(peer, answer, shows.by, self.facts.node_id))

        return work

    def _shows(self, peer: Peer) -> Showing:
        if peer.secure and self.certificate is not None:
            return Showing(By.CERTIFICATE, Trust.CLUSTER, self.certificate.outgoing, tls.CONTROL_NAME, {})
        settings = self.settings
        pairs = parse_tokens(settings.node_token or settings.service_token or "", min_chars=1)
        headers = {"Authorization": f"Bearer {pairs[0][1]}"} if pairs else {}
        trust = Trust.FILE if settings.tls_ca else Trust.SYSTEM
        context = tls.client_context(settings.tls_ca) if peer.secure else None
        return Showing(By.TOKENS, trust, context, None, headers)

    async def _before_joining(self, peer: Peer, into: list[Finding]) -> None:
        """Whether this is the cluster of the join token, which stays here."""
        from llorch import pki

        digest = read_join_token(self.settings.join_token or "")
        address = await connected(peer, into)
        anybody = tls.cluster_client_context(b"", check=False)
        if address is None or not await believed(peer, address, anybody, Trust.NOBODY, into, tls.JOIN_NAME):
            return
        async with asking(peer, address, anybody, tls.JOIN_NAME) as asker:
            answer = await asker.ask("/cacerts", raw=True)
        try:
            found = pki.matching(pki.read_certs(answer.body or b"") if answer.status == 200 else [], digest)
        except ValueError:
            found = None
        if found is None:
            into.append(said.other_cluster(peer))
            return
        trusting = tls.cluster_client_context(pki.pem_of([found]))
        if await believed(peer, address, trusting, Trust.TOKEN, into, tls.JOIN_NAME):
            async with asking(peer, address, trusting, tls.JOIN_NAME) as asker:
                if await control_there(asker, into):
                    into.append(said.unasked(peer))

    # ------------------------------------------------------------ this machine

    async def port(self, into: list[Finding]) -> None:
        """The port, and the other way: whether what this node advertises leads to it."""
        bind = self.settings.bind
        facts = await on_disk(lambda: look_at_port(bind))
        ours = facts.use is Use.TAKEN and await self._role_at(self._own_url()) == "node"
        into.append(common.port(dataclasses.replace(facts, ours=ours), "node"))
        into.append(said.address(await self._address(running=ours)))

    def _own_url(self) -> str:
        """Where the node of these settings listens, for this machine."""
        settings, bind = self.settings, self.settings.bind
        secure = settings.tls_cert is not None or (self.certificate is not None and not bind.loopback)
        host = ("::1" if ":" in bind.host else "127.0.0.1") if bind.everywhere else bind.host
        return f"{'https' if secure else 'http'}://{f'[{host}]' if ':' in host else host}:{bind.port}"

    async def _role_at(self, url: str) -> str | None:
        """What says that it is at `url`, which nobody vouches for; None if nothing does."""
        peer = Peer(url, "--address")
        addresses = (await lookup(peer.host)).addresses
        tries = await connect(addresses, peer.port)
        address = next((one.address for one in tries if one.met is Met.OPEN), None)
        if address is None:
            return None
        context = tls.cluster_client_context(b"", check=False) if peer.secure else None
        async with asking(peer, address, context) as asker:
            health = await asker.ask("/health")
        return str(health.object.get("role") or "stranger") if health.status is not None else None

    async def _address(self, *, running: bool) -> said.Address:
        url = self.settings.address
        if url is None:
            return said.Address()
        addresses, here = await addresses_of(Peer(url, "--address").host)
        role = await self._role_at(url) if here else None
        return said.Address(url, addresses, here, role, running=running)

    async def engines(self, into: list[Finding]) -> None:
        from llorch.cli import doctor_engines

        answer = await doctor_engines.ask(self.settings)
        if answer is None:
            into.append(said.no_driver(doctor_engines.LIMIT_S))
            return
        driver, engines = answer
        into += [said.driver(driver), said.engines(engines)]

    async def inotify(self, into: list[Finding]) -> None:
        settings = self.settings
        runtime = Path(settings.runtime_dir or Path(settings.data_dir) / ".runtime") / "engines"
        facts = await on_disk(lambda: look_at_watch(runtime, polling=settings.poll_handoffs))
        into.append(said.inotify(facts))
