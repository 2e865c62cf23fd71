"""`llorch config firewall [control|node]`: packet filter rules from the settings in force, for `nft -f`.

Takes the flags that the role is started with. Looks up the hosts in --join, for rules hold addresses; loads nothing.
"""

from __future__ import annotations

import inspect
import ipaddress
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from llorch.cli.control_here import has_been, local_settings
from llorch.cli.firewall_rules import Opening, rules, show
from llorch.cli.flags import flag_values, role_flags, with_flags
from llorch.cli.output import usage, warn, write_out
from llorch.cli.sources import resolve_here
from llorch.config import ControlSettings, NodeSettings
from llorch.config_kinds import CIDRS, BadValue, HostPort, Network, host_of
from llorch.errors import ConfigError

app = typer.Typer(help="Print packet filter rules.", rich_markup_mode=None)

_FROM = inspect.Parameter(
    "from_",
    inspect.Parameter.KEYWORD_ONLY,
    default=None,
    annotation=Annotated[
        str | None,
        typer.Option(
            "--from", metavar="CIDR,...", show_default=False,
            help="Who may come in. Without it everybody at a control, and at a node the controls in --join.",
        ),
    ],
)  # fmt: skip


def firewall(_: object, typer_context: typer.Context) -> None:
    """Print nftables rules that open what a role needs, and to whom; a control's if none is named."""


def control(_: object) -> None:
    """Print nftables rules for a control's machine."""


def node(_: object) -> None:
    """Print nftables rules for a node's machine."""


def _networks(text: str | None) -> tuple[Network, ...] | None:
    if text is None:
        return None
    try:
        return CIDRS.parse(text)
    except BadValue as bad:
        raise usage(f"--from: {bad.message}", bad.hint) from None


def _port_of(bind: HostPort) -> None:
    if bind.port == 0:
        raise usage("with port 0 it takes another port at each start, and no rule can name it", "give --bind HOST:PORT")


def _for_control(given: dict[str, Any]) -> None:
    flags = flag_values(ControlSettings, given)
    settings = resolve_here(ControlSettings, flags, config=given["config"], local=True).settings
    _port_of(settings.bind)
    sources = _networks(given["from_"])
    who = "Clients and nodes: every task, every heartbeat and every link comes in here."
    if settings.bind.loopback:
        who = "It listens on loopback alone: nothing comes in from outside."
    notes: list[str] = []
    if not settings.bind.loopback and sources is None:
        notes.append("--from 10.0.0.0/8,fd00::/8 narrows it to the networks of clients and nodes.")
    if not settings.bind.loopback and settings.tls == "off-mesh":
        notes.append("off-mesh: it serves without TLS, so let the mesh alone come in here.")
    write_out(rules("control", Opening(settings.bind, who, sources), notes))


def _for_node(given: dict[str, Any]) -> None:
    flags = flag_values(NodeSettings, given)
    settings = resolve_here(NodeSettings, flags, config=given["config"], local=True).settings
    _port_of(settings.bind)
    sources, named = _networks(given["from_"]), tuple[str, ...]()
    who = "Nothing comes in from outside: the node calls its controls, and its own link carries all they ask."
    notes: list[str] = []
    if not settings.bind.loopback:
        who = "Controls alone, where they call this node; without --address they never do."
        if sources is None:
            found = {url: _addresses(host_of(url)) for url in settings.join}
            sources, named = _sources(found), tuple(_told(found))
        if settings.address is None:
            notes.append("--address is not set, so no control calls this node: --bind 127.0.0.1:9200 would do.")
    write_out(rules("node", Opening(settings.bind, who, sources or (), named), notes))


def _sources(found: Mapping[str, Sequence[Network]]) -> tuple[Network, ...]:
    """Without loopback: who is on this machine comes in anyhow."""
    networks = (network for networks in found.values() for network in networks)
    return tuple(dict.fromkeys(network for network in networks if not network.is_loopback))


def _told(found: Mapping[str, Sequence[Network]]) -> list[str]:
    for url, networks in found.items():
        if not networks:
            warn(f"{host_of(url)} does not resolve here, so nothing is open to {url}")
    return [f"{url}: {', '.join(map(show, found[url])) or 'its host does not resolve'}" for url in found]


def _addresses(host: str) -> list[Network]:
    """Of one control; none if its name leads nowhere."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return []
    addresses = dict.fromkeys(str(address[0]).partition("%")[0] for *_, address in found)
    return [ipaddress.ip_network(address) for address in addresses]


def _is_a_nodes(config: str | None) -> bool:
    """Whether this machine looks like a node's and like no control's: then a control's rules are not what is meant."""
    from llorch.node.certificate import DIRECTORY, FILE_NAME

    here = Path(local_settings(None, config).data_dir)
    if has_been(here):
        return False
    try:
        joins = resolve_here(NodeSettings, {}, config=config, local=True).settings.join
    except ConfigError:  # without flags they are not whole
        joins = ()
    return bool(joins) or (here / DIRECTORY / FILE_NAME).exists()


def _run(given: dict[str, Any]) -> int | None:
    context: typer.Context = given.pop("typer_context")
    if context.invoked_subcommand is None:
        if given["data_dir"] is None and _is_a_nodes(given["config"]):
            raise usage("which rules? this is a node's machine", "`llorch config firewall node`, or control")
        _for_control(given)
        return 0
    if any(value not in (None, []) for value in given.values()):
        raise usage(f"flags mean nothing before {context.invoked_subcommand}", "put them after it")
    return None


app.callback(invoke_without_command=True)(with_flags(_run, firewall, (_FROM, *role_flags(ControlSettings)), group=True))
app.command("control")(with_flags(_for_control, control, (_FROM, *role_flags(ControlSettings))))
app.command("node")(with_flags(_for_node, node, (_FROM, *role_flags(NodeSettings))))
