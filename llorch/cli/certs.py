"""`llorch certs status|issue|rotate|revoke|export|import`: the certificates of a cluster, on a control's own machine.

They work on its data directory; a control that runs there takes a change over within a second or two.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llorch.cli.control_here import DataDir, PassphraseFile, local_settings
from llorch.cli.exits import Exit
from llorch.cli.flags import local_command
from llorch.cli.output import Column, Failure, Output, hint, usage, warn, write_err, write_out
from llorch.cli.units import age
from llorch.config_kinds import NODE_ID_PATTERN

if TYPE_CHECKING:
    from llorch.control.authority import Authority

app = typer.Typer(help="The cluster's certificates.", no_args_is_help=True, rich_markup_mode=None)

NodeId = Annotated[str, typer.Argument(metavar="NODE", show_default=False)]
EXPORT_VERSION = 1


def _authority(data_dir: str | None, passphrase_file: str | None) -> tuple[Authority, str]:
    from llorch.control.authority import Authority

    settings = local_settings(data_dir, None, passphrase_file)
    if not Authority.exists(settings.data_dir):
        raise Failure(
            f"there is no authority in {settings.data_dir}",
            hint="a control that listens beyond loopback makes one; --data-dir names another directory",
        )
    return Authority.open(settings.data_dir, settings.ca_passphrase, time.time())[0], settings.data_dir


_COLUMNS = (
    Column("name", lambda row: row["name"]),
    Column("kind", lambda row: row["kind"]),
    Column("state", lambda row: row["state"]),
    Column("expires", lambda row: age(row["expires_in_s"] * 1_000) if row["expires_in_s"] > 0 else "expired"),
    Column("sha256", lambda row: row["sha256"]),
)


def status(output: Output, data_dir: DataDir = None, ca_passphrase_file: PassphraseFile = None) -> None:
    """List the authorities and certificates in a data directory, and when they expire."""
    from llorch import pki
    from llorch.control.authority import Authority
    from llorch.node.certificate import NodeCertificate

    settings, now = local_settings(data_dir, None), time.time()
    rows: list[dict[str, Any]] = []
    if Authority.exists(settings.data_dir):
        trust = _authority(data_dir, ca_passphrase_file)[0].trust
        for place, cert in enumerate(trust.bundle):
            state = "signs" if place == 0 else f"trusted, held by {len(trust.holders(cert, now))}"
            rows.append(_row("cluster", "authority", state, pki.ends(cert) - now, pki.pin_of(cert)))
        for one in trust.issued.values():
            refusal = trust.refusal(one.node_id, one.joined, one.ends, now)
            rows.append(_row(one.node_id, "node", refusal or "valid", one.ends - now, ""))
        rows += [_row(node_id, "node", "revoked", 0, "") for node_id in trust.revoked if node_id not in trust.issued]
    held = NodeCertificate.load_any(settings.data_dir)
    if held is not None:
        rows.append(_row(held.node_id, "own", "valid", held.ends - now, pki.pin_of(held.holding.cert)))
    if not rows:
        raise Failure(f"there are no certificates in {settings.data_dir}", hint="--data-dir names another directory")
    output.rows(rows, _COLUMNS, name=lambda row: str(row["name"]))


def _row(name: str, kind: str, state: str, expires_in_s: float, sha256: str) -> dict[str, Any]:
    return {"name": name, "kind": kind, "state": state, "expires_in_s": round(expires_in_s), "sha256": sha256}


def issue(
    _: Output,
    node_id: NodeId,
    out: Annotated[str, typer.Option("--out", metavar="FILE", help="Where to write it.", show_default=False)],
    replace: Annotated[bool, typer.Option("--replace", help="Also if the node has one.")] = False,
    data_dir: DataDir = None,
    ca_passphrase_file: PassphraseFile = None,
) -> None:
    """Make a certificate for a node that can't fetch one: put the file into its data directory as pki/node.pem."""
    import re

    from llorch import pki
    from llorch.control.authority import BY_HAND
    from llorch.node.certificate import Holding

    if not re.fullmatch(NODE_ID_PATTERN, node_id):
        raise usage(f"{node_id!r} is no id for a node", "letters, digits, . _ -, at most 63")
    authority, directory = _authority(data_dir, ca_passphrase_file)
    key = pki.make_key()
    life_s = local_settings(data_dir, None).node_cert_life
    csr = pki.make_request(key, node_id)
    chain = authority.issue_node(csr, node_id, time.time(), life_s, take_over=replace, token=BY_HAND)
    holding = Holding.of(key, chain, authority.trust.bundle_pem, node_id)
    _write(Path(out).expanduser(), holding.to_pem())
    write_err(f"{directory}: wrote {out}; it holds a key\n")


def rotate(
    _: Output,
    finish: Annotated[bool, typer.Option("--finish", help="Trust the older ones no more.")] = False,
    force: Annotated[bool, typer.Option("--force", help="With --finish: also if nodes have to join again.")] = False,
    data_dir: DataDir = None,
    ca_passphrase_file: PassphraseFile = None,
) -> None:
    """Begin to sign with a new authority. The older ones stay trusted until --finish."""
    from llorch.control.authority import Authority

    if force and not finish:
        raise usage("--force means nothing without --finish")
    authority, directory = _authority(data_dir, ca_passphrase_file)
    older = len(authority.trust.succeeded)
    if finish and not older:
        write_err(f"{directory}: there is no older authority, so nothing to finish\n")
        return
    if finish:
        pin = Authority.pin_in(directory)
        warn(f"clients that pinned an older authority are shut out: llorch context add NAME --url URL --ca-pin {pin}")
        authority.finish(time.time(), force=force)
        write_err(f"{directory}: the newest authority alone is trusted now\n")
        return
    authority.rotate(time.time())
    write_err(f"{directory}: a new authority signs; {older + 1} older {'is' if not older else 'are'} still trusted\n")
    hint("nodes renew when they next beat; `llorch certs status` shows who holds what; then --finish")
    hint(f"for clients, before that: llorch context add NAME --url URL --ca-pin {Authority.pin_in(directory)}")


def revoke(
    _: Output,
    node_id: NodeId,
    force: Annotated[bool, typer.Option("--force", help="Also one that this control has not heard of.")] = False,
    data_dir: DataDir = None,
    ca_passphrase_file: PassphraseFile = None,
) -> None:
    """Refuse every certificate that a node has been issued until now. It can join again with a new token."""
    authority, directory = _authority(data_dir, ca_passphrase_file)
    trust = authority.trust
    if node_id not in trust.issued and not force:
        if node_id not in trust.revoked:
            raise Failure(
                "no node has been issued a certificate under this name", code=Exit.NOT_FOUND,
                hint="`llorch certs status` lists them; --force for one of another control of this cluster",
            )  # fmt: skip
        write_err(f"{directory}: {node_id} is revoked already\n")
        return
    authority.revoke(node_id, time.time())
    write_err(f"{directory}: {node_id} is revoked\n")


def export(
    _: Output,
    file: Annotated[str, typer.Argument(metavar="FILE", show_default=False)],
    data_dir: DataDir = None,
    ca_passphrase_file: PassphraseFile = None,
) -> None:
    """Write what makes another control one of this cluster: authority, tokens, revocations. It holds the key."""
    from llorch.control.token_files import TokenFiles

    authority, directory = _authority(data_dir, ca_passphrase_file)
    files = TokenFiles(directory)
    files.load()
    value = {"llorch-export": EXPORT_VERSION, "authority": authority.export(), "tokens": files.tokens.to_json()}
    text = json.dumps(value, indent=1) + "\n"
    if file == "-":
        write_out(text)
    else:
        _write(Path(file).expanduser(), text.encode())
        write_err(f"{directory}: wrote {file}; whoever has it can pose as the cluster\n")


def import_(
    _: Output,
    file: Annotated[str, typer.Argument(metavar="FILE|-", show_default=False)],
    force: Annotated[bool, typer.Option("--force", help="Also over another authority.")] = False,
    data_dir: DataDir = None,
    ca_passphrase_file: PassphraseFile = None,
) -> None:
    """Take over what `export` wrote; again, to take over what has changed since. Revoked stays revoked."""
    from llorch.control.authority import Authority
    from llorch.control.token_files import TokenFiles
    from llorch.tokens import Tokens

    settings = local_settings(data_dir, None, ca_passphrase_file)
    try:
        value = json.loads(_read_private(file))
        if value["llorch-export"] != EXPORT_VERSION:
            raise ValueError("another version")
        files = {str(name): str(text) for name, text in value["authority"].items()}
        tokens = Tokens.from_json(value["tokens"])
    except (ValueError, KeyError, TypeError, AttributeError):
        raise Failure(f"{file} is not what `llorch certs export` writes") from None
    taken = Authority.take_over(settings.data_dir, files, settings.ca_passphrase, force=force)
    TokenFiles(settings.data_dir).merge(tokens)
    write_err(f"{settings.data_dir}: took over from {file}: {taken}; tokens; what was revoked\n")


def _read_private(file: str) -> bytes:
    """What `export` wrote. Raises ConfigError for a file that others may read: it holds the cluster's key."""
    from llorch import private

    if file == "-":
        return sys.stdin.buffer.read(private.MAX_FILE_BYTES) if sys.stdin is not None else b""
    data = private.read(Path(file).expanduser())
    if data is None:
        raise Failure(f"{file} is not there", code=Exit.NOT_FOUND)
    return data


def _write(path: Path, data: bytes) -> None:
    """A new file that nobody else may read; never over another."""
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
            out.write(data)
    except FileExistsError:
        raise Failure(f"{path} is there already", hint="give another name, or move it away") from None
    except OSError as error:
        raise Failure(f"{path} can't be written: {error.strerror}") from None


_COMMANDS: dict[str, Callable[..., Any]] = {
    "status": status, "issue": issue, "rotate": rotate, "revoke": revoke, "export": export, "import": import_,
}  # fmt: skip
for _name, _command in _COMMANDS.items():
    app.command(_name)(local_command(_command))
