"""What exists is documented, and what is documented exists."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs import MAP, README, ROOT, commands, control_routes, metric_docs, node_route_table, with_generated

LOG_EVENTS = (
    "node.registered", "node.deregistered", "node.expired", "heartbeat.failed", "placement.decided", "task.routed",
    "task.ended", "pool.bound", "pool.failed", "engine.started", "engine.exited", "handoff.invalid", "auth.failed",
    "loop.ended", "node.struck", "node.quarantined", "node.pardoned",
)  # fmt: skip


def test_commands_settings_routes_codes_and_metrics_stand_in_the_readme_as_they_are_in_the_code() -> None:
    text = README.read_text()
    assert with_generated(text) == text, "run `python -m tests.docs`"


def test_every_command_that_the_readme_shows_exists() -> None:
    known = set(commands())
    groups = {path.split()[0] for path in known}
    shown = set()
    for line in README.read_text().splitlines():
        for match in re.finditer(r"(?:^ +|`|&& )(?:\.venv/bin/)?llorch ([a-z]+(?: [a-z]+)?)", line):
            shown.add(match.group(1))
    assert shown
    for words in shown:
        first = words.split()[0]
        assert first in groups or first in known, words
        if first in groups and first not in known:
            assert words in known, words


def test_every_module_has_its_line_on_the_map_and_every_line_its_module() -> None:
    text = MAP.read_text()
    sections = re.split(r"^### ", text, flags=re.MULTILINE)[1:]
    listed: set[str] = set()
    for section in sections:
        head = section.split(":")[0]
        folder = "" if head == "Shared core" else head
        listed |= {folder + name for name in re.findall(r"^- `([\w.]+)`", section, flags=re.MULTILINE)}
    package = ROOT / "llorch"
    modules = {path.relative_to(package).as_posix() for path in package.rglob("*.py")}
    modules = {path for path in modules if not path.endswith("__init__.py")} | {"demo/__init__.py"}
    assert listed - {"__init__.py"} == modules


def test_every_route_has_a_summary_and_a_scope() -> None:
    for route in (*control_routes(), *node_route_table()):
        assert route.summary
        assert route.scopes


def test_metric_names_are_of_the_stable_form() -> None:
    names = metric_docs()
    assert len(names) > 20
    for name, (meaning, _) in names.items():
        assert re.fullmatch(r"llorch_[a-z_]+", name)
        assert meaning


def test_every_metric_that_the_code_makes_is_among_the_documented_ones() -> None:
    """By its constructor in the source, so that a collector which the docs do not ask is seen."""
    made = r"(?:Counter|Gauge|Histogram|Summary|Info|MetricFamily|counter|gauge|histogram)\(\s*\"(llorch_\w+)\""
    source = "".join(path.read_text() for path in (ROOT / "llorch").rglob("*.py"))
    names = set(re.findall(made, source))
    assert len(names) > 20
    assert {name.removesuffix("_total") for name in names} - {n.removesuffix("_total") for n in metric_docs()} == set()


def test_every_stable_log_event_is_logged_somewhere() -> None:
    source = "".join(path.read_text() for path in (ROOT / "llorch").rglob("*.py"))
    assert [event for event in LOG_EVENTS if f'"{event}"' not in source] == []


@pytest.mark.parametrize(("shell", "file"), [("bash", "llorch.bash"), ("zsh", "_llorch"), ("fish", "llorch.fish")])
def test_committed_completions_are_what_the_command_makes(shell: str, file: str) -> None:
    made = subprocess.run(
        [sys.executable, "-m", "llorch", "completion", shell], capture_output=True, text=True, check=True, timeout=30
    ).stdout
    assert (ROOT / "completions" / file).read_text().strip() == made.strip()


def test_the_top_level_holds_what_it_should() -> None:
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.splitlines()
    if not tracked:
        pytest.skip("not a git checkout")
    top = {Path(name).parts[0] for name in tracked}
    allowed = {"pyproject.toml", "README.md", "LICENSE", "llorch", "tests", "examples", "completions"}
    assert {name for name in top if name not in allowed and not name.startswith(".")} == set()
