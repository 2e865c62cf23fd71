"""Flags that are made from the registry of settings, so that none is written twice.

Owns the signature of every command that takes settings: a role's, or the client's with the formats of results. Typer
reads signatures; what it hands back goes as raw text to `llorch.config`, which alone knows what it means.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeAlias, get_type_hints

import typer

from llorch.cli.exits import Exit
from llorch.cli.output import Format, Output, hint, usage, warn
from llorch.cli.target import Target, find_target
from llorch.config import ClientSettings, RoleSettings, Setting, settings_for

Handler: TypeAlias = Callable[..., "int | Coroutine[Any, Any, int | None] | None"]

_CONFIG_HELP = "A settings file (YAML)."
_DEBUG = inspect.Parameter(
    "debug",
    inspect.Parameter.KEYWORD_ONLY,
    default=False,
    annotation=Annotated[bool, typer.Option("--debug", help="Show tracebacks.")],
)


def _parameter(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _flag(setting: Setting) -> inspect.Parameter:
    kind, decl = setting.kind, setting.flag
    annotation: Any = str | None
    metavar: str | None = "|".join(kind.choices) if kind.choices else kind.name.upper().replace(" ", "_")
    if kind.name == "bool":
        annotation, decl, metavar = bool | None, f"{setting.flag}/--no-{setting.name}", None
    elif kind.join is not None:
        annotation = list[str] | None
    default = f" Default: {setting.default}." if setting.default and kind.name != "bool" else ""
    env = f" [{setting.env[0]}]" if setting.env else ""
    option = typer.Option(
        decl, help=f"{setting.doc}{default}{env}", metavar=metavar, show_default=False, hidden=setting.hidden
    )
    return _parameter(setting.field, Annotated[annotation, option])


def role_flags(cls: type[RoleSettings]) -> list[inspect.Parameter]:
    """A keyword parameter for each setting of a role that has a flag, and --config."""
    config = Annotated[str | None, typer.Option("--config", metavar="FILE", help=_CONFIG_HELP, show_default=False)]
    return [_parameter("config", config), *(_flag(setting) for setting in settings_for(cls) if setting.in_flags)]


def flag_values(cls: type[RoleSettings], given: dict[str, Any]) -> dict[str, Any]:
    """Take the values of a role's flags out of what typer gave."""
    return {
        setting.field: given.pop(setting.field)
        for setting in settings_for(cls)
        if setting.in_flags and setting.field in given
    }


def with_flags(
    body: Callable[[dict[str, Any]], Any], own: Handler, flags: Iterable[inspect.Parameter], *, group: bool = False
) -> Callable[..., None]:
    """`body` as a command that has the parameters of `own` (but its first) and `flags`, and ends in an exit code.

    A `group` whose body returns None goes on to its subcommand.
    """
    hints = get_type_hints(own, include_extras=True)
    _, *others = inspect.signature(own).parameters.values()
    parameters = [
        parameter.replace(annotation=hints[parameter.name], kind=inspect.Parameter.KEYWORD_ONLY) for parameter in others
    ]
    parameters += [*flags, _DEBUG]

    def command(**given: Any) -> None:
        del given["debug"]  # seen by whoever called `run`; here it only has to be known
        outcome = body(given)
        if outcome is not None or not group:
            finish(outcome)

    command.__name__ = own.__name__
    command.__doc__ = own.__doc__
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def finish(outcome: Any) -> None:
    """Run what is left to run, and leave with its exit code."""
    if inspect.iscoroutine(outcome):
        outcome = asyncio.run(outcome)
    raise typer.Exit(int(outcome or Exit.OK))


# ---------------------------------------------------------------- commands that talk to a control


@dataclass(slots=True)
class Call:
    """What every client command is given: whom to talk to, and how its result is wanted."""

    flags: dict[str, Any] = field(repr=False)
    config: str | None
    context: str | None
    output: Output
    format_given: bool
    _target: Target | None = None

    @property
    def target(self) -> Target:
        """Settled at the first look, so that wrong arguments are told before wrong settings."""
        if self._target is None:
            self._target = find_target(self.flags, config=self.config, context=self.context)
            for warning in self._target.warnings:
                warn(warning)
            if self._target.withheld:
                hint(self._target.withheld)
        return self._target


_FORMATS = "|".join(Format)
_FORMAT_FLAGS = (
    _parameter(
        "format",
        Annotated[
            Format | None, typer.Option("--output", "-o", metavar=_FORMATS, help="How to print.", show_default=False)
        ],
    ),
    _parameter("json_", Annotated[bool | None, typer.Option("--json", help="Same as -o json.", show_default=False)]),
    _parameter("quiet", Annotated[bool | None, typer.Option("--quiet", "-q", help="Ids only.", show_default=False)]),
)
_CONTEXT_FLAG = _parameter(
    "context",
    Annotated[
        str | None,
        typer.Option("--context", metavar="NAME", help="Talk to this context's control.", show_default=False),
    ],
)


def _take_output(given: dict[str, Any]) -> tuple[Output, bool]:
    """How the result is wanted, and whether that was said at all."""
    wanted, json_, quiet = given.pop("format", None), given.pop("json_", None), given.pop("quiet", None)
    chosen = {form for form, on in ((wanted, wanted), (Format.JSON, json_), (Format.NAME, quiet)) if on}
    if len(chosen) > 1:
        raise usage("-o, --json and -q say different things", "give one of them")
    return Output(next(iter(chosen), Format.TABLE)), bool(chosen)


def local_command(own: Handler) -> Callable[..., None]:
    """Make `own(output, ...)` a command that prints a result and talks to nobody."""

    def body(given: dict[str, Any]) -> Any:
        output, _ = _take_output(given)
        return own(output, **given)

    return with_flags(body, own, _FORMAT_FLAGS)


def client_body(own: Handler) -> Callable[[dict[str, Any]], Any]:
    """What `client_command` runs, for a group that has flags of its own."""

    def body(given: dict[str, Any]) -> Any:
        flags = flag_values(ClientSettings, given)
        output, said = _take_output(given)
        context, config = given.pop("context", None), given.pop("config", None)
        return own(Call(flags, config, context, output, said), **given)

    return body


def client_flags() -> tuple[inspect.Parameter, ...]:
    return (*_FORMAT_FLAGS, _CONTEXT_FLAG, *role_flags(ClientSettings))


def client_command(own: Handler) -> Callable[..., None]:
    """Make `own(call, ...)` a command with its own parameters, the client's settings and the formats."""
    return with_flags(client_body(own), own, client_flags())


def role_report(cls: type[RoleSettings], own: Handler) -> Callable[..., None]:
    """Make `own(output, flags, config)` a command that takes what a role is started with, and reports about it."""

    def body(given: dict[str, Any]) -> Any:
        output, _ = _take_output(given)
        return own(output, flag_values(cls, given), given.pop("config", None))

    def described(_: object) -> None: ...

    described.__name__, described.__doc__ = own.__name__, own.__doc__
    return with_flags(body, described, (*_FORMAT_FLAGS, *role_flags(cls)))
