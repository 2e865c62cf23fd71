from __future__ import annotations

import pytest

from llorch.control.addresses import check_address, check_ip
from llorch.errors import Code, LlorchError

LAN_PEER = "10.0.0.5"


def refused(address: str, peer: str | None = LAN_PEER) -> bool:
    try:
        check_address(address, peer)
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
        "[2001:db8::5]:9200",
        "https://[2001:db8::5]:9200/node/1",
        "http://192.168.1.20",
    ],
)
def test_addresses_of_machines_are_accepted(address: str) -> None:
    assert not refused(address)


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
        "http://[64:ff9b::7f00:1]:9200",
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
    ],
)
def test_addresses_that_are_no_machines_are_refused_even_from_this_machine(address: str) -> None:
    assert refused(address)
    assert refused(address, "127.0.0.1")


@pytest.mark.parametrize("address", ["http://127.1:80", "http://2130706433:80", "http://0x7f000001:80", "010.0.0.1:80"])
def test_numbers_that_only_resolvers_take_for_addresses_are_refused(address: str) -> None:
    assert refused(address, "127.0.0.1")


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
    for ip in ("127.0.0.1", "169.254.169.254", "::ffff:169.254.169.254", "nonsense"):
        with pytest.raises(LlorchError):
            check_ip(ip, LAN_PEER)
