"""What the clients of a run ask for: one task after another, drawn from a seed, each with what its client is to do.

Pure: random numbers come from the generator that is given. Owns the forms of tasks and how often each comes.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from random import Random
from typing import Any

FORMS = ("native", "native-json", "detach", "v1", "v1-json", "llorch")
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@dataclass(frozen=True, slots=True)
class Mix:
    """How often what comes. Weights of forms, and probabilities of the rest."""

    forms: dict[str, float]
    cancel: float = 0.08
    vanish: float = 0.15  # goes and comes back
    leave: float = 0.05  # goes for good
    stall: float = 0.04  # with an answer large enough to feel it
    mismatch: float = 0.05
    reread: float = 0.1
    script: float = 0.12  # the engine has a fault of this request's own
    keyed: float = 0.7
    deadline: float = 0.1
    shortest: int = 1
    longest: int = 120


USUAL = Mix({"native": 10, "native-json": 2, "detach": 2, "v1": 5, "v1-json": 2, "llorch": 3})


@dataclass(frozen=True, slots=True)
class Ask:
    """One task, and what its client does on the way. Counts are of tokens seen; times are seconds."""

    marker: str
    form: str
    model: str
    tokens: int
    path: str
    task_id: str | None
    key: str | None
    deadline_s: float | None
    script: str | None  # a fault for the engine, as the simulated one reads it: "die@3"
    cancel_after: int | None = None  # tokens; 0 is before the first
    vanish_after: int | None = None
    vanish_s: float = 0.0
    leave_after: int | None = None
    stall_after: int | None = None
    stall_s: float = 0.0
    mismatch_after: int | None = None
    reread: bool = False
    back_by_post: bool = False  # rather than by GET .../events, where both are possible

    @property
    def native(self) -> bool:
        return self.form in ("native", "native-json", "detach", "llorch")

    @property
    def streamed(self) -> bool:
        return self.form in ("native", "detach", "v1", "llorch")

    def body(self) -> dict[str, Any]:
        word = f"#{self.marker}!{self.script}" if self.script else f"#{self.marker}"
        body: dict[str, Any] = {"model": self.model, "max_tokens": self.tokens}
        if self.path == CHAT:
            body["messages"] = [{"role": "user", "content": f"{word} go"}]
        else:
            body["prompt"] = f"{word} go"
        if not self.native:
            return body | {"stream": True} if self.streamed else body
        if self.task_id is not None:
            body["task_id"] = self.task_id
        if self.deadline_s is not None:
            body["deadline_ms"] = round(self.deadline_s * 1_000)
        return body | {"detach": True} if self.form == "detach" else body


def draw(rng: Random, mix: Mix, marker: str, grace_s: float) -> Ask:
    form = rng.choices(list(mix.forms), list(mix.forms.values()))[0]
    native, streamed = form in ("native", "native-json", "detach", "llorch"), form not in ("native-json", "v1-json")
    model, tokens, script = "sim", rng.randint(mix.shortest, max(mix.shortest, rng.choice((10, 60, mix.longest)))), None
    deadline_s = rng.uniform(1.0, 6.0) if rng.random() < mix.deadline else None
    more: dict[str, Any] = {}
    chance = rng.random
    own = form != "llorch"  # LlorchClient comes and goes as it likes
    if chance() < mix.stall and form == "native":
        model, tokens = "bulk", 6_000
        more |= {"stall_after": rng.randint(1, 50), "stall_s": rng.uniform(0.3, 3.5)}
    elif chance() < mix.script:
        model = "odd"
        # An engine that dies often is given up by its node, so few do.
        fault = rng.choices(("truncate", "garbage", "hang", "die"), (10, 10, 4, 0.6))[0]
        script = f"{fault}@{rng.choice((0, 0, 1, rng.randint(1, max(1, tokens))))}"
        if fault == "hang":
            deadline_s = rng.uniform(1.0, 4.0)
    if streamed and own:
        if native and chance() < mix.cancel:
            more["cancel_after"] = rng.choice((0, rng.randint(1, max(1, tokens))))
        if chance() < mix.vanish:
            more |= {
                "vanish_after": rng.choice((0, rng.randint(1, max(1, tokens)))),
                "vanish_s": rng.uniform(0, 0.6) * grace_s,
            }
        elif chance() < mix.leave:
            tokens = tokens if model == "bulk" else mix.longest * 4
            more["leave_after"] = rng.choice((0, 1, rng.randint(1, 20)))
        if native:
            more["reread"] = chance() < mix.reread
    keyed = form != "llorch" and chance() < mix.keyed
    if keyed and streamed and chance() < mix.mismatch:
        more["mismatch_after"] = rng.randint(1, max(1, tokens))  # once the other body has been taken
    path = "native" if native else rng.choice((CHAT, COMPLETIONS))
    named = form == "llorch" or (native and chance() < 0.6)
    task_id = str(uuid.UUID(int=rng.getrandbits(128), version=4)) if named else None
    key = f"key-{marker}-{rng.getrandbits(32):08x}" if keyed else None
    more["back_by_post"] = chance() < 0.4
    return Ask(marker, form, model, tokens, path, task_id, key, deadline_s, script, **more)
