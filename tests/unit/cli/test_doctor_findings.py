"""From facts to findings: each bad fact is named, with what mends it, and a good one needs no mending."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import typer

import llorch
from llorch.cli import doctor_client_findings as client
from llorch.cli import doctor_control_findings as control
from llorch.cli import doctor_findings as common
from llorch.cli import doctor_node_findings as node
from llorch.cli import doctor_reach_findings as reach
from llorch.cli.doctor_client_findings import Aim
from llorch.cli.doctor_control_findings import AuthorityFacts, Holder, Place, Running, Shown, TokenFacts
from llorch.cli.doctor_findings import DAY_S, Directory, Finding, Port, SecretFile, State, Use
from llorch.cli.doctor_machine import filesystem_of
from llorch.cli.doctor_node_findings import Address, By, Driver, Engines, Member, Watch
from llorch.cli.doctor_reach_findings import Answer, Certificate, Handshake, Lookup, Met, Peer, Trust, Try
from llorch.cli.main import app
from llorch.tokens import ID_BYTES, SECRET_BYTES, write_token

NOW = 1_800_000_000.0
URL, JOIN = Peer("https://desk:8080", "--url"), Peer("https://desk:8080", "--join")
CERT = Certificate("desk", "a CA", ("desk", "10.0.0.5"), NOW - DAY_S, NOW + 30 * DAY_S)
DIRECTORY = Directory("/data", True, free_bytes=50 << 30)
AUTHORITY = AuthorityFacts(NOW - DAY_S, NOW + 3_650 * DAY_S, "pin")
MEMBER = Member("gpu-1", By.CERTIFICATE, NOW - DAY_S, NOW + 29 * DAY_S)
OK = Answer(200, {"role": "control", "version": "1", "status": "ok"})
DENIED = Answer(403, {"error": {"code": "FORBIDDEN", "message": "no"}})
REFUSED = Answer(401, {"error": {"code": "UNAUTHENTICATED", "message": "the certificate was revoked"}})
SILENT = Answer(why="it did not answer in time")
MODELS = Answer(200, {"data": [{"id": "m"}]})

Found = Finding | list[Finding] | None


def change(facts: Any, **more: Any) -> Any:
    return dataclasses.replace(facts, **more)


def shake(**more: Any) -> Finding:
    trust = more.pop("trust", Trust.SYSTEM)
    return reach.tls(more.pop("peer", URL), Handshake(**{"certificate": CERT, **more}), trust, NOW)


def granted(read: Answer = OK, submit: Answer = MODELS, stranger: Answer = Answer(404)) -> list[Finding]:  # noqa: B008
    return client.token(client.Granted(read, submit, stranger))


def of_token(text: str | None, *, abroad: bool = False, withheld: str | None = None) -> Found:
    return client.unsent(Aim("https://desk", "flag --url", text, withheld), open_network=abroad)


def whole(*, join: bool = False) -> str:
    """A token of a form that llorch makes; nobody knows it."""
    return write_token(bytes(ID_BYTES + SECRET_BYTES), bytes(32) if join else None)[1]


# What is bad, as what, in which words, and words of its mend.
BAD: list[tuple[Found, str, str, str]] = [
    # this machine
    (common.unseen("disk", 3), "fail", "no answer within 3 s", "ps -eo"),
    (common.settings((), ("url: it is odd",), "client")[1], "warn", "it is odd", "llorch config show client"),
    (
        common.directory("d", change(DIRECTORY, is_directory=False), "--data-dir"),
        "fail",
        "not a directory",
        "--data-dir",
    ),
    (common.directory("d", change(DIRECTORY, writable=False), "--data-dir"), "fail", "can't be written", "chown"),
    (
        common.directory("d", change(DIRECTORY, there=False, above="/", writable=False), "--data-dir"),
        "fail",
        "/ can't be written",
        "--data-dir",
    ),
    (common.directory("d", change(DIRECTORY, owned=False), "--data-dir"), "warn", "another user", "chown /data"),
    (common.directory("d", change(DIRECTORY, mode=0o777), "--data-dir"), "fail", "others may write", "chmod 700 /data"),
    (common.directory("d", change(DIRECTORY, mode=0o755), "--data-dir"), "warn", "others may look", "chmod 700 /data"),
    (common.disk(change(DIRECTORY, free_bytes=(1 << 30) - 1), "--data-dir"), "warn", "1.0 GiB free", "make room"),
    (common.disk(change(DIRECTORY, free_bytes=(100 << 20) - 1), "--data-dir"), "fail", "99 MiB free", "du -xh"),
    (common.secret_files((SecretFile("/t", 0o640),)), "fail", "others may read /t (mode 0640)", "chmod 600 /t"),
    (common.secret_files((SecretFile("/t", 0o644, ours=False),)), "warn", "others may read /t", "chmod 600 /t"),
    (common.secret_files((SecretFile("/t", None, "permission denied"),)), "fail", "can't be read", "as the user"),
    (common.open_files(4_095), "warn", "4095 files", "LimitNOFILE"),
    (common.open_files(255), "fail", "255 files", "ulimit"),
    (
        common.port(Port("0.0.0.0:8080", Use.TAKEN, by="nginx, pid 7"), "control"),
        "fail",
        "nginx, pid 7",
        "sport = :8080",
    ),
    (common.port(Port("0.0.0.0:8080", Use.TAKEN), "node"), "fail", "another user's process", "--bind"),
    (common.port(Port("1.2.3.4:80", Use.IMPOSSIBLE, "permission denied"), "control"), "fail", "permission", "--bind"),
    (common.clock(6, "desk"), "warn", "6 s apart", "this one is behind"),
    (common.clock(-6, "desk"), "warn", "6 s apart", "this one is ahead"),
    (common.clock(61, "desk"), "fail", "61 s apart: certificates", "timedatectl"),
    # the way there
    (reach.dns(URL, Lookup(why="name or service not known")), "fail", "desk does not resolve", "getent hosts desk"),
    (
        reach.tcp(URL, (Try("10.0.0.5", Met.REFUSED),)),
        "fail",
        "nothing listens on its port 8080",
        "llorch control --bind 0.0.0.0:8080",
    ),
    (
        reach.tcp(Peer("http://127.0.0.1", "--url"), (Try("127.0.0.1", Met.REFUSED),)),
        "fail",
        "port 80",
        "--bind 127.0.0.1:80",
    ),
    (reach.tcp(URL, (Try("10.0.0.5", Met.SILENCE),)), "fail", "a firewall drops it", "llorch config firewall control"),
    (
        reach.tcp(URL, (Try("10.0.0.5", Met.NO_WAY, "no route to host"),)),
        "fail",
        "no route to host",
        "ip route get 10.0.0.5",
    ),
    (
        reach.tcp(URL, (Try("::1", Met.SILENCE), Try("10.0.0.5", Met.OPEN))),
        "warn",
        "that of ::1 does not",
        "give 10.0.0.5 in --url",
    ),
    (shake(why="plain text instead of TLS", certificate=None), "fail", "plain text instead of TLS", "--tls on"),
    (shake(certificate=None), "fail", "no certificate", "http:// in --url"),
    (shake(code=18), "fail", "not known here", "--ca-pin SHA256"),
    (shake(code=18, certificate=change(CERT, issuer="desk")), "fail", "vouches for itself", "llorch certs status"),
    (shake(code=20, trust=Trust.FILE, peer=JOIN), "fail", "not known here", "--tls-ca FILE"),
    (shake(code=20, trust=Trust.PIN), "fail", "another cluster, or somebody else", "check the URL"),
    (shake(code=19, trust=Trust.CLUSTER, peer=JOIN), "fail", "authority that this node joined", "llorch token join"),
    (shake(code=20, trust=Trust.TOKEN, peer=JOIN), "fail", "another cluster", "check the URL"),
    (shake(code=62), "fail", "is for desk, 10.0.0.5, and not for desk", "--tls-names desk"),
    (shake(code=64), "fail", "and not for desk", "one of these names in --url"),
    (shake(code=10, certificate=change(CERT, ends=NOW - 3 * DAY_S)), "fail", "expired 3 days ago", "--tls-cert"),
    (
        shake(code=10, certificate=change(CERT, ends=NOW - 3 * DAY_S), trust=Trust.PIN),
        "fail",
        "expired",
        "restart the control",
    ),
    (shake(code=9, certificate=change(CERT, begins=NOW + 3_600)), "fail", "clock is likely wrong", "timedatectl"),
    (shake(code=10), "fail", "what signed the certificate of desk", "--tls-cert"),
    (shake(code=79, said="path length exceeded"), "fail", "path length exceeded", "--tls-ca"),
    (
        shake(certificate=change(CERT, begins=NOW - 24 * DAY_S, ends=NOW + 6 * DAY_S)),
        "warn",
        "expires in 6 days",
        "--tls-cert",
    ),
    (reach.llorch(URL, SILENT, SILENT, "1"), "fail", "answers no request", "--url"),
    (
        reach.llorch(Peer("http://desk:1", "--url"), SILENT, SILENT, "1"),
        "fail",
        "no request",
        "https://desk:1 in --url",
    ),
    (reach.llorch(URL, Answer(200, None), OK, "1"), "fail", "is not llorch", "check the host"),
    (reach.llorch(URL, Answer(404, {"role": "control"}), OK, "1"), "fail", "is not llorch", "check the host"),
    (reach.llorch(URL, Answer(200, {"role": "node"}), OK, "1"), "fail", "is a node, not a control", "--url"),
    (reach.llorch(URL, OK, OK, "2")[0], "warn", "control 1, and this is 2", "llorch version"),
    (reach.llorch(URL, OK, SILENT, "1")[1], "warn", "does not say whether", "llorch doctor"),
    (reach.llorch(URL, OK, Answer(503, {"status": "draining"}), "1")[1], "warn", "is draining", "llorch control"),
    (reach.llorch(URL, OK, Answer(200, {"status": "ok", "storm": {}}), "1")[1], "warn", "many nodes", "llorch status"),
    # a client
    (
        client.aim(Aim("http://desk", "default", warnings=("unencrypted",)))[1],
        "warn",
        "unencrypted",
        "llorch config show",
    ),
    (of_token(None), "fail", "there is none", "llorch token new"),
    (
        of_token(None, withheld="the token of context a goes to https://a only"),
        "fail",
        "goes to https://a",
        "--context",
    ),
    (of_token(whole()[:-4]), "fail", "cut off or mistyped", "llorch token new"),
    (of_token(whole(join=True)), "fail", "a join token", "llorch token new"),
    (of_token("x" * 32, abroad=True), "warn", "unencrypted: it was not sent", "https:// in --url"),
    (granted(read=REFUSED), "fail", "does not accept it", "llorch token ls --all"),
    (granted(submit=REFUSED), "fail", "wrong, expired or revoked", "LLORCH_TOKEN"),
    (granted(read=DENIED), "warn", "good for submit, not for read", "--scope submit,read"),
    (granted(submit=DENIED), "warn", "good for read, not for submit", "--scope submit,read"),
    (granted(read=DENIED, submit=DENIED), "fail", "neither submit nor read", "llorch token new"),
    (granted(read=Answer(500)), "warn", "read: status 500", "llorch doctor control"),
    (granted(submit=SILENT), "fail", "has no answer", "llorch doctor"),
    (granted(stranger=Answer(503, {"error": {"code": "RECOVERING"}}))[1], "warn", "just started", "--recovery-window"),
    (client.models(Answer(200, {"data": []})), "warn", "no node serves one", "llorch token join"),
    # a control
    (
        control.authority(change(AUTHORITY, ends=NOW + 89 * DAY_S), NOW)[0],
        "warn",
        "expires in 89 days",
        "llorch certs rotate",
    ),
    (control.authority(change(AUTHORITY, ends=NOW - 1), NOW)[0], "fail", "expired", "llorch certs rotate"),
    (control.authority(change(AUTHORITY, begins=NOW + 60), NOW)[0], "fail", "clock is likely wrong", "timedatectl"),
    (control.authority(change(AUTHORITY, older=(0,)), NOW)[1], "warn", "no node holds", "llorch certs rotate --finish"),
    (
        control.authority(change(AUTHORITY, holders=(Holder("a", NOW - 25 * DAY_S, NOW + 5 * DAY_S),)), NOW)[1],
        "warn",
        "of a expires in 5 days",
        "llorch certs revoke a",
    ),
    (
        control.authority(
            change(AUTHORITY, holders=tuple(Holder(f"n{i}", NOW - 30 * DAY_S, NOW + 1) for i in range(9))), NOW
        )[-1],
        "warn",
        "3 more",
        "llorch certs status",
    ),
    (control.clock(NOW + 120, NOW), "fail", "2 minutes behind", "timedatectl"),
    (control.tokens(TokenFacts(0), NOW), "warn", "nobody may send a task", "llorch token new"),
    (
        control.tokens(TokenFacts(1, (("ci", NOW + 3 * DAY_S),)), NOW),
        "warn",
        "ci expires in 3 days",
        "llorch token new --name ci",
    ),
    (control.shown_certificate(Shown("off-mesh"), NOW), "warn", "unencrypted", "--tls off-mesh"),
    (control.shown_certificate(Shown("own", why="the files don't match"), NOW), "fail", "don't match", "--tls-key"),
    (control.shown_certificate(Shown("own", change(CERT, names=())), NOW), "fail", "no subject alternative", "-addext"),
    (control.shown_certificate(Shown("own", change(CERT, ends=NOW - 1)), NOW), "fail", "expired", "a newer one"),
    (
        control.running(Running("https://desk:1", why="connection refused"), "1"),
        "warn",
        "connection refused",
        "llorch control",
    ),
    (
        control.running(Running("https://desk:1", "control", "1", trusted=False), "1"),
        "fail",
        "not the control of this",
        "llorch config show control",
    ),
    (control.running(Running("https://desk:1", "stranger"), "1"), "fail", "not the control of this", "--data-dir"),
    (
        control.running(Running("https://desk:1", "control", "1"), "2"),
        "warn",
        "version 1, and this is 2",
        "llorch control",
    ),
    (control.place(Place("https://desk:1", "desk", False)), "fail", "desk does not resolve", "llorch token join --at"),
    (
        control.place(Place("https://desk:1", "desk", False, ("10.0.0.5",))),
        "warn",
        "no address of this machine",
        "--tls-names",
    ),
    # a node
    (node.member(change(MEMBER, why="it is locked", hint="unlock it"), NOW), "fail", "it is locked", "unlock it"),
    (node.member(change(MEMBER, why="it is locked"), NOW), "fail", "it is locked", "llorch token join --node gpu-1"),
    (
        node.member(Member("gpu-1", By.NOTHING), NOW),
        "fail",
        "neither a certificate nor a token",
        "llorch token join --node gpu-1",
    ),
    (node.member(change(MEMBER, ends=NOW - 2 * DAY_S), NOW), "fail", "expired 2 days ago", "llorch token join"),
    (
        node.member(change(MEMBER, begins=NOW - 25 * DAY_S, ends=NOW + 5 * DAY_S), NOW),
        "warn",
        "should have been renewed",
        "llorch node",
    ),
    (node.other_cluster(JOIN), "fail", "the token was not sent", "llorch token join"),
    (
        node.accepted(JOIN, REFUSED, By.CERTIFICATE, "gpu-1"),
        "fail",
        "certificate (the certificate was revoked)",
        "llorch token join --node gpu-1",
    ),
    (node.accepted(JOIN, REFUSED, By.TOKENS, "gpu-1"), "fail", "refuses this node's node token", "--node-token-file"),
    (node.accepted(JOIN, DENIED, By.CERTIFICATE, "gpu-1"), "fail", "not take it for gpu-1 (no)", "llorch token join"),
    (node.accepted(JOIN, SILENT, By.CERTIFICATE, "gpu-1"), "fail", "in time", "llorch token join"),
    (node.address(Address("https://n:1")), "fail", "does not resolve", "leave out --address"),
    (node.address(Address("https://n:1", ("10.0.0.9",))), "warn", "no address of this machine", "leave out --address"),
    (
        node.address(Address("https://n:1", ("10.0.0.9",), ("10.0.0.9",), "control")),
        "fail",
        "by a control",
        "--address",
    ),
    (
        node.address(Address("https://n:1", ("10.0.0.9",), ("10.0.0.9",), running=True)),
        "fail",
        "nothing answers",
        "llorch config firewall node",
    ),
    (node.driver(Driver(2, "NVMLError_DriverNotLoaded")), "fail", "2 NVIDIA cards", "nvidia-smi"),
    (node.driver(Driver(1, "NVMLError_LibRmVersionMismatch")), "fail", "VersionMismatch", "restart the machine"),
    (node.driver(Driver(1)), "fail", "it lists no GPU", "nvidia-smi"),
    (node.driver(Driver(1, "NVMLError_DriverNotLoaded", "amdgpu", ("W7900",))), "fail", "1 NVIDIA cards", "nvidia-smi"),
    (node.driver(Driver(0, "ModuleNotFoundError")), "warn", "binding of NVML", "pip install nvidia-ml-py"),
    (node.no_driver(8), "fail", "within 8 s", "nvidia-smi"),
    (node.engines(Engines((), (), "pool a: there is no GPU 1", "gpus: []")), "fail", "no GPU 1", "gpus: []"),
    (
        node.engines(Engines((), (), "pool a: it can't be read")),
        "fail",
        "engines here: none",
        "llorch config show node",
    ),
    (node.inotify(Watch("/r", "nfs4")), "warn", "/r is on nfs4", "--poll-handoffs"),
    (node.inotify(Watch("/r", "fuse.sshfs")), "warn", "fuse.sshfs", "--runtime-dir"),
    (
        node.inotify(Watch("/r", error="EMFILE", instances=128)),
        "fail",
        "128 inotify instances",
        "max_user_instances=512",
    ),
    (
        node.inotify(Watch("/r", error="ENOSPC", watches=8_192)),
        "fail",
        "8192 inotify watches",
        "max_user_watches=524288",
    ),
    (node.inotify(Watch("/r", error="EACCES")), "warn", "EACCES", "--poll-handoffs"),
]

GOOD: list[Found] = [
    common.settings(("/etc/llorch/config.yaml",), (), "control"),
    common.directory("d", DIRECTORY, "--data-dir"),
    common.directory("d", change(DIRECTORY, there=False, above="/", mode=0o755, owned=False), "--data-dir"),
    common.disk(change(DIRECTORY, free_bytes=1 << 30), "--data-dir"),
    common.disk(change(DIRECTORY, free_bytes=None), "--data-dir"),
    common.secret_files((SecretFile("/t", 0o600), SecretFile("/u", 0o400, ours=False))),
    common.secret_files(()),
    common.open_files(4_096),
    common.open_files(None),
    common.port(Port("0.0.0.0:8080", Use.FREE), "control"),
    common.port(Port("0.0.0.0:0", Use.ANY), "control"),
    common.port(Port("0.0.0.0:8080", Use.TAKEN, by="python, pid 7", ours=True), "control"),
    common.clock(5, "desk"),
    common.expiry("tls", "a short one", NOW - 3 * DAY_S, NOW + 3 * DAY_S, NOW, "mend"),
    reach.dns(URL, Lookup(("10.0.0.5",))),
    reach.dns(Peer("http://10.0.0.5", "--url"), Lookup(("10.0.0.5",))),
    reach.tcp(URL, (Try("10.0.0.5", Met.OPEN),)),
    reach.tcp(URL, (Try("::1", Met.REFUSED), Try("127.0.0.1", Met.OPEN))),
    shake(),
    shake(trust=Trust.PIN),
    reach.llorch(URL, OK, OK, "1"),
    reach.llorch(URL, REFUSED, Answer(), "1"),
    client.aim(Aim("http://desk", "default")),
    of_token("x" * 32),
    of_token(whole()),
    granted(),
    client.models(MODELS),
    client.models(DENIED),
    control.no_authority(serves_tls=True),
    control.no_authority(serves_tls=False),
    control.authority(change(AUTHORITY, older=(1,), holders=(Holder("a", NOW, NOW + 30 * DAY_S),)), NOW),
    control.authority(change(AUTHORITY, holders=(Holder("gone", NOW - 60 * DAY_S, NOW - DAY_S),)), NOW),
    control.clock(NOW, NOW),
    control.clock(None, NOW),
    control.tokens(TokenFacts(0, (("ci", None),)), NOW),
    control.tokens(TokenFacts(0, (("ci", NOW + DAY_S), ("ci", NOW + 90 * DAY_S))), NOW),
    control.tokens(TokenFacts(0, (("ci", NOW + DAY_S), ("ci", None))), NOW),
    control.shown_certificate(Shown("none"), NOW),
    control.shown_certificate(Shown("cluster", names=("desk",)), NOW),
    control.shown_certificate(Shown("own", CERT), NOW),
    control.running(Running(), "1"),
    control.running(Running("https://desk:1", "control", "1"), "1"),
    control.place(Place("http://127.0.0.1:1", "127.0.0.1", True)),
    control.place(Place("https://desk:1", "desk", False, ("10.0.0.5",), ("10.0.0.5",))),
    node.member(MEMBER, NOW),
    node.member(Member("a", By.JOIN_TOKEN), NOW),
    node.member(Member("a", By.TOKENS, secure=False), NOW),
    node.accepted(JOIN, Answer(426), By.CERTIFICATE, "a"),
    node.unasked(JOIN),
    node.address(Address()),
    node.address(Address("https://n:1", ("10.0.0.9",), ("10.0.0.9",), "node", running=True)),
    node.address(Address("https://n:1", ("10.0.0.9",), ("10.0.0.9",))),
    node.driver(Driver()),
    node.driver(Driver(0, "NVMLError_LibraryNotFound")),
    node.driver(Driver(2, None, "550.54", ("RTX 4090 (24 GiB)",) * 2)),
    node.driver(Driver(0, "NVMLError_LibraryNotFound", "amdgpu 6.3", ("W7900 (48 GiB)",))),
    node.engines(Engines(("xllamacpp 1",))),
    node.engines(Engines(("xllamacpp 1",), ("p0: demo on llamacpp",))),
    node.inotify(Watch("/r", "ext4")),
    node.inotify(Watch("/r", "nfs", polling=True)),
]


def listed(found: Found) -> list[Finding]:
    return found if isinstance(found, list) else [found] if found is not None else []


@pytest.mark.parametrize(("found", "state", "words", "mend"), BAD, ids=[f"{row[1]}: {row[2]}" for row in BAD])
def test_what_is_bad_is_named_and_comes_with_its_mend(found: Found, state: str, words: str, mend: str) -> None:
    [finding] = listed(found)
    assert finding.state == state
    assert words in finding.found
    assert mend in finding.mend
    assert "\n" not in finding.found + finding.mend


def test_what_is_good_is_ok_and_needs_no_mend() -> None:
    bad = [one for found in GOOD for one in listed(found) if one.state is not State.OK]
    assert bad == []


@pytest.mark.parametrize(("state", "mend"), [(State.WARN, ""), (State.FAIL, ""), (State.OK, "do it")])
def test_there_is_no_finding_that_is_not_well_and_has_no_mend(state: State, mend: str) -> None:
    with pytest.raises(ValueError, match="needs a mend"):
        Finding("disk", state, "it is full", mend)


def test_of_several_tokens_of_one_name_the_last_to_end_counts() -> None:
    [late] = control.tokens(TokenFacts(0, (("a", NOW + 2 * DAY_S), ("a", NOW + 3 * DAY_S), ("b", None))), NOW)
    assert "3 days" in late.found


def test_what_a_peer_wrote_is_put_on_one_line_and_cut() -> None:
    evil = "x\x1b[31m\nhint: rm -rf /" + "y" * 500
    shown = [
        *reach.llorch(URL, Answer(200, {"role": evil}), OK, "1"),
        *reach.llorch(URL, Answer(200, {"role": "control", "version": evil}), OK, "1"),
        *granted(read=Answer(401, {"error": {"message": evil}})),
        shake(code=20, certificate=change(CERT, name=evil, issuer=evil, names=(evil,))),
        shake(code=62, certificate=change(CERT, names=(evil,) * 50)),
        *listed(client.models(Answer(200, {"data": [{"id": evil}] * 9}))),
    ]
    for one in shown:
        assert "\x1b" not in one.found
        assert "\n" not in one.found
        assert len(one.found) < 900


def test_answers_of_any_shape_are_no_fault() -> None:
    for body in (None, [], "x", {"error": "x"}, {"error": None}, {"data": 3}, {"status": 3, "role": 3}, {"data": [3]}):
        answer = Answer(200, body)
        reach.llorch(URL, answer, answer, "1")
        granted(answer, answer, answer)
        client.models(answer)
        node.accepted(JOIN, answer, By.TOKENS, "a")


# ---------------------------------------------------------------- mends name what there is


def _command_words() -> tuple[set[str], set[str], set[str]]:
    """(every path of commands, the groups among them, every flag)."""
    paths: set[str] = set()
    groups: set[str] = set()
    flags: set[str] = set()

    def walk(command: Any, words: tuple[str, ...]) -> None:
        paths.add(" ".join(words))
        flags.update(option for parameter in command.params for option in parameter.opts)
        inner = getattr(command, "commands", None) or {}
        if inner:
            groups.add(" ".join(words))
        for name, each in inner.items():
            walk(each, (*words, name))

    walk(typer.main.get_command(app), ())
    return paths, groups, flags


def _texts() -> list[str]:
    """Every string of the modules that judge, with whatever is put into them left out."""
    found = []
    for path in (Path(llorch.__file__).parent / "cli").glob("doctor_*findings.py"):
        tree = ast.parse(path.read_text())
        joined = [item for item in ast.walk(tree) if isinstance(item, ast.JoinedStr)]
        inside = {part for item in joined for part in item.values}
        for item in joined:
            parts = (str(part.value) if isinstance(part, ast.Constant) else "X" for part in item.values)
            found.append("".join(parts))
        alone = (item for item in ast.walk(tree) if isinstance(item, ast.Constant) and item not in inside)
        found += [item.value for item in alone if isinstance(item.value, str)]
    return found


def test_the_commands_and_flags_that_mends_name_exist() -> None:
    paths, groups, flags = _command_words()
    named = [match[1] for text in _texts() for match in re.finditer(r"`llorch ([^`]*)`", text)]
    assert len(named) > 20
    for command in named:
        first, second, *_ = [*command.split(), "", ""]
        assert first in paths, command
        if first in groups and re.fullmatch(r"[a-z]+", second):
            assert f"{first} {second}" in paths, command
    of_llorch = [re.sub(r"`(?!llorch)[^`]*`", "", text) for text in _texts()]
    used = {flag for text in of_llorch for flag in re.findall(r"(?<!\S)--[a-z]+[a-z-]*", text)}
    assert len(used) > 10
    assert used - flags == set()


# ---------------------------------------------------------------- mounts

MOUNTS = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 22 0:40 / /data rw shared:2 - nfs4 server:/export rw
31 30 8:2 / /data/local rw - xfs /dev/sdb1 rw
32 22 0:41 / /my\\040disk rw - fuse.sshfs me@host: rw
33 22 0:42 / /data/local rw - tmpfs tmpfs rw
a line that is none
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/home/a", "ext4"),
        ("/data", "nfs4"),
        ("/data/x", "nfs4"),
        ("/database", "ext4"),
        ("/data/local/x", "tmpfs"),
        ("/my disk/x", "fuse.sshfs"),
    ],
)
def test_the_filesystem_of_a_path_is_that_of_its_innermost_mount(path: str, kind: str) -> None:
    assert filesystem_of(path, MOUNTS) == kind
    assert filesystem_of(path, "") == ""
