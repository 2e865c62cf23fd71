"""Tickets: what was minted is good for exactly what it says, and nothing that anybody changed is."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llorch.errors import Code, LlorchError
from llorch.tickets import MAX_LIFE_S, MAX_TICKET_CHARS, Ticket, check, key_of, knock_of, mint

NOW, KEY = 1_800_000_000.0, "k" * 64
FIELDS: dict[str, Any] = {"digest": "d" * 64, "source": "a", "destination": "b", "model": "org/m:Q4"}
GOOD = mint(KEY, expires_at=NOW + 60, **FIELDS)


def checked(ticket: str = GOOD, keys: tuple[str, ...] = (KEY,), now: float = NOW, **changed: Any) -> Ticket:
    return check(keys, ticket, now=now, **(FIELDS | changed))


def test_a_ticket_says_what_it_was_minted_for() -> None:
    assert checked() == Ticket("d" * 64, "org/m:Q4", "a", "b", NOW + 60)
    assert checked(keys=("other" * 10, KEY)) == checked(destination=None) == checked()
    assert len(GOOD) < MAX_TICKET_CHARS and set(GOOD) <= set(
        "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_."
    )


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"keys": ()}, "not signed"),
        ({"keys": ("",)}, "not signed"),
        ({"keys": ("x" * 64,)}, "not signed"),
        ({"now": NOW + 60}, "expired"),
        ({"now": NOW + 61}, "expired"),
        ({"now": NOW - MAX_LIFE_S}, "expired"),
        ({"digest": "e" * 64}, "another model"),
        ({"digest": None}, "another model"),
        ({"model": "org/m:Q8"}, "another model"),
        ({"source": "c"}, "another node"),
        ({"destination": "c"}, "given to another"),
        ({"ticket": ""}, "can't be read"),
        ({"ticket": "v2" + GOOD[2:]}, "can't be read"),
        ({"ticket": GOOD + "x" * MAX_TICKET_CHARS}, "can't be read"),
    ],
)
def test_what_it_is_not_for_is_refused(changed: dict[str, Any], why: str) -> None:
    with pytest.raises(LlorchError, match=why) as refused:
        checked(**changed)
    assert refused.value.code is Code.FORBIDDEN and KEY not in str(refused.value.to_wire())


@given(st.integers(0, len(GOOD) - 1), st.characters())
def test_one_letter_changed_and_it_is_worth_nothing(place: int, letter: str) -> None:
    changed = GOOD[:place] + letter + GOOD[place + 1 :]
    if changed != GOOD:
        with pytest.raises(LlorchError):
            checked(changed)


def test_a_signed_ticket_of_another_form_is_refused() -> None:
    for field in ("digest", "source"):
        with pytest.raises(LlorchError, match="can't be read"):
            checked(mint(KEY, expires_at=NOW + 60, **(FIELDS | {field: 1})))


def test_what_follows_from_a_service_token_leads_neither_back_nor_to_one_another() -> None:
    token = "service-token-of-a-cluster-0123456"
    assert len({token, key_of(token), knock_of(token)}) == 3
    assert key_of(token) == key_of(token) != key_of(token + "x")
    with pytest.raises(LlorchError):
        checked(keys=(knock_of(token),), ticket=mint(key_of(token), expires_at=NOW + 60, **FIELDS))
