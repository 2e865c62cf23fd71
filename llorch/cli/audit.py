"""`llorch audit verify|export`: whether a control's audit log is whole, and what to keep elsewhere to be sure of it.

Talks to no control: it reads files, while a control writes them or not. Never changes a log.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llorch import whole_file
from llorch.cli.exits import Exit
from llorch.cli.flags import local_command, with_flags
from llorch.cli.output import Column, Failure, Format, Output, hint, report, usage, warn, write_err, write_out
from llorch.cli.sources import resolve_here
from llorch.config import ControlSettings

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    from llorch.audit_chain import Exported, Verdict

app = typer.Typer(help="Check the audit log of a control.", no_args_is_help=True, rich_markup_mode=None)

DataDir = Annotated[
    str | None, typer.Option("--data-dir", metavar="DIR", help="The control's. Its default if not given.")
]


@dataclass(frozen=True, slots=True)
class _Found:
    """One chain: its files, what is known of it, and where its fault is."""

    files: Sequence[Path]
    verdict: Verdict
    where: str | None

    def row(self) -> dict[str, Any]:
        of, signed = self.verdict, self.verdict.checkpoint
        return {
            "chain": of.chain,
            "files": [str(path) for path in self.files],
            "first_seq": of.first_seq,
            "last_seq": of.last_seq,
            "last_time": of.last_time,
            "signed_seq": signed.seq if signed is not None else None,
            "key": signed.key if signed is not None else None,
            "unproven": of.unproven,
            "lost": of.lost,
            "whole": of.whole,
            "fault": None if of.fault is None else {"at": self.where, "what": of.fault.what},
        }


_COLUMNS = (
    Column("chain", lambda row: (row["chain"] or "")[:8]),
    Column("files", lambda row: len(row["files"])),
    Column("records", lambda row: f"{row['first_seq']}-{row['last_seq']}"),
    Column("last", lambda row: row["last_time"]),
    Column("signed to", lambda row: row["signed_seq"]),
    Column("key", lambda row: row["key"]),
    Column("lost", lambda row: row["lost"]),
    Column("verdict", lambda row: "whole" if row["whole"] else "broken"),
)


def verify(
    output: Output,
    files: Annotated[list[str] | None, typer.Argument(metavar="[FILE...]", show_default=False)] = None,
    data_dir: DataDir = None,
    checkpoint: Annotated[
        str | None, typer.Option("--checkpoint", metavar="FILE", help="What `llorch audit export` wrote.")
    ] = None,
) -> int:
    """Check an audit log: exit 1, and the first bad line, if anything in it is not as it was written."""
    from llorch.audit_chain import missing_chains

    exported = _read_export(Path(checkpoint).expanduser()) if checkpoint is not None else None
    paths = [Path(file).expanduser() for file in files or ()]
    _need(paths)
    root = _audit_folder(data_dir) if data_dir is not None or not paths else _folder_of(paths[0])
    mac, public = _keys(root, exported)
    found = _check_all(_by_chain(paths) if paths else _of_folder(root), mac, public, exported)
    rows = [each.row() for each in found]
    gone = missing_chains(exported.checkpoints if exported else (), [each.verdict for each in found])
    broken = [each for each in found if not each.verdict.whole]
    whole = not broken and not gone
    if output.format is Format.TABLE:
        output.rows(rows, _COLUMNS, name=str)
    else:
        missing = [{"chain": each.chain, "seq": each.seq} for each in gone]
        output.one({"whole": whole, "chains": rows, "missing": missing}, name="whole" if whole else "broken")
    for each in broken:
        assert each.verdict.fault is not None
        report(f"{each.where}: {each.verdict.fault.what}")
    for one in [] if broken else gone:
        report(f"chain {one.chain[:8]}, whose record {one.seq} was exported, is not here")
    if whole:
        _say_what_is_not_sure(found)
    return Exit.OK if whole else Exit.FAILED


def _say_what_is_not_sure(found: Iterable[_Found]) -> None:
    for each in found:
        if each.verdict.unproven:
            warn(f"{each.files[-1]}: its last {each.verdict.unproven} lines are not signed yet and were not checked")
            hint("with the control's --data-dir they can be")
        if each.verdict.lost:
            warn(f"{each.files[-1]}: {each.verdict.lost} records could not be written; each audit.gap says when")


def export(
    _: object,
    data_dir: DataDir = None,
    out: Annotated[
        str | None,
        typer.Option("--out", metavar="FILE", help="Write it there; over an older one of the same log only."),
    ] = None,
) -> int:
    """Print the newest signed checkpoint, to be kept where nobody who could change the log can change it."""
    from llorch.audit_chain import Exported, encode_export, key_fingerprint

    path = Path(out).expanduser() if out is not None else None
    older = _read_export(path) if path is not None and path.exists() else None
    root = _audit_folder(data_dir)
    mac, public = _keys(root, None)
    found = _check_all(_of_folder(root), mac, public, older)
    for each in found:
        if each.verdict.fault is not None:
            report(f"{each.where}: {each.verdict.fault.what}", hint="nothing was exported; `llorch audit verify`")
            return Exit.FAILED
    newest = tuple(each.verdict.checkpoint for each in found if each.verdict.checkpoint is not None)
    text = encode_export(Exported(public, newest), time.time())
    if path is None:
        write_out(text)
    else:
        _replace(path, text)
    write_err(f"key {key_fingerprint(public)}\n")
    for each, signed in zip(found, newest, strict=True):
        write_err(f"chain {signed.chain[:8]}: everything up to record {signed.seq}, {signed.time}\n")
        if each.verdict.last_seq > signed.seq:
            hint(
                f"records up to {each.verdict.last_seq} are not signed yet; a control signs at its end and every minute"
            )
    return Exit.OK


# ---------------------------------------------------------------- where things are


def _audit_folder(data_dir: str | None) -> Path:
    from llorch.audit_files import FOLDER

    if data_dir is None:
        # What else a control needs is no matter here.
        filled = dict.fromkeys(("api_token", "service_token", "node_token"), "x" * 32) | {"bind": "127.0.0.1:0"}
        data_dir = resolve_here(ControlSettings, filled, config=None, local=True).settings.data_dir
    return Path(data_dir).expanduser() / FOLDER


def _folder_of(file: Path) -> Path:
    """Where the keys of a file would be: beside it, or above it if it is a second control's."""
    from llorch.audit_files import MAC_KEY

    return file.parent if (file.parent / MAC_KEY).exists() else file.parent.absolute().parent


def _keys(root: Path, exported: Exported | None) -> tuple[bytes | None, Ed25519PublicKey]:
    """The key of the macs, if it can be read, and the one to check signatures with: that of an export counts first."""
    from llorch.audit_files import MAC_KEY, Keys

    there = (root / MAC_KEY).exists()
    if exported is not None and not os.access(root / MAC_KEY, os.R_OK):
        return None, exported.public
    if not there:
        what = f"no keys of an audit log are in {root}"
        raise Failure(what, code=Exit.NOT_FOUND, hint="give the control's --data-dir, or an export as --checkpoint")
    keys = Keys.read(root)
    return keys.mac, exported.public if exported is not None else keys.public


def _of_folder(root: Path) -> list[list[Path]]:
    from llorch.audit_files import chains

    found = chains(root)
    if not found:
        raise Failure(f"there is no audit log in {root}", code=Exit.NOT_FOUND)
    return _by_chain([path for files in found for path in files])


def _need(files: Iterable[Path]) -> None:
    for path in files:
        if not path.exists():
            raise Failure(f"{path} is not there", code=Exit.NOT_FOUND)


def _by_chain(files: list[Path]) -> list[list[Path]]:
    """The files of each chain in their order, by what their first lines say. A file that says nothing is in all wrong;
    an empty one is the next file of a log, or all of it.
    """
    from llorch.audit_files import first_checkpoint

    placed: dict[str, list[tuple[int, Path]]] = {}
    empty = []
    for path in files:
        try:
            if path.stat().st_size == 0:
                empty.append(path)
                continue
            chain, seq = first_checkpoint(path) or (str(path), 0)
        except OSError as error:
            raise Failure(f"{path} can't be read: {error.strerror}") from None
        placed.setdefault(chain, []).append((seq, path))
    return [[path for _, path in sorted(each)] for each in placed.values()] or [empty[:1]]


def _check_all(
    chains: list[list[Path]], mac: bytes | None, public: Ed25519PublicKey, exported: Exported | None
) -> list[_Found]:
    return [_check(files, mac, public, exported) for files in chains]


def _check(files: list[Path], mac: bytes | None, public: Ed25519PublicKey, exported: Exported | None) -> _Found:
    from llorch.audit_chain import Verifier
    from llorch.audit_files import read_lines

    verifier = Verifier(public, mac, exported=exported.checkpoints if exported is not None else ())
    at = None
    try:
        for path in files:
            for number, line in enumerate(read_lines(path), 1):
                if not verifier.take(line):
                    at = f"{path}:{number}"
                    break
            if at is not None:
                break
    except OSError as error:
        raise Failure(f"{path} can't be read: {error.strerror}") from None
    verdict = verifier.finish()
    return _Found(files, verdict, at if at is not None or verdict.whole else str(files[-1]))


# ---------------------------------------------------------------- exports


def _read_export(path: Path) -> Exported:
    from llorch.audit_chain import MAX_EXPORT_BYTES, decode_export

    try:
        with path.open("rb") as file:
            return decode_export(file.read(MAX_EXPORT_BYTES))
    except FileNotFoundError:
        raise Failure(f"{path} is not there", code=Exit.NOT_FOUND) from None
    except OSError as error:
        raise Failure(f"{path} can't be read: {error.strerror}") from None
    except ValueError as error:
        raise usage(f"{path}: {error}", "`llorch audit export --out FILE` writes one") from None


def _replace(path: Path, text: str) -> None:
    try:
        whole_file.replace(path, text.encode("ascii"), mode=None)
    except OSError as error:
        raise Failure(f"{path} can't be written: {error.strerror}") from None


app.command("verify")(local_command(verify))
app.command("export")(with_flags(lambda given: export(None, **given), export, ()))
