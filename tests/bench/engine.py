"""A stand-in for an engine, fast enough not to be what is measured: `python -m tests.bench.engine [--port 0]`.

It holds no model. It speaks what llorch asks of an OpenAI-compatible server: /health, /v1/models, /v1/completions and
/v1/chat/completions, streamed or in one piece, over connections that are kept. Token i is the text `t<i> `, so that any
loss or repetition shows. `max_tokens` of a request says how many, `--interval-ms` how far apart. One process, one
`asyncio.Protocol` per connection, and no parser but for what llorch's node sends; a request is never logged.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import socket
import sys
from typing import Any

MODEL = "fake-model"
DEFAULT_TOKENS = 16
BACKLOG = 4_096
MAX_HEAD_BYTES = 64 * 1024

_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\n"
_STREAM_HEAD = _HEAD % b"text/event-stream" + b"Transfer-Encoding: chunked\r\n\r\n"


def text_of(tokens: int) -> str:
    """What the engine says when it is asked for so many tokens."""
    return "".join(f"t{number} " for number in range(tokens))


def _chunk(event: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(event), event)


def _event(value: object) -> bytes:
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"


def _usage(tokens: int) -> dict[str, int]:
    return {"prompt_tokens": 1, "completion_tokens": tokens, "total_tokens": tokens + 1}


class Answers:
    """One path's wording, made once: what is asked for is mostly the same."""

    def __init__(self, *, chat: bool, model: str) -> None:
        self._chat = chat
        self._fixed = {"id": "stand-in", "created": 1_700_000_000, "model": model}
        self._tokens: list[bytes] = []
        self._whole: dict[int, bytes] = {}

    def token(self, number: int) -> bytes:
        """As one HTTP chunk."""
        while len(self._tokens) <= number:
            text = f"t{len(self._tokens)} "
            said = {"delta": {"content": text}} if self._chat else {"text": text}
            self._tokens.append(_chunk(_event(self._of_stream([{"index": 0, **said, "finish_reason": None}]))))
        return self._tokens[number]

    def end(self, tokens: int) -> bytes:
        last = {"index": 0, **({"delta": {}} if self._chat else {"text": ""}), "finish_reason": "length"}
        events = _event(self._of_stream([last])), _event(self._of_stream([]) | {"usage": _usage(tokens)})
        return b"".join(map(_chunk, (*events, b"data: [DONE]\n\n"))) + b"0\r\n\r\n"

    def whole(self, tokens: int) -> bytes:
        """With its head."""
        if tokens not in self._whole:
            text = text_of(tokens)
            said = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
            kind = {"object": "chat.completion" if self._chat else "text_completion"}
            choice = {"index": 0, **said, "finish_reason": "length"}
            self._whole[tokens] = answer(self._fixed | kind | {"choices": [choice], "usage": _usage(tokens)})
        return self._whole[tokens]

    def _of_stream(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        return self._fixed | {"object": kind, "choices": choices}


def answer(value: object, status: str = "200 OK") -> bytes:
    body = json.dumps(value, separators=(",", ":")).encode()
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


class Served(asyncio.Protocol):
    """One connection: requests one after the other."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._transport: asyncio.Transport | None = None
        self._received = b""
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._timer is not None:
            self._timer.cancel()

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, found, rest = self._received.partition(b"\r\n\r\n")
        if not found:
            if len(self._received) > MAX_HEAD_BYTES and self._transport is not None:
                self._transport.close()
            return
        lines = head.lower().split(b"\r\n")
        length = next((int(line[15:]) for line in lines if line.startswith(b"content-length:")), 0)
        if len(rest) < length:
            return
        self._received = rest[length:]
        method, path, _ = head.split(b" ", 2)
        self._answer(method, path, rest[:length])

    def _answer(self, method: bytes, path: bytes, body: bytes) -> None:
        assert self._transport is not None
        answers = self._engine.answers.get(path) if method == b"POST" else None
        if answers is None:
            self._transport.write(self._engine.fixed.get(path, NOT_THERE))
            return
        asked = json.loads(body)
        tokens = asked.get("max_tokens")
        tokens = tokens if isinstance(tokens, int) else DEFAULT_TOKENS
        if asked.get("stream"):
            self._transport.write(_STREAM_HEAD)
            self._say(answers, 0, tokens)
        else:
            self._transport.write(answers.whole(tokens))

    def _say(self, answers: Answers, said: int, tokens: int) -> None:
        """The next token, and a timer for the one after it; all at once without an interval."""
        if self._transport is None:
            return
        if not self._engine.interval_s:
            self._transport.write(b"".join(map(answers.token, range(said, tokens))) + answers.end(tokens))
        elif said == tokens:
            self._transport.write(answers.end(tokens))
        else:
            self._transport.write(answers.token(said))
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._engine.interval_s, self._say, answers, said + 1, tokens)


NOT_THERE = answer({"error": {"code": 404, "message": "not here", "type": "not_found_error"}}, "404 Not Found")


class Engine:
    def __init__(self, model: str, interval_s: float) -> None:
        self.interval_s = interval_s
        chat, completion = Answers(chat=True, model=model), Answers(chat=False, model=model)
        self.answers = {b"/v1/chat/completions": chat, b"/v1/completions": completion}
        self.fixed = {
            b"/health": answer({"status": "ok"}),
            b"/v1/models": answer({"object": "list", "data": [{"id": model, "object": "model"}]}),
        }


async def serve(given: argparse.Namespace) -> None:
    loop = asyncio.get_running_loop()
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    engine = Engine(given.model, given.interval_ms / 1_000)
    sock = socket.create_server(("127.0.0.1", given.port), backlog=BACKLOG)
    server = await loop.create_server(lambda: Served(engine), sock=sock, backlog=BACKLOG)
    print(f"ready url=http://127.0.0.1:{sock.getsockname()[1]}", file=sys.stderr, flush=True)
    await stopping.wait()
    server.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--interval-ms", type=float, default=0, help="between two tokens of a stream; 0: all at once")
    import uvloop

    uvloop.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
