"""`llorch dev`: a whole cluster on this machine, for as long as the command runs.

Owns what is started with which flags and in which order, when a person is told what, and the answer to -p. The roles
are real processes, as in production, and start all at once: the nodes know the URL of a control that is not there yet,
and register when it is. Ending them is the keeper's (see `llorch.cli.keeper`), whatever ends this one.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llorch.cli.exits import Exit
from llorch.cli.flags import with_flags
from llorch.cli.output import Failure, is_terminal, usage, write_err
from llorch.client.text import plain

if TYPE_CHECKING:
    from llorch.cli.dev_cluster import Cluster, LogTail
    from llorch.cli.dev_words import Look
    from llorch.client.api import LlorchClient
    from llorch.client.events import Event

LOAD_TIMEOUT = "10m"  # of a node: a large model on a slow disk
MODEL_WITHIN_S = 660.0  # for pools to get ready: a large model on a slow disk
LOOK_FIRST_S, LOOK_MOST_S = 0.03, 0.25  # between two looks at the nodes: a small model is loaded in no time
LOGS_EVERY_S = 0.1
TASKS_EVERY_S = 0.25
PROGRESS_EVERY_S = 0.2
TASK_GRACE = "2s"  # for what still runs when the command is ended
AT_ONCE = ("--recovery-window", "0s")  # nothing was here before
MAX_NODES = 64


def dev(
    _: object,
    nodes: Annotated[int, typer.Option("--nodes", metavar="N", min=1, max=MAX_NODES, help="How many nodes.")] = 1,
    engine: Annotated[
        str, typer.Option("--engine", metavar="llamacpp|simulated", help="simulated needs no model and no wheel.")
    ] = "llamacpp",
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", metavar="PROMPT", help="Print one answer, and end.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", metavar="N", min=1, help="End -p's answer after this many tokens.")
    ] = None,
    model: Annotated[str, typer.Option("--model", "-m", metavar="REF", help="demo, or file:/abs/path.gguf")] = "demo",
    slots: Annotated[str | None, typer.Option("--slots", metavar="N", help="Sequences at a time, per node.")] = None,
    ctx: Annotated[str | None, typer.Option("--ctx", metavar="N", help="Tokens of context per slot.")] = None,
    port: Annotated[int, typer.Option("--port", metavar="N", min=0, max=65535, help="0: a free one.")] = 0,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show what the roles log.")] = False,
) -> None:
    """Run a whole cluster on this machine, until ^C."""


def _run(given: dict[str, Any]) -> Any:
    from llorch.cli import dev_checks

    engine, prompt, max_tokens = given["engine"], given.pop("prompt"), given.pop("max_tokens")
    if prompt is not None and not prompt.strip():
        raise usage("the prompt is empty", 'llorch dev -p "Hello"')
    if max_tokens is not None and prompt is None:
        raise usage("--max-tokens is for -p", 'llorch dev -p "Hello" --max-tokens 32')
    if engine == "auto":
        engine = "llamacpp"
    if engine not in ("llamacpp", "simulated"):
        raise usage(f"{engine!r} is not one of llamacpp, simulated")
    node_words = _node_words(engine, given["model"], given["slots"], given["ctx"])
    dev_checks.check_system()
    if engine == "llamacpp":
        dev_checks.check_wheel()
        dev_checks.check_model(given["model"])
    body = None if prompt is None else _body(prompt, max_tokens)
    return _Dev(given["nodes"], engine, node_words, given["port"], given["verbose"]).run(body)


def _body(prompt: str, max_tokens: int | None) -> dict[str, Any]:
    return {"prompt": prompt} | ({} if max_tokens is None else {"max_tokens": max_tokens})


def _node_words(engine: str, model: str, slots: str | None, ctx: str | None) -> list[str]:
    """The flags of a node, checked here: what is wrong with them is told before anything starts."""
    from llorch.config import NodeSettings, resolve

    flags = {"engine": engine, "model": model, "slots": slots, "ctx": ctx}
    checked = {"join": "http://127.0.0.1:1", "service-token": "x" * 32, "dev": True, **flags}
    resolve(NodeSettings, flags=checked, env={}, files=[], read_file=lambda _: "")
    return [word for name, value in flags.items() if value is not None for word in (f"--{name}", value)]


class Waiting:
    """The line that says what is being waited for. `write` is None where there is no terminal for it."""

    def __init__(self, write: Callable[[str], None] | None) -> None:
        self.text = "starting"
        self._write = write
        self._began = time.monotonic()

    @contextlib.asynccontextmanager
    async def shown(self) -> AsyncIterator[None]:
        """While the block runs; nothing is left of it after."""
        if self._write is None:
            yield
            return
        ticking = asyncio.create_task(self._tick(self._write), name="dev.waiting")
        try:
            yield
        finally:
            ticking.cancel()
            await asyncio.gather(ticking, return_exceptions=True)
            self._write(_CLEAR_LINE)

    async def _tick(self, write: Callable[[str], None]) -> None:
        from llorch.cli.dev_words import progress

        shown = ""
        while True:
            line = progress(self.text, time.monotonic() - self._began, shutil.get_terminal_size().columns)
            if line != shown:
                write(_CLEAR_LINE + line)
                shown = line
            await asyncio.sleep(PROGRESS_EVERY_S)


_CLEAR_LINE = "\r\x1b[K"


class _Dev:
    def __init__(self, nodes: int, engine: str, node_words: list[str], port: int, verbose: bool) -> None:
        self._nodes = [f"dev-{number}" for number in range(1, nodes + 1)]
        self._engine = engine
        self._node_words = ["--bind", "127.0.0.1:0", "--allow-cpu", "--load-timeout", LOAD_TIMEOUT, *node_words]
        self._port = port
        self._verbose = verbose
        self._terminal = is_terminal(sys.stderr)
        self._waiting = Waiting(write_err if self._terminal and not verbose else None)
        self._serving = False

    async def run(self, body: Mapping[str, Any] | None) -> int:
        """`body`: a task without its model, to be answered and no more."""
        from llorch.cli import contexts, dev_checks
        from llorch.cli.dev_cluster import Cluster, Tokens
        from llorch.cli.interrupts import Interrupted, Interrupts

        with Interrupts() as interrupts:
            try:
                if body is None:
                    dev_checks.check_context_place(contexts.contexts_path(os.environ))
                with dev_checks.held_port(self._port) as port:
                    async with Cluster.starting(Tokens.make()) as cluster:
                        return await self._with(cluster, port, body, interrupts.guarded)
            except (asyncio.CancelledError, Interrupted) as ended:
                if not interrupts.ours(ended):
                    raise
                return Exit.OK if self._serving else Exit.INTERRUPTED  # ^C is how it is meant to end

    async def _with(self, cluster: Cluster, port: int, body: Mapping[str, Any] | None, guarded: Any) -> int:
        watch = asyncio.create_task(self._show_logs(cluster), name="dev.logs") if self._verbose else None
        try:
            async with contextlib.AsyncExitStack() as exits:
                async with self._waiting.shown():
                    url = await self._start(cluster, port)
                    # Not before: it takes a while, of which the roles make better use.
                    from llorch.client.api import LlorchClient

                    client = await exits.enter_async_context(LlorchClient(url, cluster.tokens.api))
                    look, nodes = await self._nodes_ready(cluster, client)
                if body is not None:
                    return await self._answer(client, {**body, "model": look.model}, guarded)
            log = cluster.tail("control")
            log.new_lines()  # what is told begins here: whoever reads the welcome may be quick
            await self._welcome(cluster, url, look.model, nodes)
            return await self._serve(cluster, log)
        finally:
            if watch is not None:
                watch.cancel()
                await asyncio.gather(watch, return_exceptions=True)
            if self._serving:
                write_err("\n" * self._terminal + "ending the cluster ...\n")  # not behind the ^C

    # ------------------------------------------------------------ starting

    async def _start(self, cluster: Cluster, port: int) -> str:
        """Start every role; the URL of the control, which listens by then."""
        from llorch.cli.dev_words import STARTING

        write_err(STARTING)
        self._waiting.text = "starting the control"
        level = ["--log-level", "debug" if self._verbose else "info"]
        common = ["--dev", "--shutdown-grace", TASK_GRACE, *level, "--data-dir"]
        url = f"http://127.0.0.1:{port}"
        bind = ["--bind", f"127.0.0.1:{port}"]
        await cluster.start_role("control", ["control", *common, str(cluster.state / "control.d"), *bind, *AT_ONCE])
        for name in self._nodes:
            own = [str(cluster.state / f"{name}.d"), "--node-id", name, "--join", url, "--orphan-grace", "0"]
            await cluster.start_role(name, ["node", *common, *own, *self._node_words])
        return await cluster.ready_url("control")

    async def _nodes_ready(self, cluster: Cluster, client: LlorchClient) -> tuple[Look, list[dict[str, Any]]]:
        """Wait until every node has a pool that takes tasks. Raises Failure if one can't."""
        from llorch.cli.dev_words import Start
        from llorch.client.faults import ClientFault

        start, pause_s = Start(self._nodes), LOOK_FIRST_S
        until = asyncio.get_running_loop().time() + MODEL_WITHIN_S
        while asyncio.get_running_loop().time() < until:
            for name in ("control", *self._nodes, "keeper"):
                if name in cluster.ended:
                    raise cluster.failure(name)
            try:
                nodes = await client.nodes()
            except ClientFault:
                nodes = []  # if it has ended, the next look tells
            look = start.look(nodes)
            self._waiting.text = look.text
            if look.ready:
                return look, nodes
            await self._judge(cluster, look)
            await asyncio.sleep(pause_s)
            pause_s = min(LOOK_MOST_S, pause_s * 1.1)
        raise Failure("the pools did not get ready in time", why=cluster.failure(self._nodes[0]).why)

    async def _judge(self, cluster: Cluster, look: Look) -> None:
        """Raise Failure where an engine that ended will not do better the next time."""
        from llorch.cli import dev_checks
        from llorch.cli.dev_words import engine_fault, memory_fault

        for name, _ in look.ended:
            fault = memory_fault(name, cluster.engine_log(name))
            if fault is None and self._engine == "llamacpp":
                fault = await dev_checks.wheel_trouble(cluster.environment())
            if fault is not None:
                raise dev_checks.failure(fault)
        if look.failed is not None:
            name, said = look.failed
            raise dev_checks.failure(engine_fault(name, said, cluster.engine_log(name)))

    # ------------------------------------------------------------ running

    async def _answer(self, client: LlorchClient, body: Mapping[str, Any], guarded: Any) -> int:
        from llorch.cli.answer import print_stream
        from llorch.cli.dev_words import answered
        from llorch.cli.output import Output, write_out
        from llorch.client.faults import ClientFault
        from llorch.client.submission import with_task_id
        from llorch.errors import LlorchError

        task = with_task_id(body)
        nodes: list[str] = []
        code = await print_stream(_noting(client.submit(task), nodes), Output(), write=guarded(write_out))
        if len(self._nodes) > 1 and nodes and code == Exit.OK:
            reason = None
            with contextlib.suppress(LlorchError, ClientFault):
                reason = (await client.placement(task["task_id"])).get("reason")
            write_err(answered(nodes[-1], len(self._nodes), str(reason) if reason else None))
        return code

    async def _welcome(self, cluster: Cluster, url: str, model: str, nodes: list[dict[str, Any]]) -> None:
        from llorch.cli import contexts, dev_checks
        from llorch.cli.dev_words import Serving, welcome

        name, current = await cluster.add_context(url)
        self._serving = True
        serving = Serving(
            url=url,
            model=model,
            nodes=nodes,
            context=name,
            current=current and dev_checks.is_current(os.environ),
            context_file=dev_checks.shown_path(contexts.contexts_path(os.environ)),
            program=dev_checks.program(),
            tells_tasks=self._tells_tasks,
        )
        write_err(welcome(serving))

    @property
    def _tells_tasks(self) -> bool:
        """A person is there, and does not get the logs, in which they are too."""
        return self._terminal and not self._verbose

    async def _serve(self, cluster: Cluster, log: LogTail) -> int:
        """Until a signal, or until nothing is left that could serve. A node that dies is told: that may be the test."""
        from llorch.cli.dev_words import exit_words

        tasks = asyncio.create_task(self._tell_tasks(log), name="dev.tasks") if self._tells_tasks else None
        told: set[str] = set()
        try:
            while True:
                for name in sorted(set(cluster.ended) - told):
                    told.add(name)
                    if name == "keeper":
                        raise cluster.failure(name)
                    left = sum(node not in cluster.ended for node in self._nodes)
                    how = exit_words(cluster.ended[name])
                    write_err(f"{name} has ended ({how}); {left} of {len(self._nodes)} nodes left\n")
                    if left == 0 or name not in self._nodes:
                        raise cluster.failure(name)
                cluster.changed.clear()
                await cluster.changed.wait()
        finally:
            if tasks is not None:
                tasks.cancel()
                await asyncio.gather(tasks, return_exceptions=True)

    async def _tell_tasks(self, log: LogTail) -> None:
        from llorch.cli.dev_words import ended_tasks

        while True:
            await asyncio.sleep(TASKS_EVERY_S)
            write_err("".join(f"{plain(line)}\n" for line in ended_tasks(log.new_lines())))

    async def _show_logs(self, cluster: Cluster) -> None:
        tails: dict[str, LogTail] = {}
        while True:
            for name in cluster.roles:
                for line in tails.setdefault(name, cluster.tail(name)).new_lines():
                    write_err(f"{name}: {plain(line)}\n")
            await asyncio.sleep(LOGS_EVERY_S)


async def _noting(events: AsyncGenerator[Event, None], nodes: list[str]) -> AsyncGenerator[Event, None]:
    """The events, and on the way the nodes that they came from."""
    from llorch.client.events import Migrated, Started

    async with contextlib.aclosing(events):
        async for event in events:
            if isinstance(event, Started):
                nodes.append(event.node_id)
            elif isinstance(event, Migrated):
                nodes.append(event.target)
            yield event


def register(app: typer.Typer) -> None:
    app.command("dev")(with_flags(_run, dev, ()))
