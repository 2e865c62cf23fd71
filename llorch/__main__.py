"""`python -m llorch`, and the `llorch` command."""

from __future__ import annotations

import sys


def main() -> None:
    try:
        from llorch.cli.loading import loading

        with loading():
            from llorch.cli.main import run
        code = run()
    except KeyboardInterrupt:  # ^C while the modules load, before anything is there that could take it
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    main()
