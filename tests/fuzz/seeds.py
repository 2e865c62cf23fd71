"""Well-formed inputs for the parsers under test: what mutations start from."""

from __future__ import annotations

import json
import ssl
import struct

from llorch import records
from llorch.records import Type

TASK_ID = "01234567-89ab-cdef-0123-456789abcdef"
REGISTER_MINIMAL = b'{"node_id": "n0", "address": "10.1.2.3:9200", "pools": ["p0"], "capabilities": {"gpus": []}}'
REGISTER_FULL = json.dumps(
    {
        "node_id": "n1",
        "boot_id": "b",
        "address": "https://gpu.example:9200",
        "version": "0.1",
        "zone": "z",
        "cost_weight": 2.5,
        "draining": False,
        "pools": [
            {
                "pool_id": "p0",
                "engine": "vllm",
                "model": "m",
                "models": ["m", "k"],
                "state": "ready",
                "ready": True,
                "draining": False,
                "slots_total": 4,
                "slots_free": 3,
                "ctx": 4096,
                "modalities": ["text"],
                "vram_total_bytes": 1,
                "prompt_tps": 1.5,
                "decode_tps": 0.1,
                "kv_usage": 0.5,
                "generation": 1,
                "replicas": [{"id": "r0", "state": "ready", "owned": True, "slots_free": 3}],
            }
        ],
        "capabilities": {
            "gpus": [{"index": 0, "uuid": "u", "name": "g", "utilization": 0.5}],
            "cpu_cores": 8,
            "ram_bytes": 1,
        },
        "catalog": [{"id": "m", "size_bytes": 5, "sha256": "ab", "state": "staging", "progress": 0.5}],
        "tasks": [
            {"task_id": TASK_ID, "attempt": 2, "state": "sealed", "model": "m", "pool_id": "p0", "key_digest": "ab"}
        ],
    }
).encode()
BEATS = (
    b'{"pools": [{"pool_id": "p0", "ready": true, "model": "m", "slots_total": 2, "slots_free": 1}]}',
    b'{"lease_id": "lease", "boot_id": "b", "seq": 1, "delta": true, "pools": [{"pool_id": "p0", "gone": true}]}',
    b'{"lease_id": "lease", "boot_id": "b", "seq": 2, "draining": true, "gpus": [], "catalog": [], "tasks": []}',
)
TASK = b'{"model": "sim", "prompt": "hello", "max_tokens": 5}'
TASK_FULL = json.dumps(
    {
        "task_id": TASK_ID,
        "model": "sim",
        "messages": [{"role": "user", "content": "x"}],
        "temperature": 0.5,
        "top_p": 1,
        "top_k": 4,
        "min_p": 0,
        "repeat_penalty": 1,
        "seed": 1,
        "stop": ["a"],
        "grammar": "root ::= x",
        "priority": "batch",
        "deadline_ms": 1000,
        "session_id": "s",
        "placement": {"pin": "n0/p0", "prefer": ["n0"], "avoid": [], "zone": "z"},
        "on_node_loss": "fail",
        "detach": True,
        "metadata": {"a": [1]},
        "json_schema": {"type": "object"},
    }
).encode()
CHAT = b'{"model": "m", "messages": [{"role": "user", "content": "x"}], "stream": true, "stream_options": {}, "n": 1}'
# What must never go on to an engine, written down a second time: a name lost from the first list is noticed here.
ENGINES_OWN = frozenset(
    {"id_slot", "n_discard", "n_keep", "lora", "chat_template", "kv_transfer_params", "bootstrap_host"}
)
DENIED = tuple(CHAT.replace(b'"n": 1', f'"{name}": -1'.encode()) for name in sorted(ENGINES_OWN))
HEADERS = (
    b"X-Llorch-Priority: batch\nX-Llorch-Deadline-Ms: 50\nIdempotency-Key: k\nX-Llorch-Pin: n0\n"
    b"Content-Type: application/x+json\n\n"
)
CHUNKS = (
    b'{"choices": [{"delta": {"content": "a", "reasoning": "b"}, "finish_reason": null}], "timings": {"cache_n": 1}}',
    b'{"choices": [{"text": "a", "finish_reason": "stop"}], "usage": {"prompt_tokens": 1, "completion_tokens": 2}}',
    b'{"choices": [], "usage": {"prompt_tokens": 1, "prompt_tokens_details": {"cached_tokens": 1}}}',
    b'{"error": {"code": 400, "message": "maximum context length", "n_ctx": 1, "n_prompt_tokens": 2}}',
    b'{"type": "response.completed", "response": {"usage": {"input_tokens": 1, "output_tokens": 2}}}',
    b'{"type": "message_delta", "delta": {"stop_reason": "max_tokens"}, "usage": {"cache_read_input_tokens": 1}}',
    b'{"type": "content_block_delta", "delta": {"text": "x"}}',
    b'{"type": "message_start", "message": {"usage": {"input_tokens": 1}}}',
    b'{"type": "message_stop"}',
    b'{"error": "overloaded"}',
)
STREAM = b"".join(b"data: " + chunk + b"\n\n" for chunk in CHUNKS[:3]) + b": ping\n\ndata: [DONE]\n\n"
EVENTS = (
    b'id: 00000000001a\nevent: token\ndata: {"t": "a", "i": 0}\n\n',
    b': ping\n\nevent: queued\ndata: {"position": 1, "eta_ms": 5.5}\n\nevent: end\ndata: {"tokens_out": 1}\n\n',
    b'event: error\r\ndata: {"code": "NODE_LOST",\r\ndata: "retry_after_ms": 1}\r\n\r\n',
    b"\xef\xbb\xbfdata:x\rdata: y\r\rid\nid: \0\ndata\n\n",
    b'event: started\ndata: {"task_id": "a", "attempt": 1}\n\nevent: migrated\ndata: {"from": "a", "to": "b"}\n\n',
)
RECORDS = b"".join(
    (
        records.encode_json(
            1, Type.OPEN, {"task_id": TASK_ID, "pool_id": "p0", "attempt": 1, "headers": {"a": "b"}, "body_len": 2}
        ),
        records.encode(1, Type.BODY, b"{}"),
        records.encode_json(3, Type.ATTACH, {"task_id": TASK_ID, "offset": 5}),
        records.encode(1, Type.ACCEPT),
        records.encode_json(1, Type.REFUSE, {"code": "GAP", "message": "x", "retry_after_ms": 5, "details": {}}),
        records.encode_json(1, Type.HEAD, {"status": 200, "headers": {"content-type": "text/event-stream"}}),
        records.encode(1, Type.DATA, b"data: x\n\n"),
        records.encode_json(
            1, Type.TAIL, {"length": 9, "finish_reason": "stop", "timings": {"ttft_ms": 1.5}, "error": {"code": "X"}}
        ),
        records.encode_credit(1, 65_536),
        records.encode_json(5, Type.OPEN, {"method": "GET", "path": "/v2/pools", "headers": {}}),
        records.encode(0, Type.PING),
        records.encode(7, 99, b"of a later version"),
    )
)
HANDOFF = (
    b'{"pool_id": "p0", "replica_id": "r0", "engine": "vllm", "engine_version": "1", "url": "http://127.0.0.1:8000",'
    b' "model": "m", "slots": 4, "ctx": 4096, "pid": 5, "device_mask": "0,1", "api_key_file": "/run/key"}'
)
CONFIG = (
    b"bind: 127.0.0.1:8080\nheartbeat-interval: 10s\nmax-body: 64MiB\nlog-level: info\napi-token: '@/run/s3cret'\n",
    b"join: [http://127.0.0.1:8080, 'https://b:1']\nengine-cidr: 10.0.0.0/8\npools:\n  - id: p0\n    engine: command\n"
    b"    model: file:/m/a.gguf\n    gpus: [0, 1]\n    slots: 2\n"
    b"    args: [--a, '{port}']\n    env: {A: b}\n    idle_unload_s: 5m\n",
    b"a: &x [1]\nb: *x\nc: !!python/object {}\n? [k]\n: v\n--- |\n  text\n...\n",
)


def _text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


GGUF = (
    b"GGUF"
    + struct.pack("<IQQ", 3, 1, 4)
    + (_text("general.architecture") + struct.pack("<I", 8) + _text("llama"))
    + (_text("llama.context_length") + struct.pack("<II", 4, 4_096))
    + (_text("tokens") + struct.pack("<IIQ", 9, 8, 2) + _text("a") + _text("b"))
    + (_text("nested") + struct.pack("<IIQIQ", 9, 9, 1, 4, 1) + bytes(4))
    + (_text("w") + struct.pack("<IQQIQ", 2, 64, 2, 0, 0))
)


def greeting(name: str) -> bytes:
    """A client's first bytes, as OpenSSL writes them."""
    context, out = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), ssl.MemoryBIO()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        context.wrap_bio(ssl.MemoryBIO(), out, server_hostname=name).do_handshake()
    except ssl.SSLWantReadError:
        pass
    return out.read()


COUNTERS = (
    b"# TYPE llamacpp:n_decode_total counter\nllamacpp:n_decode_total 5\nllamacpp:requests_processing 2\n"
    b'vllm:generation_tokens_total{engine="0",model_name="m"} 40.0\nvllm:kv_cache_usage_perc{model_name="m"} 0.5\n'
    b'sglang:realtime_tokens_total{mode="decode"} 3.0e+01 1395066363000\nsglang:token_usage{model_name="m"} 0.28\n'
)
_A, _B = "a" * 64, "b" * 64
CATALOG = json.dumps(
    {
        "version": 1,
        "models": [
            {
                "id": "org/m:Q4", "ref": "hf:org/m:Q4", "sha256": _A, "size_bytes": 9, "state": "staged",
                "ctx_train": 4096,
                "files": [{"name": "m.gguf", "size_bytes": 9, "sha256": _A, "stamp": [1, 9, 1_700_000_000_000_000]}],
            },
            {
                "id": "n", "state": "staging",
                "order": {
                    "ref": "n", "model": "n",
                    "sources": [{"node_id": "a", "url": "http://10.0.0.1:9200", "ticket": "v1.x.y"}],
                },
            },
            {"id": "o", "state": "failed", "error": "DIGEST_MISMATCH: x"},
        ],
    }
).encode()  # fmt: skip
PARTIAL = json.dumps(
    {"source": _A, "validator": '"v1"', "sha256": _B, "size_bytes": 200, "synced": 100, "boot": "0f"}
).encode()
