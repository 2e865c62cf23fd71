"""`llorch bench run|overhead`: how fast an endpoint answers under load, and what llorch adds to an engine.

Owns the flags, what of them can't be, and how many connections this process may have. The work is `bench_run.py`'s and
`bench_overhead.py`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from llorch.cli.exits import Exit
from llorch.cli.flags import Call, client_body, client_flags, local_command, with_flags
from llorch.cli.interrupts import Interrupted, Interrupts
from llorch.cli.output import Failure, Format, Output, usage, warn
from llorch.config_kinds import BadValue, Kind, duration, integer, listed, number

T = TypeVar("T")
MOST_AT_A_TIME = 10_000
SPARE_FILES = 64  # that this process has open beside its connections
_CONCURRENCY = listed(integer(1, MOST_AT_A_TIME), "1,8,64")
_RATE = listed(number(0.001, 100_000), "0.5,2,8")
_DURATION = duration("100ms", "1d")
_LIMIT = duration("1ms", "1h")

app = typer.Typer(
    help="Measure an endpoint under load, or what llorch adds to an engine.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Url = Annotated[
    str | None,
    typer.Argument(
        metavar="URL",
        help="Of any OpenAI-compatible endpoint, with or without /v1. Without it, the control that commands talk to.",
        show_default=False,
    ),
]
Model = Annotated[
    str | None,
    typer.Option("--model", "-m", metavar="MODEL", help="May be left out if there is only one.", show_default=False),
]
Concurrency = Annotated[
    str | None,
    typer.Option(
        "--concurrency", metavar="N[,N...]", help="So many requests at a time; a step for each. Default: 1,8."
    ),
]
Rate = Annotated[
    str | None,
    typer.Option(
        "--rate",
        metavar="R[,R...]",
        help="So many requests a second instead, at random moments, whatever becomes of those before. Times count from "
        "when a request was due.",
    ),
]
PromptTokens = Annotated[
    int,
    typer.Option(
        "--prompt-tokens",
        metavar="N",
        min=1,
        max=1_000_000,
        help="Length of a prompt, about: short words, nearly all of them one token. Each prompt is another, from its "
        "first word on, so that no cache answers it.",
    ),
]
OutputTokens = Annotated[
    int,
    typer.Option(
        "--output-tokens", metavar="N", min=1, max=1_000_000, help="Length of an answer, at most: max_tokens."
    ),
]
Duration = Annotated[
    str | None,
    typer.Option("--duration", metavar="TIME", help="How long each step sends requests. Default: 30s."),
]
Requests = Annotated[
    int | None,
    typer.Option("--requests", metavar="N", min=1, help="Or how many each step sends.", show_default=False),
]
Warmup = Annotated[
    int | None,
    typer.Option(
        "--warmup",
        metavar="N",
        min=0,
        max=100_000,
        help="Short requests before each step, not counted: they open connections. Default: as many as there will be "
        "at a time; with --rate, 1.",
        show_default=False,
    ),
]
SloTtft = Annotated[
    str | None, typer.Option("--slo-ttft", metavar="TIME", help="A good request has its first token within this.")
]
SloItl = Annotated[
    str | None, typer.Option("--slo-itl", metavar="TIME", help="... and this much between its tokens, on the average.")
]
SloE2e = Annotated[str | None, typer.Option("--slo-e2e", metavar="TIME", help="... and its whole answer within this.")]
IgnoreEos = Annotated[
    bool,
    typer.Option(
        "--ignore-eos",
        help="Ask the engine to go on to --output-tokens. vLLM, SGLang and llama.cpp know ignore_eos; a strict "
        "endpoint may refuse it, so it is not sent unless you say so.",
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(
        "--seed",
        metavar="N",
        min=0,
        help="The same prompts and moments again, which an engine may remember. Default: another one each time.",
        show_default=False,
    ),
]
RequestTimeout = Annotated[
    str, typer.Option("--request-timeout", metavar="TIME", help="A request that takes longer has failed.")
]
Plot = Annotated[
    str | None,
    typer.Option("--plot", metavar="FILE", help="Draw a picture, .svg or .png. Needs matplotlib.", show_default=False),
]


def run(
    call: Call,
    endpoint: Url = None,
    model: Model = None,
    concurrency: Concurrency = None,
    rate: Rate = None,
    prompt_tokens: PromptTokens = 128,
    output_tokens: OutputTokens = 128,
    duration: Duration = None,
    requests: Requests = None,
    warmup: Warmup = None,
    slo_ttft: SloTtft = None,
    slo_itl: SloItl = None,
    slo_e2e: SloE2e = None,
    ignore_eos: IgnoreEos = False,
    seed: Seed = None,
    request_timeout: RequestTimeout = "2m",
    plot: Plot = None,
) -> int:
    """Measure an OpenAI-compatible endpoint under load: time to first token, between tokens, to the end; rates, errors.

    Streams POST /v1/chat/completions, at each concurrency in turn (closed loop), or at each rate (open loop). A token
    is sent if there is one, as by other commands: --token, --token-file, LLORCH_TOKEN. Tokens are counted by the
    endpoint's usage where it gives one, else by chunks. Exit 1 if a request failed.
    """
    from llorch.cli.bench_figures import Slo
    from llorch.cli.bench_plan import Ask, Load, base_url
    from llorch.cli.bench_run import Run, Wanted

    if concurrency is not None and rate is not None:
        raise usage("--concurrency and --rate are two kinds of load", "give one of them")
    if duration is not None and requests is not None:
        raise usage("--duration and --requests both say when a step ends", "give one of them")
    loads = (
        [Load(concurrency=each) for each in _parsed(_CONCURRENCY, "--concurrency", concurrency or "1,8")]
        if rate is None
        else [Load(rate_per_s=each) for each in _parsed(_RATE, "--rate", rate)]
    )
    if not loads:
        raise usage("there is no load", "for example --concurrency 1,8,64")
    seconds = None if requests is not None else _parsed(_DURATION, "--duration", duration or "30s")
    limits = (("--slo-ttft", slo_ttft), ("--slo-itl", slo_itl), ("--slo-e2e", slo_e2e))
    slo = Slo(*(None if text is None else _parsed(_LIMIT, flag, text) * 1000 for flag, text in limits))
    timeout_s = _parsed(_LIMIT, "--request-timeout", request_timeout)
    picture = None
    if plot is not None:
        from llorch.cli import bench_picture

        picture = Path(plot).expanduser()
        bench_picture.check(picture)
    if endpoint is not None:
        call.flags["url"] = base_url(endpoint)  # as --url elsewhere: a token that belongs to another one is not sent
    seed = secrets.randbits(32) if seed is None else seed
    ask = Ask(model or "", prompt_tokens, output_tokens, seed, ignore_eos=ignore_eos)
    with _room_for(None if rate is not None else max(load.concurrency or 0 for load in loads)) as most:
        wanted = Wanted(tuple(loads), ask, slo, timeout_s, seconds, requests, warmup, most, picture)
        return in_loop(Run(call, wanted).run())


# ---------------------------------------------------------------- overhead


def overhead(
    output: Output,
    duration: Annotated[
        str, typer.Option("--duration", metavar="TIME", help="How long it measures, in all; starting comes on top.")
    ] = "12s",
) -> int:
    """Measure what llorch adds to an engine, on this machine: a control and a node in front of a simulated engine.

    Real processes on free loopback ports, which end with it. The same load goes to the engine alone and through llorch,
    by turns; what is printed is the difference. It needs no GPU and no model, and takes half a minute.
    """
    from llorch.cli.bench_overhead import LONGEST, Overhead
    from llorch.cli.bench_progress import Progress
    from llorch.cli.bench_words import overhead_cautions, overhead_report

    seconds = _parsed(LONGEST, "--duration", duration)
    if output.format is Format.NAME:
        raise usage("-q prints ids, and there are none here", "leave -q out")
    progress = Progress(quiet=False)

    async def measured() -> int:
        with Interrupts() as interrupts:
            try:
                async with progress.waiting.shown():
                    document = await Overhead(seconds, progress.say).run()
            except (asyncio.CancelledError, Interrupted) as ended:
                if not interrupts.ours(ended):
                    raise
                return Exit.INTERRUPTED
        output.one(document, name="overhead", text=lambda: overhead_report(document))
        for caution in overhead_cautions(document):
            warn(caution)
        return Exit.FAILED if document["failed"] else Exit.OK

    return in_loop(measured())


# ---------------------------------------------------------------- what both need


def in_loop(main: Coroutine[Any, Any, T]) -> T:
    """Run it, by uvloop where there is one: its reads cost less, and so are nearer to when the bytes came."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(main)
    return uvloop.run(main)


def _parsed(kind: Kind[T], flag: str, text: str) -> T:
    try:
        return kind.parse(text)
    except BadValue as bad:
        raise usage(f"{flag} {bad.message}", bad.hint) from None


@contextlib.contextmanager
def _room_for(connections: int | None) -> Iterator[int]:
    """How many connections this process may have, meanwhile: those that are asked for, or Failure; if it is not known
    how many it takes, as many as there can be.
    """
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = (connections or MOST_AT_A_TIME) + SPARE_FILES
    unlimited = resource.RLIM_INFINITY
    room = wanted if soft == unlimited or soft >= wanted else wanted if hard == unlimited else min(hard, wanted)
    if connections is not None and room < wanted:
        raise Failure(
            f"{connections} requests at a time need more open files than this process may have ({room})",
            code=Exit.USAGE,
            hint=f"ulimit -n {wanted}, by a user who may, or a smaller --concurrency",
        )
    if soft != unlimited and soft < room:
        resource.setrlimit(resource.RLIMIT_NOFILE, (room, hard))
    try:
        yield max(1, room - SPARE_FILES)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


_WITHOUT = ("url", "timeout")  # the URL is an argument; how long one request may take is a flag of its own
app.command("run")(with_flags(client_body(run), run, [flag for flag in client_flags() if flag.name not in _WITHOUT]))
app.command("overhead")(local_command(overhead))
