"""What every error code means to a script. A new code must be put somewhere here before it goes out."""

from __future__ import annotations

from llorch.cli.exits import Exit, after_output, of_code
from llorch.errors import Code

FAILED = {
    Code.METHOD_NOT_ALLOWED, Code.LEASE_STALE, Code.NODE_ID_CONFLICT, Code.CONFLICT, Code.UNTRUSTED_ADDRESS,
    Code.NODE_QUARANTINED,
    Code.UPGRADE_REQUIRED, Code.CANCELED, Code.INTERNAL, Code.NODE_LOST, Code.ENGINE_FAILED, Code.DIGEST_MISMATCH,
}  # fmt: skip


def test_the_numbers_are_those_of_the_contract() -> None:
    assert {exit.name: int(exit) for exit in Exit} == {
        "OK": 0, "FAILED": 1, "USAGE": 2, "AUTH": 3, "NOT_FOUND": 4, "UNREACHABLE": 5, "NO_CAPACITY": 6,
        "BROKE_OFF": 7, "TIMEOUT": 8, "INTERRUPTED": 130, "BROKEN_PIPE": 141,
    }  # fmt: skip


def test_every_code_that_is_not_a_plain_failure_has_an_exit_code_of_its_own() -> None:
    assert {code for code in Code if of_code(code.value) is Exit.FAILED} == FAILED
    assert all(of_code(code.value) is not Exit.OK for code in Code)


def test_codes_of_a_newer_control_are_failures() -> None:
    assert of_code("SOMETHING_NEW") is of_code("") is Exit.FAILED


def test_once_output_has_begun_an_error_means_that_it_broke_off_unless_time_ran_out() -> None:
    assert {after_output(code.value) for code in Code} == {Exit.BROKE_OFF, Exit.TIMEOUT}
    assert after_output("DEADLINE_EXCEEDED") is Exit.TIMEOUT
    assert after_output("NO_CAPACITY") is Exit.BROKE_OFF
