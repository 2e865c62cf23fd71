"""`LlorchClient` whose control goes away: what it sends again, how long it looks, and what it takes for the answer."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from llorch import web
from llorch.client import api, resume
from llorch.client.api import LlorchClient
from llorch.client.events import End, Event, Failed, Queued, ServerError, Started, Token
from llorch.client.faults import StreamBroken, Unreachable
from llorch.client.resume import Looking
from llorch.client.submission import Submission
from llorch.errors import Code, LlorchError
from tests.cluster import eventually
from tests.component.scripted_control import (
    QUEUED,
    SSE,
    TASK,
    WHOLE,
    Answer,
    Asked,
    ScriptedControl,
    Then,
    answer,
    end,
    error,
    event,
    hang_up,
    log_of,
    no_answer,
    reading,
    refusal,
    resume_quickly,
    scripted,
    started,
    stream,
    token,
)

BODY = {"task_id": TASK, "model": "m", "prompt": "Hello"}
PLAIN = {"model": "m", "prompt": "Hello"}
EVENTS = f"GET /v2/tasks/{TASK}/events"
SUBMIT = "POST /v2/tasks"
REPLAYED = SSE | {"Idempotency-Replayed": "true", "X-Llorch-Task": TASK}
DONE = {"task_id": TASK, "state": "done", "text": "t0 t1 "}
PROXY = [answer(b"<html>", 502), answer(b"", 503, {"Retry-After": "0"}), answer(b"timeout", 504)]


@pytest.fixture(autouse=True)
def quick_resumption(monkeypatch: pytest.MonkeyPatch) -> None:
    resume_quickly(monkeypatch, for_s=10.0)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    resume_quickly(monkeypatch, for_s=0.1)


@pytest.fixture
async def control() -> AsyncIterator[ScriptedControl]:
    async with scripted(lasting=True) as running:
        yield running


@pytest.fixture
async def client(control: ScriptedControl) -> AsyncIterator[LlorchClient]:
    async with LlorchClient(control.url, "a token") as running:
        yield running


async def taken(events: AsyncGenerator[Event, None]) -> list[Event]:
    async with contextlib.aclosing(events):
        return [event async for event in events]


def text(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Token))


def tries(control: ScriptedControl) -> list[str | None]:
    return [asked.headers.get("X-Llorch-Try") for asked in control.asked(SUBMIT)]


def keys(control: ScriptedControl) -> list[str]:
    return [asked.headers["Idempotency-Key"] for asked in control.asked(SUBMIT)]


async def by_stream(client: LlorchClient, body: dict[str, Any], **how: Any) -> str:
    return text(await taken(client.submit(body, **how)))


async def whole(client: LlorchClient, body: dict[str, Any], **how: Any) -> str:
    return str((await client.submit_whole(body, **how))["text"])


async def detached(client: LlorchClient, body: dict[str, Any], **how: Any) -> str:
    return str((await client.detach(body, **how))["text"])


Way = Callable[..., Awaitable[str]]
WAYS = pytest.mark.parametrize("way", [by_stream, whole, detached])


async def all_well(asked: Asked, request: Any) -> Any:
    """What a submission hopes for, whichever way it came."""
    well = stream(*WHOLE) if asked.headers["Accept"] == "text/event-stream" else answer(DONE)
    return await well(asked, request)


# ---------------------------------------------------------------- one submission, sent more than once


@WAYS
async def test_every_submission_has_a_key_of_its_own_and_is_said_to_be_the_first(
    control: ScriptedControl, client: LlorchClient, way: Way
) -> None:
    control.on(SUBMIT, all_well)
    for _ in range(2):
        assert await way(client, BODY) == "t0 t1 "
    assert tries(control) == ["1", "1"]
    assert len(set(keys(control))) == 2
    assert all(uuid.UUID(key) for key in keys(control))


@WAYS
async def test_a_submission_whose_answer_never_came_is_sent_again_as_it_was_under_its_key(
    control: ScriptedControl, client: LlorchClient, way: Way
) -> None:
    control.on(SUBMIT, hang_up, hang_up, all_well)
    assert await way(client, PLAIN) == "t0 t1 "
    assert tries(control) == ["1", "2", "3"]
    assert len(set(keys(control))) == len({asked.body for asked in control.asked(SUBMIT)}) == 1
    assert len(control.requests) == 3


@WAYS
async def test_under_a_key_of_the_callers_the_same_call_is_the_same_body_and_never_the_first(
    control: ScriptedControl, client: LlorchClient, way: Way
) -> None:
    control.on(SUBMIT, all_well, hang_up, all_well)
    for _ in range(2):
        assert await way(client, PLAIN, key="build 7") == "t0 t1 "
    assert keys(control) == ["build 7"] * 3
    assert tries(control) == [None, None, "2"]
    (body,) = {asked.body for asked in control.asked(SUBMIT)}
    assert b"task_id" not in body


@pytest.mark.parametrize("key", ["", "x" * 256, "ünï", "a\nb: c", " a", "a "])
async def test_a_key_that_no_header_carries_is_refused_before_anything_is_sent(
    control: ScriptedControl, client: LlorchClient, key: str
) -> None:
    for way in (by_stream, whole, detached):
        with pytest.raises(LlorchError) as caught:
            await way(client, PLAIN, key=key)
        assert caught.value.code is Code.INVALID_REQUEST
    assert control.requests == []


@pytest.mark.parametrize(
    ("headers", "first"), [(SSE, started()), (SSE | {"X-Llorch-Task": TASK}, b"")], ids=["by event", "by header"]
)
async def test_a_task_that_the_control_named_is_known_by_its_answer(
    control: ScriptedControl, client: LlorchClient, headers: dict[str, str], first: bytes
) -> None:
    control.on(SUBMIT, stream(first + token(0), then=Then.CUT, headers=headers))
    control.on(EVENTS, stream(token(1), end()))
    assert await by_stream(client, PLAIN, key="k") == "t0 t1 "
    assert len(control.asked(EVENTS)) == 1


async def test_a_task_that_nobody_named_is_taken_up_under_its_key_and_nothing_comes_twice(
    control: ScriptedControl, client: LlorchClient
) -> None:
    control.on(SUBMIT, stream(token(0), then=Then.CUT), stream(*WHOLE, headers=REPLAYED))
    assert await by_stream(client, PLAIN, key="k") == "t0 t1 "
    assert tries(control) == [None, "2"]


OTHER = "00000000-0000-4000-8000-000000000002"
QUOTE = "x; rm -rf ~ #"


@pytest.mark.parametrize("word", [QUOTE, "x" * 5000, TASK.replace("0", "G"), f"{TASK} "[:-2]])
async def test_what_a_peer_names_a_task_is_taken_for_its_id_only_if_it_is_one(
    control: ScriptedControl, client: LlorchClient, word: str, impatient: None
) -> None:
    said = {"task_id": word, "node_id": "n1", "pool_id": "p0", "model": "m", "attempt": 1}
    log = event("started", said, 0x10) + token(0)
    control.on(SUBMIT, stream(log, then=Then.CUT, headers=SSE | {"X-Llorch-Task": word}), hang_up)
    task = Submission(PLAIN, "k")
    with pytest.raises(StreamBroken) as caught:
        await taken(client.submit(task))
    assert (caught.value.task_id, caught.value.hint, task.task_id) == ("", None, None)


@pytest.mark.parametrize(
    ("answers", "attached"),
    [
        ([REPLAYED], True),
        ([SSE | {"X-Llorch-Task": TASK}], False),
        ([SSE | {"X-Llorch-Task": TASK}, REPLAYED], False),  # what was there before was its own
        ([REPLAYED, REPLAYED], True),
        ([SSE | {"X-Llorch-Task": OTHER}, REPLAYED], True),
        ([REPLAYED | {"X-Llorch-Task": OTHER}, SSE | {"X-Llorch-Task": TASK}], False),
    ],
)
async def test_a_task_that_was_there_under_the_callers_key_before_is_told_from_ones_own(
    control: ScriptedControl, client: LlorchClient, answers: list[dict[str, str]], attached: bool
) -> None:
    *cut, last = answers
    streams = [stream(QUEUED, then=Then.CUT, headers=headers) for headers in cut]
    for key in ("k", None):
        control.on(SUBMIT, *streams, stream(QUEUED, *WHOLE, headers=last))
        task = Submission(PLAIN, key)
        await taken(client.submit(task))
        assert task.attached is (attached and key is not None), "nobody else knows a key that was made here"
        assert key is None or task.task_id == TASK


async def test_a_refusal_names_a_task_that_never_was(control: ScriptedControl, client: LlorchClient) -> None:
    never = answer(LlorchError(Code.DRAINING, "not now").envelope(request_id="r"), 503, {"X-Llorch-Task": OTHER})
    for way in (by_stream, whole):
        control.on(SUBMIT, never, no_answer)
        task = Submission(PLAIN, "k")
        waiting = asyncio.create_task(way(client, task))  # type: ignore[arg-type]
        control.requests.clear()
        await eventually(lambda: len(control.requests) == 2)
        assert task.task_id is None
        waiting.cancel()
        await asyncio.wait((waiting,))


async def test_a_task_that_was_lost_while_it_waited_is_another_when_it_runs(
    control: ScriptedControl, client: LlorchClient
) -> None:
    control.on(
        SUBMIT,
        stream(QUEUED, then=Then.CUT, headers=SSE | {"X-Llorch-Task": OTHER}),
        stream(started(), token(0), then=Then.CUT, headers=SSE | {"X-Llorch-Task": TASK}),
    )
    control.on(EVENTS, stream(token(1), end()))
    assert await by_stream(client, PLAIN, key="k") == "t0 t1 "


# ---------------------------------------------------------------- before any output


@pytest.mark.parametrize("then", [Then.CUT, Then.END])
@pytest.mark.parametrize("before", [(), (b": ping\n\n",), (QUEUED,), (QUEUED, started()[:-1])])
async def test_a_stream_that_is_lost_before_its_first_event_is_submitted_again(
    control: ScriptedControl, client: LlorchClient, before: tuple[bytes, ...], then: Then
) -> None:
    control.on(SUBMIT, stream(*before, then=then), stream(*WHOLE, headers=REPLAYED))
    events = await taken(client.submit(BODY))
    assert [type(event) for event in events if not isinstance(event, Queued)] == [Started, Token, Token, End]
    assert tries(control) == ["1", "2"]
    assert control.asked(EVENTS) == []


@WAYS
@pytest.mark.parametrize("away", [refusal(Code.RECOVERING), refusal(Code.DRAINING), *PROXY])
async def test_a_control_that_goes_or_has_just_come_and_a_proxy_without_one_are_waited_for(
    control: ScriptedControl, client: LlorchClient, away: Answer, way: Way
) -> None:
    control.on(SUBMIT, away, away, all_well)
    assert await way(client, BODY) == "t0 t1 "
    assert tries(control) == ["1", "2", "3"]
    assert len(set(keys(control))) == 1


@WAYS
async def test_a_whole_answer_that_is_cut_is_asked_for_again(
    control: ScriptedControl, client: LlorchClient, way: Way
) -> None:
    half = stream(b'{"task_id": "', headers={"Content-Type": "application/json"}, then=Then.CUT)
    control.on(SUBMIT, hang_up if way is by_stream else half, all_well)
    assert await way(client, BODY) == "t0 t1 "


@WAYS
async def test_nobody_there_at_the_first_knock_is_told_at_once(
    control: ScriptedControl, client: LlorchClient, way: Way
) -> None:
    await control.go()
    told: list[Looking] = []
    with pytest.raises(Unreachable, match="can't reach") as caught:
        await way(client, BODY, tell=told.append)
    assert caught.value.why == "Connection refused"
    assert told == []


@WAYS
@pytest.mark.parametrize(
    "refused", [Code.INVALID_REQUEST, Code.QUEUE_FULL, Code.IDEMPOTENCY_MISMATCH, Code.NODE_LOST, Code.MODEL_NOT_FOUND]
)
async def test_a_refusal_is_the_answer_also_to_a_repetition(
    control: ScriptedControl, client: LlorchClient, refused: Code, way: Way
) -> None:
    control.on(SUBMIT, hang_up, refusal(refused, "so it is", hint="do this"))
    with pytest.raises(ServerError) as caught:
        await way(client, BODY)
    assert (caught.value.code, caught.value.message, caught.value.hint) == (refused, "so it is", "do this")
    assert len(control.requests) == 2


@pytest.mark.parametrize(
    "busy", [Code.QUEUE_FULL, Code.RATE_LIMITED, Code.NO_CAPACITY, Code.MODEL_NOT_AVAILABLE, Code.MODEL_NOT_FOUND]
)
async def test_a_task_that_was_accepted_waits_where_a_new_one_is_refused(
    control: ScriptedControl, client: LlorchClient, busy: Code
) -> None:
    control.on(SUBMIT, stream(QUEUED, then=Then.CUT), refusal(busy), refusal(busy), stream(*WHOLE))
    assert await by_stream(client, BODY) == "t0 t1 "
    assert tries(control) == ["1", "2", "3", "4"]


@pytest.mark.parametrize("refused", [Code.IDEMPOTENCY_MISMATCH, Code.UNAUTHENTICATED, Code.QUEUE_TIMEOUT])
async def test_what_can_not_change_is_not_waited_for_though_the_task_was_accepted(
    control: ScriptedControl, client: LlorchClient, refused: Code
) -> None:
    control.on(SUBMIT, stream(QUEUED, then=Then.CUT), refusal(refused))
    with pytest.raises(ServerError) as caught:
        await by_stream(client, BODY)
    assert caught.value.code is refused
    assert len(control.requests) == 2


async def test_an_error_event_ends_a_task_that_was_taken_up_again(
    control: ScriptedControl, client: LlorchClient
) -> None:
    control.on(SUBMIT, stream(QUEUED, then=Then.CUT), stream(error("QUEUE_TIMEOUT")))
    last = (await taken(client.submit(BODY)))[-1]
    assert isinstance(last, Failed)
    assert last.error.code is Code.QUEUE_TIMEOUT


# ---------------------------------------------------------------- given up


@pytest.mark.usefixtures("impatient")
@WAYS
@pytest.mark.parametrize("away", [Code.RECOVERING, Code.DRAINING])
async def test_a_control_that_never_gets_ready_is_given_up_with_what_it_says(
    control: ScriptedControl, client: LlorchClient, away: Code, way: Way
) -> None:
    control.on(SUBMIT, refusal(away, "not yet", hint="wait"))
    with pytest.raises(ServerError) as caught:
        await way(client, BODY)
    assert (caught.value.code, caught.value.hint) == (away, "wait")
    assert len(control.requests) > 2


@pytest.mark.usefixtures("impatient")
@WAYS
@pytest.mark.parametrize("gone", [PROXY[0], hang_up])
async def test_a_control_that_never_comes_back_is_unreachable_and_the_hint_finds_the_task(
    control: ScriptedControl, client: LlorchClient, gone: Answer, way: Way
) -> None:
    control.on(SUBMIT, gone)
    with pytest.raises(Unreachable, match="lost the connection") as caught:
        await way(client, BODY)
    assert caught.value.hint == f"the task may be running: llorch task show {TASK}"
    assert caught.value.why
    with pytest.raises(Unreachable) as caught:
        await way(client, PLAIN, key="k")
    assert caught.value.hint == "the task may be running; the same command with the same key finds it"


async def test_a_stranger_in_the_controls_place_is_told_apart(control: ScriptedControl, client: LlorchClient) -> None:
    control.on(SUBMIT, hang_up, answer(b"<html>"))
    with pytest.raises(Unreachable, match="lost the connection") as caught:
        await by_stream(client, BODY)
    assert "is not llorch" in (caught.value.why or "")


@pytest.mark.usefixtures("impatient")
async def test_a_task_that_is_not_there_any_more_is_looked_for_as_long_as_the_rest(
    control: ScriptedControl, client: LlorchClient
) -> None:
    control.on(SUBMIT, stream(started(), token(0), then=Then.CUT))
    told: list[Looking] = []
    with pytest.raises(StreamBroken) as caught:
        await by_stream(client, BODY, tell=told.append)
    assert "TASK_NOT_FOUND" in (caught.value.why or "")
    assert caught.value.hint == f"what is left may still be there: llorch task logs {TASK} --after 000000000020"
    assert told[-1].since_s >= resume.RESUME_FOR_S
    assert [note.answered for note in told[:2]] == [False, True]


# ---------------------------------------------------------------- a control that comes back


@pytest.mark.parametrize("before", [(started(), token(0)), (QUEUED,), ()])
async def test_a_control_that_is_gone_and_comes_back_on_its_port_is_found(
    control: ScriptedControl, client: LlorchClient, before: tuple[bytes, ...]
) -> None:
    control.on(SUBMIT, stream(*before, then=Then.SILENCE) if before else no_answer, stream(*WHOLE))
    control.on(EVENTS, refusal(Code.RECOVERING), refusal(Code.TASK_NOT_FOUND), stream(token(1), end()))
    whys: list[str] = []
    events = client.submit(BODY, tell=lambda note: whys.append(note.why))
    async with contextlib.aclosing(events):
        seen = [await anext(events) for _ in before]
        rest = asyncio.create_task(taken(events))
        await eventually(lambda: control.requests)
        await control.go()
        await eventually(lambda: "Connection refused" in whys)
        await control.come()
        seen += await rest
    assert text(seen) == "t0 t1 "
    assert isinstance(seen[-1], End)


async def test_a_stream_that_is_cut_anywhere_comes_whole(control: ScriptedControl, client: LlorchClient) -> None:
    words = ("one ", "三\n", "")
    log = log_of(*words)
    ends = [at + 2 for at in range(len(log)) if log.startswith(b"\n\n", at)]
    for cut in sorted({0, 1, *(at + by for at in ends for by in (-40, -2, -1, 0, 1))} - {len(log), len(log) + 1}):
        control.on(SUBMIT, reading(log, cut))
        control.on(EVENTS, reading(log, min(cut + 70, len(log) - 1)))
        events = await taken(client.submit(BODY))
        assert [type(event) for event in events] == [Started, *[Token] * len(words), End], cut
        assert text(events) == "".join(words), cut


async def test_a_control_that_takes_the_connection_and_says_nothing_is_left(
    control: ScriptedControl, client: LlorchClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "SILENCE_S", 0.5)
    control.on(SUBMIT, stream(started(), token(0), then=Then.CUT))
    control.on(EVENTS, no_answer, stream(token(1), end()))
    assert await by_stream(client, BODY) == "t0 t1 "


async def test_a_control_that_takes_a_submission_and_says_nothing_is_asked_again(
    control: ScriptedControl, client: LlorchClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "SILENCE_S", 0.5)
    control.on(SUBMIT, no_answer, stream(*WHOLE, headers=REPLAYED))
    async with asyncio.timeout(5):
        assert await by_stream(client, BODY) == "t0 t1 "
    assert tries(control) == ["1", "2"]


async def test_a_control_that_never_says_a_word_to_a_submission_is_given_up(
    control: ScriptedControl, client: LlorchClient, monkeypatch: pytest.MonkeyPatch, impatient: None
) -> None:
    monkeypatch.setattr(api, "SILENCE_S", 0.05)
    control.on(SUBMIT, no_answer)
    async with asyncio.timeout(5):
        with pytest.raises(Unreachable, match="lost the connection"):
            await by_stream(client, BODY)


async def test_a_large_body_is_given_the_time_that_a_slow_line_takes(
    control: ScriptedControl, client: LlorchClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "SILENCE_S", 0.05)
    monkeypatch.setattr(web, "MIN_BODY_RATE", 10_000)

    async def late(asked: Asked, request: Any) -> Any:
        await asyncio.sleep(0.2)  # longer than a small body's answer may take
        return await stream(*WHOLE)(asked, request)

    control.on(SUBMIT, late)
    assert await by_stream(client, {**BODY, "prompt": "x" * 50_000}) == "t0 t1 "
    assert len(control.requests) == 1


async def test_a_whole_answer_may_take_as_long_as_it_takes(
    control: ScriptedControl, client: LlorchClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "SILENCE_S", 0.05)

    async def late(asked: Asked, request: Any) -> Any:
        await asyncio.sleep(0.2)
        return await answer(DONE)(asked, request)

    control.on(SUBMIT, late)
    assert await whole(client, BODY) == "t0 t1 "
    assert len(control.requests) == 1


async def test_a_reader_that_had_seen_the_last_event_has_nothing_to_come_back_for(
    control: ScriptedControl, client: LlorchClient
) -> None:
    control.on(EVENTS, hang_up, refusal(Code.RECOVERING), answer(b"", 204))
    assert await taken(client.follow(TASK, after="000000001000")) == []


# ---------------------------------------------------------------- not what the node wrote


@pytest.mark.parametrize(
    ("parts", "why", "came"),
    [
        ((token(0), token(2), end()), "token 2 came where token 1 belongs", "t0 "),
        ((token(1), end()), "token 1 came where token 0 belongs", ""),
        ((token(0), event("token", {"t": "t0 ", "i": 0}, 0x99), end()), "token 0 came where", "t0 "),
        ((token(0), event("token", {"t": "t0 ", "i": 0}), end()), "token 0 came where", "t0 "),
        ((token(0), token(1), end(of="t0 t1")), "sha256", "t0 t1 "),
        ((token(0), token(1, "T1 "), end(of="t0 t1 ")), "sha256", "t0 T1 "),
        ((end(of="t0 "),), "sha256", ""),
    ],
)
async def test_a_stream_that_is_not_what_the_node_wrote_is_broken_and_not_taken_for_the_answer(
    control: ScriptedControl, client: LlorchClient, parts: tuple[bytes, ...], why: str, came: str
) -> None:
    control.on(SUBMIT, stream(started(), *parts))
    seen: list[Event] = []
    with pytest.raises(StreamBroken, match="not what the node wrote") as caught:
        async for each in client.submit(BODY):
            seen += [each]
    assert why in (caught.value.why or "")
    assert caught.value.hint == f"all of it may still be there: llorch task logs {TASK}"
    assert text(seen) == came
    assert not isinstance(seen[-1], End)
    assert len(control.requests) == 1, "asking again would not mend it"


async def test_what_was_shown_over_several_connections_is_checked_as_one(
    control: ScriptedControl, client: LlorchClient
) -> None:
    control.on(SUBMIT, stream(started(), token(0), then=Then.CUT))
    control.on(EVENTS, stream(started(), token(0), token(1), then=Then.CUT), stream(token(2), end(of="t0 t1 t2 ")))
    assert await by_stream(client, BODY) == "t0 t1 t2 "
    control.on(EVENTS, stream(token(2), end(of="t0 t2 ")))
    with pytest.raises(StreamBroken, match="not what the node wrote"):
        await by_stream(client, BODY)


async def test_an_end_that_a_control_made_knows_of_no_text_and_is_an_end_all_the_same(
    control: ScriptedControl, client: LlorchClient
) -> None:
    control.on(SUBMIT, stream(started(), token(0), end("canceled", None, of="")))
    assert isinstance((await taken(client.submit(BODY)))[-1], End)


async def test_a_reader_that_begins_amid_a_task_checks_what_it_can(
    control: ScriptedControl, client: LlorchClient
) -> None:
    control.on(EVENTS, stream(token(5), token(6), end(of="all of it")))
    assert text(await taken(client.follow(TASK, "000000000024"))) == "t5 t6 "
    control.on(EVENTS, stream(token(5), token(7), end()))
    with pytest.raises(StreamBroken, match="not what the node wrote"):
        await taken(client.follow(TASK, "000000000024"))


# ---------------------------------------------------------------- calls


async def test_a_call_to_a_control_that_has_just_started_is_repeated(
    control: ScriptedControl, client: LlorchClient
) -> None:
    for what, call in (
        (f"GET /v2/tasks/{TASK}", client.task),
        (f"POST /v2/tasks/{TASK}/cancel", client.cancel),
    ):
        control.on(what, refusal(Code.RECOVERING), refusal(Code.RECOVERING), answer({"it": "works"}))
        assert await call(TASK) == {"it": "works"}
        assert len(control.asked(what)) == 3


async def test_a_call_that_would_be_repeated_too_late_is_refused_at_once(
    control: ScriptedControl, client: LlorchClient
) -> None:
    control.on(f"GET /v2/tasks/{TASK}", refusal(Code.RECOVERING, retry_after_ms=4_000))
    with pytest.raises(ServerError) as caught:
        await client.call("GET", f"/v2/tasks/{TASK}", timeout_s=2)
    assert caught.value.code is Code.RECOVERING
    assert len(control.requests) == 1
