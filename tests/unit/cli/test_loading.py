from __future__ import annotations

import gc
import sys
import types

import pytest

from llorch.cli.loading import loading


def test_nothing_is_collected_while_modules_load_and_what_they_made_is_not_looked_at_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = gc.get_freeze_count()
    with loading():
        assert not gc.isenabled()
        monkeypatch.setitem(sys.modules, "loaded", types.ModuleType("loaded"))
        made: list[list[int]] = [[] for _ in range(1_000)]
    assert gc.isenabled()
    assert gc.get_freeze_count() >= before + len(made)


def test_where_all_is_loaded_nothing_is_kept_from_the_collector() -> None:
    before = gc.get_freeze_count()
    with loading():
        import llorch.cli.loading  # noqa: F401
    assert gc.isenabled()
    assert gc.get_freeze_count() == before


def test_a_module_that_can_not_be_loaded_leaves_the_collector_at_work() -> None:
    with pytest.raises(ImportError), loading():
        raise ImportError
    assert gc.isenabled()
