"""`llorch token` and `llorch certs` on a control's own machine and elsewhere: what they refuse, and what they say."""

from __future__ import annotations

import json
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from llorch import pki, private
from llorch.control.authority import Authority
from llorch.control.place import write_place
from llorch.control.token_files import TokenFiles
from llorch.errors import Code
from llorch.tokens import ID_BYTES, SECRET_BYTES, write_token
from tests.component.command_line import CommandLine, Ran
from tests.component.scripted_control import ScriptedControl, answer, refusal, scripted

URL = "https://desk:8080"


@pytest.fixture
def llorch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> CommandLine:
    return CommandLine(monkeypatch, tmp_path)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The data directory of a control that serves with TLS, and has been started."""
    folder = tmp_path / "data"
    Authority.open(folder, None, time.time())
    write_place(str(folder), URL)
    return folder


@pytest.fixture
async def control() -> AsyncIterator[ScriptedControl]:
    async with scripted() as control:
        yield control


async def at(llorch: CommandLine, data: Path, *argv: str, stdin: bytes = b"") -> Ran:
    return await llorch(*argv, "--data-dir", str(data), stdin=stdin)


def made(*, join: bool = False) -> tuple[str, str]:
    """(id, text) of a token of this test's own."""
    return write_token(os.urandom(ID_BYTES + SECRET_BYTES), os.urandom(32) if join else None)


def with_node(data: Path, node_id: str = "gpu-1") -> Authority:
    authority = Authority.open(data, None, time.time())[0]
    authority.issue_node(pki.make_request(pki.make_key(), node_id), node_id, time.time(), 86_400)
    return authority


# ---------------------------------------------------------------- tokens


@pytest.mark.parametrize("join", [False, True])
@pytest.mark.parametrize("around", ["{}", " {}\n", "LLORCH_JOIN_TOKEN={} llorch node", "Bearer {}", '"{}",'])
async def test_a_token_that_is_pasted_to_be_revoked_goes_nowhere_but_its_id(
    llorch: CommandLine, control: ScriptedControl, join: bool, around: str
) -> None:
    token_id, text = made(join=join)
    control.on(f"DELETE /v2/tokens/{token_id}", answer({"revoked": [token_id]}))
    ran = await llorch("token", "revoke", around.format(text), "--url", control.url, "-o", "name")
    assert (ran.code, ran.out) == (0, f"{token_id}\n")
    assert control.requests[-1].path == f"/v2/tokens/{token_id}"
    assert text[-20:] not in ran.err


async def test_a_part_of_a_token_revokes_nothing_and_says_so(llorch: CommandLine, control: ScriptedControl) -> None:
    _, text = made()
    ran = await llorch("token", "revoke", text[:-3], "--url", control.url)
    assert (ran.code, control.requests) == (2, [])
    assert "cut off" in ran.err
    assert text[14:30] not in ran.err


async def test_a_pasted_token_is_revoked_in_the_data_directory(llorch: CommandLine, data: Path) -> None:
    text = (await at(llorch, data, "token", "new")).out.strip()
    assert (await at(llorch, data, "token", "revoke", text)).code == 0
    [row] = json.loads((await at(llorch, data, "token", "ls", "--all", "--json")).out)
    assert row["state"] == "revoked"


@pytest.mark.parametrize("argv", [("new",), ("join",), ("join", "--at", URL), ("ls",), ("revoke", "me")])
async def test_nothing_is_made_in_a_directory_where_no_control_has_been(
    llorch: CommandLine, tmp_path: Path, argv: tuple[str, ...]
) -> None:
    typo = tmp_path / "dta"
    ran = await at(llorch, typo, "token", *argv)
    assert (ran.code, ran.out) == (4, "")
    assert "no control has ever been in" in ran.err
    assert "--data-dir" in ran.err
    assert not typo.exists()


@pytest.mark.parametrize("name", ["control.json", "nodes.json", "tokens.json"])
async def test_a_control_that_serves_without_tls_has_tokens_and_nobody_joins_it(
    llorch: CommandLine, tmp_path: Path, name: str
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    private.write(data / name, b'{"tokens": []}')
    ran = await at(llorch, data, "token", "new")
    assert (ran.code, ran.out[:5]) == (0, "llt1_")
    ran = await at(llorch, data, "token", "join", "--at", URL)
    assert (ran.code, ran.out) == (1, "")
    assert "no authority" in ran.err
    assert not Authority.exists(data), "it is made by a control alone"


async def test_tokens_are_made_without_the_passphrase_of_the_authority(llorch: CommandLine, tmp_path: Path) -> None:
    data = tmp_path / "data"
    authority, _ = Authority.open(data, "a-passphrase", time.time())
    assert (await at(llorch, data, "token", "new")).code == 0
    ran = await at(llorch, data, "token", "join", "--at", URL)
    assert (ran.code, f"llj1_{pki.pin_of(authority.trust.signer.cert)}." in ran.out) == (0, True)


async def test_a_refusal_says_that_the_controls_own_machine_needs_no_token(
    llorch: CommandLine, control: ScriptedControl, data: Path
) -> None:
    control.on("POST /v2/tokens", refusal(Code.FORBIDDEN, "this token lacks the scope admin"))
    await llorch("context", "add", "here", "--url", control.url)
    ran = await llorch("token", "new")
    assert (ran.code, "--data-dir DIR" in ran.err) == (3, True)
    llorch.env(LLORCH_DATA_DIR=str(data))
    assert f"--data-dir {data}" in (await llorch("token", "new")).err
    llorch.env(LLORCH_NODE_CERT_LIFE="nonsense")  # a control could not start here: no matter of who asks another
    ran = await llorch("token", "new")
    assert (ran.code, "--data-dir DIR" in ran.err) == (3, True)


async def test_every_new_token_says_when_it_ends(llorch: CommandLine, data: Path) -> None:
    for argv, told in (
        (("new", "--expires", "90"), "it expires in 90s\n"),
        (("new", "--expires", "90d"), "it expires in 90d\n"),
        (("new",), "it does not expire"),
        (("join", "--ttl", "90"), "it expires in 90s\n"),
        (("join", "--uses", "3"), "good 3 times; it expires in 1h\n"),
    ):
        ran = await at(llorch, data, "token", *argv)
        assert (ran.code, told in ran.err) == (0, True), ran


@pytest.mark.parametrize(
    ("argv", "flag"),
    [
        (("new", "--expires", "soon"), "--expires"),
        (("new", "--models", "../x"), "--models"),
        (("new", "--scope", "all"), "--scope"),
        (("new", "--name", "a b"), "--name"),
        (("new", "--name", ""), "--name"),
        (("join", "--ttl", "soon"), "--ttl"),
        (("join", "--uses", "0"), "--uses"),
        (("join", "--node", "bad id"), "--node"),
        (("join", "--at", "desk"), "--at"),
        (("join", "--at", "ftp://x"), "--at"),
        (("join", "--at", "http://desk:8080"), "--at"),
    ],
)
async def test_what_no_token_can_be_is_told_in_words_with_its_flag(
    llorch: CommandLine, data: Path, argv: tuple[str, ...], flag: str
) -> None:
    ran = await at(llorch, data, "token", *argv)
    assert (ran.code, ran.out) == (2, "")
    assert flag in ran.err.partition("\n")[0]
    for word in ("`", "String should", "_s:", "--ttl" if flag == "--expires" else "--expires"):
        assert word not in ran.err.partition("\n")[0]
    assert TokenFiles(data).load() is False


# ---------------------------------------------------------------- certificates


async def test_the_passphrase_of_the_authority_is_given_as_its_hint_says(llorch: CommandLine, tmp_path: Path) -> None:
    data, passphrase = tmp_path / "data", tmp_path / "passphrase"
    passphrase.write_text("a-passphrase")
    Authority.open(data, "a-passphrase", time.time())
    ran = await at(llorch, data, "certs", "status")
    assert (ran.code, "--ca-passphrase-file" in ran.err) == (2, True)
    for argv in (("status",), ("issue", "gpu-1", "--out", "n.pem"), ("revoke", "gpu-1"), ("rotate",), ("export", "f")):
        ran = await at(llorch, data, "certs", *argv, "--ca-passphrase-file", str(passphrase))
        assert ran.code == 0, ran
    llorch.env(LLORCH_CA_PASSPHRASE_FILE=str(passphrase))
    assert (await at(llorch, data, "certs", "status")).code == 0


async def test_a_node_that_is_not_there_is_not_revoked(llorch: CommandLine, data: Path) -> None:
    authority = with_node(data)
    ran = await at(llorch, data, "certs", "revoke", "gpu-7")
    assert (ran.code, "no node has been issued a certificate" in ran.err) == (4, True)
    authority.refresh()
    assert authority.trust.revoked == {}
    assert (await at(llorch, data, "certs", "revoke", "gpu-1")).code == 0
    ran = await at(llorch, data, "certs", "revoke", "gpu-1")
    assert (ran.code, "revoked already" in ran.err) == (0, True)
    assert (await at(llorch, data, "certs", "revoke", "gpu-7", "--force")).code == 0
    authority.refresh()
    assert set(authority.trust.revoked) == {"gpu-1", "gpu-7"}


async def test_a_rotation_says_what_it_costs_and_how_many_are_trusted(llorch: CommandLine, data: Path) -> None:
    ran = await at(llorch, data, "certs", "rotate", "--finish")
    assert (ran.code, "nothing to finish" in ran.err) == (0, True)
    ran = await at(llorch, data, "certs", "rotate")
    assert "1 older is still trusted" in ran.err
    ran = await at(llorch, data, "certs", "rotate")
    assert "2 older are still trusted" in ran.err
    pin = Authority.pin_in(data)
    assert f"--ca-pin {pin}" in ran.err
    ran = await at(llorch, data, "certs", "rotate", "--finish")
    assert ran.code == 0
    assert ran.err.startswith("warning: clients that pinned an older authority are shut out")
    assert f"--ca-pin {pin}" in ran.err
    assert len(Authority.open(data, None, time.time())[0].trust.bundle) == 1


async def test_an_export_that_others_may_read_is_not_imported(llorch: CommandLine, data: Path, tmp_path: Path) -> None:
    bundle, second = llorch.work / "bundle", tmp_path / "second"
    assert (await at(llorch, data, "certs", "export", str(bundle))).code == 0
    bundle.chmod(0o640)
    ran = await at(llorch, second, "certs", "import", str(bundle))
    assert (ran.code, "chmod 600" in ran.err, second.exists()) == (2, True, False)
    assert (await at(llorch, second, "certs", "import", "-", stdin=bundle.read_bytes())).code == 0
    bundle.chmod(0o600)
    assert (await at(llorch, second, "certs", "import", str(bundle))).code == 0
    assert Authority.pin_in(second) == Authority.pin_in(data)
    assert (await at(llorch, second, "certs", "import", "nothing")).code == 4
