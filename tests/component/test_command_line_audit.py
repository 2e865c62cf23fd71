"""`llorch audit`: what it says of a log that is whole, changed, cut off or another's, and with which exit code."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml

from llorch import audit
from llorch.audit import AuditLog
from llorch.audit_files import chain_files
from tests.component.command_line import CommandLine


@pytest.fixture
def llorch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> CommandLine:
    return CommandLine(monkeypatch, tmp_path)


@pytest.fixture
async def data(tmp_path: Path) -> Path:
    """The data directory of a control that has ended, with a log of 7 lines."""
    await go_on(tmp_path / "data")
    return tmp_path / "data"


async def go_on(folder: Path, count: int = 5) -> None:
    log = AuditLog(folder)
    await log.start()
    for number in range(count):
        log.record("task.accepted", principal="alice", task_id=f"t{number}")
    await log.close()


def edit(data: Path, old: bytes, new: bytes) -> None:
    path = data / "audit" / "audit.jsonl"
    text = path.read_bytes()
    assert old in text
    path.write_bytes(text.replace(old, new))


async def test_a_whole_log_is_said_to_be_whole_in_every_format(llorch: CommandLine, data: Path) -> None:
    argv = ("audit", "verify", "--data-dir", str(data))
    ran = await llorch(*argv)
    assert (ran.code, ran.err) == (0, "")
    title, row = ran.out.splitlines()
    assert title.split() == ["CHAIN", "FILES", "RECORDS", "LAST", "SIGNED", "TO", "KEY", "LOST", "VERDICT"]
    assert row.endswith("whole")
    assert " 1-7 " in row
    document = json.loads((await llorch(*argv, "--json")).out)
    assert document == yaml.safe_load((await llorch(*argv, "-o", "yaml")).out)
    assert document["whole"] is True
    assert (document["chains"][0]["last_seq"], document["chains"][0]["signed_seq"]) == (7, 7)
    assert (await llorch(*argv, "-q")).out == "whole\n"


async def test_the_first_bad_line_is_named_with_what_is_wrong_and_the_exit_code_is_1(
    llorch: CommandLine, data: Path
) -> None:
    edit(data, b'"task_id":"t2"', b'"task_id":"t7"')
    ran = await llorch("audit", "verify", "--data-dir", str(data))
    assert ran.code == 1
    assert ran.out.splitlines()[1].endswith("broken")
    assert f"error: {data}/audit/audit.jsonl:4: its mac does not fit: record 4 was changed" in ran.err
    ran = await llorch("audit", "verify", "--data-dir", str(data), "--json")
    document = json.loads(ran.out)
    assert (ran.code, document["whole"]) == (1, False)
    assert document["chains"][0]["fault"]["at"] == f"{data}/audit/audit.jsonl:4"


async def test_an_end_that_was_cut_off_is_found_by_what_was_exported(llorch: CommandLine, data: Path) -> None:
    kept = llorch.work / "kept.json"
    ran = await llorch("audit", "export", "--data-dir", str(data), "--out", str(kept))
    assert (ran.code, ran.out) == (0, "")
    assert "everything up to record 7" in ran.err
    path = data / "audit" / "audit.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3]))
    verify = ("audit", "verify", "--data-dir", str(data))
    assert (await llorch(*verify)).code == 0  # nobody could tell
    ran = await llorch(*verify, "--checkpoint", str(kept))
    assert ran.code == 1
    assert "its end is cut off: it ends at record 3, and a checkpoint was exported of record 7" in ran.err
    path.unlink()
    await go_on(data)
    ran = await llorch(*verify, "--checkpoint", str(kept))
    assert ran.code == 1
    assert "whose record 7 was exported, is not here" in ran.err


async def test_whoever_has_only_the_export_can_check_all_that_is_signed(llorch: CommandLine, data: Path) -> None:
    kept, copy = llorch.work / "kept.json", llorch.work / "copy.jsonl"
    ran = await llorch("audit", "export", "--data-dir", str(data))
    kept.write_text(ran.out)
    await go_on(data)
    whole = (data / "audit" / "audit.jsonl").read_bytes()
    copy.write_bytes(whole)
    argv = ("audit", "verify", str(copy), "--checkpoint", str(kept))
    assert (await llorch(*argv))[::2] == (0, "")
    copy.write_bytes(b"".join(whole.splitlines(keepends=True)[:-1]))
    ran = await llorch(*argv)
    assert ran.code == 0
    assert "its last 5 lines are not signed yet and were not checked" in ran.err
    copy.write_bytes(whole.replace(b'"task_id":"t4"', b'"task_id":"t5"', 1))
    ran = await llorch(*argv)
    assert ran.code == 1
    assert f"{copy}:7: of the 5 lines before this checkpoint one is not as it was" in ran.err
    ran = await llorch(*argv, "--data-dir", str(data))
    assert ran.code == 1
    assert f"{copy}:6: its mac does not fit" in ran.err


async def test_files_are_put_in_order_and_one_that_is_missing_is_missed(
    llorch: CommandLine, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit, "MAX_FILE_BYTES", 1_500)
    for _ in range(4):
        await go_on(data)
    files = [str(path) for path in chain_files(data / "audit") if path.stat().st_size]
    assert len(files) > 3
    ran = await llorch("audit", "verify", *reversed(files), "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["chains"][0]["files"] == files
    ran = await llorch("audit", "verify", files[0], *files[2:])
    assert ran.code == 1
    assert f"{files[2]}:1: " in ran.err
    ran = await llorch("audit", "verify", *files[1:])
    assert ran.code == 1
    assert "are missing, and the log does not say that they were removed" in ran.err


async def test_each_controls_chain_is_checked_and_a_copy_of_one_is_no_other(llorch: CommandLine, data: Path) -> None:
    first = AuditLog(data)
    await first.start()
    await go_on(data)
    await first.close()
    ran = await llorch("audit", "verify", "--data-dir", str(data), "--json")
    assert ran.code == 0
    assert len(json.loads(ran.out)["chains"]) == 2
    second = data / "audit" / "2" / "audit.jsonl"
    assert (await llorch("audit", "verify", str(second))).code == 0  # with the keys above it
    kept = llorch.work / "kept.json"
    await llorch("audit", "export", "--data-dir", str(data), "--out", str(kept))
    assert len(json.loads(kept.read_text())["checkpoints"]) == 2
    second.write_bytes((data / "audit" / "audit.jsonl").read_bytes())
    assert (await llorch("audit", "verify", "--data-dir", str(data))).code == 1
    second.unlink()
    assert (await llorch("audit", "verify", "--data-dir", str(data), "--checkpoint", str(kept))).code == 1


async def test_a_broken_log_is_not_exported_and_an_export_is_not_overwritten_by_a_shorter_one(
    llorch: CommandLine, data: Path
) -> None:
    kept = llorch.work / "kept.json"
    argv = ("audit", "export", "--data-dir", str(data), "--out", str(kept))
    assert (await llorch(*argv)).code == 0
    before = kept.read_text()
    await go_on(data)
    assert (await llorch(*argv)).code == 0
    after = kept.read_text()
    assert after != before
    path = data / "audit" / "audit.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:9]))
    ran = await llorch(*argv)
    assert (ran.code, kept.read_text()) == (1, after)
    assert "its end is cut off" in ran.err
    path.write_bytes(b"".join(lines))
    edit(data, b"alice", b"alicf")
    ran = await llorch(*argv[:-2])
    assert (ran.code, ran.out) == (1, "")
    other = llorch.work / "notes.txt"
    other.write_text("mine")
    ran = await llorch(*argv[:-1], str(other))
    assert (ran.code, other.read_text()) == (2, "mine")


async def test_what_is_not_there_or_not_fit_is_told_without_a_traceback(llorch: CommandLine, data: Path) -> None:
    junk = llorch.work / "junk"
    junk.write_bytes(os.urandom(10_000))
    empty = llorch.work / "empty"
    empty.touch()
    for code, argv in (
        (4, ("verify", "--data-dir", str(llorch.work))),
        (4, ("verify",)),
        (4, ("export",)),
        (4, ("verify", str(llorch.work / "nothing"))),
        (4, ("verify", "nothing.jsonl")),
        (4, ("verify", "--data-dir", str(data), "--checkpoint", str(llorch.work / "nothing"))),
        (2, ("verify", "--data-dir", str(data), "--checkpoint", str(junk))),
        (1, ("verify", "--data-dir", str(data), str(junk))),
        (1, ("verify", "--data-dir", str(data), str(empty))),
        (1, ("verify", "--data-dir", str(data), str(llorch.work))),
        (1, ("export", "--data-dir", str(data), "--out", str(llorch.work / "no" / "folder"))),
    ):
        ran = await llorch("audit", *argv)
        assert ran.code == code, (argv, ran)
        assert ran.err.startswith("error: "), (argv, ran)
        assert "Traceback" not in ran.err
    assert "nothing.jsonl is not there" in (await llorch("audit", "verify", "nothing.jsonl")).err
    (data / "audit" / "mac.key").chmod(0o644)
    ran = await llorch("audit", "verify", "--data-dir", str(data))
    assert ran.code == 2
    assert "chmod 600" in ran.err


async def test_the_data_directory_is_the_controls_own_if_none_is_given(llorch: CommandLine, data: Path) -> None:
    llorch.env(LLORCH_DATA_DIR=str(data))
    assert (await llorch("audit", "verify")).code == 0
    llorch.env(LLORCH_DATA_DIR="", XDG_DATA_HOME=str(data.parent))
    (llorch.work / "llorch.yaml").write_text(f"data-dir: {data}\nqueue-limit: 3\n")
    assert (await llorch("audit", "verify", "-q")).out == "whole\n"
