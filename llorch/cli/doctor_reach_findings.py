"""Whether a control can be reached: from what each step of a connection met to findings.

    name ─▶ address ─▶ connection ─▶ TLS ─▶ HTTP ─▶ llorch

Owns the facts of each step and their words. A step that fails hides those behind it. What a peer sent is data: it is
put on one line and cut.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any
from urllib.parse import urlsplit

from llorch.cli.doctor_findings import Finding, State, expiry, fail, ok, warn
from llorch.client.text import one_line
from llorch.config_kinds import is_loopback

MAX_SHOWN = 80  # characters of what somebody else wrote
_EXPIRED, _NOT_YET = 10, 9  # X509_V_ERR_..., openssl/x509_vfy.h
_OTHER_NAME = frozenset({62, 64})  # host name, IP address
_NO_AUTHORITY = frozenset({2, 18, 19, 20, 21})  # self-signed, or its issuer is not known here
_PIN = (
    "`llorch certs status` on the control shows the SHA256 of its authority; then "
    "`llorch context add NAME --url URL --token - --ca-pin SHA256`"
)


def shown(text: object) -> str:
    """What another wrote, on one line."""
    line = one_line(str(text))
    return line if len(line) <= MAX_SHOWN else line[: MAX_SHOWN - 3] + "..."


@dataclass(frozen=True, slots=True)
class Peer:
    """A control's URL, and which setting it comes from."""

    url: str
    setting: str  # --url or --join

    @property
    def secure(self) -> bool:
        return self.url.startswith("https:")

    @property
    def host(self) -> str:
        return urlsplit(self.url).hostname or ""

    @property
    def port(self) -> int:
        return urlsplit(self.url).port or (443 if self.secure else 80)

    @property
    def base(self) -> str:
        """The path under which the API is, where a proxy puts it under one."""
        return urlsplit(self.url).path.rstrip("/")

    @property
    def is_client(self) -> bool:
        return self.setting == "--url"


# ---------------------------------------------------------------- name and connection


@dataclass(frozen=True, slots=True)
class Lookup:
    """`why` None: `addresses` were found."""

    addresses: tuple[str, ...] = ()
    why: str | None = None


def dns(peer: Peer, facts: Lookup) -> Finding:
    if facts.why is not None:
        return fail(
            "dns",
            f"{peer.host} does not resolve: {facts.why}",
            f"`getent hosts {peer.host}` asks as llorch does: mend DNS or /etc/hosts, or give an address in "
            f"{peer.setting}",
        )
    if facts.addresses == (peer.host,):
        return ok("dns", f"{peer.host} is an address: no name to resolve")
    return ok("dns", f"{peer.host} is {', '.join(facts.addresses)}")


class Met(StrEnum):
    """What a connection met."""

    OPEN = "open"
    REFUSED = "refused"
    SILENCE = "silence"
    NO_WAY = "no way"


@dataclass(frozen=True, slots=True)
class Try:
    address: str
    met: Met
    why: str = ""


def tcp(peer: Peer, tries: tuple[Try, ...]) -> Finding:
    """One `Try` for each address of the name."""
    opened = [one.address for one in tries if one.met is Met.OPEN]
    silent = [one.address for one in tries if one.met is Met.SILENCE]
    if opened and silent:
        return warn(
            "tcp",
            f"port {peer.port} of {', '.join(opened)} answers, that of {', '.join(silent)} does not: "
            "every new connection may first wait there",
            f"take the address that is silent out of DNS, or give {opened[0]} in {peer.setting}",
        )
    if opened:
        return ok("tcp", f"port {peer.port} of {opened[0]} answers")
    if silent:
        return fail(
            "tcp",
            f"port {peer.port} of {', '.join(silent)} does not answer: a firewall drops it, or no machine is there",
            "`llorch config firewall control` on the control's machine prints the rules that let it in",
        )
    if any(one.met is Met.REFUSED for one in tries):
        bind = f"{'127.0.0.1' if is_loopback(peer.host) else '0.0.0.0'}:{peer.port}"
        return fail(
            "tcp",
            f"{peer.host} is there, and nothing listens on its port {peer.port}",
            f"start `llorch control --bind {bind}` there (`llorch doctor control` on it tells more), "
            f"or mend the port in {peer.setting}",
        )
    why = next((one.why for one in tries if one.why), "the connection failed")
    return fail("tcp", f"{peer.host} can't be reached: {why}", f"mend the route: `ip route get {tries[0].address}`")


# ---------------------------------------------------------------- TLS


class Trust(StrEnum):
    """What decides whether a certificate is believed."""

    PIN = "the pinned authority"
    FILE = "the system's authorities and those of --tls-ca"
    SYSTEM = "the system's authorities"
    CLUSTER = "the cluster's authority"
    TOKEN = "the authority that the join token names"
    NOBODY = "nobody's word"  # to ask who it is


@dataclass(frozen=True, slots=True)
class Certificate:
    """What a certificate says of itself. Times are seconds since 1970."""

    name: str
    issuer: str
    names: tuple[str, ...]
    begins: float
    ends: float

    @property
    def self_signed(self) -> bool:
        return self.name == self.issuer

    @property
    def shown_names(self) -> str:
        some = ", ".join(map(shown, self.names[:6])) or "no name at all"
        return some + (f" and {len(self.names) - 6} more" if len(self.names) > 6 else "")


@dataclass(frozen=True, slots=True)
class Handshake:
    """`code`: OpenSSL's, where the certificate was not believed. `why`: where there was no TLS to speak of."""

    certificate: Certificate | None = None
    code: int | None = None
    said: str = ""
    why: str | None = None


def tls(peer: Peer, facts: Handshake, trust: Trust, now: float) -> Finding:
    cert = facts.certificate
    if facts.why is not None or cert is None:
        return fail(
            "tls",
            f"{peer.url} does not speak TLS as it should: {facts.why or 'it shows no certificate'}",
            f"if it is plain HTTP, start the control with --tls on, or give http:// in {peer.setting}; "
            "`llorch doctor control` on its machine tells more",
        )
    if facts.code is not None:
        return _refused(peer, facts, cert, trust, now)
    found = f"{shown(cert.name)}, signed by {shown(cert.issuer)}, believed for {trust}"
    return expiry("tls", f"the certificate of {found},", cert.begins, cert.ends, now, _renew(trust))


def _renew(trust: Trust) -> str:
    if trust in (Trust.CLUSTER, Trust.TOKEN, Trust.PIN):
        return "restart the control: it makes itself another; `llorch doctor control` on its machine tells more"
    return "put a newer certificate into the files of --tls-cert and --tls-key on the control: it takes them over"


def _refused(peer: Peer, facts: Handshake, cert: Certificate, trust: Trust, now: float) -> Finding:
    whose = f"the certificate of {shown(cert.name)}, signed by {shown(cert.issuer)},"
    if facts.code in (_EXPIRED, _NOT_YET):
        finding = expiry("tls", whose, cert.begins, cert.ends, now, _renew(trust))
        if finding.state is State.FAIL:
            return finding
        return fail("tls", f"what signed {whose[:-1]} is expired, or not good yet", _renew(trust))
    if facts.code in _OTHER_NAME:
        return fail(
            "tls",
            f"{whose} is for {cert.shown_names}, and not for {peer.host}",
            f"give one of these names in {peer.setting}, or start the control with --tls-names {peer.host} "
            "(with --tls-cert: get a certificate with this name)",
        )
    if facts.code in _NO_AUTHORITY:
        if trust is Trust.CLUSTER:
            return fail(
                "tls",
                f"{whose} is not by the authority that this node joined: another cluster, or another authority",
                "check the URL in --join; `llorch token join --node ID` on its control makes this machine a member",
            )
        if trust in (Trust.PIN, Trust.TOKEN):
            return fail(
                "tls", f"{whose} is not by {trust}: another cluster, or somebody else answers", f"check the URL; {_PIN}"
            )
        kind = "vouches for itself" if cert.self_signed else "is by an authority that is not known here"
        more = "for a company's authority: --tls-ca FILE"
        return fail("tls", f"{whose} {kind}", f"{_PIN}; {more}" if peer.is_client else more)
    return fail("tls", f"{whose} is not believed: {shown(facts.said)}", f"--tls-ca FILE, or {_PIN}")


# ---------------------------------------------------------------- HTTP


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer; `status` None: there was none, and `why` says so. `skew_s`: its clock against ours."""

    status: int | None = None
    body: Any = None
    why: str = ""
    skew_s: float | None = None

    @property
    def object(self) -> Mapping[str, Any]:
        return self.body if isinstance(self.body, dict) else {}

    @property
    def code(self) -> str:
        """The code of an error of llorch's; empty if it is none."""
        error = self.object.get("error")
        return str(error.get("code") or "") if isinstance(error, dict) else ""

    @property
    def message(self) -> str:
        error = self.object.get("error")
        return shown(error.get("message") or "") if isinstance(error, dict) else ""


def llorch(peer: Peer, health: Answer, ready: Answer, version: str) -> list[Finding]:
    """Whether what answers is a control, and in which state. `version` is ours."""
    elsewhere = f"check the host and the port in {peer.setting}"
    if health.status is None:
        tls_there = f"https:{peer.url.partition(':')[2]} in {peer.setting} if it serves with TLS; else "
        mend = elsewhere if peer.secure else tls_there + elsewhere
        return [fail("http", f"{peer.url} answers no request: {health.why}", mend)]
    if health.status == 401 and health.code:  # a certificate that was revoked may ask for nothing at all
        return [ok("http", "llorch answers, and says no more to this credential")]
    role, theirs = health.object.get("role"), shown(health.object.get("version"))
    if health.status != 200 or role is None:
        return [
            fail("http", f"what answers at {peer.url} is not llorch (status {health.status} for /health)", elsewhere)
        ]
    if role != "control":
        return [fail("http", f"what answers at {peer.url} is a {shown(role)}, not a control", elsewhere)]
    found = [ok("http", f"llorch control {theirs}")]
    if theirs != version:
        found = [
            warn(
                "http",
                f"llorch control {theirs}, and this is {version}",
                "install the same version on both: `llorch version` prints it",
            )
        ]
    status = ready.object.get("status")
    if ready.status is None or not isinstance(status, str):
        told = ready.why or f"status {ready.status}"
        found.append(warn("ready", f"it does not say whether it is ready: {told}", "run `llorch doctor` again"))
    elif status != "ok":
        found.append(
            warn("ready", f"the control is {shown(status)}: it takes no new tasks", "start it again: `llorch control`")
        )
    elif isinstance(ready.object.get("storm"), dict):
        found.append(
            warn(
                "ready",
                "the control misses many nodes at once, and blames its own network",
                "`llorch status` shows which; `llorch doctor node` on one of them says how it sees the control",
            )
        )
    else:
        found.append(ok("ready", "it takes tasks"))
    return found
