from __future__ import annotations

import functools
import json
from collections.abc import Iterator

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from llorch import audit_chain
from llorch.audit_chain import (
    CHECKPOINT,
    FIELDS,
    GAP,
    MAX_LINE_BYTES,
    MAX_VALUE_CHARS,
    REMOVED,
    Chain,
    Checkpoint,
    Exported,
    Position,
    Value,
    Verdict,
    decode_export,
    encode_export,
    key_fingerprint,
    missing_chains,
    read_checkpoint,
    verify,
)

KEY = bytes(range(32))
SIGNER, STRANGER = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
PUBLIC = SIGNER.public_key()


def a_chain(signer: Ed25519PrivateKey = SIGNER, key: bytes = KEY, chain: str = "c" * 32) -> Chain:
    return Chain(key, signer, Position.start(chain))


def written(chain: Chain, count: int, start: float = 1e9, **fields: Value) -> list[bytes]:
    return [
        chain.record(start + number, "task.accepted", {"principal": "alice", "task_id": f"t{number}"} | fields)
        for number in range(count)
    ]


def small_log(signer: Ed25519PrivateKey = SIGNER) -> list[bytes]:
    """Checkpoint, two records, checkpoint, a record, checkpoint."""
    chain = a_chain(signer)
    lines = [chain.checkpoint(1e9), *written(chain, 2), chain.checkpoint(2e9), *written(chain, 1)]
    return [*lines, chain.checkpoint(3e9)]


LOG = small_log()
LAST = read_checkpoint(LOG[-1], PUBLIC)


def cut(data: bytes) -> list[bytes]:
    lines = [line + b"\n" for line in data.split(b"\n")]
    lines[-1] = lines[-1][:-1]
    return lines if lines[-1] else lines[:-1]


def checked(lines: list[bytes], *, key: bytes | None = KEY, exported: tuple[Checkpoint, ...] = (LAST,)) -> Verdict:
    return verify(lines, PUBLIC, key, exported=exported)


WITH_AND_WITHOUT_KEY = pytest.mark.parametrize("key", [KEY, None], ids=["with the key", "with the public key only"])

# ---------------------------------------------------------------- what is written


def test_a_record_is_one_line_of_json_whose_fields_stand_in_one_order() -> None:
    chain = a_chain()
    chain.checkpoint(0)
    line = chain.record(1_000_000_000.1236, "auth.failed", {"reason": "FORBIDDEN", "principal": "alice", "peer": None})
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert list(json.loads(line)) == ["time", "seq", "event", "principal", "reason", "mac"]
    assert json.loads(line)["time"] == "2001-09-09T01:46:40.123Z"
    assert json.loads(line)["seq"] == 2


@pytest.mark.parametrize("text", ['"},\n{"seq":9', "\x1b[2J", "\x7f", "\u202eoruen", "\ud800", "é", "\\", "\0"])
def test_what_others_chose_can_neither_forge_a_line_nor_move_a_cursor(text: str) -> None:
    chain = a_chain()
    lines = [chain.checkpoint(0), chain.record(0, "auth.failed", {"path": text, "principal": text})]
    assert all(byte in range(0x20, 0x7F) for byte in lines[1][:-1])
    assert verify(lines, PUBLIC, KEY).whole
    assert json.loads(lines[1])["path"] == text.replace("\ud800", "?")


def test_no_record_is_longer_than_a_line_may_be() -> None:
    chain = a_chain()
    longest = chain.record(0, "x" * 64, dict.fromkeys(FIELDS, "😀" * 10000))
    assert len(longest) < MAX_LINE_BYTES
    assert len(json.loads(longest)["model"]) == MAX_VALUE_CHARS
    assert json.loads(longest)["model"].endswith("...")


def test_lines_that_were_not_written_are_made_again_as_they_were() -> None:
    chain = a_chain()
    lines = [chain.checkpoint(0), *written(chain, 2)]
    before = chain.position
    again = [*written(chain, 2), chain.checkpoint(1)]
    chain.rewind(before)
    assert [*written(chain, 2), chain.checkpoint(1)] == again
    assert verify([*lines, *again], PUBLIC, KEY).whole


# ---------------------------------------------------------------- what is found


@WITH_AND_WITHOUT_KEY
def test_a_log_as_it_was_written_is_whole(key: bytes | None) -> None:
    verdict = checked(LOG, key=key)
    assert verdict.fault is None
    assert (verdict.lines, verdict.first_seq, verdict.last_seq, verdict.unproven) == (6, 1, 6, 0)
    assert verdict.checkpoint == LAST


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same checkpoint's signature is checked once: these tests look at the same lines thousands of times."""
    by_line = functools.lru_cache(lambda line: read_checkpoint(line, PUBLIC))
    monkeypatch.setattr(audit_chain, "read_checkpoint", lambda line, _public: by_line(line))


@WITH_AND_WITHOUT_KEY
@pytest.mark.usefixtures("quick")
def test_every_flip_of_every_bit_is_found(key: bytes | None) -> None:
    lines = LOG[:4]
    whole, exported = b"".join(lines), (read_checkpoint(lines[-1], PUBLIC),)
    assert checked(lines, key=key, exported=exported).whole
    for place in range(len(whole)):
        for bit in range(8):
            changed = bytearray(whole)
            changed[place] ^= 1 << bit
            assert not checked(cut(bytes(changed)), key=key, exported=exported).whole, (place, bit)


@pytest.mark.usefixtures("quick")
def test_with_the_key_the_line_in_which_a_bit_was_flipped_is_named() -> None:
    for number, line in enumerate(LOG, 1):
        for place in range(len(line) - 1):
            changed = bytearray(line)
            changed[place] ^= 1
            if b"\n" in changed[:-1]:
                continue  # two lines now, the first of which is named
            verdict = checked([*LOG[: number - 1], bytes(changed), *LOG[number:]])
            assert verdict.fault is not None
            assert verdict.fault.line == number, place


@WITH_AND_WITHOUT_KEY
def test_every_line_that_is_deleted_swapped_repeated_or_put_elsewhere_is_found(key: bytes | None) -> None:
    count = len(LOG)
    for a in range(count):
        assert not checked(LOG[:a] + LOG[a + 1 :], key=key).whole, ("deleted", a)
        assert not checked([*LOG[: a + 1], *LOG[a:]], key=key).whole, ("repeated", a)
        assert not checked([*LOG, LOG[a]], key=key).whole, ("repeated at the end", a)
        for b in range(a + 1, count):
            swapped = list(LOG)
            swapped[a], swapped[b] = swapped[b], swapped[a]
            assert not checked(swapped, key=key).whole, ("swapped", a, b)


@WITH_AND_WITHOUT_KEY
@pytest.mark.usefixtures("quick")
def test_every_truncation_before_the_exported_checkpoint_is_found(key: bytes | None) -> None:
    whole = b"".join(LOG)
    for length in range(len(whole)):
        assert not checked(cut(whole[:length]), key=key).whole, length
    for start in range(1, len(LOG)):
        assert not checked(LOG[start:], key=key).whole, ("beginning cut off", start)


def test_the_verdict_says_in_words_what_is_wrong_and_where() -> None:
    changed = LOG[1].replace(b"alice", b"alicf")
    for lines, line, words in (
        ([LOG[0], changed, *LOG[2:]], 2, "record 2 was changed"),
        (LOG[:2] + LOG[3:], 3, "record 4 stands where 3 is due: lines are missing"),
        ([*LOG[:3], *LOG[2:]], 4, "record 3 stands where 4 is due: it is repeated"),
        ([*LOG[:2], b"hello\n", *LOG[2:]], 3, "no line of an audit log"),
        ([*LOG[:5], LOG[5][:-9]], 6, "not complete"),
        (LOG[:4], 0, "its end is cut off: it ends at record 4, and a checkpoint was exported of record 6"),
        (LOG[1:], 1, "does not begin with a checkpoint"),
        (LOG[3:], 0, "records 1 to 3 are missing"),
        ([], 0, "no line at all"),
        (small_log(STRANGER), 1, "names key"),
        (small_log(), 0, ""),
    ):
        fault = checked(list(lines), exported=() if not words else (LAST,)).fault
        if not words:
            assert fault is None
            continue
        assert fault is not None
        assert fault.line == line, words
        assert words in fault.what


def test_without_the_key_a_change_is_told_at_the_checkpoint_after_it_and_what_comes_last_is_said_to_be_unproven() -> (
    None
):
    changed = [LOG[0], LOG[1].replace(b"alice", b"alicf"), *LOG[2:]]
    fault = checked(changed, key=None).fault
    assert fault is not None
    assert fault.line == 4
    assert "of the 2 lines before this checkpoint one is not as it was" in fault.what
    chain = a_chain()
    lines = [chain.checkpoint(0), *written(chain, 3)]
    assert verify(lines, PUBLIC, None).unproven == 3
    assert verify(lines, PUBLIC, KEY).unproven == 0


def test_lines_cut_off_after_the_last_exported_checkpoint_are_not_found() -> None:
    """What is said not to be promised."""
    chain = a_chain()
    lines = [chain.checkpoint(0), *written(chain, 2), chain.checkpoint(1)]
    exported = read_checkpoint(lines[-1], PUBLIC)
    assert verify([*lines, *written(chain, 3)][:-2], PUBLIC, KEY, exported=(exported,)).whole


def test_whoever_holds_the_key_of_the_macs_alone_can_change_nothing_before_a_checkpoint() -> None:
    forger = a_chain(STRANGER)  # the right key of the macs, another for signatures
    forged = [LOG[0]]
    forger.rewind(_behind(LOG[:1]))
    forged += written(forger, 2, principal="mallory")
    for lines in ([*forged, forger.checkpoint(2e9)], [*forged, *LOG[3:]]):
        assert not verify(lines, PUBLIC, KEY).whole


def _behind(lines: list[bytes]) -> Position:
    from llorch.audit_chain import Verifier

    verifier = Verifier(PUBLIC, KEY)
    assert all(verifier.take(line) for line in lines)
    assert verifier.position is not None
    return verifier.position


def test_a_log_that_was_written_anew_with_other_keys_is_not_the_one_that_was_exported() -> None:
    anew = small_log(STRANGER)
    assert verify(anew, STRANGER.public_key(), KEY).whole
    assert not verify(anew, PUBLIC, KEY, exported=(LAST,)).whole


def test_a_log_that_was_written_anew_with_the_same_keys_is_not_the_one_that_was_exported() -> None:
    for chain, fault in (("c" * 32, True), ("d" * 32, False)):
        other = a_chain(chain=chain)
        anew = [other.checkpoint(1e9), *written(other, 4, principal="nobody"), other.checkpoint(3e9)]
        verdict = checked(anew)
        assert (verdict.fault is not None) is fault
        assert bool(missing_chains([LAST], [verdict])) is not fault


# ---------------------------------------------------------------- files that went, records that were lost


def test_a_log_whose_oldest_file_was_removed_is_whole_only_if_it_says_so() -> None:
    chain = a_chain()
    first = [chain.checkpoint(0), *written(chain, 3)]
    second = [chain.checkpoint(1), *written(chain, 1)]
    silent = [*second, chain.checkpoint(2)]
    assert verify([*first, *silent], PUBLIC, KEY).whole
    assert not verify(silent, PUBLIC, KEY).whole
    chain.rewind(_behind([*first, *second]))
    told = [*second, chain.record(2, REMOVED, {"file": "audit-00000001.jsonl", "to_seq": 4}), chain.checkpoint(3)]
    for key in (KEY, None):
        verdict = verify(told, PUBLIC, key)
        assert verdict.whole
        assert verdict.first_seq == 5
        assert not verify(told[1:], PUBLIC, key).whole
        assert not verify(told[3:], PUBLIC, key).whole
        assert not verify(told[:3], PUBLIC, key).whole


def test_that_records_were_removed_is_believed_of_a_signed_line_only() -> None:
    chain = a_chain()
    lines = [chain.checkpoint(0), *written(chain, 3), chain.checkpoint(1), *written(chain, 1)]
    forged = chain.record(2, REMOVED, {"to_seq": 4})  # by whoever has the key of the macs
    made_up = forged.replace(forged[-66:-2], b"0" * 64)  # by whoever has none
    assert verify([*lines[4:], forged, chain.checkpoint(3)], PUBLIC, KEY).whole
    assert not verify([*lines[4:], forged], PUBLIC, KEY).whole
    assert not verify([*lines[4:], made_up], PUBLIC, None).whole


@pytest.mark.parametrize("event", [GAP, REMOVED])
def test_what_the_log_says_of_itself_may_be_nonsense(event: str) -> None:
    chain = a_chain()
    lines = [chain.checkpoint(0), chain.record(0, event, {"count": 3, "to_seq": 3}), chain.checkpoint(1)]
    for place in range(len(lines[1]) - 1):
        changed = bytearray(lines[1])
        changed[place] ^= 1
        for key in (KEY, None):
            assert not verify([lines[0], bytes(changed), lines[2]], PUBLIC, key).whole
        verify([lines[0], bytes(changed)], PUBLIC, None)  # raises nothing


def test_lost_records_are_counted_from_what_the_log_says() -> None:
    chain = a_chain()
    lines = [chain.checkpoint(0), chain.record(0, GAP, {"count": 3}), chain.record(0, GAP, {"count": 4})]
    assert verify(lines, PUBLIC, KEY).lost == 7


# ---------------------------------------------------------------- exports


def test_an_exported_checkpoint_survives_its_document() -> None:
    text = encode_export(Exported(PUBLIC, (LAST,)), 1e9)
    assert json.loads(text)["fingerprint"] == key_fingerprint(PUBLIC) == LAST.key
    back = decode_export(text.encode())
    assert back.checkpoints == (LAST,)
    assert back.public.public_bytes_raw() == PUBLIC.public_bytes_raw()


def test_no_flip_of_a_bit_makes_an_export_that_passes_for_the_log() -> None:
    text = bytearray(encode_export(Exported(PUBLIC, (LAST,)), 1e9).encode())
    for place in range(text.index(b'"public_key"'), len(text)):
        for bit in (0, 5):  # another digit, another case
            changed = bytearray(text)
            changed[place] ^= 1 << bit
            try:
                exported = decode_export(bytes(changed))
            except ValueError:
                continue
            same = exported.checkpoints == (LAST,) and exported.public.public_bytes_raw() == PUBLIC.public_bytes_raw()
            verdict = verify(LOG, exported.public, KEY, exported=exported.checkpoints)
            assert same or not verdict.whole, (place, bit)


@pytest.mark.parametrize(
    "raw",
    [b"", b"[]", b"{}", b"null", b"\xff", b"[" * 10_000, b'{"public_key": "00", "checkpoints": [], "llorch_audit": 1}'],
)
def test_what_is_no_export_is_refused_without_a_traceback(raw: bytes) -> None:
    with pytest.raises(ValueError, match="no exported checkpoint"):
        decode_export(raw)


# ---------------------------------------------------------------- anything else

NAMES = st.sampled_from(FIELDS)
VALUES = st.one_of(st.none(), st.text(max_size=20), st.integers(-(10**30), 10**30), st.booleans())


@given(st.lists(st.tuples(st.dictionaries(NAMES, VALUES, max_size=3), st.booleans()), max_size=4))
@settings(max_examples=25, deadline=None)
def test_whatever_is_put_on_record_verifies_and_is_ascii_json(wanted: list[tuple[dict[str, Value], bool]]) -> None:
    chain = a_chain()
    lines = [chain.checkpoint(0)]
    for fields, checkpoint in wanted:
        lines.append(chain.record(1e9, "x.y", fields))
        lines += [chain.checkpoint(1e9)] if checkpoint else []
    assert verify(lines, PUBLIC, KEY).whole
    assert verify(lines, PUBLIC, None).whole
    assert all(json.loads(line.decode("ascii")) for line in lines)


@st.composite
def edits(draw: st.DrawFn) -> bytes:
    data = bytearray(b"".join(LOG))
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.integers(0, 700)))
        data[start:end] = draw(st.one_of(st.binary(max_size=40), st.sampled_from(LOG)))
    return bytes(data)


@given(edits())
@settings(max_examples=100, deadline=None)
def test_any_edit_is_found_and_none_raises(data: bytes) -> None:
    for key in (KEY, None):
        assert checked(cut(data), key=key).whole is (data == b"".join(LOG))


def test_a_checkpoint_vouches_for_no_other_chain_and_no_other_place() -> None:
    other = a_chain(chain="d" * 32)
    foreign = [other.checkpoint(1e9), *written(other, 2), other.checkpoint(2e9)]
    for lines in ([*LOG[:3], foreign[3], *LOG[4:]], [foreign[0], *LOG[1:]], [*foreign, *LOG[4:]]):
        assert not checked(lines).whole
        assert not checked(lines, key=None).whole


def _events(lines: list[bytes]) -> Iterator[str]:
    for line in lines:
        yield json.loads(line)["event"]


def test_the_small_log_has_what_the_others_suppose() -> None:
    assert [event == CHECKPOINT for event in _events(LOG)] == [True, False, False, True, False, True]
