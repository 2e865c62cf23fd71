"""Machines of moves: one description of what can happen, played by hypothesis and by a plain random driver.

World        what is tested, with its model; its methods marked `@move` are what may happen to it
machine      the hypothesis state machine over a world: it finds, shrinks and repeats
mileage      the same moves from a seed, without what hypothesis costs: it covers distance. A failure is cut down to
             the moves that it needs and printed as a list that `play` repeats
steps        how many moves were made that changed anything
"""

from __future__ import annotations

import random
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from tests.faults.virtual import VirtualLoop

Move = tuple[str, dict[str, int]]
Kind = tuple[type[Exception], int]
F = TypeVar("F", bound=Callable[..., Any])

EPISODE_MOVES = 200  # of the random driver, before it looks whether all comes to rest and begins anew
KEPT = 0.85  # of the kinds of moves, in one episode
GENTLE = 0.3  # of the episodes go without faults
MAX_SHRINK_RUNS = 600
MOST_COPIES = 3  # of a move as a rule of hypothesis, which chooses among rules evenly


def move(weight: int = 1, **most: int) -> Callable[[F], F]:
    """Something that may happen, `weight` times as often as others. Each argument is a number from 0 to `most`.

    Returns False where it could not happen: that is no step.
    """

    def mark(function: F) -> F:
        function.move = (weight, most)  # type: ignore[attr-defined]
        return function

    return mark


class World(ABC):
    """What happens is deterministic. `check` holds after every move, `finish` once everything may come to rest."""

    FAULTS: frozenset[str] = frozenset()  # moves after which less is promised

    def __init__(self) -> None:
        self.loop = VirtualLoop()
        self.steps = 0

    @abstractmethod
    def check(self) -> None: ...

    @abstractmethod
    def finish(self) -> None: ...

    @classmethod
    def moves(cls) -> dict[str, tuple[int, dict[str, int]]]:
        return {name: made.move for name in dir(cls) if hasattr(made := getattr(cls, name), "move")}

    def step(self, name: str, given: dict[str, int]) -> None:
        with self.loop:
            did = getattr(self, name)(**given)
            self.loop.settle()
            self.check()
        self.steps += did is not False

    def end(self) -> None:
        """All comes to rest, and is then checked for the last time."""
        with self.loop:
            self.finish()
            self.loop.settle()
            self.check()

    def close(self) -> None:
        self.loop.end()


W = TypeVar("W", bound=World)


def machine(world: Callable[[], World], moves: dict[str, tuple[int, dict[str, int]]]) -> type[RuleBasedStateMachine]:
    """The state machine in which hypothesis chooses among `moves` of `world`."""

    class Machine(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self.world = world()
            self.failed = False

        def teardown(self) -> None:
            try:
                if not self.failed:
                    self.world.end()
            finally:
                self.world.close()

    def rule_of(name: str, most: dict[str, int]) -> Callable[..., None]:
        def made(self: Machine, **given: int) -> None:
            self.failed = True
            self.world.step(name, given)
            self.failed = False

        made.__name__ = name
        return rule(**{key: st.integers(0, top) for key, top in most.items()})(made)

    for name, (weight, most) in moves.items():
        for copy in range(min(weight, MOST_COPIES)):
            setattr(Machine, f"{name}_{copy}", rule_of(name, most))
    return Machine


def chosen(rng: random.Random, world: type[World], count: int) -> list[Move]:
    """`count` moves at random. Not every kind in every episode: what is rare among all is common among few."""
    gentle = rng.random() < GENTLE
    moves = {
        name: made
        for name, made in world.moves().items()
        if rng.random() < KEPT and not (gentle and name in world.FAULTS)
    }
    if not moves:
        return []
    names = rng.choices(list(moves), [weight for weight, _ in moves.values()], k=count)
    return [(name, {key: rng.randint(0, top) for key, top in moves[name][1].items()}) for name in names]


def play(world: Callable[[], World], moves: Iterable[Move]) -> int:
    """Make `moves` in a new world, and let it come to rest. Returns the steps; raises what the world's checks raise."""
    made = world()
    try:
        for name, given in moves:
            made.step(name, given)
        made.end()
        return made.steps
    finally:
        made.close()


class Broken(AssertionError):
    """A world did not hold; says which moves lead there."""


def mileage(world: type[World], steps: int, seed: int, *, shrink: bool = True) -> int:
    """At least `steps` steps from `seed`. Raises Broken with the fewest moves that were found to do it."""
    done = episode = 0
    while done < steps:
        rng = random.Random(f"{seed}/{episode}")
        moves = chosen(rng, world, EPISODE_MOVES)
        try:
            done += play(world, moves)
        except Exception as error:
            fewest = fewer(world, moves, _kind(error)) if shrink else moves
            lines = "\n".join(f"    {each!r}," for each in fewest)
            raise Broken(
                f"{world.__name__}, seed {seed}, episode {episode}, after {done} steps: {error!r}\n"
                f"repeat with play({world.__name__}, [\n{lines}\n])"
            ) from error
        episode += 1
    return done


def fewer(world: Callable[[], World], moves: list[Move], kind: Kind) -> list[Move]:
    """The moves without those that the failure does not need, as far as a bounded search finds."""
    runs = 0
    size = len(moves) // 2
    while size and runs < MAX_SHRINK_RUNS:
        at = 0
        while at < len(moves) and runs < MAX_SHRINK_RUNS:
            rest = moves[:at] + moves[at + size :]
            runs += 1
            if _fails(world, rest, kind):
                moves = rest
            else:
                at += size
        size //= 2
    return moves


def _fails(world: Callable[[], World], moves: list[Move], kind: Kind) -> bool:
    try:
        play(world, moves)
    except Exception as error:
        return _kind(error) == kind
    return False


def _kind(error: Exception) -> Kind:
    """What failed: another failure on the way is another story."""
    *_, last = traceback.walk_tb(error.__traceback__)
    return type(error), last[1]
