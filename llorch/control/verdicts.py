"""What the end of an attempt means: the client's answer, or that the task may run somewhere else. Pure."""

from __future__ import annotations

from llorch.control.ejection import blames
from llorch.errors import Code, LlorchError
from llorch.messages import Tail

# A refusal with one of these sends the task back to the front of the queue: nothing has gone wrong. An engine is being
# started or its node drains, or did a moment ago: the node's next report says so, too.
_NOT_A_FAILURE = frozenset({Code.ALL_SLOTS_BUSY, Code.MODEL_NOT_AVAILABLE, Code.DRAINING})


class GoElsewhere(Exception):
    """This attempt showed nothing to the client; another may follow.

    `lost`: with its node, not by a fault of its own. `busy`: the node has no room just now. `blamed`: it counts against
    its pool.
    """

    def __init__(self, error: LlorchError, *, lost: bool = False, busy: bool = False, blamed: bool = False) -> None:
        super().__init__(error.message)
        self.error, self.lost, self.busy, self.blamed = error, lost, busy, blamed


def serves_another(error: LlorchError, model: str) -> bool:
    """Whether a node refused a task because its pool serves another model, and can't swap it just now."""
    served = (error.details or {}).get("serves")
    return error.code is Code.ALL_SLOTS_BUSY and isinstance(served, str) and served != model


def verdict(error: LlorchError, *, refused: bool = False) -> Exception:
    """What an error before the first byte means: the client's answer, or that another pool may do better."""
    if error.code is Code.ALL_SLOTS_BUSY or (refused and error.code in _NOT_A_FAILURE):
        return GoElsewhere(error, busy=True)
    if error.code is Code.POOL_NOT_FOUND or (error.status >= 500 and error.code is not Code.DEADLINE_EXCEEDED):
        return GoElsewhere(error, blamed=blames(error, refused=refused))
    return error


def early_tail(tail: Tail) -> Tail:
    """A TAIL with no HEAD: nothing was shown. Returned if the task was canceled, raised as `_verdict` says if not."""
    if tail.error is None:
        if tail.finish_reason == "canceled":
            return tail
        raise GoElsewhere(LlorchError(Code.ENGINE_FAILED, "the answer ended before it began"), blamed=True)
    clients = tail.status is not None and 400 <= tail.status < 500
    error = LlorchError.from_wire(tail.error, fallback=Code.INVALID_REQUEST if clients else Code.ENGINE_FAILED)
    if error.code is Code.CANCELED:
        return tail
    raise verdict(error)
