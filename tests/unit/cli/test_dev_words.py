"""What `llorch dev` makes of its words, what it tells, and what its roles are given; nothing is started here."""

from __future__ import annotations

from typing import Any

import pytest

from llorch.cli import dev, dev_cluster
from llorch.cli.contexts import Context, Contexts
from llorch.cli.keeper import is_alive, process_start
from llorch.cli.output import Failure
from llorch.errors import ConfigError

WORDS: dict[str, Any] = {
    "nodes": 1, "engine": "simulated", "prompt": None, "max_tokens": None, "model": "demo", "slots": None, "ctx": None,
    "port": 0, "verbose": False,
}  # fmt: skip


def asked(monkeypatch: pytest.MonkeyPatch, **words: Any) -> Any:
    """The task that is to be answered."""
    monkeypatch.setattr(dev._Dev, "run", lambda _self, body: body)
    return dev._run({**WORDS, **words})


def test_an_answer_has_a_length_unless_another_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    assert asked(monkeypatch) is None
    assert asked(monkeypatch, prompt="Hello") == {"prompt": "Hello", "max_tokens": 128}
    assert asked(monkeypatch, prompt="Hello", max_tokens=5) == {"prompt": "Hello", "max_tokens": 5}


@pytest.mark.parametrize("words", [{"prompt": " \n"}, {"engine": "vllm"}, {"max_tokens": 5}])
def test_words_that_mean_nothing_are_refused(monkeypatch: pytest.MonkeyPatch, words: dict[str, Any]) -> None:
    with pytest.raises(Failure) as caught:
        asked(monkeypatch, **words)
    assert caught.value.code == 2


def test_flags_of_a_node_are_checked_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    for words in ({"slots": "none"}, {"ctx": "-1"}, {"slots": "0"}):
        with pytest.raises(ConfigError):
            asked(monkeypatch, **words)


def test_the_words_for_a_person_name_the_context_but_show_no_token() -> None:
    current, other = (dev._how_to("http://h:1", name, name == "dev", "m", ["dev-1"]) for name in ("dev", "dev-2"))
    assert '  llorch submit "Hello"\n' in current
    assert '  llorch submit --context dev-2 "Hello"\n' in other
    assert "OPENAI_BASE_URL=http://h:1/v1 OPENAI_API_KEY=$(llorch context show dev-2 --token)" in other


def test_a_name_is_free_if_nobody_has_it_or_its_keeper_is_gone() -> None:
    living = f"1:{process_start(1)}"
    taken = {"dev": Context("u"), "dev-2": Context("u", keeper=living)}
    assert dev_cluster._free_name(Contexts({})) == "dev"
    assert dev_cluster._free_name(Contexts(taken)) == "dev-3"
    assert dev_cluster._free_name(Contexts({**taken, "dev-2": Context("u", keeper="1:0")})) == "dev-2"


def test_a_process_is_known_by_its_id_and_its_start_and_nothing_else_is_one() -> None:
    assert is_alive(f"1:{process_start(1)}")
    for stranger in ("1:0", "0:0", "999999999:5", "", "x:y", ":", "-1:5"):
        assert not is_alive(stranger)


def test_roles_get_tokens_by_environment_and_none_of_this_machines_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "LLORCH_BIND",
        "LLORCH_ADMIN_TOKEN",
        "ORCHESTRATORD_TLS_CERT",
        "POOL_MANAGERD_TLS_KEY",
        "NOTIFY_SOCKET",
    ):
        monkeypatch.setenv(name, "this machine's")
    tokens = dev_cluster.Tokens.make()
    cluster = dev_cluster.Cluster(None, {"state": "/s", "keeper": "1:2"}, tokens)  # type: ignore[arg-type]
    env = cluster._environment()
    assert "this machine's" not in env.values()
    assert {env["LLORCH_API_TOKEN"], env["LLORCH_SERVICE_TOKEN"], env["LLORCH_NODE_TOKEN"]} == {
        tokens.api, tokens.service, tokens.node,
    }  # fmt: skip
    assert tokens.api not in repr(tokens)
