"""The shape of the code, checked on its syntax trees: which modules are pure, and who may import whom."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import llorch

ROOT = Path(llorch.__file__).parent

IMPURE = frozenset(
    {
        "asyncio", "aiohttp", "os", "pathlib", "time", "random", "socket", "subprocess", "logging", "threading",
        "secrets", "concurrent", "ctypes", "http", "multiprocessing", "resource", "select", "selectors", "shutil",
        "signal", "ssl", "sys", "tempfile", "uuid",
    }
)  # fmt: skip
# Clocks and files that need no import of their own.
IMPURE_BUILTINS = frozenset({"open", "input", "print"})
IMPURE_METHODS = frozenset({"now", "utcnow", "today"})
ROLES = ("control", "node", "client")
HTTP_VERBS = frozenset({"get", "post", "put", "delete", "head", "patch", "options", "request", "ws_connect"})
PURE = (
    "auth.py",
    "backoff.py",
    "config*.py",
    "errors.py",
    "messages.py",
    "openai_paths.py",
    "records.py",
    "settings.py",
    "sse.py",
    "http_answer.py",
    "control/admission.py",
    "control/fact_table.py",
    "control/fairness.py",
    "control/intake.py",
    "control/line.py",
    "control/placement.py",
    "control/registry.py",
    "control/tasks.py",
    "control/views.py",
    "node/handoff.py",
    "node/pools.py",
    "node/pool_*.py",
    "node/replica*.py",
    "node/slots.py",
    "node/engines/*.py",
)
# Beside the engines' pure rules lie the programs that are engines, and the look at what this machine has.
PROGRAMS = frozenset(
    {
        "node/engines/shim.py",
        "node/engines/llamacpp_server.py",
        "node/engines/simulated_server.py",
        "node/engines/detect.py",
    }
)


def modules() -> list[Path]:
    return sorted(path for path in ROOT.rglob("*.py"))


def marked_pure() -> set[Path]:
    """The modules that the map calls pure, by a star behind their name."""
    found, room = set(), ""
    for line in (ROOT / "README.md").read_text().splitlines():
        if heading := re.match(r"### (\S+?):?(?: |$)", line):
            room = heading[1] if heading[1].endswith("/") else ""
        if entry := re.match(r"- `([^`]+)`\\\*:", line):
            found.add(ROOT / room / entry[1])
    return found


def pure_modules() -> list[Path]:
    found = {path for pattern in PURE for path in ROOT.glob(pattern)} | marked_pure()
    return sorted(
        path
        for path in found
        if not any(path.relative_to(ROOT).as_posix().startswith(program[:-3]) for program in PROGRAMS)
    )


def imports(tree: ast.AST, package: str) -> Iterator[str]:
    """Every module that `tree` imports, wherever in the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join(parts[: len(parts) - node.level + 1] + ([base] if base else []))
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
            "__import__",
            "import_module",
        ):
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield first.value


def package_of(path: Path) -> str:
    return ".".join(("llorch", *path.relative_to(ROOT).parent.parts))


def impure_imports(source: str) -> set[str]:
    tree = ast.parse(source)
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    builtins = {func.id for func in calls if isinstance(func, ast.Name)} & IMPURE_BUILTINS
    methods = {func.attr for func in calls if isinstance(func, ast.Attribute)} & IMPURE_METHODS
    return ({name.partition(".")[0] for name in imports(tree, "llorch")} & IMPURE) | builtins | methods


def role_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[0] == "llorch" and parts[1] in (*ROLES, "cli") else None


def forbidden_role_imports(source: str, path_in_package: str) -> set[str]:
    """Imports against `cli → control | node | client → shared`."""
    own = path_in_package.split("/")[0] if "/" in path_in_package else None
    own = own if own in (*ROLES, "cli") else None
    package = ".".join(("llorch", *Path(path_in_package).parent.parts))
    if own == "cli" or path_in_package == "__main__.py":
        return set()
    found = {name for name in imports(ast.parse(source), package) if role_of(name)}
    return {name for name in found if role_of(name) != own}


@pytest.mark.parametrize("path", pure_modules(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_pure_module_imports_nothing_that_touches_the_world(path: Path) -> None:
    assert impure_imports(path.read_text()) == set()


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_roles_do_not_import_each_other(path: Path) -> None:
    assert forbidden_role_imports(path.read_text(), path.relative_to(ROOT).as_posix()) == set()


def test_every_named_pure_module_exists() -> None:
    missing = [pattern for pattern in PURE if not list(ROOT.glob(pattern))]
    assert missing == []
    assert {path for path in marked_pure() if not path.exists()} == set()
    unmarked = [path for path in set(pure_modules()) - marked_pure() if path.name != "__init__.py"]
    assert unmarked == []


@pytest.mark.parametrize(
    "planted",
    [
        "import asyncio",
        "import os.path",
        "from time import monotonic",
        "def f():\n    import random",
        "import importlib\nimportlib.import_module('socket')",
        "from subprocess import run as harmless",
        "def f():\n    return open('x')",
        "from datetime import datetime\ndef f():\n    return datetime.now()",
    ],
)
def test_a_planted_impurity_is_found(planted: str) -> None:
    assert impure_imports(planted)


@pytest.mark.parametrize(
    ("planted", "where"),
    [
        ("from llorch.node import runner", "control/app.py"),
        ("import llorch.control.registry", "node/app.py"),
        ("from ..client import api", "control/links.py"),
        ("def f():\n    from llorch.control.app import run", "web.py"),
        ("from llorch.cli import main", "client/api.py"),
    ],
)
def test_a_planted_import_across_roles_is_found(planted: str, where: str) -> None:
    assert forbidden_role_imports(planted, where)


def redirecting_calls(source: str) -> list[int]:
    """Lines with a request that would follow a redirect, and so carry its token to wherever a peer says."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in HTTP_VERBS:
            words = {keyword.arg: keyword.value for keyword in node.keywords}
            asks = {"headers", "data", "json", "ssl", "allow_redirects"} & set(words) or node.func.attr == "ws_connect"  # type: ignore[attr-defined]
            never = isinstance(value := words.get("allow_redirects"), ast.Constant) and value.value is False
            if asks and not never:
                found.append(node.lineno)
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_request_follows_a_redirect(path: Path) -> None:
    assert redirecting_calls(path.read_text()) == []


def test_a_planted_redirect_is_found() -> None:
    assert redirecting_calls("s.get(url, headers={})") == [1]
    assert redirecting_calls("s.request('GET', url, data=b'', allow_redirects=True)") == [1]
    assert redirecting_calls("s.post(url, headers={}, allow_redirects=False)\n{}.get(1)") == []


def reads_of_lines(source: str) -> list[int]:
    """Lines where a body is read line by line: aiohttp breaks off at one over 128 KiB, and no peer promises less."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in ("readline", "readuntil"):
            of: ast.expr | None = node.value
        elif isinstance(node, ast.AsyncFor):
            of = node.iter
        else:
            continue
        if isinstance(of, ast.Attribute) and of.attr == "content":
            found.append(node.lineno)
    return found


def test_no_body_is_read_line_by_line() -> None:
    sources = {path.relative_to(ROOT).as_posix(): path.read_text() for path in modules()}
    found = {name: reads_of_lines(source) for name, source in sources.items() if ".content" in source}
    assert "node/engine_answer.py" in found  # which does read bodies
    assert {name: lines for name, lines in found.items() if lines} == {}


def test_a_planted_read_of_lines_is_found() -> None:
    assert reads_of_lines("async def f(r):\n    return await r.content.readline()") == [2]
    assert reads_of_lines("async def f(r):\n    async for line in r.content:\n        pass") == [2]
    assert reads_of_lines("async def f(r):\n    async for part in r.content.iter_any():\n        pass") == []


def test_sessions_come_from_the_one_factory() -> None:
    made = [path.relative_to(ROOT).as_posix() for path in modules() if "ClientSession(" in path.read_text()]
    listening = [path.relative_to(ROOT).as_posix() for path in modules() if "AppRunner(" in path.read_text()]
    # The simulated engine stands for a program of others: it may not lean on what it is to test.
    assert (made, listening) == (["web.py"], ["listen.py", "node/engines/simulated_server.py"])


def test_no_role_lets_clients_in_without_tls_beside_tls() -> None:
    """That is for a program that measures: no setting may lead to it."""
    asking = [path.relative_to(ROOT).as_posix() for path in modules() if "serve_without_tls" in path.read_text()]
    assert asking == ["listen.py"]


def test_modules_stay_short() -> None:
    long = {
        path.relative_to(ROOT).as_posix(): n for path in modules() if (n := len(path.read_text().splitlines())) > 500
    }
    assert long == {}
