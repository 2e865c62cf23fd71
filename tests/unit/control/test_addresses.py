from __future__ import annotations

from collections.abc import Sequence
from ipaddress import ip_network

import pytest

from llorch.control.addresses import Network, check_address, check_ip, host_of
from llorch.errors import Code, LlorchError

LAN_PEER = "10.0.0.5"
LAN = (ip_network("10.0.0.0/24"), ip_network("2001:db8::/64"))
EVERYTHING = (ip_network("0.0.0.0/0"), ip_network("::/0"))


def refused(address: str, peer: str | None = LAN_PEER, networks: Sequence[Network] = ()) -> bool:
    try:
        check_address(address, peer, networks)
    except LlorchError as error:
        assert error.code is Code.UNTRUSTED_ADDRESS
        assert error.status == 422
        assert not address or address not in error.message
        return True
    return False


@pytest.mark.parametrize(
    "address",
    [
        "10.0.0.5:9200",
        "http://10.0.0.5:9200",
        "https://gpu-1.lab.example:9200",
        "gpu_1:9200",
        "http://gpu-1",
        "http://gpu-1.:9200",
        "[::ffff:10.0.0.5]:9200",
        "[::ffff:a00:5]:9200",
    ],
)
def test_the_address_that_a_node_registers_from_and_names_are_accepted(address: str) -> None:
    assert not refused(address)
    assert not refused(address, "::ffff:10.0.0.5")


@pytest.mark.parametrize(
    "address",
    ["10.0.0.6:9200", "http://[2001:db8::5]:9200/node/1", "[::ffff:10.0.0.6]:9200"],
)
def test_another_address_is_accepted_only_in_a_network_of_the_settings(address: str) -> None:
    with pytest.raises(LlorchError) as caught:
        check_address(address, LAN_PEER)
    assert "--node-cidr" in f"{caught.value.message} {caught.value.hint}"
    assert not refused(address, LAN_PEER, LAN)
    assert not refused(address, None, LAN)
    assert refused(address, LAN_PEER, (ip_network("192.168.0.0/16"),))


def test_an_ipv6_node_is_the_address_that_it_registers_from_however_it_is_written() -> None:
    assert not refused("[2001:DB8:0:0::5]:9200", "2001:db8::5")
    assert refused("[2001:db8::6]:9200", "2001:db8::5")


def test_hosts_are_compared_without_case_and_the_last_dot() -> None:
    assert host_of("https://GPU-1.Example.:9200/x") == "gpu-1.example"
    assert host_of("[2001:DB8::5]:9200") == "2001:db8::5"


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1:9200",
        "http://127.8.9.10:9200",
        "http://localhost:9200",
        "http://LOCALHOST.:9200",
        "http://api.localhost:9200",
        "http://[::1]:9200",
        "http://[::ffff:127.0.0.1]:9200",
    ],
)
def test_a_loopback_address_is_accepted_only_from_a_loopback_peer(address: str) -> None:
    assert refused(address)
    assert refused(address, None)
    assert refused(address, "not an address")
    for peer in ("127.0.0.1", "::1", "::ffff:127.0.0.1"):
        assert not refused(address, peer)


@pytest.mark.parametrize(
    "address",
    [
        "http://169.254.169.254/latest/meta-data",
        "169.254.1.1:9200",
        "http://100.100.100.200",
        "http://[fd00:ec2::254]",
        "http://[fe80::1]:9200",
        "http://[fe80::1%25eth0]:9200",
        "http://224.0.0.1:9200",
        "http://[ff02::1]:9200",
        "http://0.0.0.0:9200",
        "http://0.1.2.3:9200",
        "http://[::]:9200",
        "http://255.255.255.255:9200",
        "http://[::ffff:169.254.169.254]:9200",
        "http://[::ffff:0.0.0.0]:9200",
        "http://[64:ff9b::a9fe:a9fe]:9200",
        "http://[2002:a9fe:a9fe::]:9200",
        "http://[64:ff9b::7f00:1]:9200",
        "http://[64:ff9b:1::a00:5]:9200",
        "http://[2002:7f00:1::]:9200",
        "http://[2002:a00:5::1]:9200",
        "http://[2001:0:a00:5::1]:9200",
        "http://[::10.0.0.5]:9200",
        "http://[::7f00:1]:9200",
        "http://[::ffff:0:127.0.0.1]:9200",
        "http://[::ffff:100.100.100.200]:9200",
        "http://[2001:db8::5%25eth0]:9200",
        "http://168.63.129.16",
        "http://[fd20:ce::254]",
        "http://240.0.0.1:9200",
    ],
)
def test_addresses_that_are_no_machines_are_refused_whatever_the_settings_say(address: str) -> None:
    assert refused(address)
    assert refused(address, "127.0.0.1")
    assert refused(address, "127.0.0.1", EVERYTHING)
    assert refused(address, address.removeprefix("http://").removesuffix(":9200").strip("[]"), EVERYTHING)


def test_loopback_in_the_settings_does_not_make_it_another_machines() -> None:
    assert refused("127.0.0.1:9200", LAN_PEER, EVERYTHING)


@pytest.mark.parametrize(
    "address",
    [
        "http://127.1:80",
        "http://2130706433:80",
        "http://0x7f000001:80",
        "http://0x7f.1:80",
        "http://0177.0.0.1:80",
        "http://017700000001:80",
        "http://127.0.0.1.:80",
        "http://10.0.0.5.:80",
        "010.0.0.1:80",
        "http://10.0.0.5%25eth0:80",
    ],
)
def test_numbers_that_only_resolvers_take_for_addresses_are_refused(address: str) -> None:
    assert refused(address, "127.0.0.1", EVERYTHING)


@pytest.mark.parametrize(
    "address",
    [
        "http://user@10.0.0.5:9200",
        "http://user:pw@10.0.0.5:9200",
        "user:pw@10.0.0.5:9200",
        "http://@10.0.0.5:9200",
        "http://10.0.0.5\\@evil.example:9200",
        "ftp://10.0.0.5:9200",
        "file:///etc/passwd",
        "unix:///run/x.sock",
        "http://10.0.0.5:9200/?q=1",
        "http://10.0.0.5:9200/#f",
        "http://10.0.0.5:99999",
        "http://10.0.0.5:0",
        "http://10.0.0.5:x",
        "http://:9200",
        "http://",
        "",
        "10.0.0.5",
        "gpu-1",
        "10.0.0.5:9200/path",
        "http://10.0.0.5:9200\r\nX: y",
        " http://10.0.0.5:9200",
        "http://bücher.example:9200",
        "http://[::1",
        "http://-x:1",
        "http://a..b%00:1",
    ],
)
def test_what_is_not_a_plain_http_address_is_refused(address: str) -> None:
    assert refused(address, "127.0.0.1")


def test_what_a_name_resolved_to_is_checked_by_number() -> None:
    check_ip("10.0.0.5", LAN_PEER)
    check_ip("10.0.0.9", LAN_PEER, LAN)
    for ip in ("10.0.0.9", "127.0.0.1", "169.254.169.254", "::ffff:169.254.169.254", "fe80::1%eth0", "nonsense"):
        with pytest.raises(LlorchError):
            check_ip(ip, LAN_PEER)
