"""The entry point, where nothing of the command line is there yet."""

import pytest

import llorch.cli.main
from llorch.__main__ import main


def test_an_interrupt_before_the_command_line_can_take_it_is_exit_130_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted() -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(llorch.cli.main, "run", interrupted)
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 130
    assert capsys.readouterr() == ("", "")
