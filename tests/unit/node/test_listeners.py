"""The kernel's tables of TCP sockets: who listens where."""

from __future__ import annotations

import os
import socket
import sys

import pytest

from llorch.node.listeners import exposed, listening

HEAD = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"


def line(address: str, state: str = "0A", inode: int = 7) -> str:
    return f"   0: {address} 00000000:0000 {state} 00000000:00000000 00:00000000 00000000  1000 0 {inode} 1 0 100\n"


@pytest.mark.skipif(sys.byteorder != "little", reason="the lines below are those of a little-endian machine")
@pytest.mark.parametrize(
    ("written", "address"),
    [
        ("0100007F:1F90", "127.0.0.1"),
        ("00000000:1F90", "0.0.0.0"),
        ("0A00000A:1F90", "10.0.0.10"),
        ("00000000000000000000000000000000:1F90", "::"),
        ("00000000000000000000000001000000:1F90", "::1"),
        ("0000000000000000FFFF00000100007F:1F90", "::ffff:7f00:1"),
    ],
)
def test_addresses_are_read_as_the_kernel_writes_them(written: str, address: str) -> None:
    ((inode, found, port),) = listening(HEAD + line(written))
    assert (inode, str(found).replace("127.0.0.1", "7f00:1") if "ffff" in address else str(found), port) == (
        "7", address, 8080,
    )  # fmt: skip


def test_what_does_not_listen_or_cannot_be_read_is_passed_over() -> None:
    table = HEAD + line("0100007F:1F90", "01") + line("xyz:1F90") + line("0100:1F90") + "\n" + "one two\n"
    assert list(listening(table)) == []
    assert list(listening("")) == []


@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
def test_of_a_process_only_what_is_reachable_from_elsewhere_is_told() -> None:
    before = exposed(os.getpid())
    with socket.create_server(("127.0.0.1", 0)):
        assert exposed(os.getpid()) == before
        with socket.create_server(("0.0.0.0", 0)) as open_to_all:
            assert f"0.0.0.0:{open_to_all.getsockname()[1]}" in exposed(os.getpid())
    assert exposed(os.getpid()) == before
