"""Packet filter rules: what is opened, to whom, and that nothing else is."""

from __future__ import annotations

import ipaddress

import pytest

from llorch.cli.firewall_rules import Opening, rules
from llorch.config_kinds import HostPort

EVERYWHERE, HERE = HostPort("0.0.0.0", 8080), HostPort("127.0.0.1", 8080)


def nets(*texts: str) -> tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]:
    return tuple(map(ipaddress.ip_network, texts))


def judged(text: str) -> list[str]:
    """The rules about the port, in their order."""
    return [line.strip() for line in text.splitlines() if "dport" in line and not line.strip().startswith("#")]


@pytest.mark.parametrize(
    ("bind", "sources", "expected"),
    [
        (HERE, None, ["tcp dport 8080 drop"]),
        (EVERYWHERE, None, ["tcp dport 8080 accept"]),
        (EVERYWHERE, (), ["tcp dport 8080 drop"]),
        (
            EVERYWHERE,
            nets("10.0.0.0/8", "fd00::/8"),
            ["tcp dport 8080 ip saddr @from4 accept", "tcp dport 8080 ip6 saddr @from6 accept", "tcp dport 8080 drop"],
        ),
        (
            HostPort("10.0.0.5", 8080),
            nets("10.0.0.0/8", "fd00::/8"),
            ["ip daddr 10.0.0.5 tcp dport 8080 ip saddr @from4 accept", "ip daddr 10.0.0.5 tcp dport 8080 drop"],
        ),
        (HostPort("fd00::5", 8080), nets("10.0.0.0/8"), ["ip6 daddr fd00::5 tcp dport 8080 drop"]),
        (HostPort("desk", 8080), None, ["tcp dport 8080 accept"]),
    ],
)
def test_a_port_is_open_to_those_that_may_and_closed_to_the_rest(
    bind: HostPort, sources: tuple[ipaddress.IPv4Network, ...] | None, expected: list[str]
) -> None:
    assert judged(rules("control", Opening(bind, "why", sources))) == expected


def test_engines_are_for_loopback_alone_and_other_ports_are_let_alone() -> None:
    text = rules("node", Opening(HERE, "why", ()))
    before, loopback, after = text.partition('iifname "lo" accept')
    assert loopback
    assert "policy accept" in before
    assert "ip daddr 127.0.0.0/8 drop" in after
    assert "ip6 daddr ::1 drop" in after


def test_it_can_be_loaded_again_and_says_how_to_take_it_away() -> None:
    text = rules("control", Opening(EVERYWHERE, "why", None), ["a note"])
    assert "table inet llorch\ndelete table inet llorch\ntable inet llorch {" in text
    assert "nft delete table inet llorch" in text
    assert "# a note\n" in text


def test_networks_within_others_are_left_out() -> None:
    text = rules("control", Opening(EVERYWHERE, "why", nets("10.0.0.0/8", "10.1.0.0/16", "10.0.0.1")))
    assert "elements = { 10.0.0.0/8 }" in text


def test_ufw_is_told_the_same() -> None:
    assert "#   ufw allow proto tcp to any port 8080" in rules("control", Opening(EVERYWHERE, "why", None))
    text = rules("node", Opening(EVERYWHERE, "why", nets("10.0.0.5", "fd00::/8")))
    assert "#   ufw allow proto tcp from 10.0.0.5 to any port 8080" in text
    assert "#   ufw allow proto tcp from fd00::/8 to any port 8080" in text
    assert "ufw deny" in rules("node", Opening(EVERYWHERE, "why", ()))
    assert "ufw" not in rules("node", Opening(HERE, "why", ()))


def test_every_line_but_the_rules_is_a_comment() -> None:
    """What a setting says stands in comments alone, or was checked to be an address or a port."""
    text = rules("node", Opening(EVERYWHERE, "a purpose", nets("10.0.0.5"), ("https://desk:1: 10.0.0.5",)))
    for line in text.splitlines():
        if "purpose" in line or "desk" in line:
            assert line.strip().startswith("#")
