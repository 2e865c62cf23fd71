from __future__ import annotations

import json
from typing import Any

from llorch.control import views
from llorch.control.registry import Registry
from llorch.messages import Heartbeat, Register

WALL = "2025-01-02T03:04:05Z"


def cluster(**second: Any) -> Registry:
    registry = Registry("epoch")
    pool = {"pool_id": "p0", "model": "m", "models": ["n"], "ready": True, "slots_total": 4, "slots_free": 3}
    nodes: list[dict[str, Any]] = [
        {"node_id": "b", "pools": [pool], "catalog": [{"id": "m", "size_bytes": 9, "sha256": "s"}]},
        {"node_id": "a", "pools": [], "catalog": [{"id": "m", "size_bytes": 9, "sha256": "s"}, {"id": "x"}], **second},
    ]
    for number, node in enumerate(nodes):
        message = Register.model_validate({"boot_id": "boot", **node})
        registry.register(message, now=0.0, wall=WALL, peer=None, lease_id=f"lease-{number}")
    registry.link_up("b", "lease-0", 0.0)
    registry.claim("b", "p0", "t", 1)
    return registry


def test_a_node_is_shown_with_its_facts_its_pools_and_the_age_of_its_heartbeat() -> None:
    shown = json.loads(json.dumps(views.nodes_view(cluster(), 1.25)))["nodes"]
    assert [node["node_id"] for node in shown] == ["a", "b"]
    node = shown[1]
    assert (node["state"], node["online"], node["reachable"], node["suspect"]) == ("online", True, True, False)
    assert node["heartbeat_age_ms"] == 1250
    assert (node["slots_total"], node["slots_free"], node["in_flight"]) == (4, 2, 1)
    pool = node["pools"][0]
    assert (pool["bound"], pool["bound_since"], pool["model"]) == (True, WALL, "m")
    assert (pool["slots_free"], pool["in_flight"], pool["facts_age_ms"], pool["last_error"]) == (2, 1, 1250, None)


def test_pools_are_listed_with_their_nodes() -> None:
    listed = views.pools_view(cluster(), 1.0)["pools"]
    assert [(pool["node_id"], pool["pool_id"], pool["node_state"]) for pool in listed] == [("b", "p0", "online")]


def test_a_closed_breaker_has_no_reason_though_its_pool_would_have_been_ejected_if_there_were_others() -> None:
    registry = cluster()
    claim = registry.claim("b", "p0", "u", 1)
    for _ in range(5):
        registry.failed(claim, 1.0)
    shown = views.pools_view(registry, 1.0)["pools"][0]["breaker"]
    assert (shown["state"], shown["failures"], shown["reason"]) == ("closed", 5, None)
    registry.nodes["b"].pools["p0"].breaker.eject(1.0)
    assert views.pools_view(registry, 1.0)["pools"][0]["breaker"]["reason"] == "5 tasks in a row failed"


def test_the_state_word_is_the_worst_that_is_true() -> None:
    registry = cluster()
    node = registry.nodes["a"]
    assert views.node_state(node) == "registered"
    registry.heartbeat("a", Heartbeat(lease_id="lease-1", draining=True), now=1.0, wall=WALL)
    assert views.node_state(node) == "unreachable"
    registry.link_up("a", "lease-1", 1.0)
    assert views.node_state(node) == "draining"
    registry.expire(40.0)
    assert views.node_state(node) == "offline"


def test_the_catalog_lists_nodes_sizes_digests_and_ready_pools_by_model() -> None:
    shown = views.catalog_view(cluster())
    assert shown["models"]["m"] == {
        "nodes": ["a", "b"],
        "ready_pools": 1,
        "size_bytes": 9,
        "sha256": "s",
        "conflict": False,
        "digests": {"s": ["a", "b"]},
    }
    assert shown["models"]["x"]["nodes"] == ["a"]
    assert [model["id"] for model in shown["nodes"]["a"]["models"]] == ["m", "x"]


def test_a_digest_that_nodes_do_not_agree_on_is_not_shown_as_the_models() -> None:
    shown = views.catalog_view(cluster(catalog=[{"id": "m", "sha256": "other"}]))
    assert shown["models"]["m"]["sha256"] is None
    assert shown["models"]["m"]["conflict"]
    assert shown["models"]["m"]["digests"] == {"other": ["a"], "s": ["b"]}


def test_openai_clients_see_the_models_that_an_online_pool_has_or_can_load() -> None:
    registry = cluster()
    listed = views.openai_models(registry)
    assert listed["object"] == "list"
    assert [entry["id"] for entry in listed["data"]] == ["m", "n"]
    assert listed["data"][0] == {"id": "m", "object": "model", "created": 1735787045, "owned_by": "llorch"}
    registry.expire(40.0)
    assert views.openai_models(registry)["data"] == []
