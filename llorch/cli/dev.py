"""`llorch dev`: a whole cluster on this machine, for as long as the command runs.

Owns what is started with which flags, what a person is told, and the answer to -p. The roles are real processes, as in
production; ending them is the keeper's (see `llorch.cli.keeper`), whatever ends this one.
"""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llorch.cli.exits import Exit
from llorch.cli.flags import with_flags
from llorch.cli.output import Failure, is_terminal, usage, write_err
from llorch.client.text import plain

if TYPE_CHECKING:
    from llorch.cli.dev_cluster import Cluster, LogTail
    from llorch.client.api import LlorchClient

MODEL_WITHIN_S = 600.0  # for pools to get ready: a large model on a slow disk
LOOK_EVERY_S = 0.1
TASK_GRACE = "2s"  # for what still runs when the command is ended
MAX_NODES = 64
ANSWER_TOKENS = 128  # a paragraph: a model with random weights ends only where its context does


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
        int | None,
        typer.Option(
            "--max-tokens", metavar="N", min=1, help=f"How long -p's answer may get. Default: {ANSWER_TOKENS}."
        ),
    ] = None,
    model: Annotated[str, typer.Option("--model", "-m", metavar="REF", help="demo, or file:/abs/path.gguf")] = "demo",
    slots: Annotated[str | None, typer.Option("--slots", metavar="N", help="Sequences at a time, per node.")] = None,
    ctx: Annotated[str | None, typer.Option("--ctx", metavar="N", help="Tokens of context per slot.")] = None,
    port: Annotated[int, typer.Option("--port", metavar="N", min=0, max=65535, help="0: a free one.")] = 0,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show what the roles log.")] = False,
) -> None:
    """Run a whole cluster on this machine, until ^C."""


def _run(given: dict[str, Any]) -> Any:
    engine, prompt, max_tokens = given["engine"], given.pop("prompt"), given.pop("max_tokens")
    if prompt is not None and not prompt.strip():
        raise usage("the prompt is empty", 'llorch dev -p "Hello"')
    if max_tokens is not None and prompt is None:
        raise usage("--max-tokens is for -p", 'llorch dev -p "Hello" --max-tokens 32')
    if engine == "auto":
        engine = "llamacpp"
    if engine not in ("llamacpp", "simulated"):
        raise usage(f"{engine!r} is not one of llamacpp, simulated")
    if engine == "llamacpp" and importlib.util.find_spec("xllamacpp") is None:
        raise Failure(
            "the engine llamacpp needs the package xllamacpp, which is not installed",
            code=Exit.USAGE,
            hint="pip install 'llorch[llamacpp]', or use --engine simulated",
        )
    body = None if prompt is None else {"prompt": prompt, "max_tokens": max_tokens or ANSWER_TOKENS}
    node_words = _node_words(engine, given["model"], given["slots"], given["ctx"])
    return _Dev(given["nodes"], node_words, given["port"], given["verbose"]).run(body)


def _node_words(engine: str, model: str, slots: str | None, ctx: str | None) -> list[str]:
    """The flags of a node, checked here: what is wrong with them is told before anything starts."""
    from llorch.config import NodeSettings, resolve

    flags = {"engine": engine, "model": model, "slots": slots, "ctx": ctx}
    checked = {"join": "http://127.0.0.1:1", "service-token": "x" * 32, "dev": True, **flags}
    resolve(NodeSettings, flags=checked, env={}, files=[], read_file=lambda _: "")
    return [word for name, value in flags.items() if value is not None for word in (f"--{name}", value)]


class _Dev:
    def __init__(self, nodes: int, node_words: list[str], port: int, verbose: bool) -> None:
        self._nodes = [f"dev-{number}" for number in range(1, nodes + 1)]
        self._control_words = ["--bind", f"127.0.0.1:{port}"]
        self._node_words = ["--bind", "127.0.0.1:0", "--allow-cpu", *node_words]
        self._verbose = verbose
        self._terminal = is_terminal(sys.stderr)
        self._serving = False

    async def run(self, body: Mapping[str, Any] | None) -> int:
        """`body`: a task without its model, to be answered and no more."""
        from llorch.cli.dev_cluster import Cluster, Tokens
        from llorch.cli.interrupts import Interrupted, Interrupts

        with Interrupts() as interrupts:
            try:
                async with Cluster.starting(Tokens.make()) as cluster:
                    return await self._with(cluster, body, interrupts.guarded)
            except (asyncio.CancelledError, Interrupted) as ended:
                if not interrupts.hit:
                    raise
                running = asyncio.current_task()
                if running is not None and isinstance(ended, asyncio.CancelledError):
                    running.uncancel()
                return Exit.OK if self._serving else Exit.INTERRUPTED  # ^C is how it is meant to end

    async def _with(self, cluster: Cluster, body: Mapping[str, Any] | None, guarded: Any) -> int:
        from llorch.client.api import LlorchClient

        watch = asyncio.create_task(self._show_logs(cluster), name="dev.logs") if self._verbose else None
        try:
            url = await self._start(cluster)
            async with LlorchClient(url, cluster.tokens.api) as client:
                model = await self._pools_ready(cluster, client)
                self._progress("")
                name, current = await cluster.add_context(url)
                if body is not None:
                    return await self._answer(client, {**body, "model": model}, guarded)
            self._serving = True
            write_err(_how_to(url, name, current, model, self._nodes))
            return await self._serve(cluster)
        finally:
            self._progress("")
            if watch is not None:
                watch.cancel()
                await asyncio.gather(watch, return_exceptions=True)
            if self._serving:
                write_err("ending the cluster ...\n")

    def _progress(self, text: str) -> None:
        if self._terminal and not self._verbose:
            write_err(f"\r\x1b[K{text}")

    # ------------------------------------------------------------ starting

    async def _start(self, cluster: Cluster) -> str:
        write_err("llorch dev: real roles on this machine, for trying out; --allow-cpu is implied\n")
        level = ["--log-level", "debug" if self._verbose else "info"]
        common = ["--dev", "--shutdown-grace", TASK_GRACE, *level]
        self._progress("starting the control ...")
        state = cluster.state
        await cluster.start_role(
            "control",
            ["control", *common, *self._control_words, "--data-dir", str(state / "control.d")],
        )
        url = await cluster.ready_url("control")
        self._progress("starting the nodes ...")
        for name in self._nodes:
            await cluster.start_role(
                name,
                [
                    "node",
                    *common,
                    *self._node_words,
                    "--join",
                    url,
                    "--node-id",
                    name,
                    "--data-dir",
                    f"{state / name}.d",
                ],
            )
        for name in self._nodes:
            await cluster.ready_url(name)
        return url

    async def _pools_ready(self, cluster: Cluster, client: LlorchClient) -> str:
        """Wait until every node has a pool that takes tasks; the model they serve. Raises Failure if one can't."""
        from llorch.client.faults import ClientFault

        until = asyncio.get_running_loop().time() + MODEL_WITHIN_S
        while asyncio.get_running_loop().time() < until:
            for name in ("control", *self._nodes):
                if name in cluster.ended:
                    raise cluster.failure(name)
            try:
                pools = await client.pools()
            except ClientFault:
                pools = []  # if it has ended, the next look tells
            failed = [pool for pool in pools if pool.get("state") == "failed"]
            if failed:
                name, why = str(failed[0].get("node_id")), failed[0].get("last_error")
                raise Failure(f"the engine of {name} failed", why=str(why) if why else cluster.failure(name).why)
            bound = {str(pool.get("node_id")): pool for pool in pools if pool.get("bound") and pool.get("model")}
            if len(bound) == len(self._nodes):
                return str(next(iter(bound.values()))["model"])
            self._progress(f"loading the model ({len(bound)} of {len(self._nodes)} nodes ready) ...")
            await asyncio.sleep(LOOK_EVERY_S)
        raise Failure("the pools did not get ready in time", why=cluster.failure(self._nodes[0]).why)

    # ------------------------------------------------------------ running

    async def _answer(self, client: LlorchClient, body: Mapping[str, Any], guarded: Any) -> int:
        from llorch.cli.answer import print_stream
        from llorch.cli.output import Output, write_out

        return await print_stream(client.submit(body), Output(), write=guarded(write_out))

    async def _serve(self, cluster: Cluster) -> int:
        """Until a signal, or until nothing is left that could serve. A node that dies is told: that may be the test."""
        from llorch.cli.dev_cluster import exit_words

        told: set[str] = set()
        while True:
            for name in sorted(set(cluster.ended) - told):
                told.add(name)
                left = sum(node not in cluster.ended for node in self._nodes)
                write_err(
                    f"{name} has ended ({exit_words(cluster.ended[name])}); {left} of {len(self._nodes)} nodes left\n"
                )
                if left == 0 or name not in self._nodes:
                    raise cluster.failure(name) if name != "keeper" else Failure("the keeper has ended")
            cluster.changed.clear()
            await cluster.changed.wait()

    async def _show_logs(self, cluster: Cluster) -> None:
        tails: dict[str, LogTail] = {}
        while True:
            for name in cluster.roles:
                for line in tails.setdefault(name, cluster.tail(name)).new_lines():
                    write_err(f"{name}: {plain(line)}\n")
            await asyncio.sleep(LOOK_EVERY_S)


def _how_to(url: str, name: str, current: bool, model: str, nodes: Sequence[str]) -> str:
    """What to type next. The token is not among it: it is in the context, and a terminal's scrollback is a log."""
    flag = "" if current else f" --context {name}"
    token = f"$(llorch context show {name} --token)"
    return (
        f"ready: {url}  model {model}, {len(nodes)} node{'s' if len(nodes) > 1 else ''}, context {name}\n"
        f'  llorch submit{flag} "Hello"\n'
        f"  llorch status{flag}\n"
        f'  curl {url}/v2/tasks -H "Authorization: Bearer {token}" \\\n'
        f'       -d \'{{"model": "{model}", "prompt": "Hello"}}\'\n'
        f"  export OPENAI_BASE_URL={url}/v1 OPENAI_API_KEY={token}\n"
        "^C ends it and leaves nothing behind.\n"
    )


def register(app: typer.Typer) -> None:
    app.command("dev")(with_flags(_run, dev, ()))
