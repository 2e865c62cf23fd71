"""Limits made small, so that a few bytes and a few tasks reach every one of them."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from llorch import logs, records
from llorch.node import link, retention
from tests.faults.virtual import FAULTS

CREDIT_BYTES = 600
MOST_REPORTED = 3


@contextmanager
def small_limits() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        for credit in (records.SendCredit, records.ReceiveCredit):
            patch.setattr(credit.__init__, "__defaults__", (CREDIT_BYTES,))
        patch.setattr(link, "MAX_PAYLOAD_BYTES", 150)
        patch.setattr(link, "TURN_BYTES", 250)
        patch.setattr(retention, "MOST_REPORTED_SEALED", MOST_REPORTED)
        patch.setattr(retention, "MOST_EPOCHS", 3)
        patch.setattr(logs.Log, "fault", _fault)
        yield patch


def _fault(log: logs.Log, event: str, **fields: object) -> None:
    FAULTS.append(f"{event} {fields}: {traceback.format_exc()}")
