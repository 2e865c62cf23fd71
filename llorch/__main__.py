"""`python -m llorch` and the command `llorch`: the command line, and nothing else."""

from __future__ import annotations


def main() -> None:
    from llorch.cli.main import run

    run()


if __name__ == "__main__":
    main()
