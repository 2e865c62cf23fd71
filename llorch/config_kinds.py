"""The kinds of values a setting can have: how each is written, checked and shown.

Owns the parsers from text to typed values, each with its range, an example and a JSON Schema. A parser raises BadValue
with a message that may quote the text, so a kind marked `secret` parses without looking. Never looks at the machine:
whether a path exists or a name resolves is for whoever uses the value.
"""

from __future__ import annotations

import ipaddress
import re
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeAlias, TypeVar
from urllib.parse import urlsplit

from llorch.config_engine_args import why_not_arg
from llorch.config_yaml import Items, Node, Scalar, YamlFault

# The wire's rules for names, as in `llorch.messages`, which takes 130 ms to import: more than `--help` can spend.
MODEL_ID_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._:/@-]{0,127}"
NODE_ID_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}"
POOL_ID_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"

T = TypeVar("T")
Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network


class BadValue(ValueError):
    """A text that is not a value of its kind; says what is allowed and, in the hint, what a good one looks like."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


@dataclass(frozen=True, slots=True)
class Kind(Generic[T]):
    """`parse` reads what `show` writes. A list kind has `item`, and `join` makes the list out of parsed items."""

    name: str
    parse: Callable[[str], T]
    example: str
    schema: Mapping[str, Any] = field(repr=False)
    show: Callable[[T], str] = str
    choices: tuple[str, ...] = ()
    item: Kind[Any] | None = None
    join: Callable[[Iterable[Any]], T] | None = None
    read: Callable[[Node, list[YamlFault]], T | None] | None = None  # for what only YAML can hold
    secret: bool = False


def quote(text: str) -> str:
    """A value in a message: short, on one line, control characters visible."""
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _string(pattern: str | None = None) -> dict[str, Any]:
    return {"type": "string", "pattern": pattern} if pattern else {"type": "string", "minLength": 1}


# ---------------------------------------------------------------- words and numbers


def text(name: str = "text", pattern: str | None = None, *, allowed: str = "", example: str = "rack-1") -> Kind[str]:
    """Text on one line, and if a pattern is given all of it must match."""
    rule = re.compile(pattern) if pattern else None

    def parse(value: str) -> str:
        if not value.strip():
            raise BadValue("is empty", f"for example {example}")
        if any(ord(char) < 32 or ord(char) == 127 for char in value):
            raise BadValue("has control characters")
        if rule and not rule.fullmatch(value):
            raise BadValue(f"{quote(value)} is not a valid {name}", f"{allowed}, for example {example}")
        return value

    return Kind(name, parse, example, _string(f"^{pattern}$" if pattern else None))


def choice(*words: str) -> Kind[str]:
    def parse(value: str) -> str:
        if value not in words:
            near = closest(value.lower(), words)
            raise BadValue(
                f"{quote(value)} is not one of {', '.join(words)}", f"did you mean {near}?" if near else None
            )
        return value

    return Kind("choice", parse, words[0], {"enum": list(words)}, choices=words)


def closest(word: str, words: Iterable[str]) -> str | None:
    from difflib import get_close_matches

    return next(iter(get_close_matches(word, list(words), n=1, cutoff=0.6)), None)


def _truth(value: str) -> bool:
    word = value.lower()
    if word in ("true", "yes", "on", "1"):
        return True
    if word in ("false", "no", "off", "0"):
        return False
    raise BadValue(f"{quote(value)} is neither true nor false", "true or false")


BOOL: Kind[bool] = Kind("bool", _truth, "true", {"type": "boolean"}, show=lambda value: str(value).lower())


def _in_range(value: float, low: float, high: float, show: Callable[[Any], str]) -> None:
    if not low <= value <= high:
        raise BadValue(f"{show(value)} is out of range", f"from {show(low)} to {show(high)}")


def integer(low: int, high: int, *, example: int | None = None) -> Kind[int]:
    def parse(value: str) -> int:
        if not re.fullmatch(r"[+-]?[0-9]{1,18}", value):
            raise BadValue(f"{quote(value)} is not a whole number", f"from {low} to {high}")
        number = int(value)
        _in_range(number, low, high, str)
        return number

    return Kind("int", parse, str(low if example is None else example), _range("integer", low, high))


def number(low: float, high: float) -> Kind[float]:
    def parse(value: str) -> float:
        if not re.fullmatch(r"[+-]?[0-9]{1,15}(\.[0-9]{1,15})?", value):
            raise BadValue(f"{quote(value)} is not a number", f"from {low:g} to {high:g}")
        parsed = float(value)
        _in_range(parsed, low, high, "{:g}".format)
        return parsed

    return Kind("number", parse, "1.0", _range("number", low, high), show=repr)


def _range(kind: str, low: float, high: float) -> dict[str, Any]:
    return {"type": kind, "minimum": low, "maximum": high}


_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def show_duration(seconds: float) -> str:
    """The largest unit that divides it, so that 300 reads 5m; `duration` reads it back exactly, to the millisecond."""
    millis = round(seconds * 1000)
    for unit in ("d", "h", "m", "s"):
        size = int(_SECONDS[unit] * 1000)
        if millis and millis % size == 0:
            return f"{millis // size}{unit}"
    return f"{millis}ms" if millis else "0s"


def duration(low: str, high: str) -> Kind[float]:
    """A length of time in seconds. A bare number is seconds."""
    low_s, high_s = _seconds(low), _seconds(high)

    def parse(value: str) -> float:
        seconds = _seconds(value)
        _in_range(seconds, low_s, high_s, show_duration)
        return seconds

    schema = {"anyOf": [_range("number", low_s, high_s), _string(r"^[0-9]+(\.[0-9]+)?(ms|s|m|h|d)?$")]}
    return Kind("duration", parse, "10s", schema, show=show_duration)


def _seconds(value: str) -> float:
    match = re.fullmatch(r"([0-9]{1,12}(?:\.[0-9]{1,9})?) ?(ms|s|m|h|d)?", value.strip())
    if not match:
        raise BadValue(
            f"{quote(value)} is not a length of time", "a number and ms, s, m, h or d, for example 10s or 5m"
        )
    # Whole milliseconds: the finest that a duration means anything at, and what makes 0.1 * 3 come out as written.
    return round(float(match[1]) * _SECONDS[match[2] or "s"], 3)


_BYTES = {
    "": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40,
}  # fmt: skip


def show_bytes(size: int) -> str:
    for unit, power in (("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size and size % 2**power == 0:
            return f"{size >> power}{unit}"
    return f"{size}B"


def byte_size(low: str, high: str) -> Kind[int]:
    """A number of bytes. A bare number is bytes; K, M, G alone are binary."""
    low_b, high_b = _bytes(low), _bytes(high)

    def parse(value: str) -> int:
        size = _bytes(value)
        _in_range(size, low_b, high_b, show_bytes)
        return size

    schema = {"anyOf": [_range("integer", low_b, high_b), _string(r"^[0-9]+(\.[0-9]+)? ?([kKmMgGtT]?([iI]?[bB])?)$")]}
    return Kind("size", parse, "64MiB", schema, show=show_bytes)


def _bytes(value: str) -> int:
    match = re.fullmatch(r"([0-9]{1,18})(?:\.([0-9]{1,9}))? ?([A-Za-z]{0,3})", value.strip())
    unit = _BYTES.get(match[3].lower()) if match else None
    if not match or unit is None:
        raise BadValue(f"{quote(value)} is not a size", "a number and KiB, MiB, GiB or TiB, for example 64MiB")
    return int(match[1]) * unit + int(match[2] or "0") * unit // int(10 ** len(match[2] or ""))


# ---------------------------------------------------------------- addresses


@dataclass(frozen=True, slots=True)
class HostPort:
    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def loopback(self) -> bool:
        return is_loopback(self.host)

    @property
    def everywhere(self) -> bool:
        """Every address of the machine."""
        try:
            return ipaddress.ip_address(self.host).is_unspecified
        except ValueError:
            return False


def is_loopback(host: str) -> bool:
    """Whether only this machine can be meant. A name other than localhost is taken to lead elsewhere."""
    name = host.lower().removesuffix(".")
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


_HOST_NAME = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?:\.[A-Za-z0-9_-]{1,63})*\.?")
_HOST_PORT_HINT = "host:port, for example 127.0.0.1:8080, 0.0.0.0:8080 or [::1]:8080"


def _host_port(value: str) -> HostPort:
    host, colon, port = value.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    host = host[1:-1] if bracketed else host
    if not colon or not host or not re.fullmatch(r"[0-9]{1,5}", port):
        raise BadValue(f"{quote(value)} is not host:port", _HOST_PORT_HINT)
    if int(port) > 65535:
        raise BadValue(f"port {port} is out of range", "from 0 to 65535; 0 takes a free port")
    if not (_is_ipv6(host) if bracketed or ":" in host else len(host) <= 253 and _HOST_NAME.fullmatch(host)):
        raise BadValue(f"{quote(host)} is not a host name or address", _HOST_PORT_HINT)
    if not bracketed and ":" in host:
        raise BadValue(f"{quote(value)} leaves open where the address ends", f"write [{host}]:{port}")
    return HostPort(host, int(port))


def _is_ipv6(host: str) -> bool:
    try:
        ipaddress.IPv6Address(host)
    except ValueError:
        return False
    return True


HOST_PORT: Kind[HostPort] = Kind(
    "host:port", _host_port, "127.0.0.1:8080", _string(r"^(\[[0-9A-Fa-f:.%]+\]|[^:\[\]]+):[0-9]{1,5}$")
)


def host_of(url: str) -> str:
    """The host of a URL that this module has accepted."""
    return urlsplit(url).hostname or ""


def plain_http_abroad(url: str) -> bool:
    """Whether what is sent to this URL crosses a network unencrypted."""
    return urlsplit(url).scheme == "http" and not is_loopback(host_of(url))


def _url(value: str) -> str:
    hint = "for example https://control.example:8080"
    if not value.isascii() or any(ord(char) <= 32 or ord(char) == 127 for char in value):
        raise BadValue("a URL has no spaces, control or non-ASCII characters", hint)
    if "@" in value:
        # Never quoted: what stands before the @ is a password.
        raise BadValue("a URL must not carry a user or password", "give tokens by their own settings")
    try:
        parts = urlsplit(value)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise BadValue(f"{quote(value)} is not a URL", hint) from None
    if parts.scheme not in ("http", "https") or not host or port == 0:
        raise BadValue(f"{quote(value)} is not an http or https URL", hint)
    if not (_is_ipv6(host) or _HOST_NAME.fullmatch(host)):
        raise BadValue(f"{quote(host)} is not a host name or address", hint)
    if parts.query or parts.fragment:
        raise BadValue("a base URL has no ?query and no #fragment", hint)
    return value.rstrip("/")


URL: Kind[str] = Kind("url", _url, "https://control.example:8080", _string(r"^https?://[^@\s?#]+$"))


def _cidr(value: str) -> Network:
    hint = "for example 10.0.0.0/8, 192.168.1.20 or fd00::/8"
    try:
        return ipaddress.ip_network(value)
    except ValueError:
        pass
    try:
        meant = ipaddress.ip_network(value, strict=False)
    except ValueError:
        raise BadValue(f"{quote(value)} is not a network", hint) from None
    raise BadValue(f"{quote(value)} has bits beyond its prefix", f"did you mean {meant}?")


_CIDR: Kind[Network] = Kind("cidr", _cidr, "10.0.0.0/8", _string(r"^[0-9A-Fa-f:.]+(/[0-9]{1,3})?$"))


# ---------------------------------------------------------------- lists, paths, secrets, models


def listed(item: Kind[T], example: str) -> Kind[tuple[T, ...]]:
    """A comma list on a command line or in the environment, a list (or the same text) in YAML; nothing twice."""

    def join(parsed: Iterable[T]) -> tuple[T, ...]:
        values = tuple(parsed)
        twice = next((value for place, value in enumerate(values) if value in values[:place]), None)
        if twice is not None:
            raise BadValue(f"{item.show(twice)} is given twice")
        return values

    def parse(value: str) -> tuple[T, ...]:
        parts = [part.strip() for part in value.split(",")]
        if parts and not parts[-1]:
            parts.pop()  # a comma at the end
        return join(item.parse(part) for part in parts)

    def show(values: tuple[T, ...]) -> str:
        return ",".join(item.show(value) for value in values)

    schema = {"anyOf": [{"type": "array", "items": dict(item.schema), "uniqueItems": True}, _string()]}
    if item.schema.get("type") == "integer":
        schema["anyOf"].append(dict(item.schema))  # `gpus: 0`
    return Kind(f"{item.name} list", parse, example, schema, show, item=item, join=join)


def _name(value: str) -> str:
    if _HOST_NAME.fullmatch(value) and len(value) <= 253:
        return value
    try:
        return str(ipaddress.ip_address(value))
    except ValueError:
        raise BadValue(f"{quote(value)} is neither a host name nor an address", "for example desk.example") from None


NAMES = listed(Kind("name", _name, "desk.example", _string()), "desk.example,10.0.0.5")
URLS = listed(URL, "https://control.example:8080")
CIDRS = listed(_CIDR, "10.0.0.0/8")
GPUS = listed(integer(0, 255), "0,1")


def arguments(engine: str | None, example: str = "--flash-attn on") -> Kind[tuple[str, ...]]:
    """Words for `engine`, less what llorch rests on; None: the words of a program of the owner's own."""

    def word(value: str) -> str:
        if "\0" in value:
            raise BadValue("has a NUL character")
        why = None if engine is None else why_not_arg(value, engine)
        if why is not None:  # the flag alone is quoted: what is behind a `=` may be a key
            raise BadValue(f"{value.partition('=')[0]} can't be given to an engine: {why}", "remove it")
        return value

    def words(value: str) -> tuple[str, ...]:
        try:
            split = shlex.split(value)
        except ValueError:
            raise BadValue("a quote is not closed", "quote as in a shell: --flag 'two words'") from None
        return tuple(map(word, split))

    item: Kind[str] = Kind("argument", word, example.partition(" ")[0], {"type": ["string", "number"]})
    schema = {"anyOf": [{"type": "array", "items": dict(item.schema)}, {"type": "string"}]}
    return Kind("arguments", words, example, schema, show=shlex.join, item=item, join=tuple)


ARGUMENTS = arguments("auto")

PATH = text("path", example="/etc/llorch/file")


def _secret(value: str) -> str:
    return value


# In YAML only a reference, `@path`. What the text holds is checked by `llorch.auth`, which never quotes it.
TOKENS: Kind[str] = Kind("tokens", _secret, "", _string(r"^@.+"), secret=True)
TOKEN: Kind[str] = Kind("token", _secret, "", _string(r"^@.+"), secret=True)

_HF = re.compile(
    r"hf:[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}(?::[A-Za-z0-9][\w.-]{0,63}|/[\w./ -]{1,255})?", re.A
)
_REF_HINT = "demo, file:/abs/path.gguf, hf:org/repo[:quant|/file], https://... or a catalog id"


def _model_ref(value: str) -> str:
    scheme, _, rest = value.partition(":")
    if scheme == "file":
        if not rest.startswith("/") or rest.startswith("//") or any(ord(char) < 32 for char in rest):
            raise BadValue(f"{quote(value)} is not an absolute path", "for example file:/models/llama-3-8b.gguf")
    elif scheme == "hf":
        if not _HF.fullmatch(value) or ".." in value or {"", "."} & set(rest.split("/")):
            raise BadValue(f"{quote(value)} is not a Hugging Face model", "for example hf:org/repo:Q4_K_M")
    elif scheme in ("http", "https"):
        if any(ord(char) <= 32 or ord(char) == 127 for char in value):
            raise BadValue("a URL has no spaces or control characters", "write them as %20")
        if plain_http_abroad(URL.parse(value.partition("?")[0])):
            raise BadValue("a model is not fetched over http://", "use https://")
    elif value.startswith(("/", "./", "../", "~")):
        raise BadValue(f"{quote(value)} is not a model reference", f"did you mean file:{value}? (absolute)")
    elif not re.fullmatch(MODEL_ID_PATTERN, value) or ".." in value:
        raise BadValue(f"{quote(value)} is not a model reference", _REF_HINT)
    if ".." in value.partition("?")[0].split("/"):
        raise BadValue(f"{quote(value)} leads through `..`", "write the path out")
    return value


def _show_model_ref(ref: str) -> str:
    """Without the query of a URL, which may be a signature that opens it."""
    return ref.partition("?")[0] if ref.startswith(("https:", "http:")) else ref


MODEL_REF: Kind[str] = Kind("model", _model_ref, "hf:org/repo:Q4_K_M", _string(), show=_show_model_ref)


# ---------------------------------------------------------------- values in YAML


def read_node(kind: Kind[T], node: Node, faults: list[YamlFault], key: str) -> T | None:
    """The value of a YAML node, or None and at least one fault, each at the line it is about."""
    if kind.read is not None:
        return kind.read(node, faults)
    if isinstance(node, Scalar):
        return _read_scalar(kind, node, faults, key)
    if not isinstance(node, Items) or kind.item is None or kind.join is None:
        given = "a list" if isinstance(node, Items) else "a mapping"
        wanted = "a list" if kind.item else "one value"
        faults.append(YamlFault(node.line, f"is {given}; expected {wanted}", f"for example {kind.example}", key))
        return None
    before = len(faults)
    values = [read_node(kind.item, item, faults, key) for item in node.items]
    if len(faults) > before:
        return None
    try:
        return kind.join(values)
    except BadValue as bad:
        faults.append(YamlFault(node.line, bad.message, bad.hint, key))
        return None


def _read_scalar(kind: Kind[T], node: Scalar, faults: list[YamlFault], key: str) -> T | None:
    if node.refused:
        return None
    if node.null:
        faults.append(YamlFault(node.line, "has no value", f"for example {kind.example}; or remove the line", key))
        return None
    try:
        return kind.parse(node.text)
    except BadValue as bad:
        faults.append(YamlFault(node.line, bad.message, bad.hint, key))
        return None
