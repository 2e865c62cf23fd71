"""`python -m llorch`, and the `llorch` command."""

from __future__ import annotations

import sys


def main() -> None:
    from llorch.cli.main import run

    sys.exit(run())


if __name__ == "__main__":
    main()
