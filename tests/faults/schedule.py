"""Which faults a run has, when and where: drawn from a seed, the same for the same seed. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random

PHASES = ("queued", "placed", "streaming", "ending")

# Kind of fault: how often, and for how many seconds it lasts (a part that was killed: until it is started again).
KINDS: Mapping[str, tuple[float, tuple[float, float]]] = {
    "control.kill": (10, (0.0, 1.0)),
    "control.term": (3, (0.0, 0.5)),
    "control.stop": (5, (0.1, 2.0)),
    "node.kill": (9, (0.0, 1.5)),
    "node.term": (2, (0.0, 0.5)),
    "node.stop": (6, (0.1, 3.0)),
    "engine.kill": (6, (0.0, 0.0)),
    "engine.stop": (6, (0.1, 2.5)),
    "link.cut": (7, (0.0, 0.0)),
    "link.reset": (7, (0.0, 0.0)),
    "link.half_open": (5, (0.5, 3.0)),
    "link.partition": (5, (0.5, 3.0)),
    "link.blackout": (0, (8.0, 12.0)),  # longer than a lost connection is waited for
    "link.cut_off": (0, (1.0, 3.0)),  # both ends know at once; nothing that is opened lives
    "link.delay": (4, (0.5, 2.0)),
    "link.throttle": (4, (0.5, 2.0)),
    "client.cut": (6, (0.0, 0.0)),
    "client.reset": (6, (0.0, 0.0)),
    "client.half_open": (4, (0.5, 3.0)),
    "client.delay": (3, (0.5, 2.0)),
    "client.throttle": (3, (0.5, 2.0)),
}
Turn = tuple[str, float, str]  # a kind of fault, how long after the one before, in which phase
GAP_S = (0.3, 1.1)  # between two faults


@dataclass(frozen=True, slots=True)
class Step:
    """`target` chooses among what can be hit by this kind then: it is reduced to how many there are."""

    after_s: float
    kind: str
    target: int
    phase: str
    for_s: float
    degree: float  # how bad, 0 to 1: of delays and throttles


def draw(
    seed: int,
    faults: int,
    weights: Mapping[str, float] | None = None,
    gap_s: tuple[float, float] = GAP_S,
    *,
    in_turn: Sequence[Turn] = (),
) -> Sequence[Step]:
    """`in_turn`: these faults, one after the other, rather than drawn ones."""
    rng = Random(seed)
    weights = weights if weights is not None else {kind: weight for kind, (weight, _) in KINDS.items()}
    kinds = rng.choices(list(weights), list(weights.values()), k=faults)
    if in_turn:
        turns = [in_turn[index % len(in_turn)] for index in range(faults)]
        return [
            Step(after_s, kind, rng.randrange(1 << 16), phase, rng.uniform(*KINDS[kind][1]), rng.random())
            for kind, after_s, phase in turns
        ]
    return [
        Step(
            rng.uniform(*gap_s),
            kind,
            rng.randrange(1 << 16),
            rng.choice(PHASES),
            rng.uniform(*KINDS[kind][1]),
            rng.random(),
        )
        for kind in kinds
    ]
