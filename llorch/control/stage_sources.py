"""What a wish for a model means, and from which nodes another can fetch it.

Owns the reading of a reference or a catalog id against what the nodes have, and which node can be a source for which.
Never downloads, mints or asks: facts of nodes come in, choices go out. Pure.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from llorch.config_kinds import MODEL_REF, BadValue
from llorch.control.addresses import host_of
from llorch.control.nodes import Node
from llorch.errors import Code, LlorchError, invalid
from llorch.messages import ModelReport, model_id_ok

MAX_SOURCES = 3  # of one order: should the first be lost there are others, and each costs a ticket
MOST_PER_SOURCE = 2  # fetch from one node at a time: what they have then serves others, and its disk serves tasks too
MAX_URL_CHARS = 512  # of a source, in an order
DEMO = "demo"
_ORIGINS = ("hf:", "https:", "http:")
_SHOWN_DIGEST_CHARS = 12


@dataclass(frozen=True, slots=True)
class Machine:
    """One node, as far as staging looks at it. `lease_id` is another one after each registration."""

    node_id: str
    online: bool
    lease_id: str
    url: str | None = None
    peer: str | None = None
    certified: bool = False
    catalog: Mapping[str, ModelReport] | None = None

    @classmethod
    def of(cls, node: Node) -> Machine:
        url = None if node.quarantine is not None or len(node.url or "") > MAX_URL_CHARS else node.url
        return cls(node.node_id, node.online, node.lease_id, url, node.peer, node.certified, node.catalog)

    def report(self, model: str | None) -> ModelReport | None:
        return None if self.catalog is None or model is None else self.catalog.get(model)


Machines = Mapping[str, Machine]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to be staged. `model`: its id, None until a node that was asked has said it. With `sha256`, exactly that.

    `ref` is where it comes from at first, or the id where only other nodes have it. `source`: the only node to ask.
    """

    text: str
    ref: str
    model: str | None = None
    sha256: str | None = None
    size_bytes: int | None = None
    source: str | None = None

    @property
    def has_origin(self) -> bool:
        """It can be fetched from outside the cluster, so once is enough."""
        return self.ref.startswith(_ORIGINS)

    @property
    def everywhere(self) -> bool:
        """Each machine has its own, or has not: nobody fetches it."""
        return self.ref == DEMO or self.ref.startswith("file:")


def shown(ref: str) -> str:
    """A reference fit for logs and views: without the query of a URL, which may be a signature that opens it."""
    return MODEL_REF.show(ref)


def resolve(text: str, machines: Machines, source: str | None = None) -> Wanted:
    """What `text`, a reference or a catalog id, means in this cluster.

    Raises INVALID_REQUEST for what can be neither, MODEL_NOT_FOUND for an id that nobody has, CONFLICT for one that
    stands for several contents, NODE_NOT_FOUND and MODEL_NOT_AVAILABLE for a source that can't be one.
    """
    try:
        MODEL_REF.parse(text)
    except BadValue as error:
        raise invalid(error.message, param="model", hint=error.hint) from None
    if source is not None and source not in machines:
        raise LlorchError(Code.NODE_NOT_FOUND, f"no node {source}", param="from")
    if text == DEMO or text.startswith("file:"):
        if source is not None:
            raise invalid(f"{text} is each machine's own", param="from", hint="name the model by its id, with --from")
        return Wanted(text, text)
    has = [
        (machine, report)
        for machine in machines.values()
        for report in (machine.catalog or {}).values()
        if report.id == text or (_is_from(report, text) and model_id_ok(report.id))
    ]
    staged = [(machine, report) for machine, report in has if report.state == "staged" and report.sha256]
    if source is not None:
        staged = [_at_source(machines[source], text, staged)]
    if staged:
        return _of_cluster(text, staged, source)
    if text.startswith(_ORIGINS):
        return Wanted(text, text, has[0][1].id if has else None)
    origins = [report.ref for _, report in has if report.ref is not None and report.ref.startswith(_ORIGINS)]
    if origins:
        return Wanted(text, origins[0], text)
    if has:
        where = ", ".join(sorted(machine.node_id for machine, _ in has))
        raise LlorchError(
            Code.MODEL_NOT_AVAILABLE,
            f"{text} is on {where}, but not staged there with a digest yet",
            hint="`llorch model ls` shows how far it is; a large file takes minutes to be read",
        )
    raise LlorchError(
        Code.MODEL_NOT_FOUND,
        f"no node has a model {text}",
        param="model",
        hint="`llorch model ls` lists what there is; a new one is hf:org/repo[:quant], https://... or file:/path",
    )


def _is_from(report: ModelReport, text: str) -> bool:
    """Reports tell a URL as it is shown."""
    return text.startswith(_ORIGINS) and report.ref is not None and shown(report.ref) == shown(text)


def _at_source(machine: Machine, text: str, staged: list[tuple[Machine, ModelReport]]) -> tuple[Machine, ModelReport]:
    found = next((pair for pair in staged if pair[0] is machine), None)
    if found is None:
        raise LlorchError(
            Code.MODEL_NOT_AVAILABLE,
            f"{machine.node_id} does not have {shown(text)} staged, with its digest",
            hint="`llorch model ls` shows who has it",
        )
    if machine.url is None:
        raise LlorchError(Code.MODEL_NOT_AVAILABLE, f"{machine.node_id} {NO_ADDRESS}", hint=ADDRESS_HINT)
    return found


NO_ADDRESS = "advertises no address that others can fetch from"
ADDRESS_HINT = "start it with --bind and --address, so that other nodes reach it"


def _of_cluster(text: str, staged: list[tuple[Machine, ModelReport]], source: str | None) -> Wanted:
    digests: dict[str, list[str]] = {}
    for machine, report in staged:
        digests.setdefault(report.sha256 or "", []).append(machine.node_id)
    if len(digests) > 1:
        who = "; ".join(f"{short(digest)} on {', '.join(sorted(nodes))}" for digest, nodes in sorted(digests.items()))
        raise LlorchError(
            Code.CONFLICT,
            f"{shown(text)} stands for several contents: {who}",
            hint="say which is meant with --from NODE, or remove the wrong one: llorch model rm MODEL --nodes NODE",
            details={"digests": {digest: sorted(nodes) for digest, nodes in digests.items()}},
        )
    report = staged[0][1]
    refs = [text, *(each.ref for _, each in staged if each.ref is not None)]
    origin = next((ref for ref in refs if ref.startswith(_ORIGINS)), report.id)
    return Wanted(text, origin, report.id, report.sha256, report.size_bytes or None, source)


def short(digest: str) -> str:
    return digest[:_SHOWN_DIGEST_CHARS]


# ---------------------------------------------------------------- who can fetch from whom


def reaches(destination: Machine, source: Machine) -> bool:
    """Whether `destination` can fetch from `source`, as far as addresses and certificates tell."""
    if source.url is None or source.node_id == destination.node_id:
        return False
    if _is_loopback(host_of(source.url)) and not _is_loopback(destination.peer or ""):
        return False
    return destination.certified or not source.certified  # who has no certificate can't show one


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def has_it(machine: Machine, wanted: Wanted, model: str | None) -> str | None:
    """The digest under which a machine has the model staged, and could give it to others; None if it can't."""
    report = machine.report(model)
    if report is None or report.state != "staged" or report.sha256 is None:
        return None
    return report.sha256 if wanted.sha256 in (None, report.sha256) else None


def holders(wanted: Wanted, model: str | None, machines: Machines) -> list[Machine]:
    """The machines that have it, whether or not they can be reached now."""
    return [
        machine
        for machine in machines.values()
        if wanted.source in (None, machine.node_id) and has_it(machine, wanted, model) is not None
    ]


def free_sources(destination: Machine, having: Iterable[Machine], used: Mapping[str, int]) -> list[Machine]:
    """Whom `destination` is to try, in this order: those first that fewest fetch from, and none that is in full use."""
    able = [machine for machine in having if machine.online and reaches(destination, machine)]
    free = [machine for machine in able if used.get(machine.node_id, 0) < MOST_PER_SOURCE]
    return sorted(free, key=lambda machine: (used.get(machine.node_id, 0), machine.node_id))[:MAX_SOURCES]
