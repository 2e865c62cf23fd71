"""What is found wrong on a control's own machine: its authority, its tokens, its certificate, where it is reached."""

from __future__ import annotations

from dataclasses import dataclass

from llorch.cli.doctor_findings import DAY_S, SOON_S, Finding, expiry, fail, ok, span, warn
from llorch.cli.doctor_reach_findings import Certificate, shown

AUTHORITY_SOON_S = 90 * DAY_S  # a new one has to reach every node and every pinned client first
LATE = 0.25  # of its life is left to a node's certificate: it renews after two thirds, so something keeps it from that
AHEAD_S = 60.0  # something on disk from later than this: the clock has gone back
_NAMED = 6


# ---------------------------------------------------------------- authority and nodes


@dataclass(frozen=True, slots=True)
class Holder:
    """A node's certificate. Times are seconds since 1970."""

    node_id: str
    issued: float
    ends: float


@dataclass(frozen=True, slots=True)
class AuthorityFacts:
    """`older`: for each authority that is still trusted beside the one that signs, how many nodes hold its."""

    begins: float
    ends: float
    pin: str
    older: tuple[int, ...] = ()
    holders: tuple[Holder, ...] = ()
    revoked: int = 0


def no_authority(*, serves_tls: bool) -> Finding:
    if serves_tls:
        return ok("authority", "there is none yet: the first start makes it")
    return ok("authority", "there is none, and none is needed on loopback without TLS")


def authority(facts: AuthorityFacts, now: float) -> list[Finding]:
    mend = "`llorch certs rotate`, and when all nodes have renewed, `llorch certs rotate --finish`"
    left_s = facts.ends - now
    if now < facts.begins or left_s <= 0 or left_s >= AUTHORITY_SOON_S:
        found = [expiry("authority", f"the authority {facts.pin[:12]}...", facts.begins, facts.ends, now, mend)]
    else:
        found = [warn("authority", f"the authority {facts.pin[:12]}... expires in {span(left_s)}", mend)]
    if facts.older and not any(facts.older):
        found.append(
            warn(
                "authority",
                f"{len(facts.older)} older ones are trusted, and no node holds a certificate of theirs",
                "`llorch certs rotate --finish`",
            )
        )
    elif facts.older:
        found.append(ok("authority", f"{len(facts.older)} older ones are still trusted, for {sum(facts.older)} nodes"))
    return [*found, *nodes(facts, now)]


def nodes(facts: AuthorityFacts, now: float) -> list[Finding]:
    """Nodes whose certificate should have been renewed by now."""
    in_force = [one for one in facts.holders if one.ends > now]
    late = [one for one in in_force if one.ends - now < LATE * (one.ends - one.issued)]
    found = [
        warn(
            "nodes",
            f"the certificate of {one.node_id} expires in {span(one.ends - now)}, and should have been renewed",
            f"`llorch doctor node` on that machine; if it is gone for good, `llorch certs revoke {one.node_id}`",
        )
        for one in late[:_NAMED]
    ]
    if len(late) > _NAMED:
        found.append(
            warn("nodes", f"{len(late) - _NAMED} more certificates are as late", "`llorch certs status` lists them")
        )
    lapsed = len(facts.holders) - len(in_force)
    counts = f"certificates of nodes: {len(in_force)} in force, {lapsed} expired, {facts.revoked} revoked"
    return found or [ok("nodes", counts)]


def clock(newest: float | None, now: float) -> Finding | None:
    """Against what this control wrote to its disk before. None where there is nothing."""
    if newest is None:
        return None
    if newest - now > AHEAD_S:
        return fail(
            "clock",
            f"this machine's clock is {span(newest - now)} behind what was written here before",
            "set it: `timedatectl set-ntp true`; until then new certificates and tokens may be refused",
        )
    return ok("clock", "later than all that was written here before")


# ---------------------------------------------------------------- tokens


@dataclass(frozen=True, slots=True)
class TokenFacts:
    """`given`: client tokens in the settings; `ends`: name and end of each made one in force that may submit."""

    given: int
    made: tuple[tuple[str, float | None], ...] = ()


def tokens(facts: TokenFacts, now: float) -> list[Finding]:
    if not facts.given and not facts.made:
        return [warn("tokens", "nobody may send a task: there is no client token", "`llorch token new` makes one")]
    newest: dict[str, float | None] = {}
    for name, ends in facts.made:
        before = newest.get(name, 0.0)
        newest[name] = None if ends is None or before is None else max(ends, before)
    found = [
        warn(
            "tokens",
            f"the last token of {name} expires in {span(ends - now)}",
            f"`llorch token new --name {name}`, and give it to whoever uses that one",
        )
        for name, ends in newest.items()
        if ends is not None and ends - now < SOON_S
    ]
    return found or [ok("tokens", f"{facts.given} in the settings and {len(facts.made)} made may submit")]


# ---------------------------------------------------------------- the certificate that is shown


@dataclass(frozen=True, slots=True)
class Shown:
    """`files`: of --tls-cert, --tls-key. `why`: they can't be used."""

    mode: str  # off-mesh, none, own, cluster; started: with flags that this command was not given
    certificate: Certificate | None = None
    why: str | None = None
    names: tuple[str, ...] = ()


def shown_certificate(facts: Shown, now: float) -> Finding:
    """What clients are shown."""
    cert = facts.certificate
    match facts.mode:
        case "off-mesh":
            return warn(
                "tls",
                "off-mesh: tokens and prompts leave this process unencrypted, and no node can join with a certificate",
                "leave out --tls off-mesh, unless a service mesh encrypts and authenticates every connection",
            )
        case "none":
            return ok("tls", "none: it listens on loopback alone")
        case "started":
            return ok(
                "tls", f"the control was started with TLS, as {shown(facts.names[0])}: with its flags more is said"
            )
        case "cluster":
            some = ", ".join(map(shown, facts.names[:_NAMED]))
            return ok("tls", f"a certificate of the cluster's authority, for {some}")
    if facts.why is not None or cert is None:
        return fail(
            "tls", facts.why or "there is no certificate in --tls-cert",
            "give a matching, unencrypted PEM pair in --tls-cert and --tls-key; or neither: the cluster's own is shown",
        )  # fmt: skip
    if not cert.names:
        return fail(
            "tls",
            f"the certificate of {shown(cert.name)} in --tls-cert has no subject alternative name: clients refuse it",
            "get one with the control's host name: openssl's -addext subjectAltName=DNS:NAME",
        )
    what = f"the certificate in --tls-cert, for {cert.shown_names},"
    return expiry("tls", what, cert.begins, cert.ends, now, "put a newer one into the files: it is taken over")


# ---------------------------------------------------------------- where it is


@dataclass(frozen=True, slots=True)
class Running:
    """`url`: what the control that was started last wrote down. `trusted`: it holds this directory's authority, or
    it serves without TLS.
    """

    url: str | None = None
    role: str | None = None
    version: str = ""
    trusted: bool = True
    why: str = ""

    @property
    def ours(self) -> bool:
        return self.role == "control" and self.trusted


def running(facts: Running, version: str) -> Finding:
    if facts.url is None:
        return ok("running", "no control has been started with this data directory yet")
    if facts.role is None:
        return warn(
            "running",
            f"the control of this directory was at {facts.url}, and does not answer: {facts.why}",
            "start it: `llorch control`; the end of its log says why it ended",
        )
    if not facts.ours:
        return fail(
            "running",
            f"what answers at {facts.url} is not the control of this directory",
            "another --data-dir? `llorch config show control` says which one is in force",
        )
    if facts.version != version:
        return warn(
            "running",
            f"{facts.url} runs version {shown(facts.version)}, and this is {version}",
            "start it again, so that it runs what is installed: `llorch control`",
        )
    return ok("running", f"{facts.url} answers, version {version}")


@dataclass(frozen=True, slots=True)
class Place:
    """The URL that a machine which joins is told; its host's `addresses`, and those of them that are this machine's."""

    url: str
    host: str
    loopback: bool
    addresses: tuple[str, ...] = ()
    here: tuple[str, ...] = ()


def place(facts: Place) -> Finding:
    if facts.loopback:
        return ok("address", f"{facts.url}: from this machine alone")
    at = "`llorch token join --at https://HOST:PORT`, or --tls-names HOST, with what they reach it by"
    if not facts.addresses:
        return fail("address", f"machines that join are told {facts.url}, and {facts.host} does not resolve here", at)
    if not facts.here:
        return warn(
            "address",
            f"machines that join are told {facts.url}, and {', '.join(facts.addresses)} is no address of this machine",
            f"nothing, if a load balancer or NAT is there; else {at}",
        )
    return ok("address", f"machines that join are told {facts.url}, which is this machine")
