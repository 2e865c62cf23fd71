from __future__ import annotations

import json
import secrets

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llorch.auth import Scope, digest
from llorch.errors import Code, LlorchError
from llorch.tokens import (
    ID_BYTES,
    KEEP_ENDED_S,
    MAX_TOKENS,
    SECRET_BYTES,
    Kind,
    Record,
    Tokens,
    Wish,
    is_whole,
    parse_scopes,
    read_join_token,
    write_token,
)

NOW = 1_000_000.0
CA = digest("an authority")
RANDOM = st.binary(min_size=ID_BYTES + SECRET_BYTES, max_size=ID_BYTES + SECRET_BYTES)


def random() -> bytes:
    return secrets.token_bytes(ID_BYTES + SECRET_BYTES)


def made(*wishes: Wish) -> tuple[Tokens, list[Record], list[str]]:
    tokens, records, texts = Tokens(), [], []
    for wish in wishes:
        tokens, record, text = tokens.add(wish, NOW, random(), CA if wish.kind is Kind.JOIN else None)
        records.append(record)
        texts.append(text)
    return tokens, records, texts


@given(RANDOM)
def test_a_token_is_whole_as_written_and_in_no_other_way(random: bytes) -> None:
    for ca in (None, CA):
        token_id, text = write_token(random, ca)
        assert token_id in text
        assert is_whole(text)
        assert not is_whole(text[:-1])
        assert not is_whole(text + "0")
        assert not is_whole(text[:20] + ("A" if text[20] != "A" else "B") + text[21:])
        assert text.isascii()
        assert text.isprintable()
        assert " " not in text


def test_a_join_token_names_its_authority_and_a_clients_names_none() -> None:
    _, join = write_token(random(), CA)
    assert read_join_token(join) == CA
    _, client = write_token(random())
    for bad, word in ((client, "no join token"), ("", "no join token"), (join[:-1] + "x", "no join token"),
                      (join[:10] + ("A" if join[10] != "A" else "B") + join[11:], "not whole")):  # fmt: skip
        with pytest.raises(LlorchError, match=word) as caught:
            read_join_token(bad)
        assert not bad or bad not in str(caught.value)


def test_what_others_made_is_never_called_cut_off() -> None:
    assert is_whole("a" * 32)
    assert not is_whole("llt1_abc")


def test_a_record_holds_a_digest_and_nothing_else_of_the_token() -> None:
    tokens, [record], [text] = made(Wish(name="ci", models=frozenset({"a", "b"}), life_s=60))
    assert record.digest == digest(text)
    secret = text.split(".")[1][:43]
    for shown in (repr(record), repr(tokens), json.dumps(tokens.to_json())):
        assert text not in shown
        assert secret not in shown
    assert digest(text).hex() not in repr(record)


def test_a_store_reads_back_as_it_was_written() -> None:
    tokens, _, _ = made(
        Wish(), Wish(name="ci", models=frozenset({"a"}), life_s=60), Wish(kind=Kind.JOIN, uses=3, node_id="gpu-1"),
        Wish(scopes=frozenset({Scope.ADMIN})),
    )  # fmt: skip
    tokens, _ = tokens.revoke("ci", NOW + 1)
    assert Tokens.from_json(json.loads(json.dumps(tokens.to_json()))) == tokens


@pytest.mark.parametrize(
    "bad", [None, [], {}, {"tokens": None}, {"tokens": [{}]}, {"tokens": [{"id": 1, "kind": "king"}]}, "x", 7]
)
def test_what_is_no_store_is_refused(bad: object) -> None:
    with pytest.raises(ValueError, match="not a file of tokens"):
        Tokens.from_json(bad)


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(), lambda one: st.lists(one) | st.dictionaries(st.text(), one)
    )
)
def test_any_json_is_a_store_or_a_value_error(value: object) -> None:
    for shown in (value, {"tokens": [value]}, {"tokens": value}):
        try:
            Tokens.from_json(shown)
        except ValueError:
            pass


@pytest.mark.parametrize(
    ("wish", "param"),
    [
        (Wish(name="a b"), "name"), (Wish(scopes=frozenset()), "scopes"),
        (Wish(scopes=frozenset({Scope.NODE})), "scopes"), (Wish(scopes=frozenset({Scope.CONTROL})), "scopes"),
        (Wish(scopes=frozenset({Scope.JOIN})), "scopes"), (Wish(life_s=0), "expires_s"), (Wish(life_s=-5), "expires_s"),
        (Wish(models=frozenset()), "models"), (Wish(models=frozenset({"../x", "a b"})), "models"),
        (Wish(kind=Kind.JOIN, uses=0), "uses"), (Wish(kind=Kind.JOIN, uses=10_001), "uses"),
    ],
)  # fmt: skip
def test_a_wish_that_nobody_should_have_names_its_field(wish: Wish, param: str) -> None:
    with pytest.raises(LlorchError) as caught:
        Tokens().add(wish, NOW, random())
    assert (caught.value.code, caught.value.param) == (Code.INVALID_REQUEST, param)


def test_scopes_are_those_that_may_be_given_away() -> None:
    assert parse_scopes(["submit", " read"]) == {Scope.SUBMIT, Scope.READ}
    for bad in ([], [""], ["node"], ["submit", "root"]):
        with pytest.raises(LlorchError):
            parse_scopes(bad)


def test_a_token_ends_when_it_expires_is_revoked_or_used_up() -> None:
    tokens, [plain, short, join], _ = made(Wish(), Wish(life_s=10), Wish(kind=Kind.JOIN, uses=2, life_s=10))
    assert [one.ended(NOW) for one in (plain, short, join)] == [None, None, None]
    assert [one.ended(NOW + 10) for one in (plain, short, join)] == [None, "expired", "expired"]
    tokens = tokens.use(join.id, NOW).use(join.id, NOW)
    with pytest.raises(LlorchError) as caught:
        tokens.use(join.id, NOW)
    assert caught.value.code is Code.UNAUTHENTICATED
    assert tokens.records[2].ended(NOW) == "used"
    tokens, revoked = tokens.revoke(plain.id, NOW)
    assert ([one.id for one in revoked], tokens.records[0].ended(NOW)) == ([plain.id], "revoked")


def test_revoking_takes_an_id_or_all_of_a_name_and_does_nothing_twice() -> None:
    tokens, [one, two, other], _ = made(Wish(name="ci"), Wish(name="ci"), Wish(name="me"))
    tokens, revoked = tokens.revoke("ci", NOW)
    assert {record.id for record in revoked} == {one.id, two.id}
    assert tokens.revoke(one.id, NOW)[1] == []
    assert [record.id for record in tokens.revoke(other.id, NOW)[1]] == [other.id]
    for unknown in ("ci", "nobody"):
        with pytest.raises(LlorchError) as caught:
            tokens.revoke(unknown, NOW)
        assert caught.value.code is Code.NOT_FOUND


def test_an_id_is_taken_before_a_name() -> None:
    tokens, [one], _ = made(Wish())
    tokens, named, _ = tokens.add(Wish(name=one.id), NOW, random())
    assert [record.id for record in tokens.revoke(one.id, NOW)[1]] == [one.id]
    assert named.ended(NOW) is None


def test_those_that_ended_long_ago_are_forgotten_with_the_next_new_one() -> None:
    tokens, [_, short], _ = made(Wish(), Wish(life_s=1))
    later = NOW + KEEP_ENDED_S + 2
    assert short.id not in {one.id for one in tokens.add(Wish(), later, random())[0].records}


def test_there_are_only_so_many() -> None:
    _, [one], _ = made(Wish())
    full = Tokens((one,) * MAX_TOKENS)
    with pytest.raises(LlorchError) as caught:
        full.add(Wish(), NOW, random())
    assert caught.value.code is Code.CONFLICT


def test_of_two_stores_what_was_revoked_or_used_in_one_of_them_stays_so() -> None:
    tokens, [plain, join], _ = made(Wish(), Wish(kind=Kind.JOIN, uses=2))
    here, _ = tokens.revoke(plain.id, NOW)
    there = tokens.use(join.id, NOW).add(Wish(name="new"), NOW + 5, random())[0]
    for merged in (here.merged(there), there.merged(here)):
        found = {one.id: one for one in merged.records}
        assert len(found) == len(merged.records) == 3
        assert (found[plain.id].ended(NOW), found[join.id].ended(NOW), found[join.id].uses_left) == ("revoked", None, 1)
        assert merged.merged(there) == merged
