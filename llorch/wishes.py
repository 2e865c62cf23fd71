"""What an operator asks of nodes, pools and catalogs, as JSON: of a control, and by it of the nodes.

Owns those models, as `messages` owns the others. Never decides whether a wish can be granted.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from llorch.messages import Count, Digest, Figure, ModelId, NodeId, ShortText, Wire


class DrainWish(Wire):
    """POST .../drain, of a node or a pool. Tasks that run longer than `deadline_s` are ended; None: they may."""

    deadline_s: Annotated[float, Field(ge=0, le=86_400)] | None = None
    reason: ShortText | None = None


class PoolWish(DrainWish):
    """POST /v2/pools/{pool}/{load,unload,reload,restart,purge}. `model`: a reference, or an id, to have loaded."""

    model: Annotated[str, StringConstraints(max_length=4_096)] | None = None


class StageWish(Wire):
    """POST /v2/catalog/stage of a control: have `model`, a reference or an id, on these nodes. `source`: a node."""

    model: Annotated[str, StringConstraints(min_length=1, max_length=4_096)]
    nodes: Literal["all"] | Annotated[list[NodeId], Field(max_length=1_000)] = "all"
    source: NodeId | None = Field(default=None, alias="from")


class StageSource(Wire):
    """A node that has the model, and the ticket that lets the asked node fetch it there."""

    node_id: NodeId
    url: Annotated[str, StringConstraints(max_length=512)]
    ticket: Annotated[str, StringConstraints(max_length=2_048)]


class StageOrder(Wire):
    """POST /v2/catalog/stage of a node. `model`: the id it is to have; `sources` are tried first, then `ref` itself.
    With `sha256` and `size_bytes`, what comes must be exactly that."""

    ref: Annotated[str, StringConstraints(min_length=1, max_length=4_096)]
    model: ModelId | None = None
    sha256: Digest | None = None
    size_bytes: Count | None = None
    sources: list[StageSource] = Field(default_factory=list, max_length=64)


class StageAnswer(Wire):
    """What a node answers to a StageOrder: the id that it has the model under, and how far it is."""

    model: ModelId
    state: Literal["staged", "staging", "failed", "retired"] = "staging"
    progress: Figure | None = None
    error: Annotated[str, StringConstraints(max_length=1_000)] | None = None


class VerifyWish(Wire):
    """POST /v2/catalog/verify of a control: read the files again and compare digests. None: every model, every node."""

    model: Annotated[str, StringConstraints(max_length=4_096)] | None = None
    nodes: Literal["all"] | Annotated[list[NodeId], Field(max_length=1_000)] = "all"


class LogLine(Wire):
    """One line that an engine wrote; a node cuts what is longer."""

    replica: ShortText
    text: Annotated[str, StringConstraints(max_length=16_384)]


class PoolLogs(Wire):
    """GET /v2/pools/{pool}/logs: the newest lines, the oldest of them first, or those after a cursor.

    `cursor` is where to go on: what is asked for `after` it has not been sent. It tells of each replica.
    """

    lines: list[LogLine] = Field(max_length=2_000)
    cursor: Annotated[str, StringConstraints(max_length=4_096)]
