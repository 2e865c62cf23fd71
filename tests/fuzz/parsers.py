"""Every parser that reads what others wrote, as a table of targets; each with what has to hold for whatever it accepts.

Where a parser takes bytes piece by piece, the pieces must not matter. Where there is a writer, what was read and
written again is the same. Where a rule is meant to keep something out, the oracle has a rule of its own.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import math
import re
import socket
import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from multidict import CIMultiDict

from llorch import openai_paths, pki, records, sse, tickets
from llorch.auth import Principal, Scope, TokenRing, authorize, parse_tokens, presented_token
from llorch.cli import contexts
from llorch.client.events import read_event
from llorch.config import ConfigFile, ControlSettings, NodeSettings, resolve
from llorch.config_faults import ConfigFaults
from llorch.config_kinds import MODEL_REF, BadValue
from llorch.config_yaml import read_yaml
from llorch.control import intake, views
from llorch.control.addresses import check_address
from llorch.control.admission import Admission
from llorch.control.decision import decide
from llorch.control.metrics import registry_metrics
from llorch.control.placement import Wish
from llorch.control.registry import Registry
from llorch.control.roster import FILE_NAME, Roster
from llorch.errors import ConfigError, LlorchError
from llorch.messages import (
    MAX_DEPTH,
    Attach,
    Head,
    Heartbeat,
    NodeCall,
    Open,
    PoolReport,
    Register,
    Tail,
    TaskBody,
    decode_json,
    decode_object,
    model_id_ok,
    parse,
)
from llorch.node import catalog_file, dial, fit, handoff, hub_files
from llorch.node.catalog import check_ref
from llorch.node.engines import gguf, openai_api, progress, requests
from llorch.node.engines.chunks import Meter, normalise_error
from llorch.node.modelref import model_id
from llorch.records import RecordError, Type
from llorch.tls import NameReader
from llorch.tokens import Tokens, is_whole, read_join_token
from llorch.tokens import Wish as TokenWish
from tests.fuzz import seeds
from tests.fuzz.watch import Shape, Target

NOW, WALL = 1_000.0, "2026-01-02T03:04:05Z"
PEER = "10.1.2.3"  # who registers, beats and advertises addresses: not this machine
TOKEN = "t" * 40
TICKET_KEY = "k" * 64
TICKET = tickets.mint(TICKET_KEY, digest="d" * 64, source="a", destination="b", expires_at=NOW + 60, model="m")
JSON_WORDS = (
    b'"model": "sim"',
    b'"prompt": "x"',
    b"\\ud800",
    b"\\u0000",
    b"NaN",
    b"-Infinity",
    b"1e400",
    b"null",
    b"true",
)


def utf8(value: object) -> bytes:
    """`value` as an answer carries it: strict JSON, whatever a peer put into it."""
    try:
        raw = json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except (ValueError, TypeError, UnicodeEncodeError) as error:
        raise AssertionError(f"what was accepted can't be written as JSON: {type(error).__name__}") from error
    return raw


def pieces(data: bytes, seed: int) -> list[bytes]:
    """`data` cut at places that depend on it; byte by byte where it is short."""
    if len(data) <= 48:
        return [data[at : at + 1] for at in range(len(data))]
    cut, at, out = seed or 1, 0, []
    while at < len(data):
        cut = (cut * 1_103_515_245 + 12_345) & 0x7FFF_FFFF
        size = 1 + (cut >> 8) % max(8, len(data) // 16)
        out.append(data[at : at + size])
        at += size
    return out


# ---------------------------------------------------------------- JSON


def _depth(value: object) -> int:
    if isinstance(value, dict):
        return 1 + max(map(_depth, value.values()), default=0)
    return 1 + max(map(_depth, value), default=0) if isinstance(value, list) else 0


def strict_json(data: bytes) -> None:
    """What is accepted is JSON to the standard library too, is not deep, and can be written again."""
    try:
        value = decode_json(data)
    except LlorchError as error:
        utf8(error.envelope())
        raise
    assert _depth(value) <= MAX_DEPTH, "deeper than the limit"
    assert json.loads(data.decode()) == value, "another value than json.loads reads"
    assert decode_json(utf8(value)) == value, "written and read again, it differs"


def _request(data: bytes) -> tuple[CIMultiDict[str], bytes]:
    """Header lines, an empty line, a body; without the empty line all is body."""
    head, found, body = data.partition(b"\n\n")
    if not found:
        return CIMultiDict(), data
    headers: CIMultiDict[str] = CIMultiDict()
    for line in head.split(b"\n"):
        name, _, value = line.decode("utf-8", "surrogateescape").partition(":")
        headers.add(name.strip(), value.strip())
    return headers, body


def _plain_task(task: intake.Task) -> None:
    assert model_id_ok(task.wish.model), "a model id with what ids may not have"
    assert task.priority in intake.PRIORITIES
    assert task.deadline_at is None or NOW < task.deadline_at <= NOW + intake.MAX_DEADLINE_MS / 1_000
    assert task.key_digest is None or len(task.key_digest) == 64
    for name, value in task.headers.items():
        assert value.isascii() and value.isprintable(), f"{name} would go on as it came"
    # As an OPEN carries it: the node must take what the control has accepted.
    opening = {
        "task_id": seeds.TASK_ID,
        "pool_id": "p0",
        "path": task.path,
        "model": task.wish.model,
        "headers": task.headers,
    }
    parse(Open, decode_object(utf8(opening)))


def task_body(data: bytes) -> None:
    headers, body = _request(data)
    task = intake.native_task(body, headers, owner="a", request_id="r", task_id=seeds.TASK_ID, now=NOW)
    _plain_task(task)
    for engine in ("llamacpp", "vllm", "sglang", "external"):
        request = requests.encode_native(parse(TaskBody, decode_object(body)), "engine-model", engine)
        wire = decode_object(request.body)
        assert set(wire) <= _KNOWN | set(requests.NATIVE_PARAMETERS), "a field that no engine is to see"
        assert wire["model"] == "engine-model" and wire["stream"] is True


_KNOWN = {
    "model", "prompt", "messages", "stream", "stream_options", "reasoning_format", "separate_reasoning",
    "response_format", "repetition_penalty", "structured_outputs", "ebnf",
}  # fmt: skip


def openai_body(data: bytes) -> None:
    headers, body = _request(data)
    path = openai_paths.served(headers.get("path", openai_paths.CHAT)).path  # as the route does, before all else
    task = intake.openai_task(path, body, headers, owner="a", request_id="r", task_id=seeds.TASK_ID, now=NOW)
    _plain_task(task)
    request = requests.encode_openai(path, decode_object(body), "engine-model")
    wire = decode_object(request.body)
    assert wire["model"] == "engine-model"
    assert not set(wire) & seeds.ENGINES_OWN, "a field that belongs to the engine"
    assert (
        not request.stream or not openai_paths.SERVED[path].usage_on_request or wire["stream_options"]["include_usage"]
    )


def reader_position(data: bytes) -> None:
    headers, query = _request(data)
    given = dict(part.partition("=")[::2] for part in query.decode("utf-8", "replace").split("&"))
    assert 0 <= intake.event_offset(headers, given) < 16**12
    attempt = intake.event_attempt(headers, given)
    assert attempt is None or 0 <= attempt < 10**9


# ---------------------------------------------------------------- membership


def _looked_at(registry: Registry) -> None:
    """Everything that is made of what nodes say."""
    utf8([views.nodes_view(registry, NOW), views.pools_view(registry, NOW), views.catalog_view(registry)])
    utf8(views.openai_models(registry))
    for metric in registry_metrics(registry, Admission(), NOW):
        for sample in metric.samples:
            assert not math.isnan(sample.value), f"{sample.name} is not a number"
    registry.events()
    known = registry.models()
    for node in registry.nodes.values():
        for pool in node.pools.values():
            assert 0 <= pool.slots_free(NOW) <= pool.slots_total, "more free slots than slots"
            if pool.bound_model is not None:
                utf8(
                    decide(
                        Wish(model=pool.bound_model), registry.pool_facts(NOW, pool.bound_model), NOW, known
                    ).to_wire()
                )


def _register(registry: Registry, data: bytes) -> str:
    message = parse(Register, decode_object(data))
    registry.register(message, now=NOW, wall=WALL, peer=PEER, lease_id="lease")
    return message.node_id


def registration(data: bytes) -> None:
    registry = Registry("epoch")
    _register(registry, data)
    _looked_at(registry)


def heartbeats(data: bytes) -> None:
    """A registration on the first line, then beats, one a line."""
    first, *beats = data.split(b"\n", 8)
    registry = Registry("epoch")
    try:
        node_id = _register(registry, first)
    except LlorchError:
        node_id = _register(registry, seeds.REGISTER_MINIMAL)
    for line in beats:
        try:
            beat = parse(Heartbeat, decode_object(line))
            registry.heartbeat(node_id, beat, now=NOW, wall=WALL)
        except LlorchError:
            continue
    _looked_at(registry)
    registry.expire(NOW + 60)
    _looked_at(registry)


def pool_report(data: bytes) -> None:
    report = parse(PoolReport, decode_object(data))
    registry = Registry("epoch")
    node_id = _register(registry, seeds.REGISTER_MINIMAL)
    registry.merge_pool(node_id, report, NOW, WALL)
    _looked_at(registry)


def address(data: bytes) -> None:
    text = data.decode("utf-8", "surrogateescape")
    check_address(text, PEER)
    parts = urlsplit(text if "://" in text else f"//{text}")
    host = (parts.hostname or "").rstrip(".")
    assert host and text.isascii() and parts.username is None
    try:
        host.encode("idna")
    except UnicodeError:
        raise AssertionError("a name that no resolver takes") from None
    assert host != "localhost" and not host.endswith(".localhost"), "this machine"
    try:
        found: Any = ipaddress.ip_address(host)
    except ValueError:
        try:
            found = ipaddress.ip_address(socket.inet_aton(host))  # what resolvers take for one
        except OSError:
            return
    found = getattr(found, "ipv4_mapped", None) or found
    assert not (found.is_loopback or found.is_link_local or found.is_multicast or found.is_unspecified), (
        "not to be dialled"
    )


# ---------------------------------------------------------------- records and links

_PAYLOADS: Mapping[int, Callable[[bytes], object]] = {
    Type.OPEN: lambda raw: parse(NodeCall if b'"method"' in raw else Open, records.decode_json(raw)),
    Type.ATTACH: lambda raw: parse(Attach, records.decode_json(raw)),
    Type.REFUSE: lambda raw: utf8(LlorchError.from_wire(records.decode_json(raw)).envelope()),
    Type.HEAD: lambda raw: parse(Head, records.decode_json(raw)),
    Type.TAIL: lambda raw: _tail(parse(Tail, records.decode_json(raw))),
    Type.CREDIT: records.decode_credit,
}


def _tail(tail: Tail) -> None:
    if tail.error is not None:
        utf8(LlorchError.from_wire(tail.error).envelope())


def record_stream(data: bytes) -> None:
    """However a stream of records is cut, the same ones come out, and written again they are the same bytes."""
    whole, by_piece = records.Decoder(), records.Decoder()
    found, again = _records(whole, [data]), _records(by_piece, pieces(data, len(data)))
    assert found == again, "the records depend on how the bytes came"
    good, broken = found
    assert broken == _malformed(data), "another view of what is malformed than the format's"
    if not broken:
        assert whole.pending == by_piece.pending
        written = b"".join(records.encode(*record) for record in good)
        assert written == data[: len(data) - whole.pending], "written again, they differ"
    for record in good:
        if record.type in _PAYLOADS:
            try:
                _PAYLOADS[record.type](record.payload)
            except (RecordError, LlorchError):
                continue


def _malformed(data: bytes) -> bool:
    """Whether a record says that it is longer than any may be; read as the format is written down."""
    at = 0
    while len(data) - at >= 9:
        length = int.from_bytes(data[at + 5 : at + 9], "big")
        if length > 64 * 1024 - 9:
            return True
        at += 9 + length
    return False


def _records(decoder: records.Decoder, parts: list[bytes]) -> tuple[list[records.Record], bool]:
    out: list[records.Record] = []
    try:
        for part in parts:
            out += decoder.feed(part)
    except RecordError:
        try:
            decoder.feed(b"")
        except RecordError:
            return [], True  # what came in the same piece as the malformed one is lost with it
        raise AssertionError("a broken decoder goes on") from None
    return out, False


def link_head(data: bytes) -> None:
    status, headers = dial._read_head(data)
    assert 0 <= status <= 999
    for name, value in headers.items():
        assert "\r\n" not in name + value


# ---------------------------------------------------------------- event streams


def _plain_events(data: bytes) -> list[tuple[str, str, str | None]]:
    """The standard's own algorithm, over the whole stream at once and without regard to speed."""
    lines = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
    out: list[tuple[str, str, str | None]] = []
    kind, ident, texts, begun = "", None, list[str](), False
    for line in lines[:-1]:  # what the last line end does not close is not looked at
        if not begun and line.startswith(b"\xef\xbb\xbf"):
            line = line[3:]  # llorch allows a mark before every block, the standard before the first
        if not line:
            if texts:
                out.append((kind, "\n".join(texts), ident))
            kind, ident, texts, begun = "", None, [], not begun  # two line ends with nothing between them end a block
            continue
        begun = True
        name, _, value = line.partition(b":")
        text = value.removeprefix(b" ").decode("utf-8", "replace")
        if name == b"data":
            texts.append(text)
        elif name == b"event":
            kind = text
        elif name == b"id" and "\0" not in text:
            ident = text
    return out


def event_stream(data: bytes) -> None:
    """Cut anywhere, the events are the same, and they are those that the standard's algorithm finds."""
    expected, uncut = _plain_events(data), sse.Splitter().feed(data)
    for parts in ([data], pieces(data, len(data)), [data[: len(data) // 2], data[len(data) // 2 :]]):
        decoder, splitter = sse.Decoder(), sse.Splitter()
        events = [event for part in parts for event in decoder.feed(part)]
        if (last := decoder.finish()) is not None:
            events.append(last)
        assert [(event.event, event.data, event.id) for event in events] == expected, "not the events of the standard"
        blocks = [block for part in parts for block in splitter.feed(part)]
        assert blocks == uncut, "the blocks depend on how the bytes came"
        assert b"".join(blocks) + splitter.finish() == data, "bytes were lost on the way"
    for kind, text, _ in expected:
        again = sse.Decoder().feed(sse.encode(kind, text, id="00")) if "\ufffd" not in kind else []
        assert not again or again == [sse.Event(kind, text, "00")], "written again, it differs"


def client_events(data: bytes) -> None:
    """What `llorch submit` makes of a control's stream."""
    for event in sse.Decoder().feed(data):
        try:
            read_event(event)
        except LlorchError as error:
            utf8(error.envelope())


# ---------------------------------------------------------------- what engines answer


def engine_chunks(data: bytes) -> None:
    """Chunks of every surface, one a line, as an engine would stream them."""
    for line in data.split(b"\n"):
        meter = Meter(NOW)
        try:
            value = openai_api._value(line.decode("utf-8", "replace"))
        except sse.SseError:
            continue
        chunk = meter.read(value)
        meter.mark(NOW)
        utf8([meter.timings.model_dump(), meter.finish_reason, vars_of(meter.usage)])
        if chunk.error is not None:
            utf8(chunk.error.envelope())


def vars_of(value: Any) -> dict[str, Any]:
    return {name: getattr(value, name) for name in value.__slots__}


def engine_answer(data: bytes) -> None:
    """An engine's stream, cut anywhere, becomes the same log; a log is a stream with one end, or nothing at all."""
    facts = openai_api.TaskFacts(seeds.TASK_ID, "n0", "p0", "m", accepted_at=NOW)
    _whole_answer(data)
    for make in _STREAMS:
        whole, error = _log(make(facts), [data])
        parts, error_too = _log(make(facts), pieces(data, len(data)))
        assert (whole, error) == (parts, error_too), "the log depends on how the engine's bytes came"
        if isinstance(make(facts), openai_api.NativeDecoder):
            _native_log(whole)


_STREAMS: tuple[Callable[[openai_api.TaskFacts], openai_api.Decoder], ...] = (
    openai_api.NativeDecoder,
    lambda facts: openai_api.OpenAiDecoder(facts, requests.EngineRequest(openai_paths.CHAT, b"", True, False)),
    lambda facts: openai_api.OpenAiDecoder(facts, requests.EngineRequest(openai_api.MESSAGES, b"", True)),
)


def _log(decoder: openai_api.Decoder, parts: list[bytes]) -> tuple[bytes, str | None]:
    out = [decoder.feed(part, NOW + 1) for part in parts]
    out.append(decoder.finish(NOW + 1))
    assert decoder.done
    assert decoder.feed(b"data: {}\n\n", NOW + 2) == decoder.finish(NOW + 2) == b"", "something after the end"
    log = b"".join(out)
    assert bool(log) == decoder.first_content or decoder.error is None, "shown and not known to be, or the reverse"
    return log, None if decoder.error is None else decoder.error.code.value


def _native_log(log: bytes) -> None:
    at, ends = 0, 0
    for block in sse.Splitter().feed(log):
        at += len(block)
        event = sse.parse(block)
        assert event is not None and event.id is not None and int(event.id, 16) == at, "an id that is not its offset"
        assert not ends, "an event after the end"
        ends += event.event in ("end", "error")
        decode_object(event.data.encode())
    assert at == len(log)
    assert ends == (1 if log else 0), "a stream has one end"


def _whole_answer(data: bytes) -> None:
    decoder = openai_api.OpenAiAnswer(openai_api.TaskFacts(seeds.TASK_ID, "n0", "p0", "m", accepted_at=NOW))
    out = decoder.feed(data, NOW) + decoder.finish(NOW)
    assert out in (b"", data)
    assert bool(out) == (decoder.error is None)


def engine_counters(data: bytes) -> None:
    """An engine's `/metrics`, whosever words they are."""
    text = data.decode("utf-8", "replace")
    for engine in ("llamacpp", "vllm", "sglang", "external"):
        found = progress.read(engine, text)
        if found is not None:
            assert len(found.counters) == 3 and all(0 <= count < math.inf for count in found.counters)
            assert found.busy is None or 0 <= found.busy <= progress.MAX_BUSY
            assert found.kv_usage is None or 0 <= found.kv_usage <= 1


def engine_error(data: bytes) -> None:
    """An engine's refusal: two bytes of status, then its body. What goes on is short, printable and in our words."""
    status = 400 + int.from_bytes(data[:2].ljust(2, b"\0"), "big") % 200
    error = normalise_error(status, data[2:])
    utf8(error.envelope())
    assert len(error.message) <= 600 and error.message.isprintable()


# ---------------------------------------------------------------- files


def handoff_file(data: bytes) -> None:
    """Under the name that its content asks for, for a wrong name is refused before anything else can go wrong."""
    name = "p0-r0.json"
    try:
        wire = json.loads(data)
        name = f"{wire['pool_id']}-{wire.get('replica_id', 'r0')}.json"
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        pass
    found = handoff.parse(name, data)
    assert handoff.parse(found.file_name, handoff.render(found)) == found, "written again, it differs"
    assert Path(found.file_name).name == found.file_name and not found.file_name.startswith("."), "another directory"
    assert model_id_ok(found.model)
    host = urlsplit(found.url).hostname or ""
    if host != "localhost":
        ip: Any = ipaddress.ip_address(host)
        assert (getattr(ip, "ipv4_mapped", None) or ip).is_loopback, "an engine elsewhere"


def gguf_header(data: bytes) -> None:
    header = gguf.parse_header(data)
    assert header.architecture and header.version in gguf.VERSIONS
    assert header.tensors * 24 <= len(data), "more tensors than there are bytes for"
    needed = fit.need(header, len(data), ctx=4096, slots=4)
    assert 0 <= needed.weights_bytes <= len(data) and needed.kv_bytes >= 0, "an estimate that can't be"


def catalog_of_a_node(data: bytes) -> None:
    found = catalog_file.load(data)
    assert catalog_file.load(catalog_file.dump(found.values())) == found, "what was read is not what is written"
    folder = Path("/data/models")
    for called, entry in found.items():
        assert called == entry.id and (folder / catalog_file.folder_name(called)).parent == folder
        assert catalog_file.id_of_folder(catalog_file.folder_name(called)) == called
        for file in entry.files:
            inside = (folder / file.name).parent == folder and file.name not in (".", "..")
            assert inside or (entry.outside and file.name.startswith("/")), "a file that lies somewhere else"
            assert "\0" not in file.name


def partial_state(data: bytes) -> None:
    state = catalog_file.load_partial(data)
    assert catalog_file.load_partial(catalog_file.dump_partial(state)) == state
    assert state.continues(state) or (state.validator is None and state.sha256 is None)


def presented_ticket(data: bytes) -> None:
    text = data.decode("utf-8", "surrogateescape")
    found = tickets.check(
        (TICKET_KEY,), text, model="m", digest="d" * 64, source="a", destination="b", now=NOW
    )  # fmt: skip
    assert found == tickets.Ticket("d" * 64, "m", "a", "b", NOW + 60) and text == TICKET, "a ticket that nobody signed"


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """For files that their readers open themselves; in memory where there is such a place."""
    shm = Path("/dev/shm")
    return tempfile.TemporaryDirectory(prefix="llorch-fuzz-", dir=shm if shm.is_dir() else None)


def tidy() -> None:
    """Remove what targets have written; for a process that ends without Python's own end."""
    if _folder.cache_info().currsize:
        _folder().cleanup()


def roster_file(data: bytes) -> None:
    folder = _folder().name
    Path(folder, FILE_NAME).write_bytes(data)
    saved = Roster(folder).saved
    assert saved is None or all(isinstance(node_id, str) for node_id in saved)


def contexts_file(data: bytes) -> None:
    path = Path(_folder().name, "contexts.json")
    path.write_bytes(data)
    found = contexts.load(path)
    assert found.current is None or found.current in found.named
    for context in found.named.values():
        assert isinstance(context.url, str)


def config_file(data: bytes) -> None:
    text = data.decode("utf-8", "replace")
    read_yaml(text)
    for cls in (ControlSettings, NodeSettings):
        try:
            resolve(
                cls, flags={}, env={"LLORCH_API_TOKEN": TOKEN}, files=[ConfigFile("f", text)], read_file=lambda _: TOKEN
            )
        except ConfigFaults as faults:
            assert faults.faults, "refused for nothing"


# ---------------------------------------------------------------- words


def tokens(data: bytes) -> None:
    text = data.decode("utf-8", "surrogateescape")
    try:
        pairs = parse_tokens(text)
    except ValueError as error:
        longest = max(text.replace("\n", ",").split(","), key=len)
        assert len(longest) < 16 or longest[:16] not in str(error), "a token is quoted"
        raise
    ring = TokenRing((name, token, frozenset({Scope.SUBMIT})) for name, token in pairs)
    for name, token in pairs:
        found = ring.identify(token, NOW)
        assert found is not None and len(token) >= 32 and token.isascii() and token.isprintable() and " " not in token
        if token.strip("="):  # `name===` is a token with its padding, so one of `=` alone can't have a name
            assert parse_tokens(f"{name}={token}") == [(name, token)], "written again, it differs"
        assert ring.identify(token + "x", NOW) is None or token + "x" in dict(map(reversed, pairs))


def made_tokens(data: bytes) -> None:
    """Tokens that llorch makes, as somebody types them; and the store of them, as it may lie on a disk."""
    text = data.decode("utf-8", "surrogateescape")
    if is_whole(text) and text.startswith(("llt1_", "llj1_")):
        assert text.isascii() and text.isprintable(), "a token that no header carries"
    try:
        assert len(read_join_token(text)) == 32 and is_whole(text), "an authority out of what is no token"
    except LlorchError as error:
        assert len(text) < 16 or text[:16] not in str(error), "a token is quoted"
    with contextlib.suppress(ValueError, LlorchError):
        value = decode_object(data)
        store = Tokens.from_json(value)
        assert Tokens.from_json(store.to_json()) == store, "written again, it differs"


def certificates(data: bytes) -> None:
    """A bundle of authorities, as anybody may send it before he is trusted."""
    pki.read_certs(data)


def certificate_request(data: bytes) -> None:
    pki.read_request(data)


def presented(data: bytes) -> None:
    """Credentials in headers. Whoever gets in has shown the token, whole."""
    headers, _ = _request(data + b"\n\n")
    ring = TokenRing([("someone", TOKEN, frozenset({Scope.READ}))])
    token = presented_token(headers)
    who: Principal = authorize(None if token is None else ring.identify(token, NOW), Scope.READ)
    assert token == TOKEN and who.name == "someone", "somebody got in without the token"


def model_refs(data: bytes) -> None:
    text = data.decode("utf-8", "surrogateescape")
    called = model_id(text)
    assert model_id_ok(called) and ".." not in called, "a reference is called by what is no id"
    try:
        ref = MODEL_REF.parse(text)
    except BadValue:
        ref = ""
    assert ".." not in ref.partition("?")[0].split("/"), "a reference leads out of its folder"
    assert not (model_id_ok(text) and ".." in text), "an id that leads somewhere else"
    try:
        staged = check_ref(text)
        wish = hub_files.parse_hub(staged) if staged.startswith("hf:") else None
    except ConfigError:
        staged, wish = "", None
    assert not staged.startswith("-") and not re.search(r"[\x00-\x1f\x7f\ud800-\udfff]", staged), "a hidden character"
    assert wish is None or not {"", ".", ".."} & set(f"{wish.repo}/{wish.file or 'x'}".split("/")), "a path that climbs"
    for model, field in ((TaskBody, "model"), (PoolReport, "pool_id"), (Register, "node_id")):
        try:
            parse(model, {field: text, **({"prompt": ""} if model is TaskBody else {})})
        except LlorchError:
            continue
        assert field != "model" or (model_id_ok(text) and ".." not in text), "two rules for model ids"
        assert text.isascii() and text.isprintable() and " " not in text, "an id with what ids may not have"


@cache
def _name_reader() -> NameReader:
    return NameReader()


def tls_greeting(data: bytes) -> None:
    whole, name = _name_reader().read(data)
    assert whole or name is None
    assert name is None or name.encode() in data, "a name that was not sent"


# ---------------------------------------------------------------- the table

LINES, BINARY = Shape.LINES, Shape.BINARY
REF_WORDS = (b"file:/", b"hf:", b"https://", b".gguf", b"..", b"/", b":", b"@", b"-00001-of-00002", b"?", b"\n")
HTTP_WORDS = (
    b"HTTP/1.1 101 ",
    b"HTTP/1.1 ",
    b"\r\n",
    b": ",
    b"Upgrade",
    b"Content-Length: ",
    b"\xb2",
    b"x-llorch-epoch",
)
HOST_WORDS = (
    b"http://", b"https://", b"127.0.0.1", b"[::1]", b"[::ffff:127.0.0.1]", b"169.254.169.254", b"localhost",
    b".localhost",
    b"0x7f.1", b"2130706433", b"0177.1", b":80", b"@", b"..", b"[", b"]", b"%", b"#", b"?", b"\\", b"a" * 64,
    b"[64:ff9b::7f00:1]",
)  # fmt: skip


def _made() -> tuple[bytes, ...]:
    """A token of each kind, and a store with one."""
    store, _, client = Tokens().add(TokenWish(models=frozenset({"m"}), life_s=60), NOW, bytes(range(40)))
    _, _, join = Tokens().add(TokenWish(), NOW, bytes(range(40)), bytes(32))
    return client.encode(), join.encode(), json.dumps(store.to_json()).encode()


def _pems() -> tuple[bytes, ...]:
    key = pki.ec.derive_private_key(1_000_003, pki.ec.SECP256R1())  # the same in every run, and nobody's
    authority = pki.make_authority(key, 1_800_000_000.0)
    return pki.pem_of([authority]), pki.make_request(key, "gpu-1")


@cache
def targets() -> tuple[Target, ...]:
    """Every target, in the order in which a long run takes them."""
    refused = (LlorchError,)
    return (
        Target(
            "strict_json",
            strict_json,
            (seeds.TASK_FULL, b'[1, "\\ud83d\\ude00", {"a": -0.0}]', b"null"),
            refused,
            words=JSON_WORDS,
        ),
        Target(
            "task_body",
            task_body,
            (seeds.TASK, seeds.TASK_FULL, seeds.HEADERS + seeds.TASK),
            refused,
            words=JSON_WORDS,
            schemas=(TaskBody,),
        ),
        Target(
            "openai_body",
            openai_body,
            (seeds.CHAT, seeds.HEADERS + seeds.CHAT, b"path: /v1/completions\n\n" + seeds.TASK, *seeds.DENIED),
            refused,
            words=JSON_WORDS,
        ),
        Target(
            "reader_position",
            reader_position,
            (b"Last-Event-ID: 00ff\n\n", b"\n\nafter=00ff&attempt=2"),
            refused,
            LINES,
        ),
        Target(
            "registration",
            registration,
            (seeds.REGISTER_MINIMAL, seeds.REGISTER_FULL),
            refused,
            words=JSON_WORDS,
            schemas=(Register,),
        ),
        Target(
            "heartbeats",
            heartbeats,
            (b"\n".join((seeds.REGISTER_FULL, *seeds.BEATS[1:])), b"\n".join((seeds.REGISTER_MINIMAL, seeds.BEATS[0]))),
            refused,
            LINES,
            JSON_WORDS,
            (Heartbeat,),
        ),
        Target(
            "pool_report",
            pool_report,
            (b'{"pool_id": "p0", "model": "m", "ready": true}',),
            refused,
            schemas=(PoolReport,),
        ),
        Target(
            "address",
            address,
            (b"10.1.2.3:9200", b"https://gpu-1.example:9200/", b"[fd00::1]:80"),
            refused,
            BINARY,
            HOST_WORDS,
        ),
        Target("record_stream", record_stream, (seeds.RECORDS, seeds.RECORDS[:40]), (), BINARY),
        Target(
            "link_head",
            link_head,
            (b"HTTP/1.1 101 Switching\r\nUpgrade: llorch-records/1\r\nX-Llorch-Epoch: ab",),
            refused,
            BINARY,
            HTTP_WORDS,
        ),
        Target(
            "event_stream",
            event_stream,
            seeds.EVENTS,
            (),
            BINARY,
            (b"data: ", b"event: ", b"id: ", b": ", b"\r\r", b"\xef\xbb\xbf"),
        ),
        Target("client_events", client_events, seeds.EVENTS, (), LINES, (b"data: ", b"event: error\n", b"\n\n")),
        Target("engine_chunks", engine_chunks, (b"\n".join(seeds.CHUNKS), *seeds.CHUNKS), (), LINES, JSON_WORDS),
        Target(
            "engine_answer",
            engine_answer,
            (seeds.STREAM, *(b"data: " + chunk + b"\n\n" for chunk in seeds.CHUNKS)),
            (),
            LINES,
            (b"data: ", b"[DONE]", b"\n\n", b"\r\n\r\n"),
        ),
        Target(
            "engine_counters",
            engine_counters,
            (seeds.COUNTERS,),
            (),
            LINES,
            (b"vllm:generation_tokens_total", b"sglang:token_usage", b"llamacpp:n_decode_total", b"{", b"} ", b"1e+09"),
        ),
        Target("engine_error", engine_error, tuple(b"\0\0" + chunk for chunk in seeds.CHUNKS), (), BINARY, JSON_WORDS),
        Target(
            "handoff_file",
            handoff_file,
            (seeds.HANDOFF, seeds.HANDOFF.replace(b'"slots"', b'"slots_total"')),
            (ValueError,),
            words=HOST_WORDS,
        ),
        Target("gguf_header", gguf_header, (seeds.GGUF,), (ValueError,), BINARY),
        Target(
            "catalog_of_a_node",
            catalog_of_a_node,
            (seeds.CATALOG, seeds.CATALOG.replace(b"m.gguf", b"/x/m.gguf")),
            (ValueError,),
            words=JSON_WORDS + REF_WORDS,
            schemas=(catalog_file.Entry,),
        ),
        Target(
            "partial_state",
            partial_state,
            (seeds.PARTIAL,),
            (ValueError,),
            words=JSON_WORDS,
            schemas=(catalog_file.PartialState,),
        ),
        Target("presented_ticket", presented_ticket, (TICKET.encode(),), refused, BINARY, (b"v1.", b".", b"=", b"-_")),
        Target("roster_file", roster_file, (b'{"nodes": ["n0", "n1"]}',)),
        Target(
            "contexts_file",
            contexts_file,
            (b'{"current": "a", "contexts": {"a": {"url": "http://a", "token": "b"}}}',),
            (ConfigError,),
        ),
        Target(
            "config_file",
            config_file,
            seeds.CONFIG,
            (),
            BINARY,
            (b"\n  ", b"- ", b": ", b"&a ", b"*a", b"!!x ", b"{", b"[", b"|\n", b"'"),
            largest=8 * 1024,
        ),
        Target(
            "tokens",
            tokens,
            (TOKEN.encode(), b"a=" + TOKEN.encode() + b",\n# x\nb=" + b"u" * 32),
            (ValueError,),
            BINARY,
            (b"=", b",", b"\n#"),
        ),
        Target(
            "presented",
            presented,
            (b"Authorization: Bearer " + TOKEN.encode(), b"api-key: x", b"X-Api-Key: " + TOKEN.encode()),
            refused,
            BINARY,
        ),
        Target("made_tokens", made_tokens, _made(), (), BINARY, (b"llt1_", b"llj1_", b'"tokens"')),
        Target("certificates", certificates, _pems()[:1], (ValueError,), BINARY, (b"-----BEGIN", b"-----END")),
        Target("certificate_request", certificate_request, _pems()[1:], refused, BINARY, (b"-----BEGIN", b"-----END")),
        Target(
            "model_refs",
            model_refs,
            (b"demo", b"file:/a/b-00001-of-00003.gguf", b"hf:org/repo:Q4", b"https://h/a.gguf?x"),
            (),
            BINARY,
            REF_WORDS,
        ),
        Target(
            "tls_greeting", tls_greeting, (seeds.greeting("llorch.control"), seeds.greeting("a.example")), (), BINARY
        ),
    )
