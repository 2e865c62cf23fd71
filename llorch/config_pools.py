"""What a person writes about one pool of a node, in the `pools:` list.

Owns PoolSpec, its fields and their faults, each at its own line. Never decides what the node then does with a pool.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from llorch.config_engine_args import PLACEHOLDERS, placeholders, why_not_env
from llorch.config_hours import HOURS, Hours
from llorch.config_kinds import (
    ARGUMENTS,
    BOOL,
    GPUS,
    MODEL_REF,
    PATH,
    POOL_ID_PATTERN,
    URL,
    BadValue,
    Kind,
    arguments,
    choice,
    closest,
    integer,
    listed,
    number,
    quote,
    read_node,
    text,
)
from llorch.config_yaml import Items, Node, Scalar, Table, YamlFault

MODEL_KEPT_S = (
    30.0  # of several models, once loaded: a load takes about as long, and two controls can't undo each other's
)
DEFAULT_SLOTS = 4
DEFAULT_CTX = 4096
ENGINE = choice("auto", "llamacpp", "llama-server", "vllm", "sglang", "command", "external", "simulated")
SLOTS = integer(1, 1024, example=DEFAULT_SLOTS)
CTX = integer(128, 16 * 1024 * 1024, example=DEFAULT_CTX)
COMMAND = arguments(None, "/opt/engine/serve --port {port}")
ENGINE_MODEL = text("model name", r"[\x21-\x7e]{1,256}", allowed="at most 256 characters, no space", example="qwen3:8b")
POOL_ID = text("pool id", POOL_ID_PATTERN, allowed="letters, digits, . _ -, at most 64", example="chat")


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSpec:
    """One wished-for pool. `gpus` None leaves the choice to the engine, () keeps it off every GPU.

    `ctx` is per slot. `env` and `args` may carry a key for the engine, so neither is printed.
    """

    id: str
    engine: str = "auto"
    model: str | None = None
    gpus: tuple[int, ...] | None = None
    slots: int = DEFAULT_SLOTS
    ctx: int = DEFAULT_CTX
    args: tuple[str, ...] = field(default=(), repr=False)
    env: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    replicas: int = 1
    url: str | None = None
    engine_model: str | None = None
    api_key_file: str | None = None
    models: tuple[str, ...] = ()
    idle_unload_s: float | None = None
    command: tuple[str, ...] = field(default=(), repr=False)
    yield_to_owner: bool = False
    hours: Hours | None = None


def _env_value(value: str) -> str:
    if "\0" in value:
        raise BadValue("has a NUL character")
    return value


def _env_name(value: str) -> str:
    name = _ENV_WORD.parse(value)
    why = why_not_env(name)
    if why is not None:
        raise BadValue(f"{name} can't be given to an engine: {why}", "remove it")
    return name


_ENV_WORD = text("environment name", "[A-Za-z_][A-Za-z0-9_]{0,127}", allowed="letters, digits and _", example="HF_HOME")
_ENV_NAME = replace(_ENV_WORD, parse=_env_name)
_ENV_VALUE: Kind[str] = Kind("value", _env_value, "text", {"type": ["string", "number", "boolean"]})


def _read_env(node: Node, faults: list[YamlFault]) -> tuple[tuple[str, str], ...] | None:
    if not isinstance(node, Table):
        if not (isinstance(node, Scalar) and node.refused):
            faults.append(
                YamlFault(node.line, "expected NAME: value lines", "for example {HF_HOME: /models/hf}", "env")
            )
        return None
    before, pairs = len(faults), []
    for entry in node.entries:
        name = read_node(_ENV_NAME, Scalar(entry.line, entry.key), faults, "env")
        value = read_node(_ENV_VALUE, entry.value, faults, f"env.{entry.key[:40]}")
        pairs.append((name or "", value or ""))
    return tuple(pairs) if len(faults) == before else None


def _no_text(value: str) -> Any:
    raise BadValue("has no text form", "write it in YAML")


_ENV: Kind[tuple[tuple[str, str], ...]] = Kind(
    "mapping",
    _no_text,
    "{HF_HOME: /models/hf}",
    {"type": "object", "additionalProperties": dict(_ENV_VALUE.schema)},
    read=_read_env,
)
FIELDS: Mapping[str, tuple[Kind[Any], str]] = {
    "id": (POOL_ID, "The pool's name, unique on its node."),
    "engine": (ENGINE, "What serves the model."),
    "model": (MODEL_REF, "The model to load: demo, file:/abs/path.gguf, hf:org/repo, https://... or a catalog id."),
    "gpus": (GPUS, "Indices of the GPUs to use; [] for none; the engine's choice if not given."),
    "slots": (SLOTS, "Sequences at a time, per replica."),
    "ctx": (CTX, "Tokens of context per slot."),
    "args": (ARGUMENTS, "Further arguments for the engine."),
    "env": (_ENV, "Further environment for the engine."),
    "replicas": (integer(1, 64), "Engine processes in this pool."),
    "url": (URL, "Where an external engine listens."),
    "engine_model": (
        ENGINE_MODEL,
        "What an external engine, or a command, calls the model; the model's id if not given.",
    ),
    "api_key_file": (PATH, "A file with the key of an external engine."),
    "models": (listed(MODEL_REF, "demo"), "Models that may be loaded here instead of the first."),
    "idle_unload_s": (number(1, 30 * 86400), "Seconds without a task after which the model is unloaded."),
    "command": (
        COMMAND,
        "The program of engine command and its arguments; {port} {model} {gpus} {slots} {ctx} {key_file} in it.",
    ),
    "yield_to_owner": (BOOL, "Take no tasks and free the memory while others' programs use the pool's GPUs."),
    "hours": (HOURS, "When the pool serves, by the machine's clock, as in mon-fri 18:00-08:00; always if not given."),
}

MAX_POOLS = 256  # what a registration can carry


def _read_pools(node: Node, faults: list[YamlFault]) -> tuple[PoolSpec, ...] | None:
    if not isinstance(node, Items):
        if not (isinstance(node, Scalar) and node.refused):
            faults.append(YamlFault(node.line, "expected a list of pools", f"for example {POOLS.example}", "pools"))
        return None
    before = len(faults)
    if len(node.items) > MAX_POOLS:
        faults.append(
            YamlFault(node.items[MAX_POOLS].line, f"a node has at most {MAX_POOLS} pools", "run more nodes", "pools")
        )
    pools: dict[str, PoolSpec] = {}
    for place, item in enumerate(node.items):
        spec = _read_pool(item, f"pools[{place}]", faults)
        if spec is not None and spec.id in pools:
            faults.append(
                YamlFault(item.line, f"another pool has the id {spec.id}", "ids are unique", f"pools[{place}]")
            )
        elif spec is not None:
            pools[spec.id] = spec
    return tuple(pools.values()) if len(faults) == before else None


def _read_pool(node: Node, key: str, faults: list[YamlFault]) -> PoolSpec | None:
    if not isinstance(node, Table):
        if not (isinstance(node, Scalar) and node.refused):
            faults.append(YamlFault(node.line, "expected the fields of a pool", "for example {id: chat}", key))
        return None
    before = len(faults)
    values: dict[str, Any] = {}
    named = [entry.value.text for entry in node.entries if entry.key == "engine" and isinstance(entry.value, Scalar)]
    for entry in node.entries:
        if entry.key not in FIELDS:
            near = closest(entry.key, FIELDS)
            values.setdefault(near or "", None)  # most likely meant, so not missing
            hint = f"did you mean {near}?" if near else f"a pool has {', '.join(FIELDS)}"
            faults.append(YamlFault(entry.line, f"{quote(entry.key)} is not a field of a pool", hint, key))
            continue
        kind = arguments(named[0]) if named and entry.key == "args" else FIELDS[entry.key][0]
        values[entry.key] = read_node(kind, entry.value, faults, f"{key}.{entry.key}")
    _check_pool(values, node.line, key, faults)
    return PoolSpec(**values) if len(faults) == before else None


def _check_pool(values: Mapping[str, Any], line: int, key: str, faults: list[YamlFault]) -> None:
    if "id" not in values:
        faults.append(YamlFault(line, "a pool needs an id", "id: chat", key))
    engine = values.get("engine", "auto")  # None: it has a fault of its own
    if engine == "external" and "url" not in values:
        faults.append(YamlFault(line, "an external engine needs a url", "url: http://127.0.0.1:8000", f"{key}.url"))
    if values.get("url") and engine not in ("external", None):
        faults.append(YamlFault(line, "only an external engine has a url", "engine: external", f"{key}.url"))
    if values.get("engine_model") and engine not in ("external", "command", None):
        what = "only an external engine, or a command, has an engine_model"
        faults.append(YamlFault(line, what, "remove it: llorch names the model", f"{key}.engine_model"))
    _check_command(values, engine, line, key, faults)


def _check_command(values: Mapping[str, Any], engine: str | None, line: int, key: str, faults: list[YamlFault]) -> None:
    def fault(message: str, hint: str, field: str = "command") -> None:
        faults.append(YamlFault(line, message, hint, f"{key}.{field}"))

    words = values.get("command")
    if engine != "command":
        if words and engine is not None:
            fault("only engine command has a command", "engine: command")
        return
    if values.get("args"):
        fault("engine command has no args", "write them in the command", "args")
    if words is None and "command" in values:
        return  # it has a fault of its own
    if not words or not words[0].strip():
        fault("engine command needs a command", f"command: {COMMAND.example}")
        return
    named = placeholders(words)
    for name in named:
        if name not in PLACEHOLDERS:
            near = closest(name, PLACEHOLDERS)
            fault(
                f"{{{name}}} stands for nothing",
                f"did you mean {{{near}}}?" if near else f"there are {' '.join(f'{{{one}}}' for one in PLACEHOLDERS)}",
            )
    if "port" not in named:
        fault("the command does not say where to listen", "write {port} where the program takes its port")
    if "model" in named and "model" not in values:
        fault("the command has {model}, and the pool no model", "model: file:/abs/path.gguf", "model")


POOLS: Kind[tuple[PoolSpec, ...]] = Kind(
    "pools",
    _no_text,
    "[{id: chat, engine: llamacpp, model: demo, gpus: [0], slots: 4}]",
    {
        "type": "array",
        "items": {
            "type": "object",
            "required": ["id"],
            "additionalProperties": False,
            "properties": {name: {**kind.schema, "description": doc} for name, (kind, doc) in FIELDS.items()},
        },
    },
    show=lambda pools: ", ".join(
        f"{pool.id} ({pool.engine}, {MODEL_REF.show(pool.model) if pool.model else 'no model'})" for pool in pools
    ),
    join=tuple,
    read=_read_pools,
)
