"""`llorch doctor control`, on a control's own machine: its directory, its secrets, its port, and where others find it.

Reads what the control reads, opens the authority with the passphrase of the settings, and writes nothing.
"""

from __future__ import annotations

import re
import ssl
import time
from pathlib import Path
from urllib.parse import urlsplit

from llorch import __version__, private, tls
from llorch.audit_files import FOLDER, MAC_KEY, SIGNING_KEY
from llorch.auth import Scope
from llorch.cli import doctor_control_findings as said
from llorch.cli import doctor_findings as common
from llorch.cli.doctor_findings import Finding
from llorch.cli.doctor_machine import look_at_port
from llorch.cli.doctor_probes import addresses_of, handshake, read_certificate
from llorch.cli.doctor_reach_findings import Peer
from llorch.cli.doctor_visit import (
    Look,
    asking,
    directory_look,
    files_look,
    on_disk,
    secrets_look,
    settings_look,
    visit,
)
from llorch.config import ControlSettings, Resolved
from llorch.config_kinds import HostPort, is_loopback
from llorch.control.access import serves_tls, static_tokens
from llorch.control.authority import DIRECTORY, FILE_NAME, ISSUED_NAME, Authority
from llorch.control.own_names import names_here
from llorch.control.place import read_place, url_for_others
from llorch.control.token_files import FILE_NAME as TOKENS_NAME
from llorch.control.token_files import USE_FILE_NAME, TokenFiles
from llorch.errors import ConfigError

_CERTIFICATE = re.compile(rb"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----\n", re.S)


async def look(resolved: Resolved[ControlSettings], files: tuple[str, ...]) -> list[Finding]:
    settings = resolved.settings
    data = Path(settings.data_dir)
    secret = [data / TOKENS_NAME, data / USE_FILE_NAME, data / DIRECTORY / FILE_NAME, data / DIRECTORY / ISSUED_NAME]
    secret += [data / FOLDER / MAC_KEY, data / FOLDER / SIGNING_KEY]
    visited = Visit(settings)
    return await visit(
        [
            settings_look(resolved, files),
            directory_look(settings.data_dir),
            secrets_look(secret, resolved),
            Look("authority", visited.authority),
            Look("tokens", visited.tokens),
            Look("tls", visited.shown),
            Look("port", visited.port),
            Look("address", visited.address),
            files_look(),
        ]
    )


class Visit:
    """The looks that need the settings."""

    def __init__(self, settings: ControlSettings) -> None:
        self.settings = settings
        self.data = Path(settings.data_dir)

    # ------------------------------------------------------------ what is on disk

    async def authority(self, into: list[Finding]) -> None:
        facts = await on_disk(self._authority)
        now = time.time()
        if facts is None:
            into.append(said.no_authority(serves_tls=serves_tls(self.settings)))
            return
        into += said.authority(facts, now)
        behind = said.clock(max(facts.begins, *(one.issued for one in facts.holders), 0.0), now)
        if behind is not None:
            into.append(behind)

    def _authority(self) -> said.AuthorityFacts | None:
        """Raises ConfigError if it can't be used."""
        from llorch import pki

        settings = self.settings
        if not Authority.exists(settings.data_dir):
            return None
        trust = Authority.open(settings.data_dir, settings.ca_passphrase, time.time())[0].trust
        now = time.time()
        return said.AuthorityFacts(
            begins=pki.begins(trust.signer.cert) + tls.BACKDATE_S,
            ends=trust.ends,
            pin=pki.pin_of(trust.signer.cert),
            older=tuple(len(trust.holders(cert, now)) for cert in trust.succeeded),
            holders=tuple(said.Holder(one.node_id, one.issued, one.ends) for one in trust.issued.values()),
            revoked=len(trust.revoked),
        )

    async def tokens(self, into: list[Finding]) -> None:
        into += said.tokens(await on_disk(self._tokens), time.time())

    def _tokens(self) -> said.TokenFacts:
        files, now = TokenFiles(self.data), time.time()
        files.load()
        submits = {Scope.SUBMIT, Scope.ADMIN}
        made = [one for one in files.tokens.records if one.ended(now) is None and one.scopes & submits]
        given = [scopes for _, _, scopes in static_tokens(self.settings) if Scope.SUBMIT in scopes]
        return said.TokenFacts(len(given), tuple((one.name, one.expires) for one in made))

    async def shown(self, into: list[Finding]) -> None:
        into.append(said.shown_certificate(await on_disk(self._shown), time.time()))

    def _shown(self) -> said.Shown:
        settings = self.settings
        if settings.tls == "off-mesh":
            return said.Shown("off-mesh")
        if not serves_tls(settings):
            url = read_place(self.data)
            if url is not None and url.startswith("https://"):
                return said.Shown("started", names=(url,))
            return said.Shown("none")
        if not (settings.tls_cert and settings.tls_key):
            return said.Shown("cluster", names=tuple(names_here(settings)))
        from llorch import pki

        try:
            tls.server_context(settings.tls_cert, settings.tls_key)
            certs = pki.read_certs(Path(settings.tls_cert).read_bytes())
            return said.Shown("own", read_certificate(certs[0]))
        except ConfigError as error:
            return said.Shown("own", why=error.message)
        except (ValueError, IndexError):
            return said.Shown("own", why=f"{settings.tls_cert} holds no certificate that can be read")

    # ------------------------------------------------------------ where it listens

    async def port(self, into: list[Finding]) -> None:
        """The port, and whether the control of this directory is the one that listens there."""
        bind = self.settings.bind
        running = await self._running()
        facts = await on_disk(lambda: look_at_port(bind))
        ours = running.ours and running.url is not None and urlsplit(running.url).port == bind.port
        into.append(common.port(common.Port(facts.bind, facts.use, facts.why, facts.by, ours), "control"))
        into.append(said.running(running, __version__))

    async def _running(self) -> said.Running:
        """What answers where the control that was started last said that it is. Asked on this machine's own address:
        the one for others may lead through something else.
        """
        url = await on_disk(lambda: read_place(self.data))
        parts = urlsplit(url or "")
        if url is None or parts.port is None:
            return said.Running()
        bind = self.settings.bind
        host = _local(bind) if bind.everywhere else parts.hostname or ""
        peer = Peer(f"{parts.scheme}://{f'[{host}]' if ':' in host else host}:{parts.port}", "--bind")
        context = await on_disk(self._trusting) if peer.secure else None
        if peer.secure and context is None:
            return said.Running(url, "stranger", trusted=False)
        if context is not None:
            met = await handshake(host, peer.port, context, tls.JOIN_NAME)
            if met.code is not None:
                return said.Running(url, "stranger", trusted=False)
            if met.certificate is None:
                return said.Running(url, why=met.why or "it shows no certificate")
        async with asking(peer, host, context, tls.JOIN_NAME) as asker:
            health = await asker.ask("/health")
        if health.status is None:
            return said.Running(url, why=health.why)
        role, version = (str(health.object.get(name) or "stranger") for name in ("role", "version"))
        return said.Running(url, role, version)

    def _trusting(self) -> ssl.SSLContext | None:
        """Believes those alone that hold this directory's authority: for that its key need not be opened."""
        data = private.read(self.data / DIRECTORY / FILE_NAME)
        if data is None:
            return None
        return tls.cluster_client_context(b"".join(_CERTIFICATE.findall(data)))

    async def address(self, into: list[Finding]) -> None:
        """What a machine that joins is told, and whether that is here."""
        settings = self.settings
        url = await on_disk(lambda: read_place(self.data))
        if url is None:
            scheme = "https" if serves_tls(settings) else "http"
            url = await on_disk(lambda: url_for_others(settings, f"{scheme}://{settings.bind}", settings.bind.port))
        host = urlsplit(url).hostname or ""
        if is_loopback(host):
            into.append(said.place(said.Place(url, host, loopback=True)))
            return
        addresses, here = await addresses_of(host)
        into.append(said.place(said.Place(url, host, loopback=False, addresses=addresses, here=here)))


def _local(bind: HostPort) -> str:
    return "::1" if ":" in bind.host else "127.0.0.1"
