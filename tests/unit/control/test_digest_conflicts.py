from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from llorch.control.digest_conflicts import DigestConflicts, by_digest, staged_digest
from llorch.control.nodes import Event
from llorch.messages import ModelReport

A, B, C = "a" * 64, "b" * 64, "c" * 64


def catalog(*reports: dict[str, Any]) -> dict[str, ModelReport]:
    listed = [ModelReport.model_validate({"id": "m"} | each) for each in reports]
    return {each.id: each for each in listed}


def words(events: list[Event]) -> list[str]:
    return [f"{event.word} {event.fields.get('digests', '')}".strip() for event in events]


def test_a_conflict_is_told_once_and_again_when_it_changes_and_when_it_ends() -> None:
    conflicts = DigestConflicts()
    nodes = {"n1": catalog({"sha256": A}), "n2": catalog({"sha256": A})}
    assert conflicts.look(nodes) == []
    nodes["n2"] = catalog({"sha256": B})
    (event,) = conflicts.look(nodes)
    assert (event.word, event.fields) == (
        "model.conflict", {"model": "m", "digests": f"{A[:12]} on n1; {B[:12]} on n2"},
    )  # fmt: skip
    nodes = {name: dict(listed) for name, listed in nodes.items()}  # told again, and nothing is new
    assert conflicts.look(nodes) == []
    nodes["n3"] = catalog({"sha256": B})
    assert words(conflicts.look(nodes)) == [f"model.conflict {A[:12]} on n1; {B[:12]} on n2,n3"]
    del nodes["n1"]
    assert words(conflicts.look(nodes)) == ["model.conflict_ended"]
    assert conflicts.look(nodes) == []


def test_what_is_on_its_way_has_failed_or_was_retired_is_no_conflict() -> None:
    conflicts = DigestConflicts()
    nodes = {"n1": catalog({"sha256": A})}
    for number, state in enumerate(("staging", "failed", "retired")):
        nodes[f"other{number}"] = catalog({"sha256": B, "state": state})
    nodes["untold"] = catalog({"sha256": None})
    assert conflicts.look(nodes) == []


NODES = st.dictionaries(
    st.sampled_from(["n1", "n2", "n3"]),
    st.dictionaries(st.sampled_from(["m", "x"]), st.sampled_from([A, B, C, None])),
)


@given(st.lists(NODES, max_size=6))
def test_what_was_told_last_of_a_model_is_what_there_is(course: list[dict[str, dict[str, str | None]]]) -> None:
    conflicts, told = DigestConflicts(), dict[str, bool]()
    for state in course:
        nodes = {
            name: catalog(*({"id": model, "sha256": digest} for model, digest in listed.items()))
            for name, listed in state.items()
        }
        for event in conflicts.look(nodes):
            told[event.fields["model"]] = event.word == "model.conflict"
        for model in ("m", "x"):
            has = [
                (name, digest)
                for name, listed in nodes.items()
                if model in listed and (digest := staged_digest(listed[model])) is not None
            ]
            assert told.get(model, False) == (len(by_digest(has)) > 1)
