from __future__ import annotations

import os
import re
import uuid
import warnings

from llorch import ids
from llorch.ids import new_request_id, new_task_id
from llorch.messages import TASK_ID

MANY = 5_000  # more than one call for entropy gives


def test_a_request_id_is_64_bits_in_hex_and_no_two_are_the_same() -> None:
    made = [new_request_id() for _ in range(MANY)]
    assert all(re.fullmatch(r"[0-9a-f]{16}", each) for each in made)
    assert len(set(made)) == MANY
    for at in range(16):
        assert len({each[at] for each in made}) == 16  # no digit of it is fixed


def test_a_task_id_is_a_random_uuid_and_no_two_are_the_same() -> None:
    made = [new_task_id() for _ in range(MANY)]
    for each in made:
        read = uuid.UUID(each)
        assert (str(read), read.version, read.variant) == (each, 4, uuid.RFC_4122)
        assert TASK_ID.fullmatch(each)
    assert len(set(made)) == MANY
    free = [at for at in range(36) if at not in (8, 13, 14, 18, 19, 23)]
    assert all(len({each[at] for each in made}) == 16 for at in free)
    assert {each[19] for each in made} == set("89ab")


def test_ids_of_both_kinds_share_no_digits() -> None:
    ids._entropy.__init__()  # type: ignore[misc]
    made = "".join(new_request_id() + new_task_id().replace("-", "") for _ in range(100))
    request = [made[at : at + 16] for at in range(0, len(made), 48)]
    task = [made[at + 16 : at + 48] for at in range(0, len(made), 48)]
    assert not any(one[:8] in other or one[8:] in other for one, other in zip(request, task, strict=True))


def test_children_of_one_process_make_other_ids_than_it_and_than_each_other() -> None:
    new_request_id()  # so that something is left of what was drawn
    made = []
    for _ in range(2):
        reading, writing = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            os.write(writing, f"{new_request_id()} {new_task_id()}".encode())
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as text:
            made += text.read().split()
        os.waitpid(child, 0)
    made += [new_request_id(), new_task_id()]
    assert len(made) == len({each[:8] for each in made}) == 6
