"""A node's certificate: kept, renewed before its time, and at once when the cluster trusts another authority."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import aiohttp
import pytest

from llorch import pki, tls
from llorch.control.authority import Authority
from llorch.errors import ConfigError
from llorch.node.certificate import RENEW_AFTER, RENEW_JITTER, Holding, NodeCertificate
from llorch.node.credentials import CertificateCredentials
from llorch.node.join import Renewal, WrongAuthority, join
from tests.cluster import eventually
from tests.component.test_control_trust import Trusted, trusted

DAY = 86_400.0


def held(folder: Path, node_id: str = "a", life_s: float = DAY, now: float | None = None) -> tuple[Holding, Authority]:
    authority, _ = Authority.open(folder / "c", None, time.time())
    key = pki.make_key()
    issued = time.time() if now is None else now
    chain = authority.issue_node(pki.make_request(key, node_id), node_id, issued, life_s, take_over=True)
    return Holding.of(key, chain, authority.trust.bundle_pem, node_id), authority


def test_it_reads_back_as_it_was_kept_and_knows_the_token_it_came_with(tmp_path: Path) -> None:
    holding, _ = held(tmp_path)
    made = NodeCertificate.take(tmp_path / "n", "a", holding, "a token")
    path = tmp_path / "n" / "pki" / "node.pem"
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    again = NodeCertificate.load(tmp_path / "n", "a")
    assert again is not None
    assert again.holding.cert == made.holding.cert
    assert (again.came_with("a token"), again.came_with("another")) == (True, False)
    assert "a token" not in path.read_text()
    renewed, _ = held(tmp_path)
    again.replace(renewed)
    assert again.came_with("a token"), "a renewed one too"
    assert NodeCertificate.load(tmp_path / "elsewhere", "a") is None


def test_it_is_for_one_node_and_refused_where_others_may_read_it_or_it_is_broken(tmp_path: Path) -> None:
    holding, _ = held(tmp_path)
    NodeCertificate.take(tmp_path / "n", "a", holding, "")
    path = tmp_path / "n" / "pki" / "node.pem"
    with pytest.raises(ConfigError, match="is for a, not for b"):
        NodeCertificate.load(tmp_path / "n", "b")
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="others may read it"):
        NodeCertificate.load(tmp_path / "n", "a")
    path.chmod(0o600)
    other, _ = held(tmp_path / "other")
    for wrong in (b"", b"nothing of the kind", pki.key_pem(pki.make_key()) + pki.pem_of(holding.chain),
                  pki.key_pem(holding.key) + pki.pem_of((*holding.chain, *other.authorities))):  # fmt: skip
        path.write_bytes(wrong)
        with pytest.raises(ConfigError, match="can't be used"):
            NodeCertificate.load(tmp_path / "n", "a")


def test_it_is_renewed_after_two_thirds_of_its_life_and_not_all_nodes_at_once(tmp_path: Path) -> None:
    now = float(int(time.time()))
    holding, _ = held(tmp_path, life_s=30 * DAY, now=now)
    certificate = NodeCertificate.take(tmp_path / "n", "a", holding, "")
    early, due, late = (certificate.renew_at(random) - now for random in (0.0, 0.5, 1.0))
    assert due == pytest.approx(30 * DAY * RENEW_AFTER, abs=2)
    assert (due - early, late - due) == (pytest.approx(30 * DAY * RENEW_JITTER), pytest.approx(30 * DAY * RENEW_JITTER))
    assert not certificate.expired(now + 30 * DAY - 1)
    assert certificate.expired(now + 30 * DAY)


async def _joined(control: Trusted, session: aiohttp.ClientSession) -> NodeCertificate:
    url = control.url
    return await join(session, [url], await control.join_token(), "a", control.folder / "n")


async def test_it_is_renewed_in_time_with_a_new_key_and_the_file_follows(tmp_path: Path) -> None:
    async with trusted(tmp_path, node_cert_life=2.0) as control, aiohttp.ClientSession() as session:
        certificate = await _joined(control, session)
        first, heard = certificate.holding, asyncio.Event()
        renewal = asyncio.ensure_future(Renewal(certificate, session, [control.url], heard.set).run())
        try:
            async with asyncio.timeout(5):
                await heard.wait()
        finally:
            renewal.cancel()
        assert not time.time() >= pki.ends(first.cert), "before the first one had ended"
        assert certificate.holding.cert.serial_number != first.cert.serial_number
        assert not pki.same_key(first.cert, certificate.holding.key)
        kept = NodeCertificate.load(control.folder / "n", "a")
        assert kept is not None
        assert kept.holding.cert == certificate.holding.cert
        context = CertificateCredentials(certificate).context
        assert (await control.ask("GET", "/livez", context=context, name=tls.CONTROL_NAME))[0] == 200


async def test_another_authority_is_a_reason_to_renew_at_once_and_the_same_one_is_none(tmp_path: Path) -> None:
    async with trusted(tmp_path) as control, aiohttp.ClientSession() as session:
        certificate = await _joined(control, session)
        credentials = CertificateCredentials(certificate)
        credentials.heard(control.authority.trust.bundle_id)
        credentials.heard(None)
        credentials.heard(7)
        assert not certificate.wanted.is_set()
        control.authority.rotate(time.time())
        await control.control.access.step()
        renewal = asyncio.ensure_future(Renewal(certificate, session, [control.url], lambda: None).run())
        try:
            credentials.heard(control.authority.trust.bundle_id)
            newest = control.authority.trust.signer.cert
            await eventually(lambda: newest in certificate.holding.authorities, within_s=5)
        finally:
            renewal.cancel()
        assert certificate.holding.cert.issuer == newest.subject


async def test_what_can_not_be_renewed_is_told_and_asked_for_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llorch.node.join.AGAIN_AFTER_S", 0.0)
    monkeypatch.setattr("llorch.node.join.RENEW_RETRY", _At(0.01))
    async with trusted(tmp_path) as control, aiohttp.ClientSession() as session:
        certificate = await _joined(control, session)
        control.authority.revoke("a", time.time() + 1)
        certificate.wanted.set()
        renewal = asyncio.ensure_future(Renewal(certificate, session, [control.url], lambda: None).run())
        try:
            await eventually(lambda: caplog.text.count("certificate.unrenewed") >= 2, within_s=5)
        finally:
            renewal.cancel()
        assert "the certificate was revoked" in caplog.text
        assert "llorch token join" in caplog.text


class _At:
    def __init__(self, pause_s: float) -> None:
        self._pause_s = pause_s

    def delay_s(self, _failures: int, _random: float) -> float:
        return self._pause_s


async def test_a_token_for_another_cluster_is_not_sent(tmp_path: Path) -> None:
    async with trusted(tmp_path / "one") as one, trusted(tmp_path / "two") as two, aiohttp.ClientSession() as session:
        token = await one.join_token()
        with pytest.raises(WrongAuthority, match="the token was not sent"):
            await join(session, [two.url], token, "a", tmp_path / "n")
        assert (await join(session, [one.url], token, "a", tmp_path / "n")).node_id == "a"


async def test_a_join_that_is_refused_says_why_and_does_not_go_on_asking(tmp_path: Path) -> None:
    async with trusted(tmp_path) as control, aiohttp.ClientSession() as session:
        token = await control.join_token()
        await join(session, [control.url], token, "a", tmp_path / "n")
        with pytest.raises(ConfigError, match="does not let b join") as caught:
            await join(session, [control.url], token, "b", tmp_path / "m")
        assert "llorch token join" in (caught.value.hint or "")
        with pytest.raises(ConfigError, match="a has a certificate already") as caught:
            await join(session, [control.url], await control.join_token(), "a", tmp_path / "m")
        assert "--node a" in (caught.value.hint or "")
