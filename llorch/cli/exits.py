"""Exit codes: what a script can branch on.

Owns the mapping from errors to codes. Codes may be added to, never changed.
"""

from __future__ import annotations

from enum import IntEnum

from llorch.errors import Code


class Exit(IntEnum):
    OK = 0
    FAILED = 1  # or degraded
    USAGE = 2  # or configuration
    AUTH = 3
    NOT_FOUND = 4
    UNREACHABLE = 5  # or TLS
    NO_CAPACITY = 6
    BROKE_OFF = 7  # the stream broke after output began
    TIMEOUT = 8
    INTERRUPTED = 130
    BROKEN_PIPE = 141


_CODES = {
    Exit.USAGE: (
        Code.INVALID_REQUEST,
        Code.UNSUPPORTED_MEDIA,
        Code.PAYLOAD_TOO_LARGE,
        Code.CONTEXT_LENGTH_EXCEEDED,
        Code.IDEMPOTENCY_MISMATCH,
    ),
    Exit.AUTH: (Code.UNAUTHENTICATED, Code.FORBIDDEN),
    Exit.NOT_FOUND: (
        Code.MODEL_NOT_FOUND,
        Code.NOT_FOUND,
        Code.TASK_NOT_FOUND,
        Code.NODE_NOT_FOUND,
        Code.POOL_NOT_FOUND,
        Code.NODE_UNKNOWN,
        Code.GAP,
    ),
    Exit.NO_CAPACITY: (
        Code.NO_CAPACITY,
        Code.MODEL_NOT_AVAILABLE,
        Code.QUEUE_FULL,
        Code.RATE_LIMITED,
        Code.ALL_SLOTS_BUSY,
        Code.DRAINING,
        Code.RECOVERING,
        Code.INSUFFICIENT_STORAGE,
    ),
    Exit.TIMEOUT: (Code.DEADLINE_EXCEEDED, Code.QUEUE_TIMEOUT, Code.ENGINE_STALLED, Code.REQUEST_TIMEOUT),
}
# By name, so that a code which the control has and this client does not know yet is no fault here.
_BY_CODE = {code.value: exit_code for exit_code, codes in _CODES.items() for code in codes}


def of_code(code: str) -> Exit:
    """What an error of this code means to a script; whatever is not listed has failed, no more."""
    return _BY_CODE.get(code, Exit.FAILED)


def after_output(code: str) -> Exit:
    """The same for a stream that ends in an error when a part of its text is out already."""
    return Exit.TIMEOUT if of_code(code) is Exit.TIMEOUT else Exit.BROKE_OFF
