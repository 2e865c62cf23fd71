"""What a control keeps of the tasks that it has seen, and what it takes for one."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llorch.control import tasks
from llorch.control.decision import Snapshot
from llorch.control.intake import openai_task
from llorch.control.placement import Known, Wish
from llorch.control.tasks import State, Task, TaskStore
from llorch.errors import Code, LlorchError

RAW = json.dumps({"model": "m", "prompt": "x"}).encode()


def taken(path: str = "/v1/completions", **headers: str) -> Task:
    named: dict[str, Any] = {"owner": "o", "request_id": "r", "task_id": "t", "now": 0.0}
    return openai_task(path, RAW, {name.replace("_", "-"): value for name, value in headers.items()}, **named)


def test_only_the_newest_ended_tasks_can_be_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "MAX_EXPLAINED_TASKS", 2)
    store = TaskStore()
    seen = [taken() for _ in range(4)]
    for number, task in enumerate(seen):
        task.task_id = str(number)
        task.placement = Snapshot(Wish("m"), (), 0.0, Known())
        store.add(task)
        task.enter(State.DONE if task.state is State.PLACED else State.FAILED)
        store.ended(task)
    assert [task.placement is not None for task in seen] == [False, False, True, True]
    assert all(store.get(task.task_id) is task for task in seen)


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5", "x", "86400001", "000000000001" + "9" * 400, "9" * 5_000])
def test_a_deadline_that_is_none_is_400_however_long(text: str) -> None:
    with pytest.raises(LlorchError) as caught:
        taken(X_Llorch_Deadline_Ms=text)
    assert caught.value.code is Code.INVALID_REQUEST
    assert taken(X_Llorch_Deadline_Ms="86400000").deadline_at == 86_400.0
