"""llorch's processes as a benchmark starts, pins, measures and ends them; and what it asks of a control beforehand.

Owns the processes that it starts and ends them by pid. Tokens are made at run time, travel in environments, and are
never printed. Never generates load.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shlex
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

ROOT = Path(__file__).parents[2]
READY_WITHIN_S = 30.0
LOOK_AGAIN_S = 0.05
CALL_TIMEOUT_S = 10.0
END_WITHIN_S = 10.0
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
PAGE_BYTES = os.sysconf("SC_PAGESIZE")
RATE_PER_S = 1_000_000  # of one principal; the default, 1,000, is what a benchmark would measure otherwise
NODE = "gpu-1"


class Role:
    """One llorch process (or another Python module), whose log is a file."""

    def __init__(
        self,
        folder: Path,
        name: str,
        words: Sequence[str],
        env: dict[str, str],
        profile: str | None = None,
        *,
        cores: set[int] | None = None,
        module: str = "llorch",
        pause_s: float = LOOK_AGAIN_S,
    ) -> None:
        """`cores`: where it runs. `pause_s`: between two looks at its log, when it is waited for."""
        self.name, self.log, self._pause_s = name, folder / f"{name}.log", pause_s
        profiled = ["-m", "cProfile", "-o", f"{profile}/{name}.prof"] if profile else []
        pinned = ["taskset", "-c", ",".join(map(str, sorted(cores)))] if cores else []
        command = [name] if module == "llorch" else []
        with self.log.open("wb") as log:
            argv = [*pinned, sys.executable, *profiled, "-m", module, *command, *words]
            self.process = subprocess.Popen(argv, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=env, cwd=folder)

    @property
    def pid(self) -> int:
        return self.process.pid

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_for(self, word: str) -> None:
        until = time.monotonic() + READY_WITHIN_S
        while word not in self.text():
            if self.process.poll() is not None or time.monotonic() > until:
                sys.stderr.write(self.text())
                raise SystemExit(f"the {self.name} did not come so far as to say {word!r}")
            time.sleep(self._pause_s)

    def ready(self) -> str:
        """Its URL, from its ready line."""
        self.wait_for("ready url=")
        return next(line for line in self.text().splitlines() if line.startswith("ready url=")).removeprefix(
            "ready url="
        )

    def end(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(END_WITHIN_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    # ---- what it costs

    def cpu_s(self) -> float:
        return cpu_s(self.pid)

    def rss(self) -> int:
        return rss(self.pid)


def cpu_s(pid: int) -> float:
    """CPU seconds of a process since its start, in user and kernel, with those of threads that have ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S


def rss(pid: int) -> int:
    """Bytes of memory that a process has resident, shared ones too."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_BYTES


def pss(pid: int) -> int | None:
    """As `rss`, and of what n processes share an n-th. Roles let only root look; None where one may not."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), None)


def busy_s() -> float:
    """CPU seconds that all cores of the machine have worked, or had to let somebody else's machine work."""
    fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields)
    return (user + nice + system + irq + softirq + steal) / TICKS_PER_S


class Meter:
    """CPU seconds from its making on: of each role, of this process as `load`, and of whatever else runs, `others`.

    Where others have used much, a latency is as much theirs, and whatever shares a core's caches costs more.
    """

    def __init__(self, roles: Sequence[Role]) -> None:
        self._roles = roles
        self._at, self._before = time.monotonic(), self._read()

    def _read(self) -> dict[str, float]:
        own = {role.name: role.cpu_s() for role in self._roles} | {"load": time.process_time()}
        return own | {"others": busy_s() - sum(own.values())}

    def seconds(self) -> dict[str, float]:
        return {name: max(0.0, now - self._before[name]) for name, now in self._read().items()}

    def cores(self) -> dict[str, float]:
        """The same, as a part of one core's time."""
        took_s = time.monotonic() - self._at
        return {name: round(spent / took_s, 3) for name, spent in self.seconds().items()}


def pin(number: int) -> set[int] | None:
    """The `number`-th core this process may use, for a process; None where there are too few to part them."""
    cores = sorted(os.sched_getaffinity(0))
    return {cores[number]} if len(cores) > 1 and number < len(cores) else None


def clean_env(**more: str) -> dict[str, str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("LLORCH_")}
    return env | {"PYTHONPATH": str(ROOT), **more}


# ---------------------------------------------------------------- a control, a node, an engine


def node_settings(engine: str, model: str, pools: int, slots: int, model_of: Callable[[int], str]) -> str:
    """YAML of a node whose pools are all the one `engine`, which calls its model `model`."""
    listed = [
        f"{{id: p{number}, engine: external, url: {engine}, model: {model_of(number)}, "
        f"engine_model: {model}, slots: {slots}}}"
        for number in range(pools)
    ]
    return "\n".join(["pools:", *(f"  - {pool}" for pool in listed), ""])


def join_command(folder: Path) -> tuple[dict[str, str], list[str]]:
    """What `llorch token join` prints for a person to copy: an environment, and the words after `llorch node`. The
    control's data directory is `control`, in `folder`.
    """
    words = [sys.executable, "-m", "llorch", "token", "join", "--data-dir", f"{folder}/control"]
    ran = subprocess.run(words, capture_output=True, text=True, timeout=30, env=clean_env(HOME=str(folder)), cwd=folder)
    if ran.returncode != 0:
        raise SystemExit(f"llorch token join: {ran.stderr}")
    variable, _, _, *join = shlex.split(ran.stdout)
    name, _, value = variable.partition("=")
    return clean_env(**{name: value}), join


@dataclass
class Cluster:
    """A control and what it was started with. `cores`: where llorch runs, None for anywhere. `profile`: a folder, in
    which both roles leave what cProfile saw of them; they are slower then."""

    folder: Path
    tls: bool
    cores: set[int] | None
    profile: str | None = None
    token: str = field(default_factory=lambda: secrets.token_hex(24), repr=False)
    admin: str = field(default_factory=lambda: secrets.token_hex(24), repr=False)
    service: str = field(default_factory=lambda: secrets.token_hex(24), repr=False)
    node_token: str = field(default_factory=lambda: secrets.token_hex(24), repr=False)
    url: str = ""
    roles: list[Role] = field(default_factory=list)

    @property
    def control(self) -> Role:
        return next(role for role in self.roles if role.name == "control")

    @property
    def node(self) -> Role:
        return next(role for role in self.roles if role.name == "node")

    @property
    def port(self) -> int:
        return urlsplit(self.url).port or 0

    def secrets_env(self) -> dict[str, str]:
        """Three clients may come, as many as a small cluster has; one of them is the benchmark."""
        others = ",".join(f"other-{number}={secrets.token_hex(24)}" for number in range(2))
        tokens = {"LLORCH_API_TOKEN": f"bench={self.token},{others}", "LLORCH_ADMIN_TOKEN": f"bench-admin={self.admin}"}
        if not self.tls:
            tokens |= {"LLORCH_SERVICE_TOKEN": self.service, "LLORCH_NODE_TOKEN": self.node_token}
        return clean_env(**tokens, HOME=str(self.folder))

    def control_words(self, data: str = "control") -> list[str]:
        folder = self.folder / data
        folder.mkdir(mode=0o700, exist_ok=True)
        (folder / "nodes.json").write_text('{"nodes": []}')  # nothing was here before: there is nobody to wait for
        words = ["--bind", "127.0.0.1:0", "--data-dir", str(folder), "--rate-requests", str(RATE_PER_S)]
        return [*words, "--shutdown-grace", "0s", *(["--tls", "on"] if self.tls else [])]

    def start_control(self, *words: str) -> Role:
        """Beyond its ready line. With TLS it makes an authority of its own, as it would for any cluster."""
        role = Role(
            self.folder, "control", [*self.control_words(), *words], self.secrets_env(), self.profile, cores=self.cores
        )
        self.roles.append(role)
        self.url = role.ready()
        return role

    def start_node(self, config: str) -> Role:
        """One that has joined: with TLS by a join token, and a certificate on its link from then on."""
        (self.folder / "node.yaml").write_text(config)
        words = ["--node-id", NODE, "--bind", "127.0.0.1:0", "--data-dir", f"{self.folder}/node"]
        words += ["--config", f"{self.folder}/node.yaml", "--shutdown-grace", "0s"]
        if self.tls:
            env, join = join_command(self.folder)
        else:
            env = clean_env(LLORCH_SERVICE_TOKEN=self.service, LLORCH_NODE_TOKEN=self.node_token)
            join = ["--join", self.url]
        role = Role(
            self.folder, "node", [*join, *words], env | {"HOME": str(self.folder)}, self.profile, cores=self.cores
        )
        self.roles.append(role)
        role.ready()
        return role

    # ---- asking it

    def client_context(self) -> ssl.SSLContext | None:
        """One that trusts the cluster's authority and no other; None without TLS."""
        if not self.tls:
            return None
        blind = ssl.create_default_context()
        blind.check_hostname, blind.verify_mode = False, ssl.CERT_NONE  # it is asked on loopback, by who started it
        with urllib.request.urlopen(f"{self.url}/cacerts", timeout=CALL_TIMEOUT_S, context=blind) as answer:
            return ssl.create_default_context(cadata=answer.read().decode())

    def get(self, path: str, context: ssl.SSLContext | None) -> bytes:
        request = urllib.request.Request(self.url + path, headers={"Authorization": f"Bearer {self.admin}"})
        with urllib.request.urlopen(request, timeout=CALL_TIMEOUT_S, context=context) as answer:
            return bytes(answer.read())

    def wait_until_bound(self, pools: int, context: ssl.SSLContext | None) -> None:
        """Until every pool may be placed on, and every node has its link."""
        until = time.monotonic() + READY_WITHIN_S
        seen: Any = None
        while time.monotonic() < until:
            with contextlib.suppress(urllib.error.URLError, TimeoutError):
                nodes = json.loads(self.get("/v2/nodes", context))["nodes"]
                seen = sum(pool["bound"] for node in nodes for pool in node["pools"]), [node["link"] for node in nodes]
                if seen[0] >= pools and all(seen[1]):
                    return
            time.sleep(LOOK_AGAIN_S)
        for role in self.roles:
            sys.stderr.write(role.text()[-1_500:])
        raise SystemExit(f"{pools} pools were to be bound; last seen (bound, links): {seen}")


@contextlib.contextmanager
def cluster(*, tls: bool = False, profile: str | None = None) -> Iterator[Cluster]:
    """A folder and no process yet. At the end of the block all that was started is ended."""
    with tempfile.TemporaryDirectory(prefix="llorch-bench-", ignore_cleanup_errors=True) as folder:
        running = Cluster(Path(folder), tls, pin(0), profile)
        try:
            yield running
        finally:
            for role in reversed(running.roles):
                role.end()
