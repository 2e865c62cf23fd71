"""What can be wrong with a role's settings, and how it is told.

Owns Fault, the error that carries all of them, and the faults that no single value shows: settings that contradict each
other, are missing together, or would leave a listener open. Fails closed: without tokens nothing starts. Never quotes a
secret.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any, Generic, TypeVar

from llorch.auth import parse_tokens
from llorch.config_kinds import host_of, is_loopback, plain_http_abroad
from llorch.errors import ConfigError
from llorch.settings import ClientSettings, ControlSettings, NodeSettings, RoleSettings, ServerSettings

S = TypeVar("S", bound=RoleSettings)
MISSING = "missing"  # the `where` of a setting that is nowhere


@dataclass(frozen=True, slots=True)
class Fault:
    """`where`: a file and line, a flag, an environment name, or MISSING. `key`: the setting, or "" for a whole file."""

    where: str
    key: str
    message: str
    hint: str | None = None

    def __str__(self) -> str:
        key = "" if self.where == f"flag --{self.key}" else self.key
        told = ": ".join(part for part in (self.where, key, self.message) if part)
        return f"{told}\n    hint: {self.hint}" if self.hint else told


class ConfigFaults(ConfigError):
    """All that is wrong with the settings, at once. Its text is what a person sees."""

    def __init__(self, faults: tuple[Fault, ...]) -> None:
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        super().__init__("\n".join([f"{count} in the settings; nothing was started", *map(str, faults)]))
        self.faults = faults


@dataclass(slots=True)
class Checked(Generic[S]):
    """Settings with what follows from them filled in. One in `broken` has been reported and is taken as unknown."""

    settings: S
    origin: dict[str, str]
    broken: frozenset[str]
    faults: list[Fault] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def fault(self, names: str, message: str, hint: str) -> None:
        """`names` are the settings involved, the one to blame first; if one of them is broken nothing is known."""
        first, *rest = names.split()
        if self.broken.isdisjoint((first, *rest)):
            where = self.origin[first]
            self.faults.append(Fault(MISSING if where == "default" else where, first, message, hint))

    def warn(self, name: str, message: str) -> None:
        self.warnings.append(f"{self.origin[name]}: {name}: {message}")


def check(settings: S, origin: Mapping[str, str], broken: frozenset[str]) -> Checked[S]:
    """The cross-checks of a role, and its node token's fallback."""
    checked = Checked(settings, dict(origin), broken)
    if isinstance(settings, ServerSettings):
        _fall_back(checked, settings)
    match checked.settings:
        case ControlSettings() as control:
            _check_listener(checked, control)
            _check_control(checked, control)
        case NodeSettings() as node:
            _check_listener(checked, node)
            _check_node(checked, node)
        case ClientSettings() as client:
            if client.token and plain_http_abroad(client.url):
                checked.warn("url", "http:// sends the token unencrypted over the network; use https://")
    return checked


def _fall_back(checked: Checked[S], settings: ServerSettings) -> None:
    if settings.node_token is None and settings.service_token is not None and "node-token" not in checked.broken:
        fallback: dict[str, Any] = {"node_token": settings.service_token}
        checked.settings = dataclasses.replace(checked.settings, **fallback)
        checked.origin["node-token"] = "service-token"
        checked.warnings.append("node-token: not set; the service token is used, so a node could pose as a control")


def _check_listener(checked: Checked[S], settings: ControlSettings | NodeSettings) -> None:
    cert, key = settings.tls_cert, settings.tls_key
    if cert and not key:
        checked.fault("tls-cert tls-key", "needs tls-key too", "give --tls-key PATH")
    if key and not cert:
        checked.fault("tls-key tls-cert", "needs tls-cert too", "give --tls-cert PATH")
    joins_securely = isinstance(settings, NodeSettings) and any(url.startswith("https:") for url in settings.join)
    has_authority = isinstance(settings, ControlSettings) and not settings.dev
    if not settings.bind.loopback and not (cert or key or joins_securely or has_authority):
        checked.fault(
            "bind tls-cert tls-key",
            f"{settings.bind} is reachable from outside this machine, and there is no TLS",
            f"give --tls-cert and --tls-key, or bind 127.0.0.1:{settings.bind.port}",
        )
    if isinstance(settings, ControlSettings) and settings.tls == "off-mesh":
        if cert or key:
            checked.fault("tls tls-cert tls-key", "off-mesh serves without TLS, yet there is a tls-cert", "give one")
        if not settings.bind.loopback:
            checked.warn(
                "tls", f"off-mesh: {settings.bind} serves tokens and prompts unencrypted; is the mesh around it?"
            )


_MAKE = "`openssl rand -hex 32` makes a token"


def _check_control(checked: Checked[S], control: ControlSettings) -> None:
    if control.offline_after <= control.heartbeat_interval:
        checked.fault(
            ("offline-after heartbeat-interval" if checked.origin["offline-after"] != "default" else
             "heartbeat-interval offline-after"),
            "offline-after must be longer than heartbeat-interval, or every node is offline between two beats",
            "three times heartbeat-interval lets two beats be lost",
        )  # fmt: skip
    _warn_of_shared(checked, control)


def _warn_of_shared(checked: Checked[S], control: ControlSettings) -> None:
    lists = {
        "api-token": control.api_token,
        "admin-token": control.admin_token,
        "service-token": control.service_token,
        "node-token": control.node_token if checked.origin["node-token"] != "service-token" else None,
    }
    owner: dict[str, str] = {}
    for name, text in lists.items():
        for _, token in parse_tokens(text, min_chars=1) if text else []:
            if owner.setdefault(token, name) != name:
                checked.warn(name, f"shares a token with {owner[token]}: who has it may do what both allow")


def _check_node(checked: Checked[S], node: NodeSettings) -> None:
    if not node.join:
        checked.fault("join", "a node needs a control to join", "give --join https://control.example:8080")
    if node.join and not node.service_token and not any(url.startswith("https:") for url in node.join):
        checked.fault(
            "service-token join",
            "without TLS a node needs the token that its control presents",
            f"set LLORCH_SERVICE_TOKEN, or --service-token-file PATH, to the control's; {_MAKE}",
        )
    for url in filter(plain_http_abroad, node.join):
        checked.fault("join", f"{url} would send the node's token unencrypted over the network", "use https://")
    if node.address and plain_http_abroad(node.address):
        checked.fault("address", "would have the service token sent unencrypted over the network", "use https://")
    if node.logs_limit < node.log_limit:
        name = "logs-limit log-limit" if checked.origin["logs-limit"] != "default" else "log-limit logs-limit"
        checked.fault(name, "logs-limit, for all tasks, is less than log-limit, for one", "raise logs-limit")
    _check_pools(checked, node)


def _check_pools(checked: Checked[S], node: NodeSettings) -> None:
    shorthand = len(node.effective_pools()) > len(node.pools)
    if shorthand and any(pool.id == "default" for pool in node.pools):
        checked.fault(
            "pools model engine", 'the id "default" is that of the pool that --model makes', "rename the pool"
        )
    if node.engine == "external" and not node.engine_url:
        checked.fault("engine engine-url", "external needs engine-url", "give --engine-url http://127.0.0.1:8000")
    if node.engine_url and node.engine != "external":
        checked.warn("engine-url", "has no effect without --engine external")
    if not shorthand:
        for name in ("slots", "ctx", "gpus", "engine-arg"):
            if checked.origin[name] != "default":
                checked.warn(name, "has no effect without --model or --engine")
    engines = [("engine-url", node.engine_url if node.engine == "external" else None)]
    engines += [("pools", pool.url) for pool in node.pools]
    for name, url in engines:
        if url and not _engine_allowed(host_of(url), node):
            checked.fault(
                f"{name} engine-cidr",
                f"{url} is neither on this machine nor in engine-cidr",
                "its traffic would cross the network unencrypted; if that network is trusted, name it in --engine-cidr",
            )


def _engine_allowed(host: str, node: NodeSettings) -> bool:
    """A name can't be looked up here; with networks given, it is left to whoever connects."""
    if is_loopback(host):
        return True
    try:
        address = ip_address(host)
    except ValueError:
        return bool(node.engine_cidr)
    return any(address in network for network in node.engine_cidr)
