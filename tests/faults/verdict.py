"""What a judgement says. Pure."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Violation:
    rule: str
    task: str | None
    at: float
    what: str

    def __str__(self) -> str:
        return f"{self.at:.3f} {self.task or '-'} [{self.rule}] {self.what}"


@dataclass(slots=True)
class Verdict:
    """`invalid` says why a run shows nothing; it is then not passed, whatever the violations."""

    violations: list[Violation] = field(default_factory=list)
    invalid: list[str] = field(default_factory=list)
    tasks: int = 0
    ended: int = 0
    rate: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    engines: Counter[str] = field(default_factory=Counter)  # what became of those whose agent went

    @property
    def passed(self) -> bool:
        return not self.violations and not self.invalid
