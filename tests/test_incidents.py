"""The incidents that llorch is built against, and the tests that hold each of them.

Every entry was met once, in a measurement, in a release note or in somebody's bug report: a default of a library that
does harm, an engine that lies. It says what was seen, what follows for the code, and which tests go red when it comes
back. The tests of this file hold the table itself: what it names exists and runs, and no entry goes unnoticed.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
MAP = TESTS.parent / "llorch" / "README.md"

# What a plain `pytest` leaves out, and what it can't run everywhere.
NOT_IN_EVERY_RUN = frozenset({"slow", "steps", "long", "gpu", "llama"})


@dataclass(frozen=True, slots=True)
class Incident:
    """`name` says what happens, `so` what was done about it, `tests` are `path::name` below tests/.

    `decision`: the words in bold that begin the entry of the map's Decisions which goes with it.
    """

    name: str
    so: str
    tests: tuple[str, ...]
    decision: str | None = None


SERVER = (
    Incident(
        "a handler goes on for a client that has left, though with aiohttp's own test server it does not",
        "the one way to listen turns handler_cancellation on, and tests go through it",
        (
            "component/test_web.py::test_a_client_that_leaves_cancels_its_handler",
            "component/test_control_streams.py::test_a_client_that_vanishes_is_told_to_the_node_as_left",
            "test_layering.py::test_sessions_come_from_the_one_factory",
        ),
    ),
    Incident(
        "requests that were half sent stay for ever, and idle connections for an hour",
        "a reaper for heads, a time for every body, 75 s for what is idle",
        (
            "component/test_web.py::test_a_connection_without_a_whole_head_is_closed",
            "component/test_web.py::test_a_later_head_has_no_more_time_than_the_first_had",
            "component/test_web.py::test_a_body_that_does_not_come_is_408",
            "component/test_web.py::test_a_body_that_trickles_is_408_though_it_never_stops",
            "component/test_web.py::test_an_idle_connection_is_closed_after_the_keepalive",
            "component/test_web.py::test_an_idle_connection_is_kept_longer_than_a_proxy_in_front_keeps_it",
            "e2e/test_attacks.py::test_half_open_requests_are_gone_within_fifteen_seconds",
        ),
    ),
    Incident(
        "a long prompt or an image is over a mebibyte, and refused",
        "64 MiB by default, and a refusal before the body is sent where it is larger",
        (
            "component/test_web.py::test_a_body_over_a_mebibyte_is_read_and_one_over_the_limit_is_413",
            "component/test_web.py::test_a_body_of_unknown_length_is_413_when_it_passes_the_limit",
            "component/test_control_link.py::test_a_large_body_is_sent_as_the_node_grants_credit",
            "component/test_node_link.py::test_large_body_flows_as_credit_is_granted",
        ),
    ),
    Incident(
        "JSON of a stranger ends in a 500, or means two things: deep, huge, not UTF-8, NaN, a key twice",
        "one strict decoder for every JSON that comes in",
        (
            "component/test_web.py::test_json_that_is_not_strict_is_400_and_quotes_nothing",
            "unit/test_messages.py::test_what_is_not_strict_json_is_refused_without_a_traceback",
            "e2e/test_attacks.py::test_json_bombs_are_400_and_nothing_explodes",
        ),
    ),
    Incident(
        "a reader that stalls holds megabytes in the kernel, for as long as it likes",
        "a small send buffer on streams, and a time for every write",
        (
            "component/test_web.py::test_a_reader_that_stalls_holds_little_memory",
            "component/test_control_streams.py::test_a_client_that_stalls_is_dropped_and_told_to_the_node_as_slow",
            "e2e/test_slow_readers.py::test_stalled_readers_hold_up_nobody_on_the_same_link_and_cost_their_window",
            "e2e/test_slow_readers.py::test_a_stalled_reader_is_dropped_and_may_come_back_for_the_rest",
        ),
    ),
    Incident(
        "the end of a server waits for its streams, twice, and then tears them",
        "streams are told to end, each in its form; readiness goes with the signal",
        (
            "component/test_control_stop.py::"
            "test_after_the_grace_every_client_gets_the_end_of_its_kind_and_the_node_a_shutdown",
            "component/test_control_stop.py::"
            "test_a_stopping_control_is_not_ready_refuses_new_tasks_and_lets_running_ones_end",
            "component/test_control_stop.py::test_the_end_of_a_control_does_not_wait_for_its_readers",
        ),
    ),
    Incident(
        "there is no HTTP/2, at either end",
        "none is offered; inside, one link carries many tasks, and calls beside it share connections",
        (
            "component/test_control_trust.py::"
            "test_clients_that_would_speak_http_2_are_answered_in_http_1_1_under_every_name",
            "component/test_web.py::test_requests_in_a_row_share_one_connection_unless_each_is_to_have_its_own",
            "component/test_node_link.py::test_stalled_stream_does_not_stall_another",
        ),
        decision="HTTP/1.1 inside.",
    ),
    Incident(
        "a certificate or an authority that was changed counts only after a restart",
        "who a listener is gets chosen at each connection",
        (
            "component/test_control_trust.py::"
            "test_a_new_certificate_file_is_shown_without_a_restart_and_a_bad_one_is_not",
            "component/test_control_trust.py::test_an_authority_is_rotated_while_nodes_and_clients_go_on",
        ),
    ),
    Incident(
        "between choosing a pool and taking its slot others choose the same one",
        "choosing and taking are one step without an await",
        (
            "component/test_control_queue.py::"
            "test_six_hundred_that_come_at_once_never_hold_more_than_the_six_slots_there_are",
            "unit/control/test_registry.py::test_a_pool_never_has_more_claims_than_slots",
        ),
    ),
)

CLIENT = (
    Incident(
        "a stream ends after five minutes, and the hundred and first waits for one of the others to end",
        "no limit on the whole of a request, none on connections",
        (
            "component/test_web.py::test_a_session_sets_no_limit_that_long_streams_would_meet",
            "component/test_web.py::test_the_hundred_and_first_stream_waits_for_no_other_to_end",
        ),
    ),
    Incident(
        "a peer can have its answer unpacked, the token sent elsewhere, and its words put into our log",
        "nothing is unpacked or followed, no proxy is taken from the environment, no exception of a peer's is quoted",
        (
            "component/test_web.py::test_an_answer_is_not_unpacked",
            "component/test_web.py::test_a_gzip_bomb_is_not_unpacked",
            "component/test_web.py::test_no_proxy_of_the_environment_is_used",
            "test_layering.py::test_no_request_follows_a_redirect",
            "component/test_client.py::test_a_redirect_is_not_followed_so_the_token_goes_nowhere_else",
            "component/test_node_bad_engines.py::test_what_an_engine_says_in_place_of_an_answer_is_quoted_nowhere",
            "component/test_web.py::test_what_is_not_http_is_4xx_in_the_one_shape_then_closed_and_never_quoted",
            "unit/test_logs.py::test_a_traceback_says_where_and_which_and_nothing_of_what_was_quoted",
        ),
    ),
    Incident(
        "a machine that is gone without a word is waited for without end",
        "keepalive and a user timeout on every socket",
        (
            "component/test_web.py::test_every_socket_notices_a_peer_that_is_gone",
            "component/test_link.py::test_its_socket_notices_in_seconds_that_the_peer_is_gone",
            "component/test_link.py::test_a_silent_peer_is_asked_and_after_three_unanswered_pings_it_is_lost",
        ),
    ),
    Incident(
        "a body that is read by lines breaks off at a long one",
        "bytes are passed on as they come; events are found by a decoder of our own",
        (
            "component/test_node_http.py::test_a_line_longer_than_any_read_buffer_passes_whole",
            "component/test_client.py::test_a_line_longer_than_any_read_buffer_is_one_event",
            "test_layering.py::test_no_body_is_read_line_by_line",
            "unit/test_sse.py::test_every_split_point_gives_the_same_events",
        ),
    ),
    Incident(
        "an answer that was cut looks like one that has ended, wherever the cut falls between two pieces",
        "only a TAIL says that a log is whole, and what was cut is passed on as cut",
        (
            "component/test_web.py::test_a_cut_answer_is_an_error_and_an_end_in_order_is_none",
            "component/test_control_dialled_node.py::test_an_answer_that_breaks_the_protocol_is_a_lost_node",
            "component/test_node_bad_engines.py::"
            "test_an_engine_that_fails_after_its_first_content_ends_the_log_with_one_error",
            "component/test_node_http.py::test_whole_answer_that_breaks_off_is_cut_not_ended",
        ),
    ),
)

ENGINES = (
    Incident(
        "an engine within the agent's own process takes the agent along",
        "the embedded one is a child that speaks llama-server's command line, and is started again",
        (
            "unit/node/test_engines.py::test_every_engine_listens_on_loopback_behind_a_key_that_is_not_in_argv",
            "component/test_supervisor.py::"
            "test_an_engine_that_is_killed_is_started_again_and_the_log_says_whose_it_was",
            "component/test_shim.py::test_without_a_grace_an_engine_is_gone_when_its_agent_is_killed",
            "component/test_supervisor.py::test_real_llama_cpp_becomes_ready_and_answers_through_its_lease",
        ),
    ),
    Incident(
        "the embedded engine's own defaults open it: any origin, a web page, no key, and a context cut into parts",
        "each parameter that matters is set; the context is asked for per slot",
        (
            "unit/node/test_engines.py::"
            "test_of_the_embedded_engines_defaults_none_that_shares_or_opens_anything_is_left",
            "component/test_llamacpp_server.py::test_the_flags_arrive",
        ),
    ),
    Incident(
        "llama.cpp lets in every page and everybody, serves under any model's name, and has numbers for error codes",
        "loopback and a key of each start; the model is compared here, and errors are put into our words",
        (
            "unit/node/test_engines.py::test_every_engine_listens_on_loopback_behind_a_key_that_is_not_in_argv",
            "unit/node/test_engines.py::test_what_llorch_rests_on_cannot_be_changed_by_args",
            "component/test_supervisor.py::test_an_engine_that_others_can_reach_is_ended_and_never_ready",
            "component/test_llamacpp_server.py::test_a_page_of_another_origin_is_not_let_in",
            "component/test_control_streams.py::"
            "test_a_v1_answer_keeps_the_engines_status_type_and_length_and_no_other_header",
            "component/test_node_bad_engines.py::"
            "test_a_body_that_names_another_model_than_the_pool_s_is_refused_where_nobody_else_looked",
            "unit/node/test_openai_api.py::test_an_engines_errors_in_our_words",
            "unit/node/test_openai_api.py::test_an_error_within_a_stream_has_a_number_for_a_code_and_none_of_ours",
        ),
    ),
    Incident(
        "with another version llama-server's default port and its number of slots are others",
        "both are always given, and no pool's arguments change them",
        (
            "unit/node/test_engines.py::test_every_engine_listens_on_loopback_behind_a_key_that_is_not_in_argv",
            "unit/node/test_engines.py::test_what_llorch_rests_on_cannot_be_changed_by_args",
        ),
        decision="A pool's own arguments stand before llorch's",
    ),
    Incident(
        "an engine that is looked at never goes to sleep",
        "what is asked again and again is its health alone",
        ("component/test_probing.py::test_looking_at_an_engine_asks_for_nothing_that_keeps_it_awake",),
    ),
    Incident(
        "a header of the client has the engine generate on when the client has gone",
        "a list of the headers that an engine may see",
        (
            "component/test_node_link.py::test_headers_that_are_not_an_engine_s_business_stay_here",
            "component/test_node_link.py::test_cancel_frees_the_slot_and_closes_the_engine_connection",
        ),
    ),
    Incident(
        "a cache of prompts gives one conversation what another had said",
        "no prompt cache in RAM and none of idle slots, unless a pool's own arguments ask for it",
        (
            "unit/node/test_engines.py::test_no_state_is_shared_between_requests_through_the_ram_cache",
            "unit/node/test_engines.py::"
            "test_of_the_embedded_engines_defaults_none_that_shares_or_opens_anything_is_left",
        ),
    ),
    Incident(
        "the chunk that has the usage has no choices",
        "none is taken for granted; usage is asked for always, and shown to whom asked",
        (
            "unit/node/test_openai_api.py::test_usage_is_always_asked_for_and_it_is_remembered_who_asked",
            "unit/node/test_openai_api.py::test_the_usage_chunk_goes_only_to_whom_asked_for_it",
            "unit/node/test_openai_api.py::test_a_native_stream_has_started_tokens_and_one_end",
            "component/test_simulated_server.py::"
            "test_a_chat_has_its_usage_in_a_chunk_of_no_choices_and_only_when_asked",
            "component/test_llamacpp_server.py::test_a_chat_streams_with_its_usage_in_a_chunk_of_no_choices",
        ),
    ),
    Incident(
        "llama.cpp's own path for completions has events of another form, and no [DONE]",
        "it is not used: native tasks take the paths that every engine has; a stream is whole by its finish reason",
        (
            "unit/node/test_openai_api.py::test_a_native_prompt_becomes_a_streamed_completion",
            "unit/node/test_openai_api.py::test_once_the_finish_reason_came_the_text_is_whole",
            "unit/test_openai_paths.py::test_no_other_path_is_served_however_it_is_written",
            "component/test_simulated_server.py::test_llama_cpp_s_own_path_ends_with_a_chunk_that_stops_and_no_done",
        ),
        decision="Native tasks use the engines' OpenAI surface",
    ),
    Incident(
        "an engine that hangs says that it is well, and one that is busy says nothing",
        "ready is one generated token; a stream that stands still is ended; no answer in time is no death",
        (
            "component/test_probing.py::test_an_engine_that_hangs_is_not_ready_though_its_health_is_well",
            "component/test_probing.py::test_an_engine_that_is_too_busy_to_say_how_it_is_is_not_gone",
            "component/test_supervisor.py::test_it_is_ready_once_it_generates_and_not_before",
            "component/test_node_link.py::test_engine_that_falls_silent_ends_the_task",
            "component/test_node_breakers.py::test_an_engine_that_hangs_when_it_is_tried_is_given_up_early",
            "component/test_control_retry.py::test_a_stream_without_a_first_byte_in_time_goes_to_another_pool",
        ),
    ),
    Incident(
        "an engine's key guards some of its paths, and others pause it or change its weights for whoever asks",
        "loopback, and a table of the paths that are passed on, letter by letter",
        (
            "component/test_served_paths.py::test_a_node_asks_its_engine_for_what_is_served_and_nothing_else",
            "component/test_served_paths.py::test_a_control_sends_on_what_is_served_and_nothing_else",
            "component/test_served_paths.py::test_a_node_takes_no_other_path_over_http_either",
            "unit/test_openai_paths.py::test_no_other_path_is_served_however_it_is_written",
        ),
    ),
    Incident(
        "a number in a request writes over the engine's memory",
        "native bodies have typed fields in ranges, and in others the engine's own fields are refused",
        (
            "unit/node/engines/test_fields.py::test_an_engine_internal_field_is_refused_by_name_on_every_path",
            "unit/node/engines/test_fields.py::test_nothing_refused_or_out_of_range_ever_reaches_an_engine",
            "unit/node/engines/test_fields.py::test_of_a_native_body_only_typed_parameters_in_range_reach_an_engine",
            "unit/node/test_openai_api.py::test_what_is_refused_is_named",
        ),
        decision="`/v1` bodies have a list of what is refused, native ones of what is allowed.",
    ),
    Incident(
        "a model file that lies about its sizes is read beyond its end",
        "magic, counts and sizes are read before an engine opens it",
        (
            "unit/node/engines/test_gguf.py::test_a_lie_is_refused_with_its_reason",
            "unit/node/engines/test_gguf.py::test_a_header_cut_at_any_byte_is_refused",
            "unit/node/engines/test_gguf.py::test_a_header_without_end_is_refused_at_its_bound",
            "unit/node/engines/test_gguf.py::test_a_file_that_ends_before_its_tensors_is_refused_at_every_length",
            "unit/node/test_catalog.py::test_a_file_that_is_no_gguf_is_refused",
            "component/test_llamacpp_server.py::test_a_bad_model_ends_it_with_a_line_that_names_it",
        ),
    ),
)

# An incident that is struck from its table is struck from here too, by somebody who knows why.
ALL = (("aiohttp as a server", SERVER, 9), ("aiohttp as a client", CLIENT, 5), ("engines", ENGINES, 13))
INCIDENTS = [incident for _, incidents, _ in ALL for incident in incidents]


# ---------------------------------------------------------------- what the tables are checked with


@cache
def statements(path: Path) -> list[ast.stmt]:
    return ast.parse(path.read_text()).body


def functions(path: Path) -> dict[str, ast.FunctionDef | ast.AsyncFunctionDef]:
    """The tests of a file, by name."""
    return {
        node.name: node
        for node in statements(path)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
    }


def file_marks(path: Path) -> frozenset[str]:
    """The names of the marks that a file gives all of its tests, and `skip` where it skips itself."""
    marks: set[str] = set()
    for node in statements(path):
        if isinstance(node, ast.Assign) and any(getattr(to, "id", "") == "pytestmark" for to in node.targets):
            marks |= set(marks_in(node.value))
        elif isinstance(node, ast.Expr) and calls_skip(node):
            marks.add("skip")
    return frozenset(marks)


def marks_in(expression: ast.AST) -> Iterator[str]:
    """`skipif` is a condition, which its reason tells; one that is written down as true is none."""
    for node in ast.walk(expression):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "skipif":
            if node.args and isinstance(node.args[0], ast.Constant) and node.args[0].value:
                yield "skip"
        elif isinstance(node, ast.Attribute) and getattr(node.value, "attr", "") == "mark":
            yield node.attr


def calls_skip(statement: ast.stmt) -> bool:
    call = statement.value if isinstance(statement, ast.Expr) else None
    return isinstance(call, ast.Call) and getattr(call.func, "attr", "") in ("skip", "xfail")


def fault(test: str, root: Path = TESTS) -> str | None:
    """Why a test that is named holds nothing; None if it may."""
    where, _, name = test.partition("::")
    path = root / where
    if not path.is_file():
        return f"{where} does not exist"
    if name not in functions(path):
        return f"{name} is not in {where}"
    if {"skip", "xfail"} & marks(test, root) or any(map(calls_skip, functions(path)[name].body)):
        return f"{name} is skipped"
    return None


def marks(test: str, root: Path = TESTS) -> frozenset[str]:
    where, _, name = test.partition("::")
    found = functions(root / where)[name]
    own = {mark for decorator in found.decorator_list for mark in marks_in(decorator)}
    return file_marks(root / where) | own


# ---------------------------------------------------------------- the tables


@pytest.mark.parametrize(("group", "incidents", "count"), ALL, ids=[group for group, _, _ in ALL])
def test_no_incident_has_gone_from_its_table(group: str, incidents: tuple[Incident, ...], count: int) -> None:
    assert len(incidents) == len({incident.name for incident in incidents}) == count


@pytest.mark.parametrize("incident", INCIDENTS, ids=lambda incident: incident.name)
def test_an_incident_is_held_by_tests_that_exist_and_run(incident: Incident) -> None:
    assert incident.tests
    assert len(set(incident.tests)) == len(incident.tests)
    assert [why for test in incident.tests if (why := fault(test)) is not None] == []
    everywhere = [test for test in incident.tests if not marks(test) & NOT_IN_EVERY_RUN]
    assert everywhere, "none of them runs wherever `pytest` does"


def test_a_decision_that_an_incident_led_to_stands_in_the_map() -> None:
    decisions = re.findall(r"^- \*\*(.+?)\*\*", MAP.read_text().partition("\n## Decisions\n")[2], flags=re.MULTILINE)
    assert [incident.decision for incident in INCIDENTS if incident.decision not in (None, *decisions)] == []


@pytest.mark.parametrize(
    ("source", "holds"),
    [
        ("def test_it(): assert 1", True),
        ("async def test_it(): assert 1", True),
        ("@pytest.mark.slow\ndef test_it(): assert 1", True),
        ("@pytest.mark.skipif(not there(), reason='not there')\ndef test_it(): assert 1", True),
        ("def test_that(): assert 1", False),
        ("def it():\n    def test_it(): assert 1", False),
        ("@pytest.mark.skip\ndef test_it(): assert 1", False),
        ("@pytest.mark.skip(reason='later')\ndef test_it(): assert 1", False),
        ("@pytest.mark.skipif(True, reason='later')\ndef test_it(): assert 1", False),
        ("@pytest.mark.xfail\ndef test_it(): assert 1", False),
        ("def test_it():\n    pytest.skip('later')", False),
        ("pytestmark = [pytest.mark.slow, pytest.mark.skip]\ndef test_it(): assert 1", False),
        ("pytest.skip('later', allow_module_level=True)\ndef test_it(): assert 1", False),
    ],
)
def test_a_test_that_is_missing_or_skipped_holds_nothing(tmp_path: Path, source: str, holds: bool) -> None:
    (tmp_path / "test_a.py").write_text(source)
    assert (fault("test_a.py::test_it", tmp_path) is None) == holds
    assert fault("test_b.py::test_it", tmp_path) == "test_b.py does not exist"
