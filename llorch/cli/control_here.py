"""A control's data directory on this machine, for the commands that work on it.

Owns the flags that name it and its passphrase, and the rule that a directory where no control has ever been is a
mistyped one. Makes nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llorch.cli.exits import Exit
from llorch.cli.output import Failure
from llorch.cli.sources import resolve_here
from llorch.config import ControlSettings

DataDir = Annotated[
    str | None,
    typer.Option(
        "--data-dir", metavar="DIR", help="Work on this data directory of a control, on its own machine.",
        show_default=False,
    ),
]  # fmt: skip
PassphraseFile = Annotated[
    str | None,
    typer.Option(
        "--ca-passphrase-file", metavar="FILE", show_default=False,
        help="What the authority's key is encrypted with. [LLORCH_CA_PASSPHRASE_FILE]",
    ),
]  # fmt: skip


def local_settings(data_dir: str | None, config: str | None, passphrase_file: str | None = None) -> ControlSettings:
    """The control's settings on this machine."""
    flags = {"data_dir": data_dir, "ca_passphrase_file": passphrase_file}
    given = {name: value for name, value in flags.items() if value is not None}
    return resolve_here(ControlSettings, given, config=config, local=True).settings


def has_been(directory: str | Path) -> bool:
    """Whether a control was ever started on this directory, or a cluster imported into it."""
    from llorch.control.authority import Authority
    from llorch.control.place import FILE_NAME as PLACE
    from llorch.control.roster import FILE_NAME as NODES
    from llorch.control.token_files import FILE_NAME as TOKENS

    data = Path(directory).expanduser()
    return Authority.exists(data) or any((data / name).exists() for name in (TOKENS, PLACE, NODES))


def need_a_control(directory: str) -> None:
    """Raises Failure where none has ever been: nothing is made in a directory that was mistyped."""
    if not has_been(directory):
        raise Failure(
            f"no control has ever been in {directory}", code=Exit.NOT_FOUND,
            hint="start `llorch control` there once, or name its directory: --data-dir DIR",
        )  # fmt: skip
