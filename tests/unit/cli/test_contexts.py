"""The file of contexts: what is written is read again, whole and private, and a keeper removes only its own."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from llorch.cli import contexts
from llorch.cli.contexts import Context, config_home
from llorch.errors import ConfigError

LAB = Context("https://lab:8080", token="secret-of-the-lab", tls_ca="/ca.pem")
DEV = Context("http://127.0.0.1:1", token="secret-of-dev", keeper="1:2")


def stored(path: Path, **named: Context) -> None:
    with contexts.changing(path) as known:
        known.named.update(named)


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "contexts.json"
    with contexts.changing(path) as known:
        known.named["lab"] = LAB
        known.current = "lab"
    found = contexts.load(path)
    assert (found.named, found.current) == ({"lab": LAB}, "lab")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_change_that_fails_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "contexts.json"
    stored(path, lab=LAB)
    before = path.read_bytes()
    with pytest.raises(ZeroDivisionError), contexts.changing(path) as known:
        known.named.clear()
        raise ZeroDivisionError
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["contexts.json"]


def test_a_world_readable_file_becomes_private_when_it_is_next_written(tmp_path: Path) -> None:
    path = tmp_path / "contexts.json"
    path.write_text(json.dumps({"contexts": {"lab": {"url": "http://lab"}}}))
    path.chmod(0o644)
    stored(path, dev=DEV)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert set(contexts.load(path).named) == {"lab", "dev"}


def test_a_keeper_removes_its_own_context_and_nobody_elses(tmp_path: Path) -> None:
    path = tmp_path / "contexts.json"
    stored(path, dev=DEV, lab=LAB)
    assert not contexts.remove(path, "dev", keeper="3:4")
    assert not contexts.remove(path, "lab", keeper="1:2")
    assert contexts.remove(path, "dev", keeper="1:2")
    assert not contexts.remove(path, "dev", keeper="1:2")
    assert set(contexts.load(path).named) == {"lab"}


def test_removing_the_current_context_leaves_none_current(tmp_path: Path) -> None:
    path = tmp_path / "contexts.json"
    with contexts.changing(path) as known:
        known.named["lab"] = LAB
        known.current = "lab"
    contexts.remove(path, "lab")
    assert contexts.load(path).current is None


def test_fields_of_a_newer_llorch_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "contexts.json"
    path.write_text(json.dumps({"contexts": {"lab": {"url": "http://lab", "colour": {"r": 1}}}, "version": 2}))
    assert contexts.load(path).named == {"lab": Context("http://lab")}


def test_a_place_where_nothing_can_be_kept_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="can't be kept in"), contexts.changing(tmp_path / "file" / "x" / "c.json"):
        pass


def test_no_context_shows_its_token_in_a_message() -> None:
    assert "secret" not in repr(LAB)


def test_the_place_of_contexts_follows_the_xdg_rules() -> None:
    assert config_home({"XDG_CONFIG_HOME": "/x"}) == Path("/x/llorch")
    assert config_home({"XDG_CONFIG_HOME": "relative"}) == config_home({}) == Path.home() / ".config" / "llorch"


def test_the_last_context_takes_the_file_with_it(tmp_path: Path) -> None:
    path = tmp_path / "llorch" / "contexts.json"
    with contexts.changing(path) as known:
        known.named["a"] = contexts.Context(url="http://127.0.0.1:1")
    assert path.exists()
    assert contexts.remove(path, "a")
    assert list(path.parent.iterdir()) == []
