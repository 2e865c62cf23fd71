"""One model id with two contents: which nodes have which, and when that begins, changes and ends.

Owns that comparison. What is on its way, has failed or was retired is compared with nothing. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from llorch.control.nodes import Event
from llorch.messages import ModelReport

Catalog = Mapping[str, ModelReport]
_SHOWN_DIGEST_CHARS = 12
_SHOWN_NODES = 5  # of one digest, in a log line


def staged_digest(report: ModelReport) -> str | None:
    return report.sha256 if report.state == "staged" else None


class DigestConflicts:
    """Ask `look` now and then; it costs what has changed since."""

    def __init__(self) -> None:
        self._seen: dict[str, Catalog] = {}
        self._has: dict[str, dict[str, str]] = {}  # by model id: node id -> digest
        self._told: set[str] = set()  # models in conflict

    def look(self, catalogs: Mapping[str, Catalog]) -> list[Event]:
        """What is to be told, once: `model.conflict`, or `model.conflict_ended`. A catalog that is the same object as
        the last time is taken for the same."""
        touched: set[str] = set()
        for node_id in self._seen.keys() - catalogs.keys():
            touched |= self._replace(node_id, {})
            del self._seen[node_id]
        for node_id, catalog in catalogs.items():
            if self._seen.get(node_id) is not catalog:
                touched |= self._replace(node_id, catalog)
                self._seen[node_id] = catalog
        return [event for model in sorted(touched) if (event := self._change(model)) is not None]

    def _replace(self, node_id: str, catalog: Catalog) -> set[str]:
        """The models whose digests on this node are others now."""
        before = {
            model: digest
            for model in self._seen.get(node_id, {})
            if (digest := self._has.get(model, {}).get(node_id)) is not None
        }
        after = {model: digest for model, report in catalog.items() if (digest := staged_digest(report)) is not None}
        changed = {model for model in before.keys() | after.keys() if before.get(model) != after.get(model)}
        for model in changed:
            nodes = self._has.setdefault(model, {})
            if model in after:
                nodes[node_id] = after[model]
            else:
                nodes.pop(node_id, None)
            if not nodes:
                del self._has[model]
        return changed

    def _change(self, model: str) -> Event | None:
        """What is to be told of a model of which some node has another digest now."""
        found = by_digest((node_id, digest) for node_id, digest in self._has.get(model, {}).items())
        if len(found) < 2:
            ended = model in self._told
            self._told.discard(model)
            return Event("model.conflict_ended", {"model": model}) if ended else None
        self._told.add(model)
        digests = "; ".join(f"{digest[:_SHOWN_DIGEST_CHARS]} on {_some(nodes)}" for digest, nodes in found.items())
        return Event("model.conflict", {"model": model, "digests": digests})


def by_digest(has: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Digest -> the nodes that have it, both in order."""
    found: dict[str, list[str]] = {}
    for node_id, digest in has:
        found.setdefault(digest, []).append(node_id)
    return {digest: sorted(nodes) for digest, nodes in sorted(found.items())}


def _some(nodes: list[str]) -> str:
    more = len(nodes) - _SHOWN_NODES
    return ",".join(nodes[:_SHOWN_NODES]) + (f" and {more} more" if more > 0 else "")
