"""The authority on disk: what two controls of one cluster tell each other, and what no import may undo."""

from __future__ import annotations

from pathlib import Path

import pytest

from llorch import pki, private
from llorch.auth import Principal
from llorch.control.authority import Authority
from llorch.errors import Code, ConfigError, LlorchError

NOW = 1_800_000_000.0
DAY = 86_400.0


def made(folder: Path, now: float = NOW) -> Authority:
    return Authority.open(folder, None, now)[0]


def beside(authority: Authority, folder: Path) -> Authority:
    """Another control of the same cluster."""
    Authority.take_over(folder, authority.export(), None, force=False)
    return made(folder)


def csr(node_id: str = "a") -> bytes:
    return pki.make_request(pki.make_key(), node_id)


def holder(authority: Authority, node_id: str = "a") -> Principal:
    """Who shows the newest certificate that was issued here."""
    held = authority.trust.issued[node_id]
    issuer = next(pki.common_name(cert) for cert in authority.trust.bundle if pki.pin_of(cert) == held.authority)
    return Principal(
        f"node:{node_id}", frozenset(), node_id=node_id, joined=held.joined, expires=held.ends, issuer=issuer
    )


def refusal(authority: Authority, who: Principal, now: float) -> str | None:
    assert who.joined is not None and who.expires is not None
    return authority.trust.refusal(who.node_id or "", who.joined, who.expires, now, who.issuer)


def test_what_was_revoked_at_one_control_is_not_made_good_by_a_renewal_at_another(tmp_path: Path) -> None:
    one = made(tmp_path / "one")
    one.issue_node(csr(), "a", NOW, DAY)
    other = beside(one, tmp_path / "other")
    thief = holder(one)
    one.revoke("a", NOW + 10)
    other.issue_node(csr(), "a", NOW + 20, DAY, renews=thief)
    renewed = holder(other)
    assert refusal(one, renewed, NOW + 30) == "the certificate was revoked"
    Authority.take_over(tmp_path / "other", one.export(), None, force=False)
    other.refresh()
    assert refusal(other, renewed, NOW + 30) == "the certificate was revoked"
    with pytest.raises(LlorchError, match="was revoked"):
        other.issue_node(csr(), "a", NOW + 30, DAY, renews=renewed)


def test_a_node_that_was_revoked_is_good_again_once_it_has_joined_again(tmp_path: Path) -> None:
    authority = made(tmp_path)
    authority.issue_node(csr(), "a", NOW, DAY)
    authority.revoke("a", NOW + 0.9)
    authority.issue_node(csr(), "a", NOW + 0.95, DAY)  # in the same second
    assert refusal(authority, holder(authority), NOW + 2) is None
    authority.issue_node(csr(), "a", NOW + 50, DAY, renews=holder(authority))
    assert refusal(authority, holder(authority), NOW + 60) is None


def test_the_key_and_the_token_that_a_node_came_with_bring_it_back_once_and_not_after_it_was_revoked(
    tmp_path: Path,
) -> None:
    authority, key, used = made(tmp_path), pki.make_key(), []
    request = pki.make_request(key, "a")
    for _ in range(3):
        authority.issue_node(request, "a", NOW, DAY, token="t", use=lambda: used.append(1))
    assert len(used) == 1
    stale = made(tmp_path)
    authority.revoke("a", NOW + 1)
    assert stale.is_repeated(request, "a", "t"), "what it read last says so"

    def used_up() -> None:
        raise LlorchError(Code.UNAUTHENTICATED, "no valid token was presented")

    with pytest.raises(LlorchError) as caught:
        stale.issue_node(request, "a", NOW + 2, DAY, token="t", use=used_up)
    assert caught.value.code is Code.UNAUTHENTICATED


def test_an_import_undoes_no_revocation_and_loses_no_certificate(tmp_path: Path) -> None:
    one = made(tmp_path / "one")
    one.issue_node(csr(), "a", NOW, DAY)
    one.issue_node(csr("b"), "b", NOW, DAY)
    before = one.export()
    other = beside(one, tmp_path / "other")
    other.revoke("b", NOW + 5)
    other.issue_node(csr("c"), "c", NOW + 6, DAY)
    Authority.take_over(tmp_path / "other", before, None, force=False)
    other.refresh()
    assert other.trust.revoked == {"b": NOW + 5}
    assert set(other.trust.issued) == {"a", "c"}


def test_an_older_export_does_not_bring_an_older_authority_back_and_a_newer_one_does(tmp_path: Path) -> None:
    one = made(tmp_path / "one")
    other = beside(one, tmp_path / "other")
    old = one.export()
    one.rotate(NOW + 1)
    newest = one.trust.signer.cert
    assert Authority.take_over(tmp_path / "one", old, None, force=False).startswith("no authority")
    one.refresh()
    assert one.trust.signer.cert == newest
    assert Authority.take_over(tmp_path / "other", one.export(), None, force=False) == "its authority"
    other.refresh()
    assert other.trust.bundle == one.trust.bundle
    one.finish(NOW + 2)
    with pytest.raises(LlorchError, match="another authority"):
        Authority.take_over(tmp_path / "one", old, None, force=False)


@pytest.mark.parametrize("broken", ["authority.pem", "issued.json"])
def test_an_export_that_can_not_be_read_changes_nothing(tmp_path: Path, broken: str) -> None:
    one = made(tmp_path / "one")
    files = one.export() | {broken: "nothing of the kind"}
    before = {path.name: path.read_bytes() for path in (tmp_path / "one" / "pki").iterdir()}
    with pytest.raises(ConfigError, match="the export"):
        Authority.take_over(tmp_path / "one", files, None, force=True)
    with pytest.raises(ConfigError):
        Authority.take_over(tmp_path / "one", {}, None, force=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "one" / "pki").iterdir()} == before


def test_nobody_becomes_at_one_control_a_node_that_the_other_let_in(tmp_path: Path) -> None:
    one = made(tmp_path / "one")
    other = beside(one, tmp_path / "other")
    one.issue_node(csr(), "a", NOW, DAY)
    other.saw({"a": one.trust.issued["a"]})  # as it came to the other, too
    with pytest.raises(LlorchError) as caught:
        other.issue_node(csr(), "a", NOW + 1, DAY)
    assert caught.value.code is Code.NODE_ID_CONFLICT


def test_a_lost_list_of_revocations_is_no_list_without_any(tmp_path: Path) -> None:
    made(tmp_path)
    (tmp_path / "pki" / "issued.json").unlink()
    with pytest.raises(ConfigError, match="who was revoked"):
        made(tmp_path)


def test_a_passphrase_is_needed_to_read_and_to_take_over(tmp_path: Path) -> None:
    locked, _ = Authority.open(tmp_path / "one", "open-sesame", NOW)
    assert "ENCRYPTED" in locked.export()["authority.pem"]
    for wrong in (None, "another"):
        with pytest.raises(ConfigError, match="can't be used"):
            Authority.open(tmp_path / "one", wrong, NOW)
        with pytest.raises(ConfigError):
            Authority.take_over(tmp_path / "two", locked.export(), wrong, force=False)
    assert not (tmp_path / "two" / "pki" / "authority.pem").exists()
    Authority.take_over(tmp_path / "two", locked.export(), "open-sesame", force=False)


def test_a_command_run_as_root_leaves_a_file_to_the_owner_of_its_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[tuple[int, int]] = []
    monkeypatch.setattr("llorch.private.os.geteuid", lambda: 0)
    monkeypatch.setattr("llorch.private.os.fchown", lambda _fd, uid, gid: given.append((uid, gid)))
    private.write(tmp_path / "file", b"x")
    owner = tmp_path.stat()
    assert given == [(owner.st_uid, owner.st_gid)]


def test_controls_of_one_cluster_have_one_ticket_key_and_others_another(tmp_path: Path) -> None:
    one = made(tmp_path / "one")
    other, stranger = beside(one, tmp_path / "other"), made(tmp_path / "stranger")
    assert one.trust.ticket_key == other.trust.ticket_key != stranger.trust.ticket_key
    assert len(one.trust.ticket_key) == 64
    assert one.trust.ticket_key not in one.export()["authority.pem"]
