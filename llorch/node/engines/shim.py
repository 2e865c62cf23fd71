"""Keeps one engine for as long as it lives, whoever is its agent. A program of its own, one for each engine.

    python -S -P -m llorch.node.engines.shim NAME

Owns what must hold before the engine's first instruction (a session of its own, SIGKILL at this program's death, no
rights beyond its parent's, no core dump, files for this user alone), the engine's log, its pid file, and the way it
ends: SIGTERM to its group, a grace, SIGKILL, and then all that it ever started, until no process is left. It ends the
engine when it is told to (SIGTERM; SIGUSR1: without grace), and when for as long as the orphan grace no live agent has
claimed it in its pid file. Never talks to the engine and never starts it again.

What to keep is one JSON object on stdin; one line of JSON on stdout says what came of it. The pid file is what an agent
of another version knows it by: its fields may be added to, never changed. Everything is loaded at the start, as the
package may be replaced underneath, and as little as can be, for all engines together pay for it.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import select
import signal
import sys
import time

from llorch.node.engines import shim_linux as linux
from llorch.node.engines.shim_claim import Claim, Json, identity, seconds
from llorch.node.engines.shim_files import RotatedLog, remove, replace

TICK_S = 1.0  # how often it is asked whether somebody claims the engine
SWEEP_S = 60.0  # a process that has not gone so long after SIGKILL is stuck in the kernel
SWEEP_AGAIN_S = 0.05
OOM_WINDOW_S = 30.0  # an engine whose worker was killed for memory may take so long to give up
READ_BYTES = 64 * 1024
LAST_READS = 64  # of what is still in the pipe when everything has ended
LAST_LINES, LAST_LINE_CHARS = 20, 300  # of the log, in the record of an end
NOT_STARTED = 127  # what shells use for a program that isn't there


class CannotStart(Exception):
    """`stage` is what could not be done, `error` why."""

    def __init__(self, stage: str, path: str, error: OSError) -> None:
        super().__init__(stage)
        self.said: Json = {"error": stage, "path": path, "errno": error.errno, "reason": error.strerror}


class Shim:
    """`wish` is what stdin said."""

    def __init__(self, wish: dict[str, object]) -> None:
        files: dict[str, str] = wish["files"]  # type: ignore[assignment]
        self.files = files
        self.argv: list[str] = wish["argv"]  # type: ignore[assignment]
        self.env: dict[str, str] = wish["env"]  # type: ignore[assignment]
        self.record: Json = wish["record"]  # type: ignore[assignment]
        own: Json = {"pid": os.getpid(), "start_time": linux.start_time(os.getpid())}
        self.claim = Claim(
            files["pid"], own, seconds(self.record.get("stop_grace_s"), 10.0),
            seconds(self.record.get("orphan_grace_s"), 300.0),
        )  # fmt: skip
        self.log = RotatedLog(files["log"])
        self.oom = linux.OomKills()
        self.engine = 0
        self.started: int | None = None
        self.digest = ""
        self.status: int | None = None  # as waitpid(2) has it
        self.childless = False
        self.told: set[int] = set()  # signals that came
        self.why: str | None = None  # it is to end
        self.kill_at: float | None = None
        self.unclaimed_since: float | None = None
        self.next_tick = 0.0
        self.poll = select.poll()
        self.woken, self.output = -1, -1
        self.watched: int | None = None  # the agent's pidfd, while it is in the poll

    # ------------------------------------------------------------ the start

    def start(self) -> None:
        """Raises CannotStart; then there is no engine and no pid file."""
        self._listen()
        agent = identity(self.record.get("agent"))
        if agent is None or not linux.lives(*agent):
            raise CannotStart("agent", "", OSError(errno.ESRCH, "the agent has gone"))
        try:
            self.log.open()
        except OSError as error:
            raise CannotStart("log", self.files["log"], error) from None
        gate, opens = os.pipe()
        failed, fails = os.pipe()
        self.output, output = os.pipe()
        self.engine = os.fork()
        if self.engine == 0:
            os.close(opens)  # so that the gate has an end
            self._become_engine(gate, fails, output)
        for descriptor in (gate, fails, output):
            os.close(descriptor)
        self._record_start(opens)
        try:
            os.write(opens, b"go")
        except BrokenPipeError:  # it has ended: that is for keep() to see
            pass
        os.close(opens)
        said = os.read(failed, 32)
        os.close(failed)
        if said:
            remove(self.files["pid"])
            raise CannotStart("program", self.argv[0], OSError(int(said), os.strerror(int(said))))
        self._see_argv()
        os.set_blocking(self.output, False)
        self.poll.register(self.output, select.POLLIN)
        self.log.note(f"engine started, pid {self.engine}")

    def _listen(self) -> None:
        """For signals, which from here on only say that there is something to do."""
        self.woken, wake = os.pipe()
        for descriptor in (self.woken, wake):
            os.set_blocking(descriptor, False)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        self.poll.register(self.woken, select.POLLIN)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, lambda number, _: self.told.add(number))
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)

    def _record_start(self, opens: int) -> None:
        """The pid file is there before the engine's first instruction: nothing that runs can be forgotten."""
        self.started = linux.start_time(self.engine)
        self.digest = linux.digest("\0".join(self.argv).encode("utf-8", "surrogateescape"))
        content = {
            "pid": self.engine, "start_time": self.started, "argv_digest": self.digest, **self.record,
            "shim": self.claim.own,
        }  # fmt: skip
        try:
            self.claim.write(content)
        except OSError as error:
            os.close(opens)  # and it ends before it has begun
            os.waitpid(self.engine, 0)
            raise CannotStart("record", self.files["pid"], error) from None
        remove(self.files["end"])

    def _become_engine(self, gate: int, fails: int, output: int) -> None:
        """In the child: never returns."""
        try:
            signal.set_wakeup_fd(-1)
            shim = os.getppid()
            os.setsid()
            linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
            linux.go_first()
            for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT, signal.SIGHUP):  # ignored up to here
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, ())
            nothing = os.open(os.devnull, os.O_RDONLY)
            for descriptor, standard in ((nothing, 0), (output, 1), (output, 2)):
                os.dup2(descriptor, standard)
            if os.read(gate, 1) and os.getppid() == shim == self.claim.own["pid"]:
                os.execvpe(self.argv[0], self.argv, self.env)
        except OSError as error:
            os.write(fails, str(error.errno).encode())
        except BaseException:
            os.write(fails, str(errno.EINVAL).encode())
        finally:
            os._exit(NOT_STARTED)

    # ------------------------------------------------------------ its life

    def keep(self) -> int:
        """Until the engine and everything it started have ended. This program's exit code."""
        while self.status is None:
            now = time.monotonic()
            self._wait(min(self.next_tick, self.kill_at if self.kill_at is not None else now + TICK_S) - now)
            self._reap()
            if self.status is not None:
                break
            if self.told:
                told, self.told = self.told, set()
                self.claim.held()  # the grace is the one that stands there now
                self._end("asked", at_once=signal.SIGUSR1 in told)
            now = time.monotonic()
            if now >= self.next_tick:
                self.next_tick = now + TICK_S
                self._tick(now)
            if self.kill_at is not None and now >= self.kill_at:
                self.kill_at = now + SWEEP_AGAIN_S
                self._signal(signal.SIGKILL)
        return self._finish()

    def _wait(self, timeout_s: float) -> None:
        """For a signal, for words of the engine, for the end of its agent, or for time to pass."""
        for descriptor, _ in self.poll.poll(max(0.0, timeout_s) * 1_000):
            if descriptor == self.woken:
                os.read(self.woken, READ_BYTES)
            elif descriptor == self.output:
                self._copy()
            else:  # the agent has ended
                self._ignore(descriptor)
                self.next_tick = 0.0

    def _copy(self) -> bool:
        """One piece of what the engine said. False: there is nothing more."""
        try:
            words = os.read(self.output, READ_BYTES)
        except BlockingIOError:
            return False
        if words:
            self.log.write(words)
            return True
        self._ignore(self.output)
        return False

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                self.childless = True
                return
            if pid == 0:
                return
            if pid == self.engine:
                self.status = status

    def _tick(self, now: float) -> None:
        self.oom.look(now)
        held = self.claim.held()
        self._watch_agent()
        self._see_argv()
        if held:
            self.unclaimed_since = None
            return
        if self.unclaimed_since is None:
            self.unclaimed_since = now
        due = self.unclaimed_since + self.claim.orphan_grace_s
        self.next_tick = min(self.next_tick, due) if now < due else self.next_tick
        if self.why is None and now >= due:
            self.log.note("no agent has claimed the engine in time")
            self._end("orphan", at_once=self.claim.orphan_grace_s == 0)

    def _watch_agent(self) -> None:
        """Hear of its end when it comes, not at the next tick. One that was replaced leaves the poll here."""
        descriptor = self.claim.agent.descriptor
        if self.watched is not None and self.watched != descriptor:
            self._ignore(self.watched)
        self.watched = descriptor if self.claim.agent.alive() else None
        if self.watched is not None:
            self.poll.register(self.watched, select.POLLIN)

    def _ignore(self, descriptor: int) -> None:
        try:
            self.poll.unregister(descriptor)
        except KeyError:
            pass

    def _see_argv(self) -> None:
        """A script is run by its interpreter, and some engines name themselves: the proof is what stands there now."""
        seen = linux.argv_digest(self.engine)
        if seen is None or seen == self.digest:
            return
        try:
            self.claim.change(argv_digest=seen)
            self.digest = seen
        except OSError:  # at the next tick, then
            pass

    def _end(self, why: str, *, at_once: bool = False) -> None:
        now = time.monotonic()
        if self.why is None:
            self.why = why
            if not at_once:
                self.kill_at = now + self.claim.stop_grace_s
                self._signal(signal.SIGTERM)
        if at_once:
            self.kill_at = now

    def _signal(self, number: int) -> None:
        """To the engine's group, which is its own as long as it has not been waited for."""
        if self.engine and self.status is None:
            try:
                os.killpg(self.engine, number)
            except (ProcessLookupError, PermissionError):
                pass

    # ------------------------------------------------------------ its end

    def _finish(self) -> int:
        assert self.status is not None  # keep() waited for it
        stuck = self._sweep()
        for _ in range(LAST_READS):
            if not self._copy():
                break
        code = os.waitstatus_to_exitcode(self.status)
        oom = self.why is None and code != 0 and self.oom.within(OOM_WINDOW_S, time.monotonic())
        last = self.log.last_lines(LAST_LINES, LAST_LINE_CHARS)
        how = f"exited with code {code}" if code >= 0 else f"killed by signal {-code}"
        self.log.note(f"engine {how}{', out of memory' if oom else ''}{f', {stuck} processes stuck' if stuck else ''}")
        content: Json = {
            "pid": self.engine, "start_time": self.started, "exit_code": code if code >= 0 else None,
            "signal": -code if code < 0 else None, "oom": oom, "why": self.why, "lost_bytes": self.log.lost_bytes,
            "stuck": stuck, "last": last,
        }  # fmt: skip
        try:
            replace(self.files["end"], content)
        except OSError:
            pass
        if not self.claim.held():
            self.claim.give_up(self.files["handoff"], self.files["key"])
        self.log.close()
        return code if code >= 0 else 128 - code

    def _sweep(self) -> int:
        """End whatever the engine started, wherever it has gone: orphans become children of this process. How many
        would not end.
        """
        until = time.monotonic() + SWEEP_S
        if sys.platform != "linux":  # there they do not
            try:
                os.killpg(self.engine, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                pass
        while True:
            self._reap()
            if self.childless or time.monotonic() > until:
                return len(linux.children())
            for pid in linux.children():
                try:
                    os.kill(pid, signal.SIGKILL)
                except (ProcessLookupError, PermissionError):
                    pass
            self._wait(SWEEP_AGAIN_S)


def harden() -> None:
    """What holds for this program and for all that it starts."""
    if os.getpid() != os.getsid(0):
        os.setsid()
    os.umask(0o077)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core would hold prompts
    # No program gains rights by being executed, set-uid or with file capabilities. That includes nvidia-modprobe, so
    # the driver's device files have to be there: the agent's own look at the GPUs, which comes first, makes them.
    linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
    linux.prctl(linux.PR_SET_CHILD_SUBREAPER, 1)


def tell(content: Json) -> None:
    """The agent, once; from then on this program has nobody to talk to."""
    try:
        os.write(1, json.dumps(content).encode() + b"\n")
    except OSError:
        pass
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nothing, number)
    os.close(nothing)


def main() -> int:
    with os.fdopen(0, "rb", closefd=False) as stdin:
        shim = Shim(json.loads(stdin.read()))
    try:
        harden()
        shim.start()
    except CannotStart as error:
        tell(error.said)
        return NOT_STARTED
    tell({"pid": shim.engine, "start_time": shim.started})
    os.chdir("/")
    linux.give_back_memory()
    try:
        return shim.keep()
    except Exception as error:
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        shim.log.note(f"the shim failed: {type(error).__name__}, line {trace.tb_lineno if trace is not None else 0}")
        raise


if __name__ == "__main__":
    sys.exit(main())
