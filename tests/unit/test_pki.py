"""Certificates: what is signed, and what another end makes of it. Handshakes in memory, no socket."""

from __future__ import annotations

import datetime
import ssl
import time
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from llorch import pki, tls
from llorch.errors import LlorchError
from llorch.tls import CONTROL_NAME, JOIN_NAME, Identities, NameReader, Role, node_name

NOW = time.time()
DAY = 86_400.0


def signer(now: float = NOW, **more: float) -> pki.Signer:
    key = pki.make_key()
    return pki.Signer(pki.make_authority(key, now, **more), key)


CA = signer()
OTHER = signer()


def node_pair(
    node_id: str = "gpu-1", by: pki.Signer = CA, now: float = NOW, life_s: float = DAY
) -> tuple[bytes, bytes]:
    key = pki.make_key()
    return pki.pem_of([by.issue_node(key.public_key(), node_id, now, life_s)]), pki.key_pem(key)


def control_pair(by: pki.Signer = CA, *more: pki.Cert, names: tuple[str, ...] = ()) -> tuple[bytes, bytes]:
    key = pki.make_key()
    return pki.pem_of([by.issue_control(key.public_key(), "desk", names, NOW, DAY), *more]), pki.key_pem(key)


def shake(server: ssl.SSLContext, client: ssl.SSLContext, name: str) -> tuple[ssl.SSLObject, ssl.SSLObject]:
    """Both ends of a handshake that went through. Raises what either end does."""
    one, other = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [client.wrap_bio(other, one, server_hostname=name), server.wrap_bio(one, other, server_side=True)]
    todo = list(ends)
    for _ in range(10):
        for end in list(todo):
            try:
                end.do_handshake()
                todo.remove(end)
            except ssl.SSLWantReadError:
                pass
    if todo:
        raise AssertionError("the handshake did not end")
    try:
        ends[0].read(1)  # in TLS 1.3 the server's refusal comes after the client's handshake
    except ssl.SSLWantReadError:
        pass
    return ends[1], ends[0]


def trusting(*authorities: pki.Cert, pair: tuple[bytes, bytes] | None = None) -> ssl.SSLContext:
    return tls.cluster_client_context(pki.pem_of(authorities), pair)


def mutual(*authorities: pki.Cert, pair: tuple[bytes, bytes] | None = None) -> ssl.SSLContext:
    return tls.mutual_server_context(*(pair or control_pair()), pki.pem_of(authorities or (CA.cert,)))


@pytest.mark.parametrize("node_id", ["gpu-1", "GPU_1.rack", "x" * 63])
def test_each_end_knows_who_the_other_is(node_id: str) -> None:
    server, client = shake(mutual(), trusting(CA.cert, pair=node_pair(node_id)), CONTROL_NAME)
    node, control = tls.peer_of(server), tls.peer_of(client)
    assert node is not None
    assert control is not None
    assert (node.role, node.name) == (Role.NODE, node_id)
    assert (control.role, control.name) == (Role.CONTROL, "desk")
    assert abs(node.joined - NOW) <= 1
    assert abs(node.ends - NOW - DAY) <= 1


def test_a_node_serves_under_a_name_that_any_id_has() -> None:
    server, _ = shake(mutual(pair=node_pair("GPU_1")), trusting(CA.cert, pair=control_pair()), node_name("GPU_1"))
    peer = tls.peer_of(server)
    assert peer is not None
    assert peer.role is Role.CONTROL
    with pytest.raises(ssl.SSLCertVerificationError, match=r"[Hh]ostname"):
        shake(mutual(pair=node_pair("GPU_1")), trusting(CA.cert, pair=control_pair()), node_name("gpu-2"))


@pytest.mark.parametrize(
    ("pair", "why"),
    [
        (lambda: node_pair(by=OTHER), "unable to get local issuer certificate|self-signed"),
        (lambda: node_pair(now=NOW - 3 * DAY), "certificate has expired"),
        (lambda: node_pair(now=NOW + DAY), "certificate is not yet valid"),
    ],
    ids=["another authority", "expired", "not yet valid"],
)
def test_a_certificate_that_is_no_good_is_refused_with_its_reason(pair: Any, why: str) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match=why) as caught:
        shake(mutual(), trusting(CA.cert, pair=pair()), CONTROL_NAME)
    assert (tls.why_refused(caught.value) or "").startswith("the client's certificate: ")


def test_no_certificate_is_refused_where_one_is_asked_for() -> None:
    with pytest.raises(ssl.SSLError) as caught:
        shake(mutual(), trusting(CA.cert), CONTROL_NAME)
    assert tls.why_refused(caught.value) == "no client certificate"


def test_a_control_of_another_authority_is_not_believed() -> None:
    with pytest.raises(ssl.SSLCertVerificationError):
        shake(mutual(pair=control_pair(OTHER)), trusting(CA.cert, pair=node_pair()), CONTROL_NAME)


def odd(cn: list[str], uris: list[str], joined: tuple[str, ...] = ("1",)) -> tuple[bytes, bytes]:
    """A certificate of the right authority with a wrong content."""
    key = pki.make_key()
    attributes = [x509.NameAttribute(NameOID.COMMON_NAME, one) for one in cn]
    name = x509.Name([*attributes, *(x509.NameAttribute(NameOID.SERIAL_NUMBER, one) for one in joined)])
    made = pki._builder(name, key.public_key(), CA.cert.subject, CA.key.public_key(), NOW, DAY)
    if uris:
        alternatives = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri) for uri in uris])
        made = made.add_extension(alternatives, critical=False)
    return pki.pem_of([made.sign(CA.key, hashes.SHA256())]), pki.key_pem(key)


@pytest.mark.parametrize(
    ("cn", "uris"),
    [
        (["gpu-2"], ["spiffe://llorch/node/gpu-1"]),
        (["gpu-1"], []),
        ([], ["spiffe://llorch/node/gpu-1"]),
        (["gpu-1", "gpu-1"], ["spiffe://llorch/node/gpu-1"]),
        (["gpu-1"], ["spiffe://llorch/node/gpu-1", "spiffe://llorch/control/gpu-1"]),
        (["gpu-1"], ["spiffe://elsewhere/node/gpu-1"]),
        (["gpu-1"], ["spiffe://llorch/root/gpu-1"]),
        (["node/gpu-1"], ["spiffe://llorch/node/gpu-1"]),
        (["gpu-1"], ["https://llorch/node/gpu-1"]),
    ],
)
def test_a_certificate_whose_names_do_not_agree_stands_for_nobody(cn: list[str], uris: list[str]) -> None:
    server, _ = shake(mutual(), trusting(CA.cert, pair=odd(cn, uris)), CONTROL_NAME)
    with pytest.raises(ValueError, match="certificate"):
        tls.peer_of(server)


@pytest.mark.parametrize("joined", [(), ("soon",), ("-1",), ("1", "2")])
def test_a_nodes_certificate_says_when_it_joined(joined: tuple[str, ...]) -> None:
    pair = odd(["gpu-1"], ["spiffe://llorch/node/gpu-1"], joined)
    server, _ = shake(mutual(), trusting(CA.cert, pair=pair), CONTROL_NAME)
    with pytest.raises(ValueError, match="when its node joined"):
        tls.peer_of(server)


def test_where_no_certificate_was_asked_for_there_is_no_peer() -> None:
    server, _ = shake(tls.cluster_server_context(*control_pair()), trusting(CA.cert), JOIN_NAME)
    assert tls.peer_of(server) is None
    assert tls.peer_of(None) is None


# ---------------------------------------------------------------- rotation


def test_who_trusts_only_the_old_authority_trusts_the_new_ones_control() -> None:
    middle, newest = signer(), signer()
    chain = (pki.cross_sign(newest.cert, middle.cert, middle.key), pki.cross_sign(middle.cert, CA.cert, CA.key))
    server = mutual(newest.cert, middle.cert, CA.cert, pair=control_pair(newest, *chain))
    for trusted in (newest.cert, middle.cert, CA.cert):
        shake(server, trusting(trusted, pair=node_pair()), CONTROL_NAME)
    with pytest.raises(ssl.SSLCertVerificationError):
        shake(server, trusting(OTHER.cert, pair=node_pair()), CONTROL_NAME)


def test_what_is_issued_never_outlives_its_authority() -> None:
    brief = signer(life_s=DAY)
    key = pki.make_key()
    assert pki.ends(brief.issue_node(key.public_key(), "a", NOW, 100 * DAY)) <= pki.ends(brief.cert)


# ---------------------------------------------------------------- requests and files


def test_a_request_gives_its_key_and_nothing_else_counts() -> None:
    key = pki.make_key()
    assert pki.read_request(pki.make_request(key, "gpu-1")) == key.public_key()


def _csr(key: Any) -> bytes:
    made = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    return made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def _forged() -> bytes:
    """A request for a key that its sender does not hold."""
    good = x509.load_pem_x509_csr(_csr(pki.make_key())).public_bytes(serialization.Encoding.DER)
    other = (
        pki.make_key()
        .public_key()
        .public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    mine = (
        x509.load_der_x509_csr(good)
        .public_key()
        .public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    forged = x509.load_der_x509_csr(good.replace(mine, other))
    return forged.public_bytes(serialization.Encoding.PEM)


@pytest.mark.parametrize(
    "pem",
    [
        lambda: b"", lambda: b"-----BEGIN CERTIFICATE REQUEST-----\n", lambda: pki.pem_of([CA.cert]),
        lambda: b"x" * 20_000,
        lambda: _csr(rsa.generate_private_key(65537, 2048)), lambda: _csr(ec.generate_private_key(ec.SECP384R1())),
        _forged,
    ],
)  # fmt: skip
def test_a_request_that_proves_nothing_is_refused(pem: Any) -> None:
    with pytest.raises(LlorchError) as caught:
        pki.read_request(pem())
    assert caught.value.param == "csr"


def test_a_key_is_read_with_its_passphrase_alone() -> None:
    key = pki.make_key()
    locked = pki.key_pem(key, b"open sesame")
    assert pki.same_key(CA.cert, CA.key)
    assert not pki.same_key(CA.cert, key)
    assert pki.read_key(locked, b"open sesame").private_numbers() == key.private_numbers()
    for pem, passphrase in ((locked, None), (locked, b"wrong"), (pki.key_pem(key), b"needless"), (b"no key", None)):
        with pytest.raises(ValueError, match=r"key|encrypted"):
            pki.read_key(pem, passphrase)


def test_a_node_takes_only_what_is_its_own() -> None:
    key = pki.make_key()
    cert = CA.issue_node(key.public_key(), "gpu-1", NOW, DAY)
    pki.check_issued(cert, [OTHER.cert, CA.cert], key, "gpu-1")
    for bundle, own, node_id in (
        ([OTHER.cert], key, "gpu-1"),
        ([CA.cert], pki.make_key(), "gpu-1"),
        ([CA.cert], key, "gpu-2"),
    ):
        with pytest.raises(LlorchError):
            pki.check_issued(cert, bundle, own, node_id)


def test_bundles_have_one_name_whatever_their_order() -> None:
    assert pki.bundle_id([CA.cert, OTHER.cert]) == pki.bundle_id([OTHER.cert, CA.cert]) != pki.bundle_id([CA.cert])
    assert pki.matching([OTHER.cert, CA.cert], pki.sha256(CA.cert)) is CA.cert
    assert pki.matching([OTHER.cert], pki.sha256(CA.cert)) is None


def test_certificates_begin_before_now_for_clocks_that_are_behind() -> None:
    begins = datetime.datetime.fromtimestamp(pki.begins(CA.cert), datetime.UTC).timestamp()
    assert NOW - begins == pytest.approx(tls.BACKDATE_S, abs=1)


# ---------------------------------------------------------------- names


def hello(name: str | None) -> bytes:
    context = tls.cluster_client_context(b"", check=False)
    out = ssl.MemoryBIO()
    end = context.wrap_bio(ssl.MemoryBIO(), out, server_hostname=name)
    with pytest.raises(ssl.SSLWantReadError):
        end.do_handshake()
    return out.read()


@pytest.mark.parametrize(
    ("name", "heard"),
    [("llorch.control", "llorch.control"), ("Desk.Example", "Desk.Example"), ("10.0.0.1", None), (None, None)],
)
def test_the_name_is_read_out_of_a_greeting_once_it_is_whole(name: str | None, heard: str | None) -> None:
    reader, greeting = NameReader(), hello(name)
    assert reader.read(greeting) == (True, heard)
    assert reader.read(greeting[:200]) == (False, None)
    assert reader.read(greeting) == (True, heard)


@pytest.mark.parametrize(
    "garbage", [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x00\x05abcde", b"\xff" * 100, b"\x80\x2e\x01"]
)
def test_what_is_no_greeting_has_no_name(garbage: bytes) -> None:
    assert NameReader().read(garbage)[1] is None


def test_a_name_in_capitals_is_the_same_name() -> None:
    named, default = mutual(), tls.cluster_server_context(*control_pair())
    identities = Identities(default, {CONTROL_NAME: named})
    assert identities.choose("LLORCH.Control") is named
    assert identities.choose("desk.example") is identities.choose(None) is default
