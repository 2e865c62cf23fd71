"""What is found wrong on a GPU machine: its certificate, whether controls take it, GPUs and engines, notifications."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from llorch.cli.doctor_control_findings import LATE
from llorch.cli.doctor_findings import Finding, fail, ok, span, warn
from llorch.cli.doctor_reach_findings import Answer, Peer, shown
from llorch.client.text import one_line

UPGRADE_REQUIRED = 426  # what the link's route says to whom it would let in, and who asks for no upgrade
NETWORK_FILESYSTEMS = ("nfs", "cifs", "smb", "9p", "ceph", "lustre", "gluster", "afs", "fuse", "virtiofs", "vboxsf")
_NAMED = 4


# ---------------------------------------------------------------- who this node is


class By(StrEnum):
    """With what a node becomes or is a member."""

    CERTIFICATE = "certificate"
    JOIN_TOKEN = "join token"
    TOKENS = "tokens"
    NOTHING = "nothing"


@dataclass(frozen=True, slots=True)
class Member:
    """`why`, `hint`: the certificate or the token can't be used. `unused`: there is a join token, and it is not the one
    that the certificate came with. Times are seconds since 1970.
    """

    node_id: str
    by: By
    begins: float = 0.0
    ends: float = 0.0
    unused: bool = False
    why: str | None = None
    hint: str | None = None
    secure: bool = True  # some --join is https://


def member(facts: Member, now: float) -> Finding:
    join = f"`llorch token join --node {facts.node_id}` on the control prints the command that makes it a member"
    if facts.why is not None:
        return fail("member", one_line(facts.why), facts.hint or join)
    match facts.by:
        case By.TOKENS:
            kind = "with tokens of the settings" + ("" if facts.secure else ", on loopback without TLS")
            return ok("member", f"{facts.node_id}, {kind}")
        case By.JOIN_TOKEN:
            return ok("member", f"{facts.node_id} has no certificate yet, and a join token that is whole")
        case By.NOTHING:
            return fail("member", f"{facts.node_id} has neither a certificate nor a token", join)
    left_s = facts.ends - now
    if left_s <= 0:
        return fail("member", f"the certificate of {facts.node_id} expired {span(-left_s)} ago", join)
    if left_s < LATE * (facts.ends - facts.begins):
        return warn(
            "member",
            f"the certificate of {facts.node_id} expires in {span(left_s)}, and should have been renewed",
            f"start `llorch node`: it renews by itself while it reaches a control; else {join}",
        )
    anew = "; it joins anew with the new join token" if facts.unused else ""
    return ok("member", f"{facts.node_id}, with a certificate that is good for {span(left_s)}{anew}")


def other_cluster(peer: Peer) -> Finding:
    """What answers has not the authority that the join token names. The token itself is not sent."""
    return fail(
        "tls",
        f"{peer.url} is not the cluster that the join token is for; the token was not sent",
        "check the URL in --join; `llorch token join` on that cluster's control prints both",
    )


def accepted(peer: Peer, answer: Answer, by: By, node_id: str) -> Finding:
    """What the control says to this node when it asks for its link, and asks for no switch to it."""
    join = f"`llorch token join --node {node_id}` on the control makes it a member again"
    what = "certificate" if by is By.CERTIFICATE else "node token"
    mend = join if by is By.CERTIFICATE else "--node-token-file has to hold a node token of that control"
    said = f" ({answer.message})" if answer.message else ""
    if answer.status == UPGRADE_REQUIRED:
        return ok("accepted", f"{peer.url} accepts this node's {what}")
    if answer.status == 401:
        return fail("accepted", f"{peer.url} refuses this node's {what}{said}", mend)
    if answer.status == 403:
        return fail("accepted", f"{peer.url} does not take it for {node_id}{said}", mend)
    told = answer.why or f"status {answer.status}{said}"
    return fail("accepted", f"{peer.url} does not say whether it accepts this node: {told}", mend)


def unasked(peer: Peer) -> Finding:
    return ok("accepted", f"{peer.url} has the join token's authority; the token is not spent on trying it")


# ---------------------------------------------------------------- the other way


@dataclass(frozen=True, slots=True)
class Address:
    """`url` None: none is advertised. `role`: of what answers there; None: nothing does."""

    url: str | None = None
    addresses: tuple[str, ...] = ()
    here: tuple[str, ...] = ()
    role: str | None = None
    running: bool = False


def address(facts: Address) -> Finding:
    url = facts.url
    if url is None:
        return ok("address", "none is advertised, and none is needed: the node's own link is enough")
    leave = "leave out --address: the node's own link is enough"
    if not facts.addresses:
        return fail("address", f"the host of {url} does not resolve", f"{leave}; or give an address of this machine")
    if not facts.here:
        return warn(
            "address",
            f"{url} leads to {', '.join(facts.addresses)}, which is no address of this machine",
            f"nothing, if NAT is there; else {leave}",
        )
    if facts.role == "node":
        return ok("address", f"{url} is this machine, and a node answers")
    if facts.role is not None:
        return fail("address", f"{url} is answered by a {shown(facts.role)}, not by a node", leave)
    if not facts.running:
        return ok("address", f"{url} is this machine; no node runs yet that could answer")
    return fail(
        "address",
        f"a node runs here, and nothing answers at {url}",
        f"--bind has to listen there, and `llorch config firewall node` prints the rules; or {leave}",
    )


# ---------------------------------------------------------------- GPUs and engines


@dataclass(frozen=True, slots=True)
class Driver:
    """`cards`: NVIDIA display devices on the PCI bus. `nvml`: why NVML can't be asked; None: it can. `gpus` are those
    of all makers, `version` that of the first one's driver.
    """

    cards: int = 0
    nvml: str | None = None
    version: str | None = None
    gpus: tuple[str, ...] = ()


def driver(facts: Driver) -> Finding:
    if facts.gpus and not (facts.cards and facts.nvml):
        maker = "" if (facts.version or "").startswith("amdgpu") else "NVIDIA "
        count = "1 GPU" if len(facts.gpus) == 1 else f"{len(facts.gpus)} GPUs"
        some = ", ".join(map(shown, facts.gpus[:_NAMED]))
        return ok("driver", f"{maker}{shown(facts.version)}, {count}: {some}")
    if facts.cards:
        why = facts.nvml or "it lists no GPU"
        again = "; after an update of the driver, restart the machine" if "Version" in why else ""
        return fail(
            "driver",
            f"{facts.cards} NVIDIA cards are here, and their driver can't be asked: {shown(why)}",
            f"`nvidia-smi` says what is wrong; install the driver of the distribution{again}",
        )
    if facts.nvml == "ModuleNotFoundError":
        return warn("driver", "the binding of NVML is missing", "pip install nvidia-ml-py, where llorch is installed")
    if facts.nvml is None:
        return ok("driver", f"NVIDIA {shown(facts.version)}, and no GPU on this machine")
    return ok("driver", "no NVIDIA GPU on this machine")


def no_driver(limit_s: float) -> Finding:
    return fail(
        "driver",
        f"GPUs and engines did not say what they are within {limit_s:.0f} s",
        "`nvidia-smi` and `llama-server --list-devices` hang likewise: restart the machine, or mend the driver",
    )


@dataclass(frozen=True, slots=True)
class Engines:
    """What there is, by name and version; what each pool of the settings would run; or why one can't."""

    there: tuple[str, ...] = ()
    pools: tuple[str, ...] = ()
    why: str | None = None
    hint: str | None = None


def engines(facts: Engines) -> Finding:
    there = ", ".join(map(shown, facts.there)) or "none"
    if facts.why is not None:
        return fail(
            "engines",
            f"{one_line(facts.why)} (engines here: {there})",
            facts.hint or "mend the pool in the settings: `llorch config show node`",
        )
    if not facts.pools:
        return ok("engines", f"{there}; no pool in the settings, so only handoff files make any")
    return ok("engines", f"{'; '.join(map(shown, facts.pools[:_NAMED]))} (engines here: {there})")


# ---------------------------------------------------------------- notifications


@dataclass(frozen=True, slots=True)
class Watch:
    """`error`: the name of the errno that a real watch met; None: it works. `filesystem`: of the watched directory."""

    directory: str
    filesystem: str = ""
    error: str | None = None
    instances: int | None = None
    watches: int | None = None
    polling: bool = False


_INOTIFY_LIMITS = {"EMFILE": ("instances", 512), "ENOSPC": ("watches", 524_288)}  # what to raise, and to at least


def inotify(facts: Watch) -> Finding:
    poll = "--poll-handoffs"
    if facts.polling:
        return ok("inotify", f"not used: handoff files are polled for ({poll})")
    kind = facts.filesystem
    if kind.startswith(NETWORK_FILESYSTEMS):
        return warn(
            "inotify",
            f"{facts.directory} is on {shown(kind)}, where changes that others make are not announced",
            f"{poll}, or --runtime-dir on a local disk",
        )
    if facts.error in _INOTIFY_LIMITS:
        what, least = _INOTIFY_LIMITS[facts.error]
        have: int | None = getattr(facts, what)
        more = max(least, 2 * (have or 0))
        return fail(
            "inotify",
            f"this user's {have} inotify {what} are used up",
            f"`sysctl fs.inotify.max_user_{what}={more}`, and in /etc/sysctl.d to keep it; or {poll}",
        )
    if facts.error is not None:
        return warn("inotify", f"no watch can be set on {facts.directory}: {facts.error}", poll)
    return ok("inotify", f"a watch on {facts.directory} works")
