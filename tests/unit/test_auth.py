from __future__ import annotations

import secrets
from collections.abc import Mapping

import pytest

from llorch.auth import (
    ADMIN_SCOPES,
    CLIENT_SCOPES,
    Principal,
    Scope,
    TokenRing,
    authorize,
    digest,
    parse_tokens,
    presented_token,
)
from llorch.errors import Code, LlorchError

ONE, TWO, ADMIN = (secrets.token_hex(16) for _ in range(3))
RING = TokenRing([("alice", ONE, CLIENT_SCOPES), ("bob", TWO, CLIENT_SCOPES), ("root", ADMIN, ADMIN_SCOPES)])


def identify(ring: TokenRing, headers: Mapping[str, str], now: float) -> Principal | None:
    token = presented_token(headers)
    return None if token is None else ring.identify(token, now)


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def test_several_tokens_are_valid_at_once_and_name_their_principal() -> None:
    assert authorize(identify(RING, bearer(ONE), 0), Scope.SUBMIT).name == "alice"
    assert authorize(identify(RING, bearer(TWO), 0), Scope.READ).name == "bob"


@pytest.mark.parametrize("header", ["api-key", "x-api-key"])
def test_other_clients_headers_carry_a_token_too(header: str) -> None:
    assert authorize(identify(RING, {header: ONE}, 0), Scope.SUBMIT).name == "alice"


@pytest.mark.parametrize(
    "headers",
    [
        {},
        bearer("x" * 32),
        bearer(""),
        {"Authorization": f"Basic {ONE}"},
        {"Authorization": ONE},
        bearer(ONE + " "[:0] + "x"),
    ],
)
def test_missing_and_wrong_are_the_same_401(headers: dict[str, str]) -> None:
    with pytest.raises(LlorchError) as caught:
        authorize(identify(RING, headers, 0), Scope.SUBMIT)
    assert (caught.value.code, caught.value.message) == (Code.UNAUTHENTICATED, "no valid token was presented")


def test_too_little_scope_is_403_and_says_what_is_needed() -> None:
    with pytest.raises(LlorchError) as caught:
        authorize(identify(RING, bearer(ONE), 0), Scope.ADMIN)
    assert caught.value.code is Code.FORBIDDEN
    assert caught.value.details == {"needs": ["admin"]}


def test_admin_implies_the_client_scopes_but_is_no_node() -> None:
    for scope in (Scope.SUBMIT, Scope.READ, Scope.METRICS, Scope.ADMIN):
        assert authorize(identify(RING, bearer(ADMIN), 0), scope).name == "root"
    for scope in (Scope.NODE, Scope.CONTROL):
        with pytest.raises(LlorchError):
            authorize(identify(RING, bearer(ADMIN), 0), scope)


def test_one_of_several_scopes_will_do() -> None:
    assert authorize(identify(RING, bearer(ADMIN), 0), Scope.NODE, Scope.ADMIN).name == "root"


def test_an_empty_ring_admits_nobody() -> None:
    with pytest.raises(LlorchError):
        authorize(identify(TokenRing(), bearer(ONE), 0), Scope.SUBMIT)


def test_a_token_that_has_expired_is_just_wrong_and_one_that_the_ring_no_longer_holds_is_noticed() -> None:
    until = Principal("ci", CLIENT_SCOPES, expires=100.0)
    ring = TokenRing(digests=[(digest(ONE), until)])
    assert ring.identify(ONE, 99.9) == until
    assert ring.identify(ONE, 100.0) is None
    assert (ring.holds(until, 99.9), ring.holds(until, 100.0), TokenRing().holds(until, 0)) == (True, False, False)


def test_nothing_printable_holds_a_token() -> None:
    principal = RING.identify(ONE, 0)
    assert ONE not in repr(RING) + repr(principal) + repr(RING._entries)


def test_lists_take_commas_lines_names_and_comments() -> None:
    text = f"# rotation of May\nci={ONE},{TWO}\n\n  ops={ADMIN}  \n"
    assert parse_tokens(text) == [("ci", ONE), ("default", TWO), ("ops", ADMIN)]


def test_base64_padding_is_no_name() -> None:
    token = "A" * 42 + "=="
    assert parse_tokens(token) == [("default", token)]
    assert parse_tokens(f"ci={token}") == [("ci", token)]


@pytest.mark.parametrize("bad", ["brief0", "ci=brief0", "x" * 31, "x" * 600, "é" * 40, "a b" * 20])
def test_a_bad_token_is_named_by_position_and_never_quoted(bad: str) -> None:
    with pytest.raises(ValueError, match="token 2") as caught:
        parse_tokens(f"{ONE},{bad}")
    assert bad not in str(caught.value)


@pytest.mark.parametrize("token", ["\ud800" * 32, "\x00", "ü"])
def test_a_strange_token_is_just_wrong(token: str) -> None:
    assert RING.identify(token, 0) is None
