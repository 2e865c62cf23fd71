from __future__ import annotations

import gc
import sys
import types

import pytest

from llorch.cli.loading import loading


def is_looked_at(made: object) -> bool:
    """Whether the collector still looks at it."""
    return any(each is made for each in gc.get_objects())


def test_nothing_is_collected_while_modules_load_and_what_they_made_is_not_looked_at_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with loading():
        assert not gc.isenabled()
        monkeypatch.setitem(sys.modules, "loaded", types.ModuleType("loaded"))
        made: list[int] = []
        assert is_looked_at(made)
    assert gc.isenabled()
    assert not is_looked_at(made)


def test_where_all_is_loaded_nothing_is_kept_from_the_collector() -> None:
    with loading():
        import llorch.cli.loading  # noqa: F401

        made: list[int] = []
    assert gc.isenabled()
    assert is_looked_at(made)


def test_a_module_that_can_not_be_loaded_leaves_the_collector_at_work() -> None:
    with pytest.raises(ImportError), loading():
        raise ImportError
    assert gc.isenabled()
