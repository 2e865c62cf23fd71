"""`llorch doctor control` and `llorch doctor node`: on a data directory, on this machine, and beside a real control."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import stat
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from llorch import pki, private, tls
from llorch.cli import doctor_control_findings, doctor_engines, doctor_machine
from llorch.cli.doctor_findings import Use
from llorch.cli.doctor_node_findings import Driver, Engines
from llorch.config import NodeSettings
from llorch.config_kinds import HostPort
from llorch.config_pools import PoolSpec
from llorch.control.authority import Authority
from llorch.control.place import write_place
from llorch.control.token_files import TokenFiles
from llorch.node.certificate import Holding, NodeCertificate
from llorch.tokens import Wish
from tests.cluster import alive, eventually
from tests.component.command_line import CommandLine, Ran
from tests.component.control_harness import TOKENS, a_control
from tests.component.test_control_trust import Trusted, trusted

DAY = 86_400.0
ENGINES = (Driver(), Engines(("xllamacpp 1",)))


@pytest.fixture
def llorch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> CommandLine:
    return CommandLine(monkeypatch, tmp_path)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The data directory of a control that is not running: with an authority and a token."""
    path = tmp_path / "data"
    Authority.open(path, None, time.time())
    TokenFiles(path).new(Wish(name="ci"), time.time())
    return path


def told(ran: Ran) -> dict[str, dict[str, str]]:
    """The findings by check: the worst one of each."""
    found: dict[str, dict[str, str]] = {}
    for row in json.loads(ran.out):
        rank = ("ok", "warn", "fail").index
        if row["check"] not in found or rank(row["state"]) > rank(found[row["check"]]["state"]):
            found[row["check"]] = row
    return found


def bad(found: dict[str, dict[str, str]]) -> dict[str, str]:
    return {check: row["state"] for check, row in found.items() if row["state"] != "ok"}


async def doctor(llorch: CommandLine, *argv: str) -> tuple[int, dict[str, dict[str, str]]]:
    ran = await llorch("doctor", argv[0], "--json", *argv[1:])
    assert ran.out, ran.err
    return ran.code, told(ran)


def picture(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Every file below, as it is."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path): (path.stat().st_mode, path.stat().st_mtime_ns, path.read_bytes()) for path in files}


# ---------------------------------------------------------------- a control


async def at_control(llorch: CommandLine, data: Path, *more: str) -> tuple[int, dict[str, dict[str, str]]]:
    return await doctor(llorch, "control", "--data-dir", str(data), "--tls", "on", "--bind", "127.0.0.1:0", *more)


async def test_a_directory_that_is_as_it_should_be_is_ok_and_left_as_it_was(llorch: CommandLine, data: Path) -> None:
    before = picture(data)
    code, found = await at_control(llorch, data)
    assert (code, bad(found)) == (0, {})
    checks = "settings data-dir disk secrets authority nodes clock tokens tls port running address files"
    assert set(found) == set(checks.split())
    assert picture(data) == before


async def test_a_control_that_was_never_started_needs_a_token_and_nothing_is_made(
    llorch: CommandLine, tmp_path: Path
) -> None:
    code, found = await at_control(llorch, tmp_path / "new" / "data")
    assert (code, bad(found)) == (0, {"tokens": "warn"})
    assert "llorch token new" in found["tokens"]["mend"]
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("name", "mode", "checks"),
    [
        ("tokens.json", 0o644, {"secrets", "tokens"}),
        ("pki/authority.pem", 0o640, {"secrets", "authority"}),
        ("", 0o777, {"data-dir"}),
    ],
)
async def test_modes_that_were_opened_are_named_with_their_chmod(
    llorch: CommandLine, data: Path, name: str, mode: int, checks: set[str]
) -> None:
    path = data / name
    path.chmod(mode)
    code, found = await at_control(llorch, data)
    assert (code, set(bad(found))) == (1, checks)
    for check in checks:
        assert found[check]["mend"] == f"chmod {'600' if name else '700'} {path}"
    assert stat.S_IMODE(path.stat().st_mode) == mode, "it mends nothing by itself"


async def test_an_authority_that_does_not_open_is_named(llorch: CommandLine, tmp_path: Path, data: Path) -> None:
    sealed = tmp_path / "sealed"
    Authority.open(sealed, "of-the-test", time.time())
    llorch.env(LLORCH_CA_PASSPHRASE="a-wrong-one")
    code, found = await at_control(llorch, sealed)
    assert (code, found["authority"]["state"]) == (1, "fail")
    assert "a-wrong-one" not in json.dumps(found)
    llorch.env(LLORCH_CA_PASSPHRASE="of-the-test")
    assert (await at_control(llorch, sealed))[1]["authority"]["state"] == "ok"
    (data / "pki" / "authority.pem").write_bytes(b"x")
    assert (await at_control(llorch, data))[1]["authority"]["state"] == "fail"


async def test_nodes_that_are_late_old_authorities_and_a_clock_that_went_back(llorch: CommandLine, data: Path) -> None:
    authority, _ = Authority.open(data, None, time.time())
    csr = pki.make_request(pki.make_key(), "gpu-1")
    authority.issue_node(csr, "gpu-1", time.time() - 28 * DAY, 30 * DAY)
    authority.rotate(time.time())
    code, found = await at_control(llorch, data)
    assert (code, bad(found)) == (0, {"nodes": "warn"})
    assert "gpu-1 expires in 48 hours" in found["nodes"]["found"]
    authority.issue_node(csr, "gpu-1", time.time() + 3_600, 30 * DAY, take_over=True)
    authority.saw({"gpu-1": authority.trust.issued["gpu-1"]})
    code, found = await at_control(llorch, data)
    assert (code, bad(found)) == (1, {"authority": "warn", "clock": "fail"})
    assert "--finish" in found["authority"]["mend"]


@pytest.mark.parametrize(
    ("since_days", "life_days", "state"), [(1, 90, "ok"), (85, 90, "warn"), (91, 90, "fail"), (-1, 90, "fail")]
)
async def test_the_certificate_of_the_files_is_looked_at(
    llorch: CommandLine, data: Path, since_days: float, life_days: float, state: str
) -> None:
    signer, key = Authority.open(data, None, time.time())[0].trust.signer, pki.make_key()
    since = time.time() - since_days * DAY
    cert, key_file = data / "cert.pem", data / "key.pem"
    own = pki.Signer(pki.make_authority(signer.key, since - DAY), signer.key)
    cert.write_bytes(
        pki.pem_of([own.issue(key.public_key(), tls.Role.CONTROL, "desk", ["desk"], since, life_days * DAY)])
    )
    private.write(key_file, pki.key_pem(key))
    code, found = await at_control(llorch, data, "--tls-cert", str(cert), "--tls-key", str(key_file))
    assert (code, found["tls"]["state"]) == (state == "fail", state)
    private.write(key_file, pki.key_pem(pki.make_key()))
    key_file.chmod(0o644)
    code, found = await at_control(llorch, data, "--tls-cert", str(cert), "--tls-key", str(key_file))
    assert (code, found["tls"]["state"], found["secrets"]["state"]) == (1, "fail", "warn")
    assert "matching" in found["tls"]["found"]


async def test_a_port_that_somebody_else_has_is_told_with_who_it_is(llorch: CommandLine, data: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        code, found = await at_control(llorch, data, "--bind", f"127.0.0.1:{port}")
        assert (code, bad(found)) == (1, {"port": "fail"})
        assert f"pid {os.getpid()}" in found["port"]["found"]
        write_place(str(data), f"http://127.0.0.1:{port}")  # and it says nothing
        other.close()
        code, found = await at_control(llorch, data, "--bind", f"127.0.0.1:{port}")
        assert (code, bad(found)) == (0, {"running": "warn"})


async def test_this_control_is_known_by_its_authority_and_another_is_not(
    llorch: CommandLine, data: Path, tmp_path: Path
) -> None:
    async with trusted(tmp_path) as control:
        own = Path(control.control.access.settings.data_dir)
        bind = ("--bind", f"127.0.0.1:{control.port}")
        code, found = await doctor(llorch, "control", "--data-dir", str(own), "--tls", "on", *bind)
        assert (found["port"]["state"], found["running"]["state"]) == ("ok", "ok"), found
        assert f"pid {os.getpid()}" in found["port"]["found"]
        write_place(str(data), control.url)
        code, found = await at_control(llorch, data, *bind)
    assert (code, bad(found)) == (1, {"port": "fail", "running": "fail"})
    assert "not the control of this directory" in found["running"]["found"]


async def test_off_mesh_and_what_joiners_are_told(llorch: CommandLine, data: Path) -> None:
    _, found = await doctor(llorch, "control", "--data-dir", str(data), "--tls", "off-mesh", "--bind", "127.0.0.1:0")
    assert (found["tls"]["state"], "--tls off-mesh" in found["tls"]["mend"]) == ("warn", True)
    write_place(str(data), "https://192.0.2.1:8080")  # an address that no machine has
    _, found = await doctor(llorch, "control", "--data-dir", str(data), "--bind", "127.0.0.1:0")
    assert (found["address"]["state"], "--at" in found["address"]["mend"]) == ("warn", True)


# ---------------------------------------------------------------- a node


def joined(control: Trusted, folder: Path, node_id: str = "gpu-1", **more: Any) -> Path:
    """The data directory of a node with a certificate of this control's cluster."""
    key = pki.make_key()
    chain = control.authority.issue_node(
        pki.make_request(key, node_id), node_id, more.pop("issued", time.time()), more.pop("life_s", 30 * DAY),
        take_over=True,
    )  # fmt: skip
    NodeCertificate.take(folder, node_id, Holding.of(key, chain, control.authority.trust.bundle_pem, node_id), "x")
    return folder


async def at_node(
    llorch: CommandLine, url: str, data: Path, *more: str, node_id: str = "gpu-1"
) -> tuple[int, dict[str, dict[str, str]]]:
    words = ("--join", url, "--data-dir", str(data), "--node-id", node_id, "--bind", "127.0.0.1:0", *more)
    return await doctor(llorch, "node", *words)


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the process that asks would answer: it takes a second."""

    async def ask(_: NodeSettings) -> tuple[Driver, Engines]:
        return ENGINES

    monkeypatch.setattr(doctor_engines, "ask", ask)


async def test_a_member_is_accepted_and_the_control_remembers_nothing_of_it(
    llorch: CommandLine, tmp_path: Path, engines: None, caplog: pytest.LogCaptureFixture
) -> None:
    async with trusted(tmp_path) as control:
        data = joined(control, tmp_path / "n")
        before = picture(data)
        code, found = await at_node(llorch, control.url, data)
        assert (code, bad(found)) == (0, {})
        checks = "settings data-dir disk secrets member dns tcp tls http ready clock accepted port address"
        assert set(found) == {*checks.split(), "driver", "engines", "inotify", "files"}
        assert "for the cluster's authority" in found["tls"]["found"]
        assert control.control.registry.nodes == {}
        assert picture(data) == before
        assert "auth.failed" not in caplog.text


async def test_a_revoked_one_is_refused_with_the_reason_and_the_command_that_mends_it(
    llorch: CommandLine, tmp_path: Path, engines: None
) -> None:
    async with trusted(tmp_path) as control:
        data = joined(control, tmp_path / "n")
        control.authority.revoke("gpu-1", time.time() + 1)
        code, found = await at_node(llorch, control.url, data)
    assert (code, bad(found)) == (1, {"accepted": "fail"})
    assert "the certificate was revoked" in found["accepted"]["found"]
    assert "llorch token join --node gpu-1" in found["accepted"]["mend"]


async def test_an_expired_one_another_nodes_and_one_that_lies_open_are_named(
    llorch: CommandLine, tmp_path: Path, engines: None
) -> None:
    async with trusted(tmp_path) as control:
        late = joined(control, tmp_path / "late", issued=time.time() - 29 * DAY)
        code, found = await at_node(llorch, control.url, late)
        assert (code, bad(found)) == (0, {"member": "warn"})
        over = joined(control, tmp_path / "over", issued=time.time() - 31 * DAY)
        code, found = await at_node(llorch, control.url, over)
        assert (code, found["member"]["state"]) == (1, "fail")
        assert "expired" in found["member"]["found"]
        data = joined(control, tmp_path / "n")
        code, found = await at_node(llorch, control.url, data, node_id="gpu-2")
        assert "is for gpu-1, not for gpu-2" in found["member"]["found"]
        (data / "pki" / "node.pem").chmod(0o644)
        code, found = await at_node(llorch, control.url, data)
        assert (code, bad(found)) == (1, {"member": "fail", "secrets": "fail"})
        assert found["member"]["mend"] == f"chmod 600 {data}/pki/node.pem"


async def test_a_join_token_is_compared_and_stays_here(llorch: CommandLine, tmp_path: Path, engines: None) -> None:
    new = tmp_path / "new"
    async with trusted(tmp_path) as control, trusted(tmp_path / "other") as other:
        token = await control.join_token()
        llorch.env(LLORCH_JOIN_TOKEN=token)
        code, found = await at_node(llorch, control.url, new)
        assert (code, bad(found)) == (0, {})
        assert "the authority that the join token names" in found["tls"]["found"]
        code, found = await at_node(llorch, other.url, new)
        assert (code, bad(found)) == (1, {"tls": "fail"})
        assert "the token was not sent" in found["tls"]["found"]
        assert token not in json.dumps(found)
        [record] = [one for one in control.control.access.files.tokens.records if one.uses_left is not None]
        assert record.uses_left == 1
        assert control.control.access.files.last_used == {}
        llorch.env(LLORCH_JOIN_TOKEN=token[:-2])
        code, found = await at_node(llorch, control.url, new)
        assert (code, "not whole" in found["member"]["found"] or "no join token" in found["member"]["found"]) == (
            1,
            True,
        )
    assert not new.exists()


async def test_static_tokens_on_loopback(llorch: CommandLine, tmp_path: Path, engines: None) -> None:
    async with a_control() as control:
        llorch.env(LLORCH_SERVICE_TOKEN=TOKENS["service"], LLORCH_NODE_TOKEN=TOKENS["node"])
        code, found = await at_node(llorch, control.server.url, tmp_path)
        assert (code, bad(found)) in ((0, {}), (0, {"data-dir": "warn"}))
        llorch.env(LLORCH_NODE_TOKEN=TOKENS["alice"])
        code, found = await at_node(llorch, control.server.url, tmp_path)
        assert (code, found["accepted"]["state"]) == (1, "fail")
        assert TOKENS["alice"] not in json.dumps(found)


async def test_one_with_nothing_to_show_and_one_whose_address_leads_elsewhere(
    llorch: CommandLine, tmp_path: Path, engines: None
) -> None:
    async with trusted(tmp_path) as control:
        code, found = await at_node(llorch, control.url, tmp_path / "n", "--address", "https://192.0.2.1:9200")
        assert (code, bad(found)) == (1, {"member": "fail", "address": "warn"})
        code, found = await at_node(llorch, control.url, tmp_path / "n", "--address", control.url)
        assert "answered by a control" in found["address"]["found"]


# ---------------------------------------------------------------- this machine


@pytest.mark.slow
async def test_engines_are_asked_in_a_process_that_dies_with_its_children_when_its_time_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor_engines, "LIMIT_S", 2.0)
    program, pid_file = tmp_path / "llama-server", tmp_path / "pid"
    program.write_text(f"#!/bin/sh\necho $$ > {pid_file}\nexec sleep 60\n")
    program.chmod(0o755)
    settings = NodeSettings(llama_server=str(program), service_token="x" * 32, join=("http://127.0.0.1:1",))
    started = time.monotonic()
    assert await doctor_engines.ask(settings) is None
    assert time.monotonic() - started < 8
    assert pid_file.exists(), "it was asked, and hung"
    await eventually(lambda: not alive(int(pid_file.read_text())), within_s=5)


def test_a_pool_that_could_not_start_says_why_and_others_what_they_would_run() -> None:
    pools = (
        PoolSpec(id="a", engine="simulated", model="m"),
        PoolSpec(id="b", engine="llamacpp", model="demo", gpus=(7,)),
    )
    found = doctor_engines.look_at_engines(NodeSettings(llama_server="/nonexistent", pools=pools), 0)
    assert found.pools == ("a: m on simulated",)
    assert (found.why or "").startswith("pool b: there is no GPU 7")
    assert found.hint == "gpus: [] for the CPU"


def test_what_a_node_is_asked_with_holds_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[bytes] = []

    async def refuse(*_: object, **__: object) -> None:
        raise OSError("no process here")

    def keep(value: object) -> bytes:
        sent.append(repr(value).encode() + str([getattr(value, name) for name in value.__dataclass_fields__]).encode())  # type: ignore[attr-defined]
        return b""

    class Child:
        pid = (1 << 22) + 1  # more than there can be

        async def communicate(self, _: bytes) -> tuple[bytes, bytes]:
            raise OSError("gone")

        async def wait(self) -> int:
            return 0

    async def start(*_: object, **__: object) -> Child:
        return Child()

    monkeypatch.setattr(doctor_engines.asyncio, "create_subprocess_exec", start)
    monkeypatch.setattr(doctor_engines.pickle, "dumps", keep)
    secret = "s" * 40
    settings = NodeSettings(service_token=secret, node_token=secret, join_token=secret, join=("http://127.0.0.1:1",))
    assert asyncio.run(doctor_engines.ask(settings)) is None
    assert sent
    assert secret.encode() not in sent[0]


def test_a_port_is_free_taken_or_impossible() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    assert doctor_machine.look_at_port(HostPort("127.0.0.1", port)).use is Use.FREE
    assert doctor_machine.look_at_port(HostPort("127.0.0.1", 0)).use is Use.ANY
    assert doctor_machine.look_at_port(HostPort("192.0.2.1", port)).use is Use.IMPOSSIBLE
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        facts = doctor_machine.look_at_port(HostPort("0.0.0.0", port))
    assert (facts.use, str(os.getpid()) in facts.by) == (Use.TAKEN, True)


async def test_a_directory_that_hangs_is_told_and_the_rest_is_looked_at(
    llorch: CommandLine, tmp_path: Path, engines: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hangs(*_: object) -> None:
        raise TimeoutError

    monkeypatch.setattr(NodeCertificate, "load", hangs)
    code, found = await at_node(llorch, "https://127.0.0.1:1", tmp_path / "n")
    assert (code, bad(found)) == (1, {"member": "fail", "tcp": "fail"})
    assert "can't be looked at" in found["member"]["found"]


def test_a_real_watch_is_set_and_taken_off(tmp_path: Path) -> None:
    before = set(os.listdir("/proc/self/fd"))
    facts = doctor_machine.look_at_watch(tmp_path / "engines", polling=False)
    assert (facts.error, facts.filesystem != "") == (None, True)
    assert (facts.instances or 0) > 0
    assert set(os.listdir("/proc/self/fd")) <= before
    assert not (tmp_path / "engines").exists()


def test_a_file_that_cannot_be_looked_at_says_so(tmp_path: Path) -> None:
    (tmp_path / "a-directory").mkdir()
    [facts] = doctor_machine.look_at_secrets([tmp_path / "a-directory", tmp_path / "none"], [])
    assert (facts.mode, facts.why) == (None, "is a directory")


# ---------------------------------------------------------------- firewall


FIREWALLS = [
    ("control",),
    ("control", "--bind", "0.0.0.0:8080"),
    ("control", "--bind", "10.0.0.5:8080", "--from", "10.0.0.0/8,10.1.0.0/16,fd00::/8"),
    ("control", "--bind", "[::]:8080", "--from", "fd00::/8,192.168.1.20"),
    ("control", "--bind", "desk:8080", "--tls", "off-mesh"),
    ("node", "--join", "https://10.0.0.5:8080"),
    ("node", "--join", "https://10.0.0.5:8080,https://[fd00::1]:8080,https://127.0.0.1:1", "--bind", "0.0.0.0:9200"),
    ("node", "--join", "https://127.0.0.1:8080", "--bind", "0.0.0.0:9200"),
    ("node", "--join", "https://127.0.0.1:8080", "--bind", "0.0.0.0:9200", "--from", "10.0.0.7"),
]


@pytest.mark.parametrize("argv", FIREWALLS, ids=" ".join)
async def test_firewall_rules_load(llorch: CommandLine, tmp_path: Path, argv: tuple[str, ...]) -> None:
    nft = shutil.which("nft", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if nft is None:
        pytest.skip("nft is not here to check the rules with (nftables)")
    ran = await llorch("config", "firewall", *argv)
    assert ran.code == 0
    (tmp_path / "rules").write_text(ran.out)
    checked = subprocess.run(
        [nft, "-c", "-f", str(tmp_path / "rules")], capture_output=True, text=True, check=False, timeout=20
    )
    if "Operation not permitted" in checked.stderr:
        pytest.skip("nft may not ask the kernel here (it needs CAP_NET_ADMIN)")
    assert (checked.returncode, checked.stderr) == (0, "")


async def test_firewall_rules_are_of_the_settings_in_force(llorch: CommandLine) -> None:
    assert await llorch("config", "firewall") == await llorch("config", "firewall", "control")
    llorch.env(LLORCH_BIND="0.0.0.0:7777")
    assert "tcp dport 7777 accept" in (await llorch("config", "firewall")).out
    assert (await llorch("config", "firewall", "--bind", "0.0.0.0:0")).code == 2
    assert (await llorch("config", "firewall", "--from", "10.0.0.1/8")).code == 2
    assert (await llorch("config", "firewall", "--from", "10.0.0.0/8", "node")).code == 2


async def test_on_a_nodes_machine_a_role_has_to_be_named_for_its_rules(llorch: CommandLine, data: Path) -> None:
    (llorch.work / "llorch.yaml").write_text("join: https://192.0.2.1:8080\n")
    ran = await llorch("config", "firewall")
    assert (ran.code, ran.out) == (2, "")
    assert "llorch config firewall node" in ran.err
    assert (await llorch("config", "firewall", "control")).code == 0
    llorch.env(LLORCH_DATA_DIR=str(data))
    assert (await llorch("config", "firewall")).code == 0, "a control has been here too"
    (llorch.work / "llorch.yaml").unlink()
    (data / "pki" / "authority.pem").rename(data / "pki" / "node.pem")
    (data / "tokens.json").unlink()
    assert (await llorch("config", "firewall")).code == 2


async def test_without_the_controls_flags_what_it_was_started_as_is_believed(llorch: CommandLine, data: Path) -> None:
    _, found = await doctor(llorch, "control", "--data-dir", str(data))
    assert "loopback alone" in found["tls"]["found"]
    write_place(str(data), "https://192.0.2.1:8080")
    _, found = await doctor(llorch, "control", "--data-dir", str(data))
    assert found["tls"]["found"].startswith("the control was started with TLS, as https://192.0.2.1:8080")


async def test_a_control_that_does_not_resolve_gets_no_rule_and_is_told(
    llorch: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nobody(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "no such name")

    monkeypatch.setattr("llorch.cli.firewall.socket.getaddrinfo", nobody)
    ran = await llorch("config", "firewall", "node", "--join", "https://desk.invalid:1", "--bind", "0.0.0.0:9200")
    assert (ran.code, "does not resolve here" in ran.err) == (0, True)
    assert "accept\n        ip daddr" in ran.out
    assert "dport 9200 drop" in ran.out
    assert "dport 9200 accept" not in ran.out


def test_late_means_the_same_to_a_control_and_to_a_node() -> None:
    """A node renews after two thirds of its certificate's life, a little more or less: less than a quarter is late."""
    from llorch.node.certificate import RENEW_AFTER, RENEW_JITTER

    assert 1 - RENEW_AFTER - RENEW_JITTER > doctor_control_findings.LATE
