from __future__ import annotations

from typing import Any

import pytest

from llorch.control.stage_sources import Machine, free_sources, reaches, resolve, shown
from llorch.errors import Code, LlorchError
from llorch.messages import ModelReport

A, B = "ab" * 32, "cd" * 32


def machine(name: str, *reports: dict[str, Any], **more: Any) -> Machine:
    listed = [ModelReport.model_validate({"id": "m", "state": "staged"} | each) for each in reports]
    fields = {"url": f"http://{name}.lan:9200", "catalog": {each.id: each for each in listed}} | more
    return Machine(name, True, "lease", **fields)


def cluster(*machines: Machine) -> dict[str, Machine]:
    return {each.node_id: each for each in machines}


def refused(text: str, machines: dict[str, Machine], source: str | None = None) -> LlorchError:
    with pytest.raises(LlorchError) as error:
        resolve(text, machines, source)
    return error.value


def test_a_reference_that_nobody_has_is_what_it_says() -> None:
    for ref in ("hf:org/repo:Q4_K_M", "https://host/x.gguf"):
        wanted = resolve(ref, cluster(machine("a")))
        assert (wanted.ref, wanted.model, wanted.sha256, wanted.has_origin) == (ref, None, None, True)


def test_a_machines_own_is_ordered_as_it_is_though_others_have_it() -> None:
    for ref in ("demo", "file:/x/m.gguf"):
        wanted = resolve(ref, cluster(machine("a", {"id": "demo", "ref": ref, "sha256": A})))
        assert (wanted.ref, wanted.model, wanted.sha256, wanted.everywhere) == (ref, None, None, True)


def test_a_catalog_id_is_the_content_that_nodes_have_and_so_is_a_reference_that_they_have_it_from() -> None:
    has = {"ref": "hf:org/m", "sha256": A, "size_bytes": 5}
    for text in ("m", "hf:org/m"):
        wanted = resolve(text, cluster(machine("a", has), machine("b")))
        assert (wanted.ref, wanted.model, wanted.sha256, wanted.size_bytes) == ("hf:org/m", "m", A, 5)


def test_an_id_whose_file_is_a_machines_own_has_no_origin() -> None:
    wanted = resolve("m", cluster(machine("a", {"ref": "file:/x/m.gguf", "sha256": A})))
    assert (wanted.ref, wanted.has_origin, wanted.everywhere) == ("m", False, False)


def test_an_id_that_is_only_on_its_way_is_fetched_from_where_it_comes_from() -> None:
    wanted = resolve("m", cluster(machine("a", {"ref": "hf:org/m", "state": "staging"})))
    assert (wanted.ref, wanted.model, wanted.sha256) == ("hf:org/m", "m", None)


def test_what_can_not_be_had_is_told_with_what_mends_it() -> None:
    here = cluster(
        machine("a", {"sha256": A}), machine("b", {"sha256": B}), machine("c", {"id": "x"}),
        machine("d", {"id": "y", "sha256": A}, url=None), machine("e", {"id": "z", "sha256": A, "state": "retired"}),
    )  # fmt: skip
    assert refused("nothing", here).code is Code.MODEL_NOT_FOUND
    conflict = refused("m", here)
    assert conflict.code is Code.CONFLICT and "--from NODE" in str(conflict.hint)
    assert conflict.details == {"digests": {A: ["a"], B: ["b"]}}
    assert refused("x", here).code is Code.MODEL_NOT_AVAILABLE  # its digest is not known yet
    assert refused("z", here).code is Code.MODEL_NOT_AVAILABLE
    assert refused("m", here, "nobody").code is Code.NODE_NOT_FOUND
    assert refused("m", here, "c").code is Code.MODEL_NOT_AVAILABLE
    assert "address" in refused("y", here, "d").message
    assert refused("demo", here, "a").code is Code.INVALID_REQUEST


@pytest.mark.parametrize(
    "text", ["../m", "a/../b", "-x", "file:relative", "hf:org", "file:/x\0y", "a b", "ftp://x/y", "m\n", "file://x"]
)
def test_what_is_neither_a_reference_nor_an_id_is_refused(text: str) -> None:
    assert refused(text, cluster(machine("a", {"sha256": A}))).code in (Code.INVALID_REQUEST, Code.MODEL_NOT_FOUND)


def test_a_named_source_says_which_of_several_contents_is_meant() -> None:
    here = cluster(machine("a", {"sha256": A}), machine("b", {"sha256": B}))
    assert [resolve("m", here, name).sha256 for name in ("a", "b")] == [A, B]


@pytest.mark.parametrize(
    ("source", "destination", "able"),
    [
        ({}, {}, True),
        ({"url": None}, {}, False),
        ({"url": "http://127.0.0.1:9200"}, {"peer": "127.0.0.1"}, True),
        ({"url": "http://127.0.0.1:9200"}, {"peer": "10.0.0.2"}, False),
        ({"url": "http://localhost:9200"}, {"peer": "10.0.0.2"}, False),
        ({"url": "http://[::1]:9200"}, {"peer": None}, False),
        ({"url": "http://[::1]:9200"}, {"peer": "::1"}, True),
        ({"certified": True}, {}, False),
        ({"certified": True}, {"certified": True}, True),
        ({}, {"certified": True}, True),
    ],
)
def test_who_can_fetch_from_whom(source: dict[str, Any], destination: dict[str, Any], able: bool) -> None:
    assert reaches(machine("b", **destination), machine("a", **source)) is able


def test_nobody_fetches_from_itself() -> None:
    assert not reaches(machine("a"), machine("a"))


def test_sources_are_the_least_used_ones_that_are_online_and_not_in_full_use() -> None:
    machines = [machine(name) for name in "abcde"]
    machines[0] = Machine("a", False, "lease", url="http://a.lan:9200")
    found = free_sources(machine("z"), machines, {"b": 2, "c": 1})
    assert [each.node_id for each in found] == ["d", "e", "c"]


def test_what_is_shown_of_a_url_is_not_its_signature() -> None:
    assert shown("https://h/x.gguf?sig=secret") == "https://h/x.gguf"


def test_a_url_is_the_one_that_nodes_report_though_they_do_not_tell_its_signature() -> None:
    here = cluster(machine("a", {"ref": "https://h/m.gguf", "sha256": A}))
    wanted = resolve("https://h/m.gguf?sig=secret", here)
    assert (wanted.model, wanted.sha256, wanted.ref) == ("m", A, "https://h/m.gguf?sig=secret")
