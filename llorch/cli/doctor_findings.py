"""What `llorch doctor` says: findings, each with what mends it, and those that every role has in common.

Owns the rule that whatever is not well comes with its mend, and the limits from which on something is not well. Facts
and `now` (seconds since 1970) come in; the looks that gather them are elsewhere. Never holds a secret.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

DAY_S = 86_400.0
SOON_S = 7 * DAY_S  # a certificate or token with less time left needs a person now
FREE_WARN_BYTES = 1 << 30  # logs and a model's download fill a GiB in an hour
FREE_FAIL_BYTES = 100 << 20  # certificates and tokens are replaced whole: a full disk stops renewals
SKEW_WARN_S = 5.0  # a clock that is set by NTP is off by milliseconds
SKEW_FAIL_S = 60.0  # certificates and tokens begin and end at the wrong moment
FILES_WARN = 4_096  # a connection is a file: each client, each node, each engine
FILES_FAIL = 256


class State(StrEnum):
    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """`found`: what was seen. `mend`: the command or the edit that mends it; empty only where all is well."""

    check: str
    state: State
    found: str
    mend: str = ""

    def __post_init__(self) -> None:
        if (self.state is State.OK) == bool(self.mend):
            raise ValueError(f"{self.check}: what is not well needs a mend, and nothing else does")


def ok(check: str, found: str) -> Finding:
    return Finding(check, State.OK, found)


def warn(check: str, found: str, mend: str) -> Finding:
    return Finding(check, State.WARN, found, mend)


def fail(check: str, found: str, mend: str) -> Finding:
    return Finding(check, State.FAIL, found, mend)


def unseen(check: str, limit_s: float) -> Finding:
    """Something that a look waited for has not answered."""
    return fail(
        check,
        f"no answer within {limit_s:.0f} s: this machine's network, disk or driver hangs",
        "look for processes in state D: `ps -eo pid,stat,wchan:20,comm`; then run it again",
    )


def settings(files: tuple[str, ...], warnings: tuple[str, ...], role: str) -> list[Finding]:
    """Settings that could be read whole: where from, and what is doubtful about them."""
    source = f"from {', '.join(files)}, flags and environment" if files else "from flags, environment and defaults"
    mend = f"`llorch config show {role}` shows every setting and where it comes from"
    return [ok("settings", source), *(warn("settings", text, mend) for text in warnings)]


# ---------------------------------------------------------------- time


def span(seconds: float) -> str:
    """A length of time as a person says it."""
    for name, length_s in (("day", DAY_S), ("hour", 3_600.0), ("minute", 60.0)):
        if seconds >= 2 * length_s:
            return f"{seconds / length_s:.0f} {name}s"
    return f"{seconds:.0f} s"


def expiry(check: str, what: str, begins: float, ends: float, now: float, mend: str) -> Finding:
    """Whether something is good now, and for how long still. `mend` makes another."""
    if now < begins:
        return fail(
            check,
            f"{what} is not good yet: it begins in {span(begins - now)}, so this machine's clock is likely wrong",
            "set the clock: `timedatectl set-ntp true`",
        )
    left_s = ends - now
    if left_s <= 0:
        return fail(check, f"{what} expired {span(-left_s)} ago", mend)
    if left_s < SOON_S and left_s < (ends - begins) / 3:
        return warn(check, f"{what} expires in {span(left_s)}", mend)
    return ok(check, f"{what} is good for {span(left_s)}")


def clock(skew_s: float, whose: str) -> Finding:
    """`skew_s`: how far another's clock is ahead of this machine's."""
    apart = f"this machine's clock and that of {whose} are {span(abs(skew_s))} apart"
    way = "behind" if skew_s > 0 else "ahead"
    mend = f"set both by NTP: `timedatectl set-ntp true` (this one is {way})"
    if abs(skew_s) > SKEW_FAIL_S:
        return fail("clock", f"{apart}: certificates and tokens are taken for expired, or for not valid yet", mend)
    if abs(skew_s) > SKEW_WARN_S:
        return warn("clock", apart, mend)
    return ok("clock", f"the same as that of {whose}, to the second")


# ---------------------------------------------------------------- this machine


@dataclass(frozen=True, slots=True)
class Directory:
    """`above`: the nearest directory that is there, where this one is not. `mode`: its permission bits."""

    path: str
    there: bool
    is_directory: bool = True
    above: str = ""
    writable: bool = True
    mode: int = 0o700
    owned: bool = True
    free_bytes: int | None = None


def directory(check: str, facts: Directory, setting: str) -> Finding:
    """Where a role keeps its state."""
    path = facts.path
    if not facts.is_directory:
        return fail(check, f"{path} is not a directory", f"move it away, or {setting} DIR")
    if not facts.writable:
        where = path if facts.there else f"{path} is not there, and {facts.above}"
        return fail(
            check, f"{where} can't be written by this user", f"chown it to the user that runs llorch, or {setting} DIR"
        )
    if not facts.there:
        return ok(check, f"{path} is not there yet: the first start makes it")
    if not facts.owned:
        return warn(
            check, f"{path} belongs to another user", f"run this as the user that runs llorch, or chown {path} to it"
        )
    if facts.mode & 0o022:
        return fail(
            check, f"others may write to {path} (mode {facts.mode:04o}), and so swap what is in it", f"chmod 700 {path}"
        )
    if facts.mode & 0o055:
        return warn(check, f"others may look into {path} (mode {facts.mode:04o})", f"chmod 700 {path}")
    return ok(check, f"{path} is there, can be written, and is private")


def disk(facts: Directory, setting: str) -> Finding | None:
    """None where it could not be asked."""
    if facts.free_bytes is None:
        return None
    found = f"{facts.free_bytes / (1 << 30):.1f} GiB free at {facts.path}"
    mend = f"make room: `du -xh --max-depth=2 {facts.above or facts.path}`; or {setting} DIR on another disk"
    if facts.free_bytes < FREE_FAIL_BYTES:
        return fail("disk", f"{facts.free_bytes >> 20} MiB free at {facts.path}", mend)
    return warn("disk", found, mend) if facts.free_bytes < FREE_WARN_BYTES else ok("disk", found)


@dataclass(frozen=True, slots=True)
class SecretFile:
    """`mode` None: it can't be read, and `why` says why. `ours`: llorch made it, and refuses it while it lies open."""

    path: str
    mode: int | None
    why: str | None = None
    ours: bool = True


def secret_files(files: tuple[SecretFile, ...]) -> list[Finding]:
    """Whether files that hold secrets are for their owner alone."""
    found = [
        fail("secrets", f"{file.path} can't be read: {file.why}", "run this as the user that runs llorch")
        for file in files
        if file.why is not None
    ]
    for file in files:
        if file.mode is not None and file.mode & 0o077:
            state = State.FAIL if file.ours else State.WARN  # a mount of secrets may know no modes
            seen = f"others may read {file.path} (mode {file.mode:04o})"
            found.append(Finding("secrets", state, seen, f"chmod 600 {file.path}"))
    there = sum(file.mode is not None for file in files)
    return found or [ok("secrets", f"files with secrets: {there or 'none yet'}, readable by their owner alone")]


def open_files(hard_limit: int | None) -> Finding:
    """The hard limit: a role raises its own soft one up to it. None: there is none."""
    if hard_limit is None:
        return ok("files", "no limit to open files")
    found = f"{hard_limit} files may be open at once; every connection is one"
    mend = "LimitNOFILE=65536 in the unit of systemd, or `ulimit -Hn 65536` before it is started"
    if hard_limit < FILES_FAIL:
        return fail("files", found, mend)
    return warn("files", found, mend) if hard_limit < FILES_WARN else ok("files", found)


class Use(StrEnum):
    """What there is at an address where a role is to listen."""

    ANY = "any"  # port 0
    FREE = "free"
    TAKEN = "taken"
    IMPOSSIBLE = "impossible"


@dataclass(frozen=True, slots=True)
class Port:
    """`by`: who listens there, as far as this user may know; `ours`: a role of llorch, the one that is looked at."""

    bind: str
    use: Use
    why: str = ""
    by: str = ""
    ours: bool = False


def port(facts: Port, role: str) -> Finding:
    match facts.use:
        case Use.ANY:
            return ok("port", "port 0: a free one at each start, which no firewall rule can name")
        case Use.FREE:
            return ok("port", f"{facts.bind} is free")
        case Use.IMPOSSIBLE:
            return fail("port", f"{facts.bind} can't be listened on: {facts.why}", "give another --bind HOST:PORT")
        case _ if facts.ours:
            return ok("port", f"this {role} listens on {facts.bind}{f' ({facts.by})' if facts.by else ''}")
        case _:
            by = facts.by or "another user's process"
            return fail(
                "port",
                f"{facts.bind} is taken by {by}, which is not this {role}",
                f"end it, or give another --bind HOST:PORT; `ss -ltnp 'sport = :{facts.bind.rpartition(':')[2]}'`",
            )
