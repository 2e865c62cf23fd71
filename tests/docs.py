"""The parts of the docs that come from the code: `python -m tests.docs` writes them, test_docs.py compares them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import typer

import llorch
from llorch.cli.main import app
from llorch.config import settings_markdown
from llorch.control import routes_catalog, routes_health, routes_nodes, routes_pools, routes_tasks
from llorch.control.admission import Admission
from llorch.control.metrics import ControlMetrics, registry_metrics, trust_metrics
from llorch.control.registry import Registry
from llorch.errors import MEANINGS
from llorch.node import routes as node_routes
from llorch.node.metrics import NodeMetrics
from llorch.web import Route

ROOT = Path(llorch.__file__).parent.parent
README = ROOT / "README.md"
MAP = ROOT / "llorch" / "README.md"


def control_routes() -> tuple[Route, ...]:
    return routes_health.routes(
        (*routes_tasks.ROUTES, *routes_nodes.ROUTES, *routes_pools.ROUTES, *routes_catalog.ROUTES)
    )


def node_route_table() -> tuple[Route, ...]:
    return node_routes.routes()


def _routes(table: tuple[Route, ...]) -> str:
    lines = ["| Route | Scope | What |", "|---|---|---|"]
    for route in table:
        path = re.sub(r"\{(\w+):[^}]*\}", r"{\1}", route.path)
        scopes = ", ".join(scope.value for scope in route.scopes)
        lines.append(f"| `{route.method} {path}` | {scopes} | {route.summary} |")
    return "\n".join(lines)


def _codes() -> str:
    lines = ["| Code | HTTP | A retry can help | What to do |", "|---|---|---|---|"]
    for code, meaning in sorted(MEANINGS.items(), key=lambda item: (item[1].status, item[0])):
        retry = "yes" if meaning.retriable else "no"
        lines.append(f"| `{code.value}` | {meaning.status} | {retry} | {meaning.hint or ''} |")
    return "\n".join(lines)


def metric_docs() -> dict[str, tuple[str, set[str]]]:
    """Every metric's name → its meaning and the roles that have it."""
    found: dict[str, tuple[str, set[str]]] = {}
    control, node = ControlMetrics(), NodeMetrics("docs")
    scraped = registry_metrics(Registry(epoch="docs"), Admission(), 0.0)
    node.scrape(list, list, list)
    for role, metrics in (
        ("control", [*control.registry.collect(), *scraped, *trust_metrics({}, {})]),
        ("node", list(node.registry.collect())),
    ):
        for metric in metrics:
            name = metric.name + ("_total" if metric.type == "counter" else "")
            found.setdefault(name, (metric.documentation, set()))[1].add(role)
    return found


def _metrics() -> str:
    lines = ["| Metric | Roles | Meaning |", "|---|---|---|"]
    for name, (meaning, roles) in sorted(metric_docs().items()):
        lines.append(f"| `{name}` | {', '.join(sorted(roles))} | {meaning} |")
    return "\n".join(lines)


def commands() -> dict[str, str]:
    """Every command's words → the first sentence of its help."""
    found: dict[str, str] = {}

    def walk(command: Any, words: tuple[str, ...]) -> None:
        inner = getattr(command, "commands", None) or {}
        if words and (not inner or command.invoke_without_command):
            found[" ".join(words)] = " ".join((command.help or "").split("\n\n")[0].split())
        for name, each in inner.items():
            if not each.hidden:
                walk(each, (*words, name))

    walk(typer.main.get_command(app), ())
    return found


def _commands() -> str:
    lines = ["| Command | What |", "|---|---|"]
    lines += [f"| `llorch {words}` | {text} |" for words, text in commands().items()]
    return "\n".join(lines)


def generated() -> dict[str, str]:
    """Marker in the README → the text between its two marks."""
    return {
        "commands": _commands(),
        "settings": settings_markdown().strip(),
        "control routes": _routes(control_routes()),
        "node routes": _routes(node_route_table()),
        "codes": _codes(),
        "metrics": _metrics(),
    }


def with_generated(text: str) -> str:
    for name, body in generated().items():
        start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        before, _, rest = text.partition(start)
        _, found, after = rest.partition(end)
        if not found:
            raise LookupError(f"the README has no marks for {name}")
        text = before + start + body + "\n" + end + after
    return text


if __name__ == "__main__":
    README.write_text(with_generated(README.read_text()))
