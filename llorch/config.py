"""From flags, environment and files to one role's settings, or to a list of everything that is wrong with them.

Owns precedence (flag, then environment, then files in order, then default), where each value came from, how secrets
come in and stay out of sight, and what the registry is turned into: JSON Schema, docs, an example file. The registry
itself is `llorch.settings`. Never opens a file or reads the environment: both come in as arguments, so that a new
configuration can be built and checked whole before it replaces the one in use.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeAlias, TypeVar

from llorch.auth import fingerprint, parse_tokens
from llorch.config_faults import ConfigFaults, Fault, check
from llorch.config_kinds import BadValue, HostPort, Kind, closest, read_node
from llorch.config_pools import PoolSpec
from llorch.config_yaml import Entry, Node, Scalar, YamlFault, read_yaml
from llorch.settings import (
    SETTINGS,
    ClientSettings,
    ControlSettings,
    NodeSettings,
    RoleSettings,
    Setting,
    settings_for,
)

__all__ = [
    "SETTINGS", "ClientSettings", "ConfigFaults", "ConfigFile", "ControlSettings", "Fault", "HostPort", "Kind",
    "NodeSettings", "PoolSpec", "Resolved", "RoleSettings", "Setting", "example_yaml", "json_schema", "resolve",
    "settings_for", "settings_markdown", "show",
]  # fmt: skip

S = TypeVar("S", bound=RoleSettings)
FlagValue: TypeAlias = str | bool | Sequence[str] | None

# Kubernetes gives every container such variables for each service; a service may well be named llorch.
_KUBERNETES = re.compile(r"LLORCH_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_\w+)?)")
_STDIN = "-"
_UNKNOWN = "not a setting"


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """A settings file that was read. `path` is how faults name it."""

    path: str
    text: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Resolved(Generic[S]):
    """`origin` has an entry for each field of `settings`, by setting name. `files_read` hold secrets: watch them."""

    settings: S
    origin: Mapping[str, str]
    warnings: tuple[str, ...]
    files_read: tuple[str, ...] = ()


def resolve(
    cls: type[S],
    *,
    flags: Mapping[str, FlagValue],
    env: Mapping[str, str],
    files: Sequence[ConfigFile],
    read_file: Callable[[str], str],
) -> Resolved[S]:
    """The settings of one role. The first of `files` wins; `read_file` gets paths of secrets, "-" for standard input.
    Paths stay as written: `~` is for the caller to expand.

    Raises ConfigFaults with everything that is wrong, in every source, also where another source would have won.
    """
    reading = _Reading(cls, read_file)
    reading.take_flags(flags)
    reading.take_env(env)
    for file in files:
        reading.take_file(file)
    values = reading.values(dev=_is_true(flags.get("dev")))
    if cls is ClientSettings and values.get("token") is None:
        reading.borrow_api_token(env, values)
    return reading.resolved(values)


def _is_true(value: FlagValue) -> bool:
    return value is True or value == "true"


@dataclass(frozen=True, slots=True)
class _Given:
    """A value that one source gives. `level` tells sources apart, the strongest first; of a secret's two names a level
    may use one.
    """

    setting: Setting
    level: str
    where: str
    value: Any = field(repr=False)


class _Reading(Generic[S]):
    """All sources in, one value for each setting out; faults and warnings on the way."""

    def __init__(self, cls: type[S], read_file: Callable[[str], str]) -> None:
        self.cls = cls
        self.own = {setting.name: setting for setting in settings_for(cls)}
        self.read_file = read_file
        self.given: dict[str, list[_Given]] = {}
        self.faults: list[Fault] = []
        self.warnings: list[str] = []
        self.files_read: list[str] = []
        self.origin: dict[str, str] = {}
        self.broken: set[str] = set()  # settings with a fault: no cross-check may report them again
        self.unread = False  # a file could not be read, so nothing can be said to be missing

    def fault(self, where: str, key: str, message: str, hint: str | None = None) -> None:
        self.faults.append(Fault(where, key, message, hint))
        self.broken.add(key.partition(".")[0].partition("[")[0].removesuffix("-file"))

    # ------------------------------------------------------------ sources

    def take_flags(self, flags: Mapping[str, FlagValue]) -> None:
        for key, value in flags.items():
            if value is None:
                continue
            name = key.replace("_", "-")
            setting = self.own.get(name)
            if setting is None or not setting.in_flags:
                hint = self.unknown(name, [own.name for own in self.own.values() if own.in_flags and not own.hidden])
                self.fault(f"flag --{name}", name, _UNKNOWN, hint)
                continue
            self.take_text("flag", f"flag {setting.flag}", setting, value)
            if setting.secret and isinstance(value, str) and not value.startswith("@") and value != _STDIN:
                self.warnings.append(
                    f"{setting.flag}: a secret on the command line shows in the list of processes; "
                    f"use {setting.flag}-file PATH, {setting.env[0]}, or {setting.flag} @PATH"
                )

    def take_env(self, env: Mapping[str, str]) -> None:
        for setting in self.own.values():
            name = next((name for name in setting.env if env.get(name)), None)
            if name is not None:
                self.take_text("env", f"env {name}", setting, env[name])
        known = {name for setting in SETTINGS for name in setting.env}
        for name in sorted(env):
            if name.startswith("LLORCH_") and name not in known and not _KUBERNETES.fullmatch(name):
                near = closest(name, known)
                hint = f"; did you mean {near}?" if near else ""
                self.warnings.append(f"env {name}: not a setting{hint}")

    def take_text(self, level: str, where: str, setting: Setting, value: FlagValue) -> None:
        try:
            parsed = _from_text(setting.kind, value)
        except BadValue as bad:
            self.fault(where, setting.name, bad.message, bad.hint)
            return
        self.give(_Given(setting, level, where, parsed))

    def take_file(self, file: ConfigFile) -> None:
        table, problems = read_yaml(file.text)
        self.unread = self.unread or any(not problem.key for problem in problems)
        by_name = {setting.name: setting for setting in (*SETTINGS, *self.own.values()) if setting.in_yaml}
        for entry in table.entries:
            setting = by_name.get(entry.key)
            if setting is None:
                problems.append(YamlFault(entry.line, _UNKNOWN, self.unknown(entry.key, by_name), entry.key))
                continue
            value, found = _from_yaml(setting, entry)
            problems += found
            if not found and setting.name in self.own:
                self.give(_Given(setting, file.path, f"{file.path}:{entry.line}", value))
        for problem in sorted(problems, key=lambda problem: problem.line):
            self.fault(f"{file.path}:{problem.line}", problem.key, problem.message, problem.hint)

    def unknown(self, name: str, known: Iterable[str]) -> str:
        """The hint for a name that is no setting. The one it comes close to was likely meant, so it is not missing."""
        near = closest(name.lower().replace("_", "-"), known)
        self.broken.add((near or "").removesuffix("-file"))
        return f"did you mean {near}?" if near else "`llorch config schema` lists all"

    def give(self, given: _Given) -> None:
        target = given.setting.file_of or given.setting.name
        others = [one for one in self.given.get(target, []) if one.level == given.level]
        if others:
            hint = f"give {target} or {target}-file, not both"
            self.fault(given.where, given.setting.name, f"given beside {others[0].where}", hint)
            return
        self.given.setdefault(target, []).append(given)

    # ------------------------------------------------------------ values

    def values(self, *, dev: bool) -> dict[str, Any]:
        """By field name; what is not given, or is broken, is left to the default."""
        values: dict[str, Any] = {}
        for setting in self.own.values():
            if setting.file_of is not None:
                continue
            self.origin[setting.name] = "default"
            for given in self.given.get(setting.name, ())[:1]:
                self.origin[setting.name] = given.where
                value = self.secret(given, setting, dev=dev) if setting.secret else given.value
                if value is not None:
                    values[setting.field] = value
        return values

    def secret(self, given: _Given, setting: Setting, *, dev: bool) -> str | None:
        """The text of a secret, read from where it is and checked. Nothing here may quote it, nor a path that holds it:
        a token given by mistake as the path is still a token.
        """
        path = given.value if given.setting.file_of else given.value.removeprefix("@")
        referred = given.setting.file_of is not None or given.value.startswith("@") or given.value == _STDIN
        text = self.contents(given, path) if referred else given.value.strip()
        if text is None:
            return None
        try:
            if setting.kind.name == "token":
                tokens = [text] if re.fullmatch(r"[\x21-\x7e]{1,512}", text) else []
            else:
                tokens = _tokens(text, dev=dev)
        except ValueError as error:
            self.fault(given.where, given.setting.name, str(error), "`openssl rand -hex 32` makes a token")
            return None
        if not tokens:
            self.fault(given.where, given.setting.name, "holds no token", "`openssl rand -hex 32` makes one")
            return None
        return text

    def contents(self, given: _Given, path: str) -> str | None:
        if path == _STDIN and _STDIN in self.files_read:
            self.fault(given.where, given.setting.name, "standard input can be read only once", "use a file for one")
            return None
        self.files_read.append(path)
        try:
            return self.read_file(path).strip()
        except OSError as error:
            problem = error.strerror or type(error).__name__
        except ValueError:
            problem = "not UTF-8 text"
        self.fault(given.where, given.setting.name, f"the file it names can't be read: {problem}", "check the path")
        return None

    def borrow_api_token(self, env: Mapping[str, str], values: dict[str, Any]) -> None:
        """A client with no token of its own presents the first of the control's client tokens."""
        setting = next(setting for setting in SETTINGS if setting.name == "api-token")
        text = env.get(setting.env[0])
        if not text or "token" in self.broken:
            return
        given = _Given(setting, "env", f"env {setting.env[0]}", text)
        tokens = self.secret(given, setting, dev=True)  # the control decides whether it is long enough
        if tokens is not None:
            values["token"] = parse_tokens(tokens, min_chars=1)[0][1]
            self.origin["token"] = given.where

    def resolved(self, values: dict[str, Any]) -> Resolved[S]:
        settings = self.cls(**values)
        if not self.unread:
            checked = check(settings, self.origin, frozenset(self.broken))
            self.faults += checked.faults
            self.warnings += checked.warnings
            settings, self.origin = checked.settings, dict(checked.origin)
        if self.faults:
            raise ConfigFaults(tuple(self.faults))
        files_read = tuple(path for path in self.files_read if path != _STDIN)
        return Resolved(settings, self.origin, tuple(self.warnings), files_read)


def _from_text(kind: Kind[Any], value: FlagValue) -> Any:
    """The value of a flag or variable. A flag given several times is joined, if its kind is a list."""
    if isinstance(value, bool):
        value = "true" if value else "false"
    if isinstance(value, str):
        return kind.parse(value)
    parts = list(value or ())
    if len(parts) == 1:
        return kind.parse(parts[0])
    if kind.join is None:
        raise BadValue("is given more than once" if parts else "has no value")
    return kind.join(one for part in parts for one in kind.parse(part))


def _from_yaml(setting: Setting, entry: Entry) -> tuple[Any, list[YamlFault]]:
    found: list[YamlFault] = []
    if setting.secret and not _refers(entry.value):
        message = "a secret may not stand in a settings file"
        hint = f"write it to a file of its own and give {setting.name}-file: PATH, or set {setting.env[0]}"
        return None, [YamlFault(entry.line, message, hint, setting.name)]
    value = read_node(setting.kind, entry.value, found, setting.name)
    return value, found


def _refers(node: Node) -> bool:
    return isinstance(node, Scalar) and len(node.text) > 1 and node.text.startswith("@") and "\n" not in node.text


def _tokens(text: str, *, dev: bool) -> list[str]:
    pairs = parse_tokens(text, min_chars=1) if dev else parse_tokens(text)
    for position, (name, token) in enumerate(pairs, 1):
        # What stands before the `=` was no name, so all of it was taken for the token: hardly what was meant.
        if name == "default" and "=" in token.rstrip("="):
            raise ValueError(f"token {position} has a name that is not 1 to 64 of letters, digits, . _ -")
    return [token for _, token in pairs]


# ---------------------------------------------------------------- what is made of the registry


def show(resolved: Resolved[Any]) -> list[tuple[str, str, str]]:
    """(name, value, origin) of each setting. A secret is shown as the fingerprints of its tokens."""
    rows = []
    for setting in settings_for(type(resolved.settings)):
        if setting.file_of is None and not setting.hidden:
            value = getattr(resolved.settings, setting.field)
            rows.append((setting.name, _shown(setting, value), resolved.origin[setting.name]))
    return rows


def _shown(setting: Setting, value: Any) -> str:
    if value is None or value == ():
        return ""
    if not setting.secret:
        return setting.kind.show(value)
    tokens = [value] if setting.kind.name == "token" else [token for _, token in parse_tokens(value, min_chars=1)]
    return ", ".join(f"sha256:{fingerprint(token)}" for token in tokens)


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a settings file, for editors: names, shapes and ranges, not the cross-checks."""
    properties: dict[str, dict[str, Any]] = {}
    for setting in SETTINGS:
        if not setting.in_yaml or setting.hidden:
            continue
        doc = f"{' and '.join(setting.roles)}: {setting.doc}"
        if setting.default:
            doc += f" Default: {setting.default}."
        if setting.name in properties:
            doc = f"{properties[setting.name]['description']} {doc}"
        properties[setting.name] = {**setting.kind.schema, "description": doc}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "llorch settings",
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
    }


def settings_markdown() -> str:
    """The table of all settings, for the docs."""
    lines = ["| Setting | Roles | Default | Environment | Meaning |", "|---|---|---|---|---|"]
    for setting in SETTINGS:
        if setting.hidden:
            continue
        name = f"`--{setting.name}`" if setting.in_flags else f"`{setting.name}:` (YAML only)"
        doc = setting.doc + (f" One of {', '.join(setting.choices)}." if setting.choices else "")
        default = f"`{setting.default}`" if setting.default else ""
        env = ", ".join(f"`{name}`" for name in setting.env)
        lines.append(f"| {name} | {', '.join(setting.roles)} | {default} | {env} | {doc.replace('|', chr(92) + '|')} |")
    return "\n".join(lines) + "\n"


def example_yaml(cls: type[RoleSettings]) -> str:
    """A settings file with every setting of a role, commented out. `#name: value` becomes a setting without its `#`."""
    lines = [f"# Settings of llorch {cls.role}. Remove the # in front of a name to set it."]
    for setting in settings_for(cls):
        if setting.in_yaml and not setting.hidden and not setting.secret:
            default = f"Default: {setting.default}." if setting.default else "Not set by default."
            lines += ["", f"# {setting.doc} {default}", f"#{setting.name}: {setting.example}"]
    return "\n".join(lines) + "\n"
