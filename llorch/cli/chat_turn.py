"""One turn of a chat: a task, its answer as it comes, and what stops it.

Owns that a task whose answer is not wanted any more is cancelled at the control, and the signals of a chat at a
terminal: ^C stops what runs and never the program.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any, TypeVar

from llorch.cli.answer import progress
from llorch.cli.interrupts import SIGNALS, Handled, Interrupted
from llorch.cli.output import abandon_output, is_terminal
from llorch.cli.submit import cancel_quietly
from llorch.client.api import LlorchClient
from llorch.client.events import End, Failed, Token
from llorch.client.faults import StreamBroken, TimedOut, Unreachable
from llorch.client.render import TextRenderer
from llorch.client.submission import with_task_id
from llorch.errors import LlorchError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Taken:
    """How a turn ended: with an `end`, with a `failed`, or (neither) because it was stopped here.

    `told`: of a stopped one, whether the control knows.
    """

    text: str
    task_id: str
    end: End | None = None
    failed: Failed | None = None
    told: bool = False


@contextlib.asynccontextmanager
async def within(timeout_s: float | None) -> AsyncIterator[None]:
    """The caller's --timeout, for one turn: a conversation may last as long as it likes."""
    try:
        async with asyncio.timeout(timeout_s) as limit:
            yield
    except TimeoutError:
        if timeout_s is None or not limit.expired():
            raise
        raise TimedOut(f"it took longer than --timeout, {timeout_s:g} s") from None


async def take_turn(
    client: LlorchClient, body: Mapping[str, Any], *, write: Callable[[str], None], timeout_s: float | None
) -> Taken:
    """Submit `body` and print its answer, which ends in a newline. Raises what `LlorchClient.submit` does, TimedOut,
    and what `write` does.
    """
    task = with_task_id(body)
    task_id = task["task_id"]
    # A pipe gets the last newline too, so that answers can be told apart there; and control characters, as they are.
    waiting = progress()
    shown = TextRenderer(write, waiting, terminal=True, raw=not is_terminal(sys.stdout))
    close = shown.close
    said: list[str] = []
    taken: Taken | None = None
    try:
        async with within(timeout_s), contextlib.aclosing(client.submit(task, tell=shown.looking)) as events:
            async for event in events:
                match event:  # noted before it is shown: a signal may break out of the showing
                    case Token():
                        said.append(event.text)
                    case End():
                        taken = Taken("".join(said), task_id, end=event)
                    case Failed():
                        taken = Taken("".join(said), task_id, failed=event)
                shown.show(event)
        shown.close()
    except (asyncio.CancelledError, Interrupted) as stop:
        if isinstance(stop, Interrupted):  # out of a write, and the next one would stand as still
            close = waiting.clear
        if taken is None:
            return Taken("".join(said), task_id, told=await cancel_quietly(client, task_id))
    except TimedOut:
        if taken is None:
            await cancel_quietly(client, task_id)
            raise
    except (LlorchError, Unreachable, StreamBroken):  # what the control said, or that it is gone: it has its own advice
        raise
    except Exception:  # nobody takes the answer any more
        if taken is None:
            await cancel_quietly(client, task_id)
        raise
    finally:
        with contextlib.suppress(Exception):  # what made us leave is what matters
            close()
    assert taken is not None, "a stream ends in a terminal event or raises"
    return taken


class Stops(Handled):
    """The signals of a chat at a terminal, while the block lasts.

    ^C stops what `run` runs, once: a second one finds it on its way. SIGTERM, SIGHUP and SIGQUIT (^\\) do the same, and
    `leaving` says that there is to be nothing after it.
    """

    numbers = (*SIGNALS, signal.SIGQUIT)

    def __init__(self) -> None:
        super().__init__()
        self.leaving = False
        self._running: asyncio.Task[Any] | None = None

    async def run(self, work: Coroutine[Any, Any, T]) -> T | None:
        """What `work` returns; None if it was stopped and did not say otherwise."""
        if self.leaving:
            work.close()
            return None
        task = self._running = asyncio.create_task(work)
        try:
            await asyncio.wait({task})
        finally:
            self._running = None
        return None if task.cancelled() else task.result()

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self.leaving = self.leaving or number != signal.SIGINT
        task, self._running = self._running, None
        if self._writing:  # perhaps into a pipe that nobody reads
            self._writing = False
            if self.leaving:
                abandon_output()  # or Python's own last flush would stand there again
            raise Interrupted
        if task is not None and self._loop is not None:
            self._loop.call_soon_threadsafe(task.cancel)
