"""Planted bugs: each a mistake that somebody could make, as a change of the text of the code, and what must notice it.

`old` occurs in its file exactly once: a test says so, and when the code moves on, the bug is to be planted anew. `rules`:
of the validator's rules those that the bug breaks; one of them has to speak. Data only: `planted` runs them.
"""

# ruff: noqa: E501 - texts of code, as they are there

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Change:
    file: str  # below llorch/
    old: str
    new: str


@dataclass(frozen=True, slots=True)
class Bug:
    name: str
    plan: str  # of plans.PLANS
    rules: frozenset[str]
    changes: tuple[Change, ...]


def bug(name: str, plan: str, rules: str, *changes: tuple[str, str, str]) -> Bug:
    return Bug(name, plan, frozenset(rules.split(", ")), tuple(Change(*change) for change in changes))


BUGS = (
    # ---- claims and slots
    bug(
        "a claim is not released", "calm", "left over, slots, stuck",
        ("control/nodes.py", "        self.claimed -= 1\n", ""),
    ),
    bug(
        "claims beyond the slots", "crowd", "slots",
        ("control/nodes.py", "return max(0, self.slots_total - self.claimed - others)", "return self.slots_total"),
        ("control/registry.py", "if pool.claimed >= pool.slots_total:", "if pool.claimed >= 10 * pool.slots_total:"),
    ),
    bug(
        "a canceled task keeps its slot on the node", "calm", "left over, slots, stuck",
        (
            "node/runner.py",
            "        self.pools.release(slot)\n",
            "        if execution._stopped is None:\n            self.pools.release(slot)\n",
        ),
    ),
    bug(
        "a slot is given to a waiter that has left, and stays with it", "crowd", "left over, slots, stuck",
        ("control/waiting.py", "            self._admission.remove(task.task_id, self._clock())\n", ""),
        (
            "control/waiting.py",
            "            if future is None or future.done():\n                self._registry.release(claim, used=False)\n",
            "            if future is None or future.done():\n                continue\n",
        ),
    ),
    bug(
        "the slot of a trial is not given back", "ejections", "left over, slots, stuck",
        ("control/nodes.py", "        self.claimed -= 1\n", "        self.claimed -= not claim.trial\n"),
    ),
    # ---- cancels, readers that go
    bug(
        "a cancel does not reach the engine", "calm", "cancel",
        ("node/execution.py", "        self._stopped = why\n        self._leave_engine()\n        asyncio.get_running_loop().call_soon(self._end, why)\n", "        self._stopped = why\n        asyncio.get_running_loop().call_soon(self._end, why)\n"),
    ),
    bug(
        "a native task has no grace", "leavers", "canceled by nobody, one execution",
        (
            "node/task_entry.py",
            "return None if lost_at is not None else left_at + reconnect_grace_s",
            "return None if lost_at is not None else left_at",
        ),
    ),
    bug(
        "a native task that was left runs on for ever", "leavers", "reader gone",
        ("node/task_entry.py", "return None if lost_at is not None else left_at + reconnect_grace_s", "return None"),
    ),
    bug(
        "a v1 task that was left runs on", "leavers", "reader gone",
        (
            "node/task_entry.py",
            "return left_at if lost_at is None else lost_at + LOST_GRACE_S",
            "return (left_at if lost_at is None else lost_at) + LOST_GRACE_S",
        ),
    ),
    bug(
        "a control that died is taken for a reader that left", "restarts", "canceled by nobody, one execution",
        (
            "node/link.py",
            "    def link_lost(self, reason: str) -> None:\n        for stream in list(self._streams.values()):\n"
            "            self._drop(stream, Gone.LOST)\n",
            "    def link_lost(self, reason: str) -> None:\n        for stream in list(self._streams.values()):\n"
            "            self._drop(stream, Gone.LEFT)\n",
        ),
    ),
    bug(
        "who goes before the first byte is not waited for", "crowd", "canceled by nobody, one execution",
        (
            "control/audience.py",
            "return self.task.native and self.task.state in (State.QUEUED, State.PLACED)",
            "return False",
        ),
    ),
    # ---- bytes
    bug(
        "a resume begins a byte early", "cuts", "order, unexplained error",
        ("control/intake.py", "    return int(text, 16)\n", "    return max(0, int(text, 16) - 1)\n"),
    ),
    bug(
        "a resume begins a byte late", "cuts", "order, unexplained error",
        ("control/intake.py", "    return int(text, 16)\n", "    return int(text, 16) + 1\n"),
    ),
    bug(
        "a connection that is made again repeats a byte", "links", "order, text, bytes, cut or whole, digest, unexplained error",
        ("control/log_reader.py", "self.offset += len(item)\n", "self.offset += len(item) - (not self._canceled)\n"),
    ),
    bug(
        "HEAD's first bytes are lost", "calm", "order",
        ("node/tasklog.py", "        self.head = head\n        self._put(first)\n", "        self.head = head\n"),
    ),
    bug(
        "a byte is lost where credit runs out", "bulk", "order",
        (
            "node/link.py",
            "                if not data:\n                    break\n",
            "                if not data:\n                    source.take(self, 1, tear=True)\n                    break\n",
        ),
    ),
    bug(
        "a reader that was overtaken is not told of the gap", "bulk", "order",
        ("node/tasklog.py", "        if offset < self._start:\n            raise LlorchError(", "        if offset < 0:\n            raise LlorchError("),
        ("node/tasklog.py", "        at = offset - self._start\n", "        at = max(0, offset - self._start)\n"),
    ),
    bug(
        "TAIL goes out before the last bytes", "bulk", "struck",  # the control refuses it: no client sees a byte too few
        ("node/link.py", "tail = source.tail if self.offset == source.end else None", "tail = source.tail"),
    ),
    bug(
        "credit is not granted", "bulk", "stuck, unexplained break, lost task",
        ("control/links.py", "            if granted:\n", "            if not granted:\n"),
    ),
    # ---- ends
    bug(
        "the error that ends a log is not written to it", "calm", "cut or whole, lost end, unexplained break",
        ("node/execution.py", "        if last:\n            self._put(last)\n        error =", "        if last and failure is None:\n            self._put(last)\n        error ="),
    ),
    bug(
        "a second terminal event", "calm", "nothing after the end, one end",
        ("control/answers.py", "        self._stream.write_rest()\n        if tail.length == 0:\n", "        if tail is not None:\n"),
    ),
    bug(
        "a v1 stream that failed ends as if it were whole", "nodes", "cut or whole",
        ("control/answers.py", 'if last != b"data: [DONE]" and not', "if last is None and not"),
    ),
    # ---- nodes that are lost, attempts
    bug(
        "a task goes elsewhere after something was shown", "nodes", "order, one execution",
        ("control/dispatch.py", "        task.body = b\"\"  # it is not sent again; a long prompt is not kept for as long as its answer takes\n", ""),
        (
            "control/dispatch.py",
            "            return await self._relay(task, reader, audience)\n        except SlowReader:\n",
            "            return await self._relay(task, reader, audience)\n        except LlorchError as error:\n"
            "            task.state = State.PLACED\n            raise GoElsewhere(error, lost=True) from None\n"
            "        except SlowReader:\n",
        ),
    ),
    bug(
        "a task without output ends with its node", "nodes", "unexplained error",
        (
            "control/dispatch.py",
            'raise GoElsewhere(LlorchError(Code.NODE_LOST, f"the node was lost: {item.reason}"), lost=True)',
            'raise LlorchError(Code.NODE_LOST, f"the node was lost: {item.reason}")',
        ),
    ),
    bug(
        "a lost connection is not made again", "links", "unexplained error",
        ("control/log_reader.py", "                await self._again(item.reason)\n", "                raise self._lost(item.reason)\n"),
    ),
    bug(
        "an overtaken attempt is not cancelled", "lonely", "fence, one execution",
        ("node/retention.py", "older.opening.attempt < opening.attempt", "older.opening.attempt > opening.attempt"),
        ("control/surplus.py", "            if task.ended or task.node_id != node_id:\n", "            if task.ended:\n"),
    ),
    # ---- what a control learns again, and what is asked twice
    bug(
        "nodes tell a new control of no task", "restarts", "one execution, unexplained error, lost task",
        ("node/heartbeat.py", "tasks=node.runner.logs.reports(epoch),", "tasks=[],"),
    ),
    bug(
        "a control that has just started says that it does not exist", "restarts", "unexplained error, one execution",
        ("control/recovery.py", "return now < self._until and (self._missing is None or bool(self._missing))", "return False"),
    ),
    bug(
        "a replayed key runs a second time", "cuts", "one execution",
        ("control/replay.py", "            return known.task_id\n", "            return known.task_id if task.key_digest is None else None\n"),
    ),
    bug(
        "a resume is shown the log of another attempt", "attempts", "order, bytes, text, one execution, unexplained error",
        ("control/follow.py", "    if attempt != mine.attempt or (task is None and beyond):\n", "    if False:\n"),
        ("node/retention.py", "if entry is None or attempt not in (None, entry.opening.attempt):", "if entry is None:"),
    ),
    bug(
        "a new control learns of tasks, but not of their keys", "restarts", "one execution",
        ("control/task_reports.py", "                self._by_key.setdefault(report.key_digest, {})[report.task_id] = None\n", "                pass\n"),
    ),
    bug(
        "a task that was read to its end is forgotten", "restarts", "one execution, unexplained error, lost task",
        ("control/follow.py", "            control.dispatcher.tasks.remember(before.as_read(mine.tail))\n", "            pass\n"),
    ),
    bug(
        "another body under a key is served", "calm", "mismatch",
        ("control/replay.py", "if known.path != task.path or known.body_digest not in (None, task.body_digest):", "if known.path != task.path:"),
    ),
    # ---- engines whose agent went
    bug(
        "an agent takes over no engine", "agents", "engines",
        ("node/supervisor.py", "            return \"the settings ask for another engine than this one\"\n", "            pass\n        return \"nobody's\"\n"),
    ),
    bug(
        "an engine that nobody claims runs on", "agents", "engines, left over",
        ("node/engines/shim.py", "        if self.why is None and now >= due:\n", "        if False:\n"),
    ),
)  # fmt: skip
