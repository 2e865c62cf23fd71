"""`LlorchClient` against a scripted control on a real socket: what it makes of answers, good, bad and cut off."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from pathlib import Path

import pytest

from llorch import sse
from llorch.client import api
from llorch.client.api import LlorchClient
from llorch.client.events import End, Event, Failed, Queued, ServerError, Started, Token
from llorch.client.faults import StreamBroken, TimedOut, Unreachable
from llorch.errors import Code, ConfigError
from llorch.tls import server_context
from tests.certificates import certificate
from tests.component.scripted_control import (
    QUEUED,
    TASK,
    WHOLE,
    Answer,
    ScriptedControl,
    Then,
    answer,
    end,
    error,
    event,
    hang_up,
    no_answer,
    refusal,
    resume_quickly,
    scripted,
    started,
    stream,
    token,
)

BODY = {"task_id": TASK, "model": "m", "prompt": "Hello"}
EVENTS = f"GET /v2/tasks/{TASK}/events"
SECRET = "token-that-only-one-control-may-see"


@pytest.fixture(autouse=True)
def quick_resumption(monkeypatch: pytest.MonkeyPatch) -> None:
    resume_quickly(monkeypatch)


@pytest.fixture
async def control() -> AsyncIterator[ScriptedControl]:
    async with scripted() as running:
        yield running


@pytest.fixture
async def client(control: ScriptedControl) -> AsyncIterator[LlorchClient]:
    async with LlorchClient(control.url + "/", SECRET) as running:
        yield running


async def taken(events: AsyncGenerator[Event, None]) -> list[Event]:
    async with contextlib.aclosing(events):
        return [event async for event in events]


def text(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Token))


# ---------------------------------------------------------------- a stream that goes well


async def test_a_submission_streams_typed_events_up_to_the_last_one(
    control: ScriptedControl, client: LlorchClient
) -> None:
    control.on("POST /v2/tasks", stream(QUEUED, *WHOLE, token(9), then=Then.SILENCE))
    events = await taken(client.submit(BODY))
    assert [type(event) for event in events] == [Queued, Started, Token, Token, End]
    assert (events[0].id, events[-1].id) == (None, "000000001000")
    assert text(events) == "t0 t1 "
    asked = control.asked("POST /v2/tasks")[0]
    assert asked.json() == BODY
    assert asked.headers["Authorization"] == f"Bearer {SECRET}"
    assert asked.headers["Accept"] == "text/event-stream"


async def test_a_submission_without_a_task_id_gets_one_of_its_own(
    control: ScriptedControl, client: LlorchClient
) -> None:
    control.on("POST /v2/tasks", stream(*WHOLE))
    for _ in range(2):
        await taken(client.submit({"model": "m", "prompt": "x"}))
    ids = [asked.json()["task_id"] for asked in control.asked("POST /v2/tasks")]
    assert len(set(ids)) == 2
    assert all(len(task_id) == 36 for task_id in ids)


async def test_a_stream_in_single_bytes_gives_the_same_events(control: ScriptedControl, client: LlorchClient) -> None:
    whole = b"".join((started(), token(0, "ä\n€"), token(1), end()))
    control.on("POST /v2/tasks", stream(*(whole[at : at + 1] for at in range(len(whole)))))
    assert text(await taken(client.submit(BODY))) == "ä\n€t1 "


async def test_a_line_longer_than_any_read_buffer_is_one_event(control: ScriptedControl, client: LlorchClient) -> None:
    control.on("POST /v2/tasks", stream(started(), token(0, "x" * 1_000_000), end()))
    assert text(await taken(client.submit(BODY))) == "x" * 1_000_000


async def test_events_that_this_client_does_not_know_are_passed_over(
    control: ScriptedControl, client: LlorchClient
) -> None:
    control.on("POST /v2/tasks", stream(b": ping\n\n", event("news", {"a": 1}, 0x5), *WHOLE))
    assert [type(event) for event in await taken(client.submit(BODY))] == [Started, Token, Token, End]


async def test_an_error_event_is_the_last_one_and_says_all_it_was_told(
    control: ScriptedControl, client: LlorchClient
) -> None:
    control.on("POST /v2/tasks", stream(started(), token(0), error("NODE_LOST", "n1 is gone", hint="again")))
    last = (await taken(client.submit(BODY)))[-1]
    assert isinstance(last, Failed)
    assert (last.error.code, last.error.message, last.error.hint) == (Code.NODE_LOST, "n1 is gone", "again")
    assert (last.error.request_id, last.error.task_id) == ("req-1", TASK)


async def test_leaving_a_stream_early_closes_its_connection_and_cancels_nothing(
    control: ScriptedControl, client: LlorchClient
) -> None:
    control.on("POST /v2/tasks", stream(started(), token(0), then=Then.SILENCE))
    async with contextlib.aclosing(client.submit(BODY)) as events:
        async for event in events:
            if isinstance(event, Token):
                break
    async with asyncio.timeout(5):
        await control.requests[0].left.wait()
    assert len(control.requests) == 1


# ---------------------------------------------------------------- a stream that is lost


@pytest.mark.parametrize("then", [Then.CUT, Then.END])
async def test_a_lost_stream_goes_on_at_the_last_event_and_nothing_comes_twice(
    control: ScriptedControl, client: LlorchClient, then: Then
) -> None:
    control.on("POST /v2/tasks", stream(started(), token(0), token(1), then=then))
    control.on(EVENTS, stream(token(1), token(2), then=then), stream(token(3), end()))
    events = await taken(client.submit(BODY))
    assert text(events) == "t0 t1 t2 t3 "
    assert [asked.headers.get("Last-Event-ID") for asked in control.asked(EVENTS)] == ["000000000021", "000000000022"]
    assert len(control.asked("POST /v2/tasks")) == 1


async def test_a_stream_that_goes_silent_is_taken_up_again(
    control: ScriptedControl, client: LlorchClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "SILENCE_S", 0.05)
    control.on("POST /v2/tasks", stream(started(), token(0), then=Then.SILENCE))
    control.on(EVENTS, stream(token(1), end()))
    assert text(await taken(client.submit(BODY))) == "t0 t1 "


@pytest.mark.parametrize(
    ("resumed", "why"),
    [
        (refusal(Code.TASK_NOT_FOUND, "no such task"), "TASK_NOT_FOUND"),
        (refusal(Code.GAP, "its oldest bytes are gone"), "GAP"),
        (refusal(Code.RATE_LIMITED, "wait"), "RATE_LIMITED"),
        (hang_up, "closed the connection"),
        (answer({"hello": "world"}), "not llorch"),
        (answer({}, 302, {"Location": "http://127.0.0.1:1/"}), "leads elsewhere"),
        (answer(b"", 204), "without a last event"),
        (stream(b"data: {\n\n", headers={"Content-Type": "text/html"}), "not llorch"),
        (stream(b"event: token\ndata: {\n\n", then=Then.END), "no stream of events"),
        (stream(b"data: " + b"x" * (sse.MAX_EVENT_BYTES + 1)), "no stream of events"),
    ],
)
async def test_a_stream_that_can_not_be_taken_up_again_has_broken_off(
    control: ScriptedControl, client: LlorchClient, resumed: Answer, why: str
) -> None:
    control.on("POST /v2/tasks", stream(started(), token(0), then=Then.CUT))
    control.on(EVENTS, resumed)
    seen: list[Event] = []
    with pytest.raises(StreamBroken) as caught:
        async for event in client.submit(BODY):
            seen += [event]
    assert text(seen) == "t0 "
    assert caught.value.task_id == TASK
    assert why in (caught.value.why or "")


async def test_a_control_that_has_just_started_may_not_know_the_task_yet(
    control: ScriptedControl, client: LlorchClient
) -> None:
    control.on("POST /v2/tasks", stream(started(), token(0), then=Then.CUT))
    control.on(EVENTS, refusal(Code.TASK_NOT_FOUND), refusal(Code.TASK_NOT_FOUND), stream(token(1), end()))
    assert text(await taken(client.submit(BODY))) == "t0 t1 "


async def test_a_log_that_ends_without_a_last_event_has_broken_off(
    control: ScriptedControl, client: LlorchClient
) -> None:
    control.on("POST /v2/tasks", stream(started(), token(0)))
    control.on(EVENTS, stream())
    with pytest.raises(StreamBroken, match="after output had begun"):
        await taken(client.submit(BODY))
    assert len(control.asked(EVENTS)) > 1, "it was looked for more than once"


async def test_events_that_only_repeat_do_not_keep_a_reader_for_ever(
    control: ScriptedControl, client: LlorchClient
) -> None:
    control.on("POST /v2/tasks", stream(started(), token(0), then=Then.CUT))
    control.on(EVENTS, stream(started(), token(0), then=Then.CUT))
    with pytest.raises(StreamBroken):
        await taken(client.submit(BODY))


# ---------------------------------------------------------------- following


async def test_following_starts_where_it_is_told(control: ScriptedControl, client: LlorchClient) -> None:
    control.on(EVENTS, stream(token(1), end()))
    assert text(await taken(client.follow(TASK, after="000000000020"))) == "t1 "
    assert control.asked(EVENTS)[0].headers["Last-Event-ID"] == "000000000020"


async def test_after_the_last_event_of_a_task_there_is_nothing_more(
    control: ScriptedControl, client: LlorchClient
) -> None:
    control.on(EVENTS, answer(b"", 204))
    assert await taken(client.follow(TASK, after="000000001000")) == []


async def test_following_a_task_that_nobody_knows_is_refused(control: ScriptedControl, client: LlorchClient) -> None:
    with pytest.raises(ServerError) as caught:
        await taken(client.follow(TASK))
    assert caught.value.code is Code.TASK_NOT_FOUND
    assert len(control.requests) == 1


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("code", [Code.UNAUTHENTICATED, Code.NO_CAPACITY, Code.QUEUE_FULL, Code.QUEUE_TIMEOUT])
@pytest.mark.parametrize("way", ["stream", "whole", "detached"])
async def test_a_refusal_keeps_its_code_hint_and_request_id(
    control: ScriptedControl, client: LlorchClient, code: Code, way: str
) -> None:
    control.on("POST /v2/tasks", refusal(code, "not now", hint="do this", retry_after_ms=5, request_id="abc"))
    with pytest.raises(ServerError) as caught:
        if way == "stream":
            await taken(client.submit(BODY))
        else:
            await (client.submit_whole(BODY) if way == "whole" else client.detach(BODY))
    refused = caught.value
    assert (refused.code, refused.message, refused.hint) == (code, "not now", "do this")
    assert (refused.request_id, refused.retry_after_ms) == ("abc", 5)
    assert len(control.requests) == 1, "what becomes of it is the caller's to say"


@pytest.mark.parametrize(
    "body", [b"<html>", b"", b'{"error": "text"}', b'{"error": {"code": 5, "message": []}}', b"[]"]
)
async def test_a_refusal_that_can_not_be_read_is_known_by_its_status(
    control: ScriptedControl, client: LlorchClient, body: bytes
) -> None:
    statuses = {401: "UNAUTHENTICATED", 404: "NOT_FOUND", 429: "RATE_LIMITED", 503: "NO_CAPACITY", 418: "INTERNAL"}
    control.on("GET /v2/nodes", *(answer(body, status, {"X-Request-Id": "from-the-header"}) for status in statuses))
    for code in statuses.values():
        with pytest.raises(ServerError) as caught:
            await client.nodes()
        assert (caught.value.code, caught.value.request_id) == (code, "from-the-header")
        assert "<html>" not in caught.value.message


async def test_a_code_that_this_client_does_not_know_is_taken_by_its_status(
    control: ScriptedControl, client: LlorchClient
) -> None:
    wire = {"error": {"code": "SOMETHING_NEW", "message": "wait", "retriable": True}}
    control.on("POST /v2/tasks", answer(wire, 503))
    with pytest.raises(ServerError) as caught:
        await taken(client.submit(BODY))
    assert (caught.value.code, caught.value.retriable) == (Code.NO_CAPACITY, True)


# ---------------------------------------------------------------- no llorch there


@pytest.mark.parametrize(
    "said",
    [
        answer(b"<html>welcome</html>"),
        answer([]),
        answer({"nodes": "many"}),
        answer({}),
        answer(b'{"nodes": [], "nodes": []}'),
        answer(b"", 204),
    ],
)
async def test_an_answer_that_is_no_llorchs_is_told_as_such(
    control: ScriptedControl, client: LlorchClient, said: Answer
) -> None:
    control.on("GET /v2/nodes", said)
    with pytest.raises(Unreachable, match="is not llorch"):
        await client.nodes()


async def test_entries_of_a_list_that_are_no_objects_are_left_out(
    control: ScriptedControl, client: LlorchClient
) -> None:
    control.on("GET /v2/nodes", answer({"nodes": [{"node_id": "a"}, 5, None]}))
    assert await client.nodes() == [{"node_id": "a"}]


@pytest.mark.parametrize("said", [answer({"text": "hi"}), stream(*WHOLE, headers={"Content-Type": "text/plain"})])
async def test_a_submission_that_is_answered_by_no_stream_is_told_as_such(
    control: ScriptedControl, client: LlorchClient, said: Answer
) -> None:
    control.on("POST /v2/tasks", said)
    with pytest.raises(Unreachable, match="is not llorch"):
        await taken(client.submit(BODY))


async def test_a_redirect_is_not_followed_so_the_token_goes_nowhere_else(
    control: ScriptedControl, client: LlorchClient
) -> None:
    async with scripted() as other:
        control.on("GET /v2/nodes", answer({}, 307, {"Location": f"{other.url}/v2/nodes"}))
        with pytest.raises(Unreachable, match="leads elsewhere"):
            await client.nodes()
        assert other.requests == []


async def test_nobody_there_is_unreachable_and_says_why() -> None:
    server = await asyncio.start_server(lambda _reader, _writer: None, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    server.close()
    await server.wait_closed()
    async with LlorchClient(f"http://127.0.0.1:{port}") as client:
        with pytest.raises(Unreachable) as caught:
            await taken(client.submit(BODY))
    assert caught.value.message == f"can't reach http://127.0.0.1:{port}"
    assert caught.value.why == "Connection refused"


async def test_a_server_that_speaks_no_http_is_asked_once() -> None:
    asked = 0

    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        asked += 1
        writer.write(b"SSH-2.0-OpenSSH_9.6\r\n")
        await reader.read()
        writer.close()

    async with (
        await asyncio.start_server(speak, "127.0.0.1", 0) as server,
        LlorchClient(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}") as client,
    ):
        with pytest.raises(Unreachable) as caught:
            await taken(client.submit(BODY))
    assert asked == 1
    assert "does not speak HTTP" in (caught.value.why or "")
    assert "SSH" not in str(vars(caught.value)), "nothing that a peer sent is quoted"


async def test_https_to_a_port_that_speaks_http_is_told_apart(control: ScriptedControl) -> None:
    async with LlorchClient(control.url.replace("http://", "https://")) as client:
        with pytest.raises(Unreachable, match="can't reach") as caught:
            await client.nodes()
    assert caught.value.why == "the TLS handshake failed"


async def test_a_certificate_must_be_signed_by_an_authority_that_was_given(tmp_path: Path) -> None:
    cert, key = certificate(tmp_path)
    async with scripted(tls=server_context(str(cert), str(key))) as control:
        control.on("GET /v2/nodes", answer({"nodes": []}))
        async with LlorchClient(control.url, SECRET) as stranger:
            with pytest.raises(Unreachable) as caught:
                await stranger.nodes()
        assert "certificate" in (caught.value.why or "")
        assert "--tls-ca" in (caught.value.hint or "")
        assert control.requests == [], "the token was not sent"
        async with LlorchClient(control.url, SECRET, tls_ca=str(cert)) as friend:
            assert await friend.nodes() == []


async def test_a_stream_over_tls_is_closed_at_once_though_its_control_says_no_goodbye(tmp_path: Path) -> None:
    """TLS waits 30 s for the other side's; a program that has ended its loop by then would never close it."""
    cert, key = certificate(tmp_path / "tls")
    answer = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    answer += b"%x\r\n%s\r\n" % (len(end()), end())  # and the last chunk never comes

    def serve(listening: socket.socket) -> None:
        accepted, _ = listening.accept()
        with server_context(str(cert), str(key)).wrap_socket(accepted, server_side=True) as connection:
            connection.settimeout(5)
            connection.recv(64 * 1024)
            connection.sendall(answer)
            with socket.socket(fileno=os.dup(connection.fileno())) as beneath:  # TLS: what it says is not listened to
                beneath.settimeout(5)
                with contextlib.suppress(ConnectionResetError):
                    while beneath.recv(64 * 1024):
                        pass

    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(5)
        serving = asyncio.create_task(asyncio.to_thread(serve, listening))
        url = f"https://127.0.0.1:{listening.getsockname()[1]}"
        async with LlorchClient(url, tls_ca=str(cert)) as client:
            assert [type(event) for event in await taken(client.submit(BODY))] == [End]
            await serving  # a TimeoutError, were it open after 5 s


async def test_an_authority_file_that_is_none_is_a_fault_of_the_settings(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("not a certificate")
    with pytest.raises(ConfigError, match=r"ca\.pem can't be used"):
        async with LlorchClient("https://127.0.0.1:1", tls_ca=str(tmp_path / "ca.pem")):
            pass


# ---------------------------------------------------------------- limits of time


async def test_a_call_gives_up_after_its_own_time(control: ScriptedControl, client: LlorchClient) -> None:
    control.on("GET /v2/nodes", no_answer)
    with pytest.raises(TimedOut, match=r"did not answer within 0\.05 s"):
        await client.call("GET", "/v2/nodes", timeout_s=0.05)


async def test_a_refusal_whose_body_never_ends_does_not_hold_the_caller(
    control: ScriptedControl, client: LlorchClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "CALL_TIMEOUT_S", 0.02)
    half = stream(b'{"error"', headers={"Content-Type": "application/json"}, status=400, then=Then.SILENCE)
    control.on("POST /v2/tasks", half)
    control.on(EVENTS, half)
    with pytest.raises(Unreachable):
        await taken(client.submit(BODY))


async def test_an_answer_that_is_cut_is_unreachable(control: ScriptedControl, client: LlorchClient) -> None:
    control.on("GET /v2/nodes", stream(b'{"nodes": [', headers={"Content-Type": "application/json"}, then=Then.CUT))
    with pytest.raises(Unreachable) as caught:
        await client.nodes()
    assert caught.value.why == "the connection was lost"


# ---------------------------------------------------------------- the other calls


@pytest.mark.parametrize(
    ("call", "what"),
    [
        (lambda client: client.cancel(TASK), f"POST /v2/tasks/{TASK}/cancel"),
        (lambda client: client.task(TASK), f"GET /v2/tasks/{TASK}"),
        (lambda client: client.placement(TASK), f"GET /v2/tasks/{TASK}/placement"),
        (lambda client: client.node("a b/../c"), "GET /v2/nodes/a%20b%2F..%2Fc"),
        (lambda client: client.dry_run(BODY), "POST /v2/placement"),
        (lambda client: client.submit_whole(BODY), "POST /v2/tasks"),
    ],
)
async def test_calls_go_where_the_contract_says_and_return_the_answer(
    control: ScriptedControl, client: LlorchClient, call: Callable[[LlorchClient], object], what: str
) -> None:
    control.on(what, answer({"it": "works"}, 202 if "cancel" in what else 200))
    assert await call(client) == {"it": "works"}  # type: ignore[misc]
    assert control.requests[0].headers["Accept"] == "application/json"


async def test_detaching_says_so_in_the_body(control: ScriptedControl, client: LlorchClient) -> None:
    control.on("POST /v2/tasks", answer({"task_id": TASK}, 202))
    assert await client.detach(BODY) == {"task_id": TASK}
    assert control.requests[0].json() == {**BODY, "detach": True}


async def test_a_control_that_drains_answers_with_503_and_that_is_no_error(
    control: ScriptedControl, client: LlorchClient
) -> None:
    control.on("GET /readyz", answer({"status": "draining"}, 503))
    assert await client.ready() == {"status": "draining"}


async def test_models_are_listed_by_id(control: ScriptedControl, client: LlorchClient) -> None:
    control.on("GET /v1/models", answer({"object": "list", "data": [{"id": "a"}, {"id": "b"}]}))
    assert await client.models() == ["a", "b"]
