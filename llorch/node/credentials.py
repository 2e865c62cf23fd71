"""What a node shows a control: a token, or the certificate that the cluster gave it.

One value per control, looked at for every call and every link: a certificate that was renewed counts from the next
connection on.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from llorch import tls

if TYPE_CHECKING:
    from llorch.node.certificate import NodeCertificate


class Credentials(Protocol):
    @property
    def headers(self) -> Mapping[str, str]: ...

    @property
    def context(self) -> ssl.SSLContext | None:
        """For https; None: what the system trusts."""

    @property
    def server_name(self) -> str | None:
        """Whom the certificate of the control has to be for; None: the host in its URL."""

    @property
    def mend(self) -> str:
        """What a person does where a control refuses it."""

    def heard(self, authorities: object) -> None:
        """A control said which authorities the cluster trusts today (their short name)."""


@dataclass(frozen=True, slots=True)
class TokenCredentials:
    token: Callable[[], str]
    context: ssl.SSLContext | None
    server_name: str | None = None
    mend: str = "--node-token or --node-token-file has to hold a node token of that control"

    @property
    def headers(self) -> Mapping[str, str]:
        return {"Authorization": f"Bearer {self.token()}"}

    def heard(self, authorities: object) -> None:
        """Nothing to it: whom it trusts is in its settings."""


@dataclass(frozen=True, slots=True)
class CertificateCredentials:
    certificate: NodeCertificate
    server_name: str | None = tls.CONTROL_NAME

    @property
    def headers(self) -> Mapping[str, str]:
        return {}

    @property
    def context(self) -> ssl.SSLContext | None:
        return self.certificate.outgoing

    @property
    def mend(self) -> str:
        return f"`llorch token join --node {self.certificate.node_id}` on the control makes it a member again"

    def heard(self, authorities: object) -> None:
        if isinstance(authorities, str):
            self.certificate.heard(authorities)
