"""Fair shares of one model's slots: who has been given how much of it, and so whose turn it is.

Owns the virtual token counters of a model's line, what a task is taken to cost before it has ended, and the credit of
those who asked for little. Never holds a task, and says nothing of priorities: among those with the same one, the
principal whose counter is lowest is next.

A counter grows by what a task costs: an uncached input token 1, a cached one a tenth, an output token 2. It is charged
with an estimate when the slot is given, for otherwise one principal could take every slot before the first of its tasks
has ended, and is set right when the task ends. (Sheng and others, "Fairness in Serving Large Language Models", 2024.)

Who asks for nothing for a while falls behind the others, and must not come back with a day's worth of credit. So no
counter counts as lower than the highest one at which a slot was ever given, less the credit of one burst: 4 tasks for
every slot. That credit is what the bound on a small principal's wait rests on.

    n slots, tasks of at most S. One principal keeps the line full, whatever its load, and has done so for a burst's
    worth; another sends bursts of B >= 3n tasks, and in the long run asks for less than its share (half). Alone, its
    i-th task (from 0) waits floor(i/n) S. Beside the other one it finds all slots taken, and nobody's slot is taken
    away; but each becomes free within S, and as long as the burst is within its credit every free slot is its own. So
    its i-th task waits at most (floor(i/n) + 1) S: the wait alone plus S, which is at most the mean wait alone,
    (B/n - 1) S / 2. Beyond the credit of 4n tasks it still gets every second slot, so its wait grows twice as fast as
    alone, from a point that is below twice the wait alone. Hence at most twice, for the mean and for the slowest.
    A burst below 3n waits at most S longer than alone, and no order of waiting does better: that S is the time until
    a slot is free at all.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from llorch.messages import Tail

CACHED_WEIGHT = 0.1  # of an uncached input token: it is read from memory, not computed
OUTPUT_WEIGHT = 2.0  # an output token holds the slot longer than an input token, which is computed with many others
BURST_TASKS_PER_SLOT = 4  # 3 make up for the slots that are taken when a burst comes; 1 for costs that vary
BYTES_PER_TOKEN = 4  # of text in most languages
MAX_INPUT_TOKENS = 32_768  # a body that would be more tokens than this holds an image, not text
FIRST_OUTPUT_TOKENS = 256.0  # what an answer is taken to have before any has ended
REMEMBERED_TASKS = 10  # an average follows the last ten or so
MAX_PRINCIPALS = 1_000  # counters per model; those that were not heard of for longest go


@dataclass(slots=True)
class _Average:
    """The mean of the first few, and later one that follows the newest."""

    value: float = 0.0
    count: int = 0

    def add(self, value: float) -> None:
        self.count = min(self.count + 1, REMEMBERED_TASKS)
        self.value += (value - self.value) / self.count


@dataclass(slots=True)
class _Account:
    counter: float = 0.0
    seen_at: float = 0.0
    output: _Average = field(default_factory=_Average)
    cost: _Average = field(default_factory=_Average)


def cost(tail: Tail) -> float:
    """What an ended task has cost, in virtual tokens. 0 if its engine did not count."""
    cached = min(tail.cached_tokens, tail.tokens_in)
    return tail.tokens_in - cached + CACHED_WEIGHT * cached + OUTPUT_WEIGHT * tail.tokens_out


class Shares:
    """The counters of one line. `slots` is how many its model has; it outlives every emptiness of the line."""

    def __init__(self, slots: int = 1) -> None:
        self.slots = slots
        self._reached = 0.0
        self._accounts: OrderedDict[str, _Account] = OrderedDict()  # those seen last come last
        self._output, self._cost = _Average(), _Average()

    def __len__(self) -> int:
        return len(self._accounts)

    def seen(self, owner: str, now: float) -> None:
        """`owner` has asked for this model."""
        self._account(owner).seen_at = now
        self._accounts.move_to_end(owner)
        while len(self._accounts) > MAX_PRINCIPALS:
            self._accounts.popitem(last=False)

    def another_seen(self, owner: str, since: float) -> bool:
        """Whether anybody else has asked for this model at or after `since`."""
        last = next((account for name, account in reversed(self._accounts.items()) if name != owner), None)
        return last is not None and last.seen_at >= since

    def counter(self, owner: str) -> float:
        """The lowest is next. It never counts as further behind than one burst's credit."""
        account = self._accounts.get(owner)
        lowest = max(0.0, self._reached - self._credit(account))  # 0: when all begin, nobody has fallen behind
        return lowest if account is None else max(lowest, account.counter)

    def estimate(self, owner: str, size: int) -> float:
        """What a task with a body of `size` bytes will cost, before anything is known of it."""
        account = self._accounts.get(owner)
        if account is not None and account.output.count:
            output = account.output.value
        else:
            output = self._output.value if self._output.count else FIRST_OUTPUT_TOKENS
        return min(size / BYTES_PER_TOKEN, MAX_INPUT_TOKENS) + OUTPUT_WEIGHT * output

    def charge(self, owner: str, size: int) -> float:
        """A slot is given to a task of `owner`. Returns what was charged, for `settle`."""
        account, before, charged = self._account(owner), self.counter(owner), self.estimate(owner, size)
        self._reached = max(self._reached, before)
        account.counter = before + charged
        return charged

    def settle(self, owner: str, charged: float, tail: Tail | None, *, ran: bool) -> None:
        """A task that was charged has ended. What it cost where that is known; the estimate stands where not.

        `ran`: it was sent to a node. One that wasn't costs nothing. A principal that was forgotten meanwhile stays so.
        """
        account = self._accounts.get(owner)
        if account is None:
            account = _Account()
        if not ran:
            account.counter -= charged
        elif tail is not None and (paid := cost(tail)) > 0.0:
            account.counter += paid - charged
            for output, costs in ((account.output, account.cost), (self._output, self._cost)):
                output.add(tail.tokens_out)
                costs.add(paid)

    def _account(self, owner: str) -> _Account:
        account = self._accounts.get(owner)
        if account is None:
            account = self._accounts[owner] = _Account()
        return account

    def _credit(self, account: _Account | None) -> float:
        """One burst's worth: of tasks as this line sees them, or as this principal sends them if those cost more."""
        usual = self._cost.value if self._cost.count else OUTPUT_WEIGHT * FIRST_OUTPUT_TOKENS
        own = 0.0 if account is None else account.cost.value
        return BURST_TASKS_PER_SLOT * max(1, self.slots) * max(usual, own)
