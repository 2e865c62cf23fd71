"""A submission: one task body under one idempotency key, however often it has to be sent.

Owns that every repetition is the same bytes under the same key, which is what makes it safe, and says which repetition
it is. The task's id is made here, so that the task can be cancelled before a byte of its answer has come.

Where the caller gives the key, it may have given it before, in a process that is gone. So the body gets no id of its
own then: ids are one name space for all principals, while a key is its owner's, and whoever runs the same command again
is to send the same bytes. And such a key is never said to be sent for the first time.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from typing import Any

from llorch.errors import invalid
from llorch.messages import TASK_ID

MAX_KEY_CHARS = 255


class Submission:
    """`task_id` is None while only the control knows it. Raises INVALID_REQUEST for a key that can't be one.

    `attached`: the task was there before, under the caller's key; whoever submitted it may be reading it.
    """

    def __init__(self, body: Mapping[str, Any], key: str | None = None) -> None:
        if key is not None and not _fit(key):
            raise invalid(f"the idempotency key is not 1 to {MAX_KEY_CHARS} printable ASCII characters")
        self.body = dict(body) if key is not None else with_task_id(body)
        self.key = key if key is not None else str(uuid.uuid4())
        self.task_id: str | None = self.body.get("task_id")
        self.attached = False
        self._own_key = key is None
        self._sent = 0
        self._told: str | None = None

    def headers(self) -> dict[str, str]:
        """Those of the next time that it is sent."""
        self._sent += 1
        known = self._own_key or self._sent > 1
        return {"Idempotency-Key": self.key} | ({"X-Llorch-Try": str(self._sent)} if known else {})

    def accepted(self, headers: Mapping[str, str]) -> None:
        """A control has answered with a task. One that was there when it was sent again may be its own."""
        task_id = headers.get("X-Llorch-Task", "")
        if task_id == self._told or TASK_ID.fullmatch(task_id) is None:
            return
        self._told = task_id
        self.attached = not self._own_key and headers.get("Idempotency-Replayed") == "true"
        if "task_id" not in self.body:
            self.task_id = task_id

    def wire(self) -> bytes:
        return to_json(self.body)


def _fit(key: str) -> bool:
    """Whether a header can carry it; one loses the blanks around its value on the way."""
    return 0 < len(key) <= MAX_KEY_CHARS and key.isascii() and key.isprintable() and key == key.strip()


def to_json(body: object) -> bytes:
    return json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")


def with_task_id(body: Mapping[str, Any]) -> dict[str, Any]:
    """`body` with an id of its own, which is what makes it possible to cancel it, or to find it again."""
    return {**body, "task_id": body.get("task_id") or str(uuid.uuid4())}
