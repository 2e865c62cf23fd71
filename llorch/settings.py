"""Every setting of every role, once: flags, environment names, YAML keys, defaults and docs all come from here.

A setting is a field of its role's dataclass; its name is the field's with `-` for `_`. Owns which settings there are
and what they mean. Never reads a flag, a variable or a file (`llorch.config` does); keeps secrets out of every repr.
"""

# ruff: noqa: RUF009 - `setting` is a field specifier: its values are frozen

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar, overload

from llorch.config_kinds import (
    ARGUMENTS,
    BOOL,
    CIDRS,
    GPUS,
    HOST_PORT,
    MODEL_REF,
    NAMES,
    NODE_ID_PATTERN,
    PATH,
    POOL_ID_PATTERN,
    TOKEN,
    TOKENS,
    URL,
    URLS,
    HostPort,
    Kind,
    Network,
    byte_size,
    choice,
    duration,
    integer,
    number,
    text,
)
from llorch.config_pools import CTX, ENGINE, POOLS, SLOTS, PoolSpec

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Setting:
    """One name that means one thing to `roles`. A name whose default differs by role has one Setting for each."""

    name: str
    kind: Kind[Any]
    default: str | None  # as a person would write it; None: not set; "": an empty list
    doc: str
    roles: tuple[str, ...]
    env: tuple[str, ...]  # the first that is set counts
    in_flags: bool = True
    in_yaml: bool = True
    hidden: bool = False
    file_of: str | None = None  # this one names a file with the value of that secret
    example: str = ""

    @property
    def secret(self) -> bool:
        return self.kind.secret

    @property
    def field(self) -> str:
        return self.name.replace("-", "_")

    @property
    def flag(self) -> str:
        return f"--{self.name}"

    @property
    def choices(self) -> tuple[str, ...]:
        return self.kind.choices


@dataclass(frozen=True, slots=True)
class _Declared:
    kind: Kind[Any]
    default: str | None
    doc: str
    aliases: tuple[str, ...]
    only: str | None
    hidden: bool
    example: str


@overload
def setting(default: str, kind: Kind[T], doc: str, *, only: str = ..., hidden: bool = ..., example: str = ...) -> T: ...
@overload
def setting(
    default: None, kind: Kind[T], doc: str, *, aliases: tuple[str, ...] = ..., example: str = ...
) -> T | None: ...
def setting(
    default: str | None,
    kind: Kind[Any],
    doc: str,
    *,
    aliases: tuple[str, ...] = (),
    only: str | None = None,
    hidden: bool = False,
    example: str = "",
) -> Any:
    """Declare a setting. `aliases` are further environment names; `only`: the one place it can be set, flag or yaml."""
    value = None if default is None else kind.join(()) if default == "" and kind.join else kind.parse(default)
    declared = _Declared(kind, default, doc, aliases, only, hidden, example or default or kind.example)
    return dataclasses.field(default=value, repr=not kind.secret, metadata={"setting": declared})


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleSettings:
    """What `llorch.config.resolve` builds."""

    role: ClassVar[str]

    tls_ca: str | None = setting(
        None,
        PATH,
        "A file with further CA certificates (PEM) to trust on outgoing connections.",
        example="/etc/llorch/ca.crt",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings(RoleSettings):
    """What the roles that listen have in common."""

    data_dir: str = setting(
        "~/.local/share/llorch", PATH, "Where state is kept. $XDG_DATA_HOME/llorch where that is set."
    )
    log_level: str = setting(
        "info",
        choice("debug", "info", "warning", "error"),
        "How much is logged. No level logs a token, a prompt or an output.",
    )
    shutdown_grace: float = setting(
        "30s", duration("0s", "1h"), "How long running tasks may go on after SIGTERM before their streams are closed."
    )
    max_body: int = setting(
        "64MiB",
        byte_size("1KiB", "1GiB"),
        "Largest request body. Long prompts and images need room; each body is held in memory while it is passed on.",
    )
    slow_reader_timeout: float = setting(
        "30s",
        duration("100ms", "1h"),
        "A reader that takes nothing for this long is dropped; it may resume. Longer costs memory per stalled reader.",
    )
    max_connections_per_ip: int = setting(
        "512",
        integer(1, 1_000_000),
        "Connections from one IP address, with IPv6 from one /64; more are closed at once. For loopback and "
        "trusted-proxies there is no such bound.",
    )
    trusted_proxies: tuple[Network, ...] = setting(
        "", CIDRS, "Networks of proxies in front of this role: many clients come from one address there."
    )
    rate_failures: int = setting(
        "60",
        integer(0, 1_000_000),
        "Requests without a valid token per minute and address; more are answered 429. A valid token is never refused "
        "for them. 0: no limit.",
    )
    service_token: str | None = setting(
        None, TOKENS, "Tokens that a control presents to nodes. The first is presented, all are accepted."
    )
    node_token: str | None = setting(
        None, TOKENS, "Tokens that a node presents to controls. Without it the service token is used, with a warning."
    )
    dev: bool = setting("false", BOOL, "Set by `llorch dev`: short tokens are accepted.", only="flag", hidden=True)


_TLS_CERT = "The certificate chain to serve with (PEM), of your own in place of the cluster's; with its key."
_CONNECTIONS = integer(16, 1_000_000)
_TLS_KEY = "The private key of tls-cert (PEM)."


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlSettings(ServerSettings):
    """`llorch control`."""

    role: ClassVar[str] = "control"

    bind: HostPort = setting("127.0.0.1:8080", HOST_PORT, "Where the control plane listens; port 0 takes a free one.")
    tls_cert: str | None = setting(
        None, PATH, _TLS_CERT, example="/etc/llorch/tls.crt", aliases=("ORCHESTRATORD_TLS_CERT",)
    )
    tls_key: str | None = setting(
        None, PATH, _TLS_KEY, example="/etc/llorch/tls.key", aliases=("ORCHESTRATORD_TLS_KEY",)
    )
    tls: str = setting(
        "auto",
        choice("auto", "on", "off-mesh"),
        "auto: TLS wherever it listens beyond loopback, with a certificate of the cluster's own authority if tls-cert "
        "is not given. on: on loopback too. off-mesh: none, for a service mesh that encrypts and authenticates.",
    )
    tls_names: tuple[str, ...] = setting(
        "", NAMES, "Further names and addresses for the certificate that the cluster's authority gives this control."
    )
    ca_passphrase: str | None = setting(
        None,
        TOKEN,
        "Encrypts the key of the cluster's authority on disk. Without it, the file's mode alone guards it.",
    )
    node_cert_life: float = setting(
        "30d",
        duration("1m", "3650d"),
        "How long a node's certificate is valid. It is renewed after two thirds; a node away for longer joins again.",
    )
    api_token: str | None = setting(
        None, TOKENS, "Client tokens (scopes submit and read): a comma or line list, all valid; name=token names one."
    )
    admin_token: str | None = setting(None, TOKENS, "Tokens that may do everything.")
    max_connections: int = setting(
        "4096",
        _CONNECTIONS,
        "Connections in all; beyond it the client that has been idle for longest goes, or the new one is closed. 256 "
        "of them, a quarter at most, are for nodes alone.",
    )
    rate_requests: int = setting(
        "1000",
        integer(0, 1_000_000),
        "Requests per second and principal, twice as many at once; more are answered 429. 0: no limit.",
    )
    rate_streams: int = setting(
        "0", integer(0, 1_000_000), "Answers that one principal may be given at a time. 0: no limit."
    )
    rate_tokens: int = setting(
        "0",
        integer(0, 1_000_000_000),
        "Tokens per minute and principal, prompt and answer together. A task is taken in on an estimate, from its size "
        "and its max_tokens, and counted as what it took. 0: no limit.",
    )
    heartbeat_interval: float = setting(
        "10s", duration("50ms", "10m"), "How often nodes beat. Shorter notices a dead node sooner and costs requests."
    )
    offline_after: float = setting(
        "30s",
        duration("100ms", "1d"),
        "A node silent for this long is offline. Three heartbeats: one lost packet must not move every task.",
    )
    probe_interval: float = setting(
        "5s", duration("50ms", "10m"), "How often a node without a link is asked for its health."
    )
    queue_limit: int | None = setting(
        None,
        integer(0, 1_000_000, example=256),
        "Tasks that may wait for one model; more are refused with 429. 0 refuses at once. Without it, 4 for each of "
        "the model's slots, and 64 at least. While others wait too, one principal may have a quarter of it; while it "
        "waits alone, three quarters if anybody else has asked for the model in the last ten minutes.",
    )
    queue_body_limit: int = setting(
        "256MiB",
        byte_size("1KiB", "64GiB"),
        "Bodies of all waiting tasks together, which are held in memory; beyond it tasks are refused with 429. One "
        "principal may have as much of it as of `queue-limit`, and one body always.",
    )
    queue_timeout: float = setting(
        "120s",
        duration("100ms", "1d"),
        "How long a task may wait for a slot. Time in which its model is being loaded does not count.",
    )
    queue_timeout_batch: float = setting(
        "300s", duration("100ms", "1d"), "How long a task of priority batch may wait for a slot."
    )
    recovery_window: float = setting(
        "15s",
        duration("0s", "10m"),
        "How long after its start a control waits for its nodes before it says that a task or a model does not exist. "
        "It ends early once every node it knew is back.",
    )
    node_cidr: tuple[Network, ...] = setting(
        "",
        CIDRS,
        "Networks in which a node may advertise an address that it does not register from: nodes with several "
        "addresses, or behind NAT. Nodes that are reached over their own link need none.",
    )
    ttft_timeout: float = setting(
        "120s",
        duration("100ms", "1d"),
        "How long a placed stream may take to its first token before it is tried elsewhere. Long prompts need long.",
    )
    audit_files: int | None = setting(
        None,
        integer(2, 1_000_000, example=100),
        "How many files of the audit log are kept, 64 MiB each; the oldest goes first, and the log says so. All of "
        "them without it.",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSettings(ServerSettings):
    """`llorch node`."""

    role: ClassVar[str] = "node"

    bind: HostPort = setting("127.0.0.1:9200", HOST_PORT, "Where the node listens; port 0 takes a free one.")
    tls_cert: str | None = setting(
        None, PATH, _TLS_CERT, example="/etc/llorch/tls.crt", aliases=("POOL_MANAGERD_TLS_CERT",)
    )
    tls_key: str | None = setting(
        None, PATH, _TLS_KEY, example="/etc/llorch/tls.key", aliases=("POOL_MANAGERD_TLS_KEY",)
    )
    max_connections: int = setting(
        "1024", _CONNECTIONS, "Connections in all; beyond it the one that has been idle for longest goes."
    )
    join_token: str | None = setting(
        None,
        TOKEN,
        "What `llorch token join` on the control printed. The node gets its certificate for it and needs it only once.",
    )
    join: tuple[str, ...] = setting("", URLS, "URLs of the controls to register with; all of them, for availability.")
    node_id: str | None = setting(
        None,
        text("node id", NODE_ID_PATTERN, allowed="letters, digits, . _ -, at most 63", example="gpu-1"),
        "This machine's name in the cluster. The hostname if not given.",
    )
    address: str | None = setting(
        None,
        URL,
        "The URL at which controls reach this node. Not needed: the node's own link is enough.",
        example="https://gpu-1.example:9200",
    )
    zone: str | None = setting(
        None,
        text("zone", POOL_ID_PATTERN, allowed="a short word", example="rack-1"),
        "Where this machine is; placement may prefer a zone.",
    )
    cost_weight: float = setting(
        "1.0", number(0.001, 1000), "What work costs here against other nodes; the cheaper is preferred."
    )
    runtime_dir: str | None = setting(
        None,
        PATH,
        "Where handoff files and pids are kept. `.runtime` under data-dir if not given.",
        example="/run/llorch",
    )
    model: str | None = setting(
        None,
        MODEL_REF,
        "Serve this model: demo, file:/abs/path.gguf, hf:org/repo[:quant|/file], https://... or a catalog id.",
    )
    engine: str = setting("auto", ENGINE, "What serves --model: auto takes the fastest engine that can use the GPU.")
    slots: int = setting("4", SLOTS, "Sequences at a time for --model.")
    ctx: int = setting("4096", CTX, "Tokens of context per slot for --model. Memory grows with slots x ctx.")
    gpus: tuple[int, ...] | None = setting(None, GPUS, "GPUs for --model. The engine's choice if not given.")
    engine_arg: tuple[str, ...] = setting(
        "", ARGUMENTS, "A further argument for the engine of --model, quoted as in a shell; may be repeated."
    )
    engine_url: str | None = setting(
        None, URL, "Where the engine of `--engine external` listens.", example="http://127.0.0.1:8000"
    )
    pools: tuple[PoolSpec, ...] = setting("", POOLS, "Pools, beside the one that --model makes.", only="yaml")
    allow_cpu: bool = setting("false", BOOL, "Serve from the CPU when no engine can use the GPU.")
    llama_server: str | None = setting(
        None, PATH, "The llama-server binary. Looked up in PATH if not given.", example="/usr/local/bin/llama-server"
    )
    engine_cidr: tuple[Network, ...] = setting(
        "", CIDRS, "Networks, beside loopback, in which external engines may be. Their traffic is not encrypted."
    )
    early_beat: float = setting(
        "250ms",
        duration("10ms", "10s"),
        "How soon a change here is told to the controls. Changes within it go together.",
    )
    reconnect_grace: float = setting(
        "10s", duration("0s", "1h"), "How long a native task whose reader left runs on before it is cancelled."
    )
    log_retention: float = setting(
        "10m", duration("1s", "1d"), "How long the output of an ended task can be read again."
    )
    log_limit: int = setting("4MiB", byte_size("64KiB", "1GiB"), "Output kept per task; beyond it the oldest bytes go.")
    logs_limit: int = setting("256MiB", byte_size("1MiB", "64GiB"), "Output kept of all tasks together.")
    load_timeout: float = setting(
        "5m", duration("1s", "1d"), "How long an engine may take to load its model; 20 s more for each GiB of it."
    )
    stall_timeout: float = setting(
        "120s",
        duration("1s", "1d"),
        "An engine whose slots are busy and that has made no token for this long has stalled, and is started anew.",
    )
    orphan_grace: float = setting(
        "5m",
        duration("0s", "1d"),
        "How long an engine waits for the next agent once its own is gone. 0: it ends with its agent.",
    )
    keep_engines: bool = setting(
        "false", BOOL, "At SIGTERM, leave the engines to the next agent, which takes them over with their models."
    )
    stage_rate: int | None = setting(
        None, byte_size("64KiB", "64GiB"), "Bytes a second that the staging of models may take, all together."
    )
    stage_headroom: int = setting("2GiB", byte_size("0", "64GiB"), "Disk space that the staging of models leaves free.")
    stop_grace: float = setting("10s", duration("0s", "10m"), "How long an engine may take to end before it is killed.")
    poll_handoffs: bool = setting(
        "false", BOOL, "Poll for handoff files: for network mounts, where changes are not announced."
    )

    def effective_pools(self) -> tuple[PoolSpec, ...]:
        """`pools`, with the one that --model or --engine makes in front."""
        if self.model is None and self.engine == "auto":
            return self.pools
        shorthand = PoolSpec(
            id="default",
            engine=self.engine,
            model=self.model,
            gpus=self.gpus,
            slots=self.slots,
            ctx=self.ctx,
            args=self.engine_arg,
            url=self.engine_url if self.engine == "external" else None,
        )
        return (shorthand, *self.pools)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientSettings(RoleSettings):
    """Commands that talk to a control."""

    role: ClassVar[str] = "client"

    url: str = setting("http://127.0.0.1:8080", URL, "The control to talk to.")
    token: str | None = setting(None, TOKEN, "The token to present. Without it the first of LLORCH_API_TOKEN is.")
    timeout: float | None = setting(
        None,
        duration("1ms", "30d"),
        "Give up after this long. Without it a task has as long as it takes, and any other request 30 s.",
    )


ROLES: tuple[type[RoleSettings], ...] = (ControlSettings, NodeSettings, ClientSettings)


def _settings(cls: type[RoleSettings]) -> tuple[Setting, ...]:
    out: list[Setting] = []
    for field in dataclasses.fields(cls):
        declared: _Declared = field.metadata["setting"]
        name = field.name.replace("_", "-")
        env = (f"LLORCH_{field.name.upper()}", *declared.aliases) if declared.only is None else ()
        out.append(
            Setting(
                name,
                declared.kind,
                declared.default,
                declared.doc,
                (cls.role,),
                env,
                in_flags=declared.only != "yaml",
                in_yaml=declared.only != "flag",
                hidden=declared.hidden,
                example=declared.example,
            )
        )
        if declared.kind.secret:
            doc = f"A file with the value of {name}."
            path = f"/etc/llorch/{name}"
            out.append(
                Setting(f"{name}-file", PATH, None, doc, (cls.role,), (f"{env[0]}_FILE",), file_of=name, example=path)
            )
    return tuple(out)


_BY_ROLE = {cls.role: _settings(cls) for cls in ROLES}


def settings_for(cls: type[RoleSettings]) -> tuple[Setting, ...]:
    """The settings of one role, in the order of its dataclass."""
    return _BY_ROLE[cls.role]


def _merged() -> tuple[Setting, ...]:
    """Settings that are the same for several roles, once, with all of those roles."""
    merged: dict[tuple[object, ...], Setting] = {}
    for of_role in _BY_ROLE.values():
        for one in of_role:
            same = (one.name, one.default, one.doc, one.env)
            roles = (*merged[same].roles, *one.roles) if same in merged else one.roles
            merged[same] = dataclasses.replace(one, roles=roles)
    return tuple(merged.values())


SETTINGS: tuple[Setting, ...] = _merged()
