"""The catalog as a file: what is written is read again, and what was never written is refused."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llorch.messages import MODEL_ID, model_id_ok
from llorch.node.catalog_file import (
    Entry,
    PartialState,
    StoredFile,
    dump,
    fault_of_parts,
    file_name_ok,
    folder_name,
    id_of_folder,
    load,
    load_partial,
    whole_digest,
)
from llorch.wishes import StageOrder, StageSource

A, B = "a" * 64, "b" * 64
ENTRY = Entry(
    id="org/m:Q4",
    ref="hf:org/m:Q4",
    files=[StoredFile(name="m.gguf", size_bytes=5, sha256=A, stamp=(1, 5, 2**62))],
    size_bytes=5,
    sha256=A,
    state="staging",
    order=StageOrder(ref="x", model="m", sources=[StageSource(node_id="n", url="http://n:1", ticket="t")]),
)


def test_what_is_written_is_read_again() -> None:
    assert load(dump([ENTRY])) == {"org/m:Q4": ENTRY}
    assert load(dump([])) == {}


@pytest.mark.parametrize(
    "change",
    [
        {"id": "../x"}, {"id": "a..b"}, {"id": "-x"}, {"state": "unknown"}, {"sha256": "x"}, {"size_bytes": -1},
        {"files": [{"name": "../m.gguf", "size_bytes": 1}]}, {"files": [{"name": "a/m.gguf", "size_bytes": 1}]},
        {"files": [{"name": "m.gguf.partial", "size_bytes": 1}]}, {"files": [{"name": "-m.gguf", "size_bytes": 1}]},
        {"files": [{"name": "/a/../m.gguf", "size_bytes": 1}]}, {"files": [{"name": "a\u0000b", "size_bytes": 1}]},
        {"files": [{"name": "/a.gguf", "size_bytes": 1}, {"name": "b.gguf", "size_bytes": 1}]},
        {"order": {"ref": "x", "model": "a..b"}},
    ],
)  # fmt: skip
def test_an_entry_that_leads_somewhere_else_is_refused(change: dict[str, object]) -> None:
    value = {"models": [json.loads(dump([ENTRY]))["models"][0] | change]}
    with pytest.raises(ValueError):
        load(json.dumps(value).encode())


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"{}", b'{"models": {}}', b'{"models": [1]}', b"\xff", b"[" * 99])
def test_what_is_torn_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError):
        load(data)
    with pytest.raises(ValueError):
        load_partial(data)


def test_every_cut_of_a_catalog_is_refused() -> None:
    whole = dump([ENTRY])
    for end in range(len(whole)):
        with pytest.raises(ValueError):
            load(whole[:end])


@given(st.from_regex(MODEL_ID, fullmatch=True).filter(model_id_ok))
def test_an_id_is_one_folder_and_no_two_are_the_same(model: str) -> None:
    name = folder_name(model)
    assert id_of_folder(name) == model and "/" not in name and len(name.encode()) <= 255 and not name.startswith(".")


def test_a_strange_folder_is_no_id() -> None:
    assert [id_of_folder(name) for name in ("-x", "a/b", ".tmp", "a..b", "a:b", "")] == [None] * 6


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "-a", ".a", "a\n", "ä.gguf", "a" * 201, "a.partial", "x\\y"])
def test_what_is_no_name_for_a_file(name: str) -> None:
    assert not file_name_ok(name)


def test_parts_are_those_of_one_model() -> None:
    assert fault_of_parts(["a.gguf"]) is fault_of_parts(["a-00001-of-00001.gguf"]) is None
    assert fault_of_parts(["a-00001-of-00002.gguf", "a-00002-of-00002.gguf"]) is None
    for names in (
        ["a.gguf", "b.gguf"], ["a.gguf", "a.gguf"], ["a-00002-of-00002.gguf", "a-00001-of-00002.gguf"],
        ["a-00001-of-00002.gguf"], ["a-00001-of-00002.gguf", "b-00002-of-00002.gguf"], ["a-00001-of-00000.gguf"],
    ):  # fmt: skip
        assert fault_of_parts(names) is not None, names


def test_the_digest_of_a_model_is_its_files_or_that_of_their_list() -> None:
    assert whole_digest([A]) == A
    assert whole_digest([A, B]) != whole_digest([B, A]) != A


def test_bytes_are_gone_on_with_where_they_are_of_the_same_file() -> None:
    state = PartialState(source=A, validator='"1"', size_bytes=9)
    assert state.continues(state)
    assert not state.continues(state.model_copy(update={"validator": '"2"'}))
    assert not state.continues(state.model_copy(update={"size_bytes": 8}))
    assert not state.continues(state.model_copy(update={"source": B}))
    unvouched = state.model_copy(update={"validator": None})
    assert not unvouched.continues(unvouched)
    known = state.model_copy(update={"sha256": A, "source": B})
    assert known.continues(unvouched.model_copy(update={"sha256": A}))
    assert not known.continues(state.model_copy(update={"sha256": B, "source": B}))
