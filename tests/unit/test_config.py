"""Settings: where they come from, what is refused, how it is told, and that no secret is ever told."""

from __future__ import annotations

import dataclasses
import ipaddress
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from llorch import config_kinds as kinds
from llorch import messages
from llorch.auth import fingerprint
from llorch.config import (
    SETTINGS,
    ClientSettings,
    ConfigFaults,
    ConfigFile,
    ControlSettings,
    Fault,
    HostPort,
    NodeSettings,
    PoolSpec,
    Resolved,
    RoleSettings,
    example_yaml,
    json_schema,
    resolve,
    settings_for,
    settings_markdown,
    show,
)
from llorch.config_engine_args import why_not_arg
from llorch.config_kinds import BadValue, Kind
from llorch.config_pools import ENGINE, FIELDS, MAX_POOLS
from llorch.config_yaml import MAX_CHARS, read_yaml
from llorch.control import audience, dispatch, log_reader
from llorch.errors import ConfigError, LlorchError
from llorch.node import retention, task_entry
from llorch.settings import ROLES

API = "a1" * 20
ADMIN = "b2" * 20
SERVICE = "c3" * 20
NODE = "d4" * 20
CONTROL_ENV = {"LLORCH_API_TOKEN": API, "LLORCH_SERVICE_TOKEN": SERVICE, "LLORCH_NODE_TOKEN": NODE}
S = TypeVar("S", bound=RoleSettings)
NODE_ENV = {"LLORCH_JOIN": "http://127.0.0.1:8080", "LLORCH_SERVICE_TOKEN": SERVICE, "LLORCH_NODE_TOKEN": NODE}


def files_of(contents: Mapping[str, str | Exception]) -> Callable[[str], str]:
    def read_file(path: str) -> str:
        content = contents.get(path, FileNotFoundError(2, "No such file or directory", path))
        if isinstance(content, Exception):
            raise content
        return content

    return read_file


def control(
    flags: Mapping[str, Any] | None = None,
    env: Mapping[str, str] | None = None,
    yaml: str | Sequence[ConfigFile] = (),
    contents: Mapping[str, str | Exception] | None = None,
    base: Mapping[str, str] = CONTROL_ENV,
) -> Resolved[ControlSettings]:
    return _resolve(ControlSettings, flags, {**base, **(env or {})}, yaml, contents)


def node(
    flags: Mapping[str, Any] | None = None,
    env: Mapping[str, str] | None = None,
    yaml: str | Sequence[ConfigFile] = (),
    contents: Mapping[str, str | Exception] | None = None,
    base: Mapping[str, str] = NODE_ENV,
) -> Resolved[NodeSettings]:
    return _resolve(NodeSettings, flags, {**base, **(env or {})}, yaml, contents)


def client(
    flags: Mapping[str, Any] | None = None,
    env: Mapping[str, str] | None = None,
    contents: Mapping[str, str | Exception] | None = None,
) -> Resolved[ClientSettings]:
    return _resolve(ClientSettings, flags, env or {}, (), contents)


def _resolve(
    cls: type[S],
    flags: Mapping[str, Any] | None,
    env: Mapping[str, str] | None,
    yaml: str | Sequence[ConfigFile],
    contents: Mapping[str, str | Exception] | None,
) -> Resolved[S]:
    files = [ConfigFile("llorch.yaml", yaml)] if isinstance(yaml, str) else yaml
    return resolve(cls, flags=flags or {}, env=env or {}, files=files, read_file=files_of(contents or {}))


def faults(run: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Fault, ...]:
    with pytest.raises(ConfigFaults) as caught:
        run(*args, **kwargs)
    return caught.value.faults


def only(found: Sequence[Fault]) -> Fault:
    assert len(found) == 1, "\n".join(map(str, found))
    return found[0]


# ---------------------------------------------------------------- the registry


def test_every_role_can_be_built_from_its_defaults() -> None:
    assert ControlSettings().bind == HostPort("127.0.0.1", 8080)
    assert NodeSettings().bind == HostPort("127.0.0.1", 9200)
    assert ClientSettings().url == "http://127.0.0.1:8080"


def test_the_defaults_are_those_of_the_contract() -> None:
    got, on_node = ControlSettings(), NodeSettings()
    assert (got.heartbeat_interval, got.offline_after, got.probe_interval) == (10.0, 30.0, 5.0)
    assert (got.queue_limit, got.queue_body_limit, got.ttft_timeout) == (None, 256 * 2**20, 120.0)
    assert (got.queue_timeout, got.queue_timeout_batch) == (120.0, 300.0)
    assert (got.max_body, got.slow_reader_timeout, got.shutdown_grace) == (64 * 2**20, 30.0, 30.0)
    assert got.recovery_window == 15.0
    assert (on_node.slots, on_node.ctx, on_node.engine, on_node.early_beat) == (4, 4096, "auto", 0.25)
    assert (on_node.log_limit, on_node.logs_limit, on_node.log_retention) == (4 * 2**20, 256 * 2**20, 600.0)
    assert (on_node.load_timeout, on_node.stop_grace, on_node.reconnect_grace) == (300.0, 10.0, 10.0)


def test_the_times_without_a_setting_are_those_of_the_contract() -> None:
    assert (retention.SEALED_V1_S, task_entry.LOST_GRACE_S) == (30.0, 30.0)
    assert (audience.RECONNECT_GRACE_S, log_reader.RECONNECT_S, dispatch.ACCEPT_TIMEOUT_S) == (10.0, 5.0, 1.0)


@pytest.mark.parametrize("name", sorted({one.name for one in SETTINGS}))
def test_one_name_means_one_kind_of_value_in_every_role(name: str) -> None:
    assert len({id(one.kind) for one in SETTINGS if one.name == name}) == 1


def test_names_follow_one_rule() -> None:
    for setting in SETTINGS:
        assert re.fullmatch(r"[a-z]+(-[a-z]+)*", setting.name)
        assert setting.flag == f"--{setting.name}"
        if setting.env:
            assert setting.env[0] == f"LLORCH_{setting.name.upper().replace('-', '_')}"


def test_every_field_of_a_role_is_a_setting_and_every_secret_has_a_file() -> None:
    for cls in ROLES:
        names = {one.name: one for one in settings_for(cls)}
        fields = {one.name.replace("_", "-") for one in dataclasses.fields(cls)}
        assert {name for name, one in names.items() if one.file_of is None} == fields
        for name, one in names.items():
            if one.secret:
                assert names[f"{name}-file"].file_of == name


def test_the_name_rules_are_those_of_the_wire() -> None:
    assert kinds.MODEL_ID_PATTERN == messages.MODEL_ID_PATTERN
    assert kinds.NODE_ID_PATTERN == messages.NODE_ID_PATTERN
    assert kinds.POOL_ID_PATTERN == messages.POOL_ID_PATTERN


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda one: f"{one.name}-{one.roles[0]}")
def test_the_default_and_the_example_of_a_setting_are_values_of_it(setting: Any) -> None:
    for value in (setting.default, setting.example):
        if value and not setting.secret and setting.kind.read is None:
            assert setting.kind.parse(setting.kind.show(setting.kind.parse(value))) == setting.kind.parse(value)


# ---------------------------------------------------------------- where a value comes from


def test_a_flag_beats_the_environment_beats_files_in_order_beats_the_default() -> None:
    files = [
        ConfigFile("near.yaml", "queue-limit: 3\n"),
        ConfigFile("far.yaml", "\nqueue-limit: 4\nqueue-timeout: 9s\n"),
    ]
    env = {"LLORCH_QUEUE_LIMIT": "2"}
    got = control({"queue-limit": "1"}, env, files)
    assert (got.settings.queue_limit, got.origin["queue-limit"]) == (1, "flag --queue-limit")
    got = control({"queue-limit": None}, env, files)
    assert (got.settings.queue_limit, got.origin["queue-limit"]) == (2, "env LLORCH_QUEUE_LIMIT")
    got = control({}, {}, files)
    assert (got.settings.queue_limit, got.origin["queue-limit"]) == (3, "near.yaml:1")
    assert (got.settings.queue_timeout, got.origin["queue-timeout"]) == (9.0, "far.yaml:3")
    got = control({}, {}, files[1:])
    assert (got.settings.queue_limit, got.origin["queue-limit"]) == (4, "far.yaml:2")
    got = control()
    assert (got.settings.queue_limit, got.origin["queue-limit"]) == (None, "default")


def test_every_setting_has_an_origin() -> None:
    for got in (control(), node(), client()):
        assert set(got.origin) == {field.name.replace("_", "-") for field in dataclasses.fields(got.settings)}


def test_flags_may_be_named_as_fields_and_may_repeat_where_they_are_lists() -> None:
    got = node({"engine_arg": ["--tokens 5", "--ttft-ms '1 0'"], "gpus": ["0", "2,1"], "engine": "simulated"}).settings
    assert got.engine_arg == ("--tokens", "5", "--ttft-ms", "1 0")
    assert got.gpus == (0, 2, 1)
    assert node({"join": ["http://localhost:1", "https://far:2"]}).settings.join == (
        "http://localhost:1",
        "https://far:2",
    )
    assert "more than once" in only(faults(node, {"zone": ["a", "b"]})).message
    assert "twice" in only(faults(node, {"gpus": ["0", "0"]})).message


def test_boolean_flags_come_as_booleans() -> None:
    assert node({"allow-cpu": True}).settings.allow_cpu is True
    assert node({"allow-cpu": False}, {"LLORCH_ALLOW_CPU": "yes"}).settings.allow_cpu is False
    assert only(faults(node, {"slots": True})).key == "slots"
    assert only(faults(node, {"zone": []})).message == "has no value"


def test_an_empty_variable_is_not_set() -> None:
    assert control(env={"LLORCH_BIND": ""}).origin["bind"] == "default"
    assert control(env={"LLORCH_API_TOKEN": ""}).settings.api_token is None


def test_the_older_names_for_certificates_work_for_their_own_role_only() -> None:
    env = {
        "ORCHESTRATORD_TLS_CERT": "/o.crt", "ORCHESTRATORD_TLS_KEY": "/o.key",
        "POOL_MANAGERD_TLS_CERT": "/p.crt", "POOL_MANAGERD_TLS_KEY": "/p.key",
    }  # fmt: skip
    assert (control(env=env).settings.tls_cert, control(env=env).settings.tls_key) == ("/o.crt", "/o.key")
    assert (node(env=env).settings.tls_cert, node(env=env).settings.tls_key) == ("/p.crt", "/p.key")
    assert node(env={**env, "LLORCH_TLS_CERT": "/l.crt"}).settings.tls_cert == "/l.crt"


def test_settings_of_other_roles_are_accepted_in_a_file_and_still_checked() -> None:
    assert control(yaml="join: https://c:1\npools: [{id: a}]\nurl: http://localhost:2\n").settings.queue_limit is None
    found = faults(control, yaml="join: ftp://c\nslots: 0\n")
    assert [(one.where, one.key) for one in found] == [("llorch.yaml:1", "join"), ("llorch.yaml:2", "slots")]


def test_settings_of_other_roles_and_those_for_files_only_are_no_flags() -> None:
    assert only(faults(control, {"join": "https://c:1"})).where == "flag --join"
    assert only(faults(node, {"pools": "[]"})).message == "not a setting"
    assert only(faults(control, {"devv": "1"})).hint != "did you mean dev?"


def test_a_broken_value_is_reported_even_where_a_stronger_source_would_have_won() -> None:
    found = faults(control, {"queue-limit": "1"}, {"LLORCH_QUEUE_LIMIT": "x"}, "queue-limit: y\n")
    assert [one.where for one in found] == ["env LLORCH_QUEUE_LIMIT", "llorch.yaml:1"]


def test_unknown_variables_warn_and_those_of_kubernetes_do_not() -> None:
    env = {
        "LLORCH_BNID": "x",
        "LLORCH_SERVICE_HOST": "10.0.0.1",
        "LLORCH_CONTROL_PORT_8080_TCP": "tcp://x",
        "OTHER": "1",
    }
    warnings = control(env={**env, "LLORCH_JOIN": "nonsense"}).warnings
    assert warnings == ("env LLORCH_BNID: not a setting; did you mean LLORCH_BIND?",)


def test_dev_is_set_by_its_flag_alone() -> None:
    assert control({"dev": True}, {"LLORCH_API_TOKEN": "short"}).settings.dev is True
    assert control({"dev": "true"}, {"LLORCH_API_TOKEN": "short"}).settings.dev is True
    assert only(faults(control, yaml="dev: true\n")).key == "dev"
    assert any("LLORCH_DEV" in one for one in control(env={"LLORCH_DEV": "1"}).warnings)
    assert not control(env={"LLORCH_DEV": "1"}).settings.dev
    assert "dev" not in json_schema()["properties"]
    assert "| `--dev`" not in settings_markdown()


# ---------------------------------------------------------------- faults, all at once


def test_everything_that_is_wrong_is_told_at_once_with_its_place_and_a_way_out() -> None:
    yaml = (
        "heartbeat-intervall: 4s\n"  # 1
        "offline-after: 3 parsecs\n"  # 2
        f"api-token: {API}\n"  # 3
        "log-level:\n"  # 4
        "max-body: [1]\n"  # 5
        "pools:\n"
        "  - idd: 3\n"  # 7
        "    slots: many\n"  # 8
        "  - {id: b, engine: vlm}\n"  # 9
        "queue-limit: 1\n"
        "queue-limit: 2\n"  # 11
    )
    with pytest.raises(ConfigFaults) as caught:
        control({"bind": "8080", "zap": "1"}, {"LLORCH_QUEUE_TIMEOUT": "1y", "LLORCH_TLS_CERT": "/c"}, yaml)
    got = {(one.where, one.key): one for one in caught.value.faults}
    assert set(got) == {
        ("flag --bind", "bind"), ("flag --zap", "zap"), ("env LLORCH_QUEUE_TIMEOUT", "queue-timeout"),
        ("llorch.yaml:1", "heartbeat-intervall"), ("llorch.yaml:2", "offline-after"), ("llorch.yaml:3", "api-token"),
        ("llorch.yaml:4", "log-level"), ("llorch.yaml:5", "max-body"), ("llorch.yaml:7", "pools[0]"),
        ("llorch.yaml:8", "pools[0].slots"), ("llorch.yaml:9", "pools[1].engine"), ("llorch.yaml:11", "queue-limit"),
        ("env LLORCH_TLS_CERT", "tls-cert"),
    }  # fmt: skip
    assert got["llorch.yaml:1", "heartbeat-intervall"].hint == "did you mean heartbeat-interval?"
    assert got["llorch.yaml:7", "pools[0]"].hint == "did you mean id?"
    told = str(caught.value)
    assert told.startswith("13 faults in the settings; nothing was started\n")
    assert "llorch.yaml:11: queue-limit: given twice; first at line 10" in told
    assert "    hint: did you mean heartbeat-interval?" in told
    assert isinstance(caught.value, ConfigError)


def test_faults_in_one_file_come_in_the_order_of_its_lines() -> None:
    found = faults(control, yaml="slots: x\nqueue-limit: z\nzzz: 1\nlog-level: loud\n")
    assert [one.where for one in found] == [f"llorch.yaml:{line}" for line in (1, 2, 3, 4)]


def test_an_underscore_for_a_hyphen_is_recognised() -> None:
    fault = only(faults(control, yaml="queue_limit: 3\n"))
    assert fault.hint == "did you mean queue-limit?"


def test_a_misspelt_setting_is_not_reported_as_missing_too() -> None:
    assert only(faults(node, {"joim": "https://c:1"}, base={**NODE_ENV, "LLORCH_JOIN": ""})).key == "joim"


@pytest.mark.parametrize(
    ("yaml", "line", "says"),
    [
        ("queue-limit: 1\nlog-level: [\n", 3, "not valid YAML"),
        ("queue-limit: 1\n\tlog-level: info\n", 2, "not valid YAML"),
        ("pools:\n\t- id: a\n", 2, "\\t"),
        ("log-level: 'info\n", 2, "not valid YAML"),
        ("token-file: @x\n", 1, "not valid YAML"),
        ("queue-limit: 1\nlog-level: \x00\n", 2, "a character that YAML does not allow"),
        ("- queue-limit\n", 1, "expected `key: value` lines"),
        ("just words\n", 1, "expected `key: value` lines"),
        ("queue-limit: 1\n---\nqueue-limit: 2\n", 2, "a second document"),
        ("log-level: info\nzone: &a b\n", 2, "anchors"),
        ("zone: *a\n", 1, "aliases"),
        ("log-level: info\nqueue-limit: !!python/object/apply:os.system [x]\n", 2, "tags"),
        ("? [a]\n: b\n", 1, "a key must be a plain word"),
        ("pools: " + "[" * 50 + "]" * 50, 1, "nested deeper"),
        ("# " + "x" * MAX_CHARS, 1, "longer than"),
    ],
)
def test_a_file_that_is_not_plain_yaml_is_told_with_its_line_and_nothing_else_is(
    yaml: str, line: int, says: str
) -> None:
    found = faults(control, yaml=yaml, base={})  # without tokens: an unread file might have named them
    assert found[0].where == f"llorch.yaml:{line}"
    assert any(says in one.message for one in found), found
    assert not any(one.where == "missing" for one in found)


def test_nothing_is_missing_while_any_file_is_unread() -> None:
    files = [ConfigFile("near.yaml", "a: ["), ConfigFile("far.yaml", "log-level: info\n")]
    assert only(faults(control, yaml=files, base={})).where == "near.yaml:1"


def test_a_tab_is_told_from_other_faults() -> None:
    assert "tabs" in (only(faults(control, yaml="pools:\n\t- id: a\n")).hint or "")
    assert "quote" in (only(faults(control, yaml="token-file: @x\n")).hint or "")


@pytest.mark.parametrize("yaml", ["pools: *a", "pools: [*a]", "pools: [{id: a, env: *a}]", "slots: *a", "gpus: [*a]"])
def test_an_alias_is_one_fault_wherever_it_stands(yaml: str) -> None:
    assert "aliases" in only(faults(control, yaml=yaml)).message


def test_an_alias_bomb_is_refused_without_being_built() -> None:
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30))
    found = faults(control, yaml=bomb)
    assert sum("aliases" in one.message for one in found) == 29 * 9


def test_an_empty_file_is_a_file() -> None:
    for text in ("", "\n", "# nothing\n", "---\n", "--- {}\n", "\ufefflog-level: debug\n"):
        assert control(yaml=text).settings.queue_limit is None


def test_values_are_taken_as_written_not_as_yaml_guesses() -> None:
    got = node(yaml='node-id: 007\nzone: "on"\nslots: "8"\ngpus: [0, 1]\nallow-cpu: on\n').settings
    assert (got.node_id, got.zone, got.slots, got.gpus, got.allow_cpu) == ("007", "on", 8, (0, 1), True)
    assert only(faults(control, yaml="shutdown-grace: 1:30\n")).key == "shutdown-grace"


@pytest.mark.parametrize("null", ["", " null", " ~", " # nothing"])
def test_a_key_with_no_value_is_a_fault_and_an_empty_list_is_none(null: str) -> None:
    assert "has no value" in only(faults(control, yaml=f"zone:{null}\n")).message
    assert only(faults(control, yaml='zone: "~"\n')).key == "zone"  # quoted, it is a word like any other
    assert node(yaml="gpus: []\nmodel: demo\n").settings.gpus == ()


@pytest.mark.parametrize(
    ("yaml", "says"),
    [
        ("bind: [1]\n", "is a list; expected one value"),
        ("bind: {a: 1}\n", "is a mapping; expected one value"),
        ("gpus: {a: 1}\n", "is a mapping; expected a list"),
        ("gpus: [0, [1]]\n", "is a list; expected one value"),
        ("gpus: [0, ~]\n", "has no value"),
        ("gpus: [0, 0]\n", "0 is given twice"),
        ("pools: a\n", "expected a list of pools"),
        ("pools: {a: 1}\n", "expected a list of pools"),
        ("pools: [a]\n", "expected the fields of a pool"),
        ("pools: [[a]]\n", "expected the fields of a pool"),
        ("pools: [{id: a, env: A=1}]\n", "expected NAME: value lines"),
        ("queue-limit: true\n", "not a whole number"),
        ("allow-cpu: maybe\n", "neither true nor false"),
    ],
)
def test_a_value_of_the_wrong_shape_is_a_fault(yaml: str, says: str) -> None:
    assert says in only(faults(control, yaml=yaml)).message


def test_each_item_of_a_list_is_told_at_its_own_line() -> None:
    found = faults(control, yaml="join:\n  - https://a:1\n  - ftp://b\n  - https://c:1\n  - d\n")
    assert [one.where for one in found] == ["llorch.yaml:3", "llorch.yaml:5"]


@given(st.text(max_size=200))
def test_no_text_makes_the_reader_fail_in_its_own_way(text: str) -> None:
    table, problems = read_yaml(text)
    assert all(entry.line >= 1 for entry in table.entries)
    assert all(problem.line >= 1 for problem in problems)


@given(st.text(alphabet="ab:- \n\t[]{}#&*!|>'\"%@`,?~", max_size=60))
def test_no_yaml_like_text_makes_resolve_fail_in_its_own_way(text: str) -> None:
    try:
        control(yaml=text)
    except ConfigFaults as caught:
        assert all(one.where.startswith("llorch.yaml:") for one in caught.faults)


# ---------------------------------------------------------------- secrets


@pytest.mark.parametrize(
    ("flags", "env", "yaml", "origin"),
    [
        ({"admin-token-file": "/tok"}, {}, "", "flag --admin-token-file"),
        ({"admin-token": "@/tok"}, {}, "", "flag --admin-token"),
        ({"admin-token": "-"}, {}, "", "flag --admin-token"),
        ({}, {"LLORCH_ADMIN_TOKEN_FILE": "/tok"}, "", "env LLORCH_ADMIN_TOKEN_FILE"),
        ({}, {"LLORCH_ADMIN_TOKEN": "@/tok"}, "", "env LLORCH_ADMIN_TOKEN"),
        ({}, {"LLORCH_ADMIN_TOKEN": ADMIN}, "", "env LLORCH_ADMIN_TOKEN"),
        ({}, {}, "admin-token-file: /tok\n", "llorch.yaml:1"),
        ({}, {}, 'admin-token: "@/tok"\n', "llorch.yaml:1"),
    ],
)
def test_a_secret_comes_from_a_file_standard_input_or_a_variable(
    flags: dict[str, str], env: dict[str, str], yaml: str, origin: str
) -> None:
    got = control(flags, env, yaml, {"/tok": f"{ADMIN}\n", "-": f"{ADMIN}\n"})
    assert (got.settings.admin_token, got.origin["admin-token"]) == (ADMIN, origin)
    assert got.warnings == ()
    assert got.files_read == (("/tok",) if "/tok" in str((flags, env, yaml)) else ())


def test_a_secret_on_the_command_line_works_and_warns() -> None:
    got = control({"admin-token": ADMIN})
    assert got.settings.admin_token == ADMIN
    assert "list of processes" in only_text(got.warnings)
    assert "--admin-token-file" in only_text(got.warnings)


def only_text(texts: Sequence[str]) -> str:
    assert len(texts) == 1, texts
    return texts[0]


@pytest.mark.parametrize(
    "yaml",
    [
        "admin-token: '@'\n",
        f'admin-token: "@/x\\n{ADMIN}"',
        f"admin-token: {ADMIN}\n",
        f"admin-token:\n  - {ADMIN}\n",
        'admin-token: "-"\n',
    ],
)
def test_a_secret_in_a_settings_file_is_refused_with_a_way_out(yaml: str) -> None:
    fault = only(faults(control, yaml=yaml))
    assert (fault.where, fault.key) == ("llorch.yaml:1", "admin-token")
    assert "admin-token-file: PATH" in (fault.hint or "")


def test_a_secret_and_its_file_from_one_source_contradict_and_from_two_the_stronger_wins() -> None:
    fault = only(faults(control, {}, {"LLORCH_ADMIN_TOKEN": ADMIN, "LLORCH_ADMIN_TOKEN_FILE": "/tok"}))
    assert "not both" in (fault.hint or "")
    got = control({"admin-token-file": "/tok"}, {"LLORCH_ADMIN_TOKEN": ADMIN}, contents={"/tok": NODE[::-1]})
    assert got.settings.admin_token == NODE[::-1]
    got = control({}, {"LLORCH_ADMIN_TOKEN": ADMIN}, "admin-token-file: /absent\n")
    assert got.settings.admin_token == ADMIN  # the file that lost is not opened


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (FileNotFoundError(2, "No such file or directory", ADMIN), "No such file or directory"),
        (PermissionError(13, "Permission denied", ADMIN), "Permission denied"),
        (OSError(ADMIN), "OSError"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, ADMIN), "not UTF-8 text"),
        ("", "holds no token"),
        ("# only a comment\n", "holds no token"),
        ("short", "shorter than 32"),
        (f"{API},short", "token 2 is shorter"),
        ("two words of a token that is long enough", "characters that no HTTP header can carry"),
        (f"no/name={ADMIN}", "token 1 has a name"),
    ],
)
def test_a_secret_that_cant_be_used_is_a_fault_that_does_not_quote_it(content: str | Exception, says: str) -> None:
    fault = only(faults(control, {"admin-token-file": "/tok"}, contents={"/tok": content}))
    assert (fault.where, fault.key) == ("flag --admin-token-file", "admin-token-file")
    assert says in fault.message
    assert_hidden([ADMIN, "short,", "no/name"], fault)


def test_standard_input_is_read_once() -> None:
    fault = only(faults(control, {"admin-token": "-", "api-token": "-"}, contents={"-": ADMIN}))
    assert "only once" in fault.message
    got = control({"api-token": "-", "admin-token-file": "/tok"}, contents={"-": API, "/tok": ADMIN})
    assert (got.settings.admin_token, got.settings.api_token) == (ADMIN, API)


def test_lists_names_and_padding_of_tokens_are_accepted() -> None:
    for text in (
        f"{API},{ADMIN}",
        f"ci={API}\n# rotated\nci={ADMIN}\n",
        f"{'Zm9v' * 10}Zg==",
        f"a.b_c-1={API}==",
        f"ci={API}={API}",
    ):
        assert control(env={"LLORCH_API_TOKEN": text}).settings.api_token == text.strip()


def test_short_tokens_are_for_dev() -> None:
    assert only(faults(control, env={"LLORCH_API_TOKEN": "short"})).key == "api-token"
    assert control({"dev": True}, env={"LLORCH_API_TOKEN": "short"}).settings.api_token == "short"


def assert_hidden(secrets: Sequence[str], *things: object) -> None:
    for thing in things:
        for told in (str(thing), repr(thing)):
            for secret in secrets:
                assert secret not in told


def test_nothing_that_can_be_printed_holds_a_secret() -> None:
    env = {"LLORCH_ADMIN_TOKEN": ADMIN}
    pools = f"pools: [{{id: p, engine: simulated, env: {{HF_TOKEN: {NODE[::-1]}}}, args: [--special, {API[::-1]}]}}]\n"
    got = control({}, env)
    on_node = node(yaml=pools)
    assert on_node.settings.pools[0].env == (("HF_TOKEN", NODE[::-1]),)
    secrets = [API, ADMIN, SERVICE, NODE, NODE[::-1], API[::-1]]
    assert_hidden(secrets, got, got.settings, got.origin, got.warnings, show(got), ConfigFile("x", API))
    assert_hidden(secrets, on_node, on_node.settings, show(on_node), on_node.settings.effective_pools())
    assert_hidden(secrets, client(env={"LLORCH_TOKEN": API}), show(client(env={"LLORCH_TOKEN": API})))


@pytest.mark.parametrize(
    ("flags", "env", "yaml"),
    [
        ({"admin-token": "S3CRET" * 4}, {}, ""),
        ({"admin-token": "@" + "S3CRET" * 8}, {}, ""),
        ({"admin-token-file": "S3CRET" * 8}, {}, ""),
        ({"admin-token": "-"}, {}, ""),
        ({"admin-token": ["S3CRET" * 8, "S3CRET"]}, {}, ""),
        ({"admin-token": "é" + "S3CRET" * 8}, {}, ""),
        ({}, {"LLORCH_ADMIN_TOKEN": "S3CRET bad" * 8}, ""),
        ({}, {"LLORCH_ADMIN_TOKEN": "x/y=" + "S3CRET" * 8}, ""),
        ({}, {"LLORCH_ADMIN_TOKEN": "S3CRET" * 200}, ""),
        ({}, {}, "admin-token: " + "S3CRET" * 8),
        ({}, {}, "admin-token: !" + "S3CRET" * 8),
        ({}, {}, "admin-token: !a!" + "S3CRET" * 8),
        ({}, {}, "admin-token: !" + "S3CRET" * 8 + "!x y"),
        ({}, {}, "admin-token: &" + "S3CRET" * 8),
        ({}, {}, "admin-token: *" + "S3CRET" * 8),
        ({}, {}, "admin-token: %" + "S3CRET" * 8),
        ({}, {}, "admin-token: 'S3CRET"),
        ({}, {}, "admin-token: [" + "S3CRET" * 8),
        ({}, {}, 'admin-token: "\\S3CRET"'),
        ({}, {}, "admin-token: {a: " + "S3CRET" * 8 + "}"),
        ({}, {}, "admin_token: " + "S3CRET" * 8),
        ({}, {}, "admin-token: a: " + "S3CRET" * 8),
        ({}, {}, "url: https://user:S3CRET@host"),
        ({}, {}, "model: https://user:S3CRET@host/m.gguf"),
        ({"bind": "x"}, {"LLORCH_ADMIN_TOKEN": "S3CRET" * 8}, ""),
    ],
)
def test_no_fault_holds_a_secret(flags: dict[str, Any], env: dict[str, str], yaml: str) -> None:
    with pytest.raises(ConfigFaults) as caught:
        control(flags, env, yaml, {"-": "S3CRET"})
    assert_hidden(["S3CRET"], caught.value, caught.value.faults, caught.value.to_wire())
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


def test_show_tells_tokens_apart_by_their_fingerprints() -> None:
    rows = {
        name: (value, origin) for name, value, origin in show(control(env={"LLORCH_API_TOKEN": f"ci={API},{ADMIN}"}))
    }
    assert rows["api-token"][0] == f"sha256:{fingerprint(API)}, sha256:{fingerprint(ADMIN)}"
    assert rows["api-token"][1] == "env LLORCH_API_TOKEN"
    assert rows["admin-token"] == ("", "default")
    assert rows["bind"] == ("127.0.0.1:8080", "default")
    assert rows["max-body"][0] == "64MiB"
    assert "dev" not in rows
    assert "api-token-file" not in rows
    rows = {name: (value, origin) for name, value, origin in show(node({"model": "https://h/m.gguf?sig=S3CRET"}))}
    assert rows["model"][0] == "https://h/m.gguf"
    assert rows["engine-cidr"] == ("", "default")


# ---------------------------------------------------------------- cross-checks


def test_a_control_may_start_without_tokens_for_they_can_be_made_later() -> None:
    assert control(base={}).settings.api_token is None


def test_a_broken_token_is_not_also_missing() -> None:
    assert only(faults(control, env={"LLORCH_API_TOKEN": "short"})).where == "env LLORCH_API_TOKEN"
    assert only(faults(node, env={"LLORCH_SERVICE_TOKEN": "short"})).where == "env LLORCH_SERVICE_TOKEN"


def test_a_node_needs_the_token_that_its_control_presents_where_it_gets_no_certificate() -> None:
    fault = only(faults(node, {"join": "http://127.0.0.1:8080"}, {"LLORCH_SERVICE_TOKEN": ""}))
    assert (fault.where, fault.key) == ("missing", "service-token")
    assert node({"join": "https://c:1"}, {"LLORCH_SERVICE_TOKEN": ""}).settings.service_token is None


@pytest.mark.parametrize("run", [control, node])
def test_the_node_token_falls_back_to_the_service_token_with_a_warning(run: Callable[..., Resolved[Any]]) -> None:
    got = run(env={"LLORCH_NODE_TOKEN": ""})
    assert (got.settings.node_token, got.origin["node-token"]) == (SERVICE, "service-token")
    assert "node-token" in only_text(got.warnings)
    assert run().warnings == ()


def test_one_token_in_two_lists_warns() -> None:
    assert "shares a token with api-token" in only_text(control(env={"LLORCH_ADMIN_TOKEN": f"x={API}"}).warnings)
    assert "shares" not in " ".join(control(env={"LLORCH_NODE_TOKEN": ""}).warnings)


@pytest.mark.parametrize("run", [control, node])
def test_a_certificate_needs_its_key_and_the_key_its_certificate(run: Callable[..., Any]) -> None:
    assert only(faults(run, {"tls-cert": "/c"})).message == "needs tls-key too"
    assert only(faults(run, yaml="tls-key: /k\n")).where == "llorch.yaml:1"
    assert run({"tls-cert": "/c", "tls-key": "/k"}).settings.tls_key == "/k"


@pytest.mark.parametrize("run", [control, node])
@pytest.mark.parametrize("bind", ["0.0.0.0:80", "[::]:80", "10.0.0.1:0", "gpu-1:80", "0:80", "[::ffff:10.0.0.1]:1"])
def test_nothing_listens_beyond_loopback_without_tls(run: Callable[..., Any], bind: str) -> None:
    """A control has its authority for that, a node its certificate from it; `llorch dev` has neither."""
    for flags in ({"dev": True, "join": "http://127.0.0.1:1"} if run is node else {"dev": True},):
        fault = only(faults(run, {"bind": bind, **flags}))
        assert fault.key == "bind"
        assert "--tls-cert" in (fault.hint or "")
        assert "127.0.0.1" in (fault.hint or "")
    encrypted = {"join": "https://c:1"} if run is node else {}
    assert str(run({"bind": bind, **encrypted}).settings.bind) == bind
    assert str(run({"bind": bind, "tls-cert": "/c", "tls-key": "/k"}).settings.bind) == bind


@pytest.mark.parametrize("bind", ["127.0.0.1:0", "127.9.9.9:80", "[::1]:80", "localhost:80", "[::ffff:127.0.0.1]:1"])
def test_loopback_needs_no_tls(bind: str) -> None:
    assert control({"bind": bind}).settings.bind.loopback


def test_a_node_is_offline_later_than_after_one_beat() -> None:
    fault = only(faults(control, {"offline-after": "10s"}))
    assert (fault.where, fault.key) == ("flag --offline-after", "offline-after")
    assert only(faults(control, {"heartbeat-interval": "30s"})).where == "flag --heartbeat-interval"
    assert control({"heartbeat-interval": "100ms", "offline-after": "300ms"}).settings.offline_after == 0.3


def test_a_node_needs_someone_to_join() -> None:
    fault = only(faults(node, env={"LLORCH_JOIN": ""}))
    assert (fault.where, fault.key) == ("missing", "join")


def test_tokens_do_not_cross_a_network_unencrypted() -> None:
    assert only(faults(node, {"join": "https://a:1,http://b:2"})).hint == "use https://"
    assert only(faults(node, {"address": "http://10.0.0.1:9200"})).key == "address"
    assert node(
        {"join": "http://localhost:1,http://[::1]:2,https://b:3", "address": "http://127.0.0.1:5"}
    ).settings.join
    assert "unencrypted" in only_text(client({"url": "http://far:1"}, {"LLORCH_TOKEN": API}).warnings)
    assert client({"url": "http://far:1"}).warnings == ()
    assert client({"url": "https://far:1"}, {"LLORCH_TOKEN": API}).warnings == ()


def test_all_logs_together_hold_at_least_one() -> None:
    assert only(faults(node, {"log-limit": "512MiB"})).where == "flag --log-limit"
    assert only(faults(node, {"logs-limit": "1MiB"})).where == "flag --logs-limit"
    assert node({"logs-limit": "4MiB"}).settings.logs_limit == 4 * 2**20


def test_an_external_engine_is_on_this_machine_or_in_a_network_that_was_named() -> None:
    assert only(faults(node, {"engine": "external"})).key == "engine"
    near = node({"engine": "external", "engine-url": "http://127.0.0.1:8000"}).settings.effective_pools()
    assert near == (PoolSpec(id="default", engine="external", url="http://127.0.0.1:8000"),)
    away = {"engine": "external", "engine-url": "http://10.1.2.3:8000"}
    assert only(faults(node, away)).key == "engine-url"
    assert only(faults(node, {**away, "engine-cidr": "192.168.0.0/16"})).key == "engine-url"
    assert node({**away, "engine-cidr": "10.0.0.0/8"}).settings.engine_cidr == (ipaddress.ip_network("10.0.0.0/8"),)
    pools = "pools: [{id: x, engine: external, url: 'http://vllm:8000'}]\n"
    assert only(faults(node, yaml=pools)).where == "llorch.yaml:1"
    assert node({"engine-cidr": "10.0.0.0/8"}, yaml=pools).settings.pools[0].url == "http://vllm:8000"
    assert "no effect" in only_text(node({"engine-url": "http://127.0.0.1:1"}).warnings)


def test_the_shorthand_makes_a_pool_in_front_of_the_others() -> None:
    flags = {"model": "demo", "engine": "llamacpp", "slots": "2", "ctx": "512", "gpus": "1", "engine-arg": "--x 1"}
    got = node(flags, yaml="pools: [{id: more}]\n").settings.effective_pools()
    first = PoolSpec(id="default", engine="llamacpp", model="demo", slots=2, ctx=512, gpus=(1,), args=("--x", "1"))
    assert got == (first, PoolSpec(id="more"))
    assert node(yaml="pools: [{id: default}]\n").settings.effective_pools() == (PoolSpec(id="default"),)
    assert node().settings.effective_pools() == ()
    assert node({"model": "demo"}).settings.effective_pools() == (PoolSpec(id="default", model="demo"),)
    assert node({"engine": "simulated"}).settings.effective_pools() == (PoolSpec(id="default", engine="simulated"),)
    assert only(faults(node, flags, yaml="\npools: [{id: default}]\n")).where == "llorch.yaml:2"
    assert "slots: has no effect" in only_text(node({"slots": "2"}).warnings)


# ---------------------------------------------------------------- pools


def test_a_pool_may_say_everything() -> None:
    yaml = (
        "pools:\n"
        "  - id: chat\n    engine: external\n    model: hf:org/repo:Q4_K_M\n    gpus: [0, 1]\n    slots: 8\n"
        "    ctx: 8192\n"
        "    args: [--flag, two words, 3]\n    env: {A: 1, B_C: 'x y', D: ''}\n    replicas: 2\n"
        "    url: http://127.0.0.1:8000/\n    api_key_file: /key\n    models: [demo]\n    idle_unload_s: 60\n"
        "  - {id: plain}\n"
    )
    full, plain = node(yaml=yaml).settings.pools
    assert full == PoolSpec(
        id="chat", engine="external", model="hf:org/repo:Q4_K_M", gpus=(0, 1), slots=8, ctx=8192,
        args=("--flag", "two words", "3"), env=(("A", "1"), ("B_C", "x y"), ("D", "")), replicas=2,
        url="http://127.0.0.1:8000", api_key_file="/key", models=("demo",), idle_unload_s=60.0,
    )  # fmt: skip
    assert plain == PoolSpec(id="plain", slots=4, ctx=4096, replicas=1)
    assert set(FIELDS) == {field.name for field in dataclasses.fields(PoolSpec)}


@pytest.mark.parametrize(
    ("pool", "key", "says"),
    [
        ("{}", "pools[0]", "needs an id"),
        ("{id: a/b}", "pools[0].id", "not a valid pool id"),
        ("{id: -a}", "pools[0].id", "not a valid pool id"),
        (f"{{id: {'x' * 65}}}", "pools[0].id", "not a valid pool id"),
        ("{id: a, slots: 0}", "pools[0].slots", "out of range"),
        ("{id: a, ctx: 1}", "pools[0].ctx", "out of range"),
        ("{id: a, replicas: 0}", "pools[0].replicas", "out of range"),
        ("{id: a, gpus: [x]}", "pools[0].gpus", "not a whole number"),
        ("{id: a, model: ../x}", "pools[0].model", "not a model reference"),
        ("{id: a, env: [A]}", "env", "expected NAME: value lines"),
        ("{id: a, env: {1A: x}}", "env", "not a valid environment name"),
        ("{id: a, env: {A: ~}}", "env.A", "has no value"),
        ("{id: a, env: {A: [x]}}", "env.A", "is a list"),
        ("{id: a, args: {a: 1}}", "pools[0].args", "is a mapping"),
        ("{id: a, engine: external}", "pools[0].url", "needs a url"),
        ("{id: a, url: 'http://127.0.0.1:1'}", "pools[0].url", "only an external engine"),
        ("{id: a, id: b}", "id", "given twice"),
        ("{id: a, hours: 9-17}", "pools[0].hours", "neither days nor hours"),
        ("{id: a, vram: 3}", "pools[0]", "not a field of a pool"),
    ],
)
def test_a_pool_with_a_fault_is_refused_at_its_line(pool: str, key: str, says: str) -> None:
    fault = only(faults(node, yaml=f"pools:\n\n  - {pool}\n"))
    assert (fault.where, fault.key) == ("llorch.yaml:3", key)
    assert says in fault.message


def test_all_faults_of_all_pools_are_told_at_once() -> None:
    yaml = "pools:\n  - slots: x\n    ctx: y\n  - id: a\n  - id: a\n  - {id: b, engine: external, slots: z}\n"
    found = faults(node, yaml=yaml)
    assert [(one.where, one.key) for one in found] == [
        ("llorch.yaml:2", "pools[0].slots"), ("llorch.yaml:2", "pools[0]"), ("llorch.yaml:3", "pools[0].ctx"),
        ("llorch.yaml:5", "pools[2]"), ("llorch.yaml:6", "pools[3].slots"), ("llorch.yaml:6", "pools[3].url"),
    ]  # fmt: skip


def test_a_node_has_no_more_pools_than_a_registration_carries() -> None:
    ids = [f"p{place}" for place in range(MAX_POOLS)]
    messages.parse(messages.Register, {"node_id": "n", "address": "x:1", "pools": ids})
    with pytest.raises(LlorchError):
        messages.parse(messages.Register, {"node_id": "n", "address": "x:1", "pools": [*ids, "more"]})
    lines = [f"  - {{id: {pool_id}}}\n" for pool_id in ids]
    assert len(node(yaml="pools:\n" + "".join(lines)).settings.pools) == MAX_POOLS
    fault = only(faults(node, yaml="pools:\n" + "".join(lines) + "  - {id: more}\n"))
    assert (fault.where, fault.key) == (f"llorch.yaml:{MAX_POOLS + 2}", "pools")


# ---------------------------------------------------------------- clients


def test_a_client_takes_its_own_token_and_else_the_first_of_the_controls() -> None:
    both = {"LLORCH_TOKEN": NODE, "LLORCH_API_TOKEN": f"ci={API},{ADMIN}"}
    assert client(env=both).settings.token == NODE
    del both["LLORCH_TOKEN"]
    got = client(env=both)
    assert (got.settings.token, got.origin["token"]) == (API, "env LLORCH_API_TOKEN")
    assert client(env={"LLORCH_API_TOKEN": "@/tok"}, contents={"/tok": f"{ADMIN}\n"}).settings.token == ADMIN
    assert client({"token-file": "/tok"}, both, {"/tok": NODE}).settings.token == NODE
    assert client(env={"LLORCH_TOKEN": "short"}).settings.token == "short"
    assert client().settings.token is None
    assert client(env={"LLORCH_URL": "https://c.example/"}).settings.url == "https://c.example"


def test_a_clients_token_is_one_token() -> None:
    for bad in ("two words", "a\nb", "é"):
        fault = only(faults(client, env={"LLORCH_TOKEN": bad, "LLORCH_API_TOKEN": API}))
        assert (fault.where, fault.key) == ("env LLORCH_TOKEN", "token")
    assert only(faults(client, env={"LLORCH_API_TOKEN": "two words"})).where == "env LLORCH_API_TOKEN"


# ---------------------------------------------------------------- kinds


def refuses(kind: Kind[Any], text: str) -> BadValue:
    with pytest.raises(BadValue) as caught:
        kind.parse(text)
    return caught.value


DURATION = kinds.duration("0s", "365d")
SIZE = kinds.byte_size("0", "1024TiB")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("10s", 10),
        ("250ms", 0.25),
        ("5m", 300),
        ("1h", 3600),
        ("2d", 172800),
        ("7", 7),
        ("1.5", 1.5),
        ("0.5h", 1800),
        ("0", 0),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    assert DURATION.parse(text) == seconds


@pytest.mark.parametrize("text", ["", "s", "-1s", "1y", "1e9", "nan", "inf", "1 0s", "10 seconds", "١s", "9" * 20])
def test_what_is_no_duration(text: str) -> None:
    refuses(DURATION, text)


def test_a_range_is_told_in_the_units_of_its_setting() -> None:
    assert refuses(kinds.duration("50ms", "10m"), "1ms").hint == "from 50ms to 10m"
    assert refuses(kinds.duration("50ms", "10m"), "11m").message == "11m is out of range"
    assert refuses(kinds.byte_size("1KiB", "1GiB"), "2GiB").hint == "from 1KiB to 1GiB"
    assert refuses(kinds.integer(1, 4), "5").hint == "from 1 to 4"
    assert refuses(kinds.number(0.5, 2), "3").hint == "from 0.5 to 2"


@pytest.mark.parametrize(
    ("text", "size"),
    [("64MiB", 2**26), ("64 mib", 2**26), ("1k", 1024), ("1KB", 1000), ("1.5GiB", 3 * 2**29), ("12", 12), ("12B", 12)],
)
def test_byte_sizes(text: str, size: int) -> None:
    assert SIZE.parse(text) == size


@pytest.mark.parametrize("text", ["", "MiB", "-1", "1 PiB", "1e3", "1..5k", "9" * 16])
def test_what_is_no_byte_size(text: str) -> None:
    refuses(SIZE, text)


def test_units_are_the_largest_that_divide() -> None:
    assert [DURATION.show(one) for one in (0, 0.25, 90, 300, 7200, 86400)] == ["0s", "250ms", "90s", "5m", "2h", "1d"]
    assert [SIZE.show(one) for one in (0, 1000, 1024, 3 << 29)] == ["0B", "1000B", "1KiB", "1536MiB"]


@given(st.integers(0, 10**10))
def test_a_duration_reads_as_it_is_shown(millis: int) -> None:
    assert DURATION.parse(DURATION.show(millis / 1000)) == millis / 1000


@given(st.integers(0, 2**50))
def test_a_size_reads_as_it_is_shown(size: int) -> None:
    assert SIZE.parse(SIZE.show(size)) == size


@given(st.integers(0, 2**128 - 1) | st.integers(0, 2**32 - 1).map(lambda n: -n - 1), st.integers(0, 65535))
def test_an_address_reads_as_it_is_shown(number: int, port: int) -> None:
    host = str(ipaddress.IPv6Address(number)) if number >= 0 else str(ipaddress.IPv4Address(-number - 1))
    assert kinds.HOST_PORT.parse(str(HostPort(host, port))) == HostPort(host, port)


@given(st.lists(st.integers(0, 255), min_size=1, unique=True).map(tuple))
def test_a_list_reads_as_it_is_shown(gpus: tuple[int, ...]) -> None:
    assert kinds.GPUS.parse(kinds.GPUS.show(gpus)) == gpus


@given(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))).map(tuple))
def test_arguments_read_as_they_are_shown(arguments: tuple[str, ...]) -> None:
    assume(all(why_not_arg(word) is None for word in arguments))
    assert kinds.ARGUMENTS.parse(kinds.ARGUMENTS.show(arguments)) == arguments


@given(st.text(max_size=40))
def test_a_parser_refuses_in_one_way_only(text: str) -> None:
    for kind in {id(one.kind): one.kind for one in SETTINGS}.values():
        try:
            kind.parse(text)
        except BadValue as bad:
            assert "\n" not in bad.message
            assert len(bad.message) < 300


@pytest.mark.parametrize("text", ["8080", ":8080", "host", "host:", "host:x", "host:65536", "::1:80", "[::1]",
                                  "[x]:1", "a b:1", "-a:1", "http://a:1", "a:1:2", "[127.0.0.1]:1", "x:-1",
                                  f"{'a' * 64}:1"])  # fmt: skip
def test_what_is_no_address(text: str) -> None:
    refuses(kinds.HOST_PORT, text)


def test_an_address_without_brackets_is_told_how_to_write_it() -> None:
    assert refuses(kinds.HOST_PORT, "::1:80").hint == "write [::1]:80"


@pytest.mark.parametrize("text", ["", "c:1", "//c:1", "ftp://c", "http://", "https://c:0", "https://c:99999", "https://c:x",
                                  "https://[::1", "https://u:p@c", "https://c d", "https://c\n", "https://c/?a=1",
                                  "https://c/#a", "https://c/é", "https://-c"])  # fmt: skip
def test_what_is_no_url(text: str) -> None:
    refuses(kinds.URL, text)


def test_urls_lose_their_last_slash() -> None:
    assert kinds.URLS.parse("https://c:1/, http://[::1]:2/llorch/,") == ("https://c:1", "http://[::1]:2/llorch")
    assert refuses(kinds.URLS, "https://c/,https://c").message == "https://c is given twice"


def test_networks() -> None:
    assert kinds.CIDRS.parse("10.0.0.0/8,fd00::/8,192.168.1.2") == tuple(
        map(ipaddress.ip_network, ("10.0.0.0/8", "fd00::/8", "192.168.1.2/32"))
    )
    assert refuses(kinds.CIDRS, "10.1.0.0/8").hint == "did you mean 10.0.0.0/8?"
    refuses(kinds.CIDRS, "10.0.0.0/33")


@pytest.mark.parametrize("text", ["demo", "file:/m/a b.gguf", "hf:org/repo", "hf:org/repo:Q4_K_M", "hf:o/r/sub/f.gguf",
                                  "https://h/x.gguf?download=true", "llama-3-8b", "org/model:tag@1"])  # fmt: skip
def test_model_references(text: str) -> None:
    assert kinds.MODEL_REF.parse(text) == text


@pytest.mark.parametrize("text", ["", "/abs.gguf", "./x.gguf", "~/x.gguf", "file:x", "file://h/x", "file:/a\nb",
                                  "hf:repo", "hf:o/r:", "hf:o/../r", "http://h/x.gguf", "https://u:p@h/x",
                                  "a..b", "-a", "a b", "x" * 129, "hf:o/r/../x"])  # fmt: skip
def test_what_is_no_model_reference(text: str) -> None:
    refuses(kinds.MODEL_REF, text)


@pytest.mark.parametrize("text", ["", "-a", ".a", "a b", "a/b", "x" * 64, "é"])
def test_what_is_no_node_id(text: str) -> None:
    assert faults(node, {"node-id": text})
    assert node({"node-id": "x" * 63}).settings.node_id == "x" * 63


def test_truth_has_four_words_each_way() -> None:
    assert [kinds.BOOL.parse(word) for word in ("true", "YES", "on", "1")] == [True] * 4
    assert [kinds.BOOL.parse(word) for word in ("false", "No", "off", "0")] == [False] * 4
    refuses(kinds.BOOL, "")


def test_a_word_that_is_not_a_choice_gets_the_closest() -> None:
    assert refuses(ENGINE, "llama-cpp").hint == "did you mean llamacpp?"
    assert refuses(kinds.choice("info", "warning"), "WARN").hint == "did you mean warning?"
    refuses(ENGINE, "tgi")


def test_a_path_is_one_line_of_text() -> None:
    assert kinds.PATH.parse("~/a b") == "~/a b"
    for bad in ("", " ", "a\0b", "a\nb", "a\x7fb"):
        refuses(kinds.PATH, bad)


def test_a_long_value_is_quoted_short_and_on_one_line() -> None:
    message = only(faults(control, {"log-level": "x\n" * 500})).message
    assert len(message) < 200
    assert "\n" not in message


# ---------------------------------------------------------------- what is made of the registry


def uncommented(text: str) -> str:
    return re.sub(r"^#(?=[a-z])", "", text, flags=re.MULTILINE)


@pytest.mark.parametrize("cls", [ControlSettings, NodeSettings, ClientSettings])
def test_the_example_file_passes_once_uncommented(cls: type[RoleSettings]) -> None:
    text = uncommented(example_yaml(cls))
    keys = {one.name for one in settings_for(cls) if one.in_yaml and not one.secret}
    assert {entry.key for entry in read_yaml(text)[0].entries} == keys
    tokens = {
        f"/etc/llorch/{name}-token": digit * 40
        for name, digit in zip(("api", "admin", "service", "node"), "abcd", strict=True)
    }
    for name in ("token", "ca-passphrase", "join-token"):
        tokens[f"/etc/llorch/{name}"] = API
    got: Resolved[Any] = _resolve(cls, {}, {}, text, tokens)
    for one in settings_for(cls):
        if one.default and one.in_yaml:
            assert getattr(got.settings, one.field) == getattr(cls(), one.field), one.name
    assert _resolve(cls, {}, {**CONTROL_ENV, **NODE_ENV}, example_yaml(cls), {}).settings  # as it is, all comments


def test_the_schema_names_every_setting_of_a_file_and_no_other() -> None:
    schema = json_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["additionalProperties"] is False
    assert set(schema["properties"]) == {one.name for one in SETTINGS if one.in_yaml and not one.hidden}
    assert all(one["description"] for one in schema["properties"].values())
    assert schema["properties"]["bind"]["description"].count("Default:") == 2
    assert schema["properties"]["api-token"]["pattern"] == "^@.+"
    pool = schema["properties"]["pools"]["items"]
    assert (set(pool["properties"]), pool["required"], pool["additionalProperties"]) == (set(FIELDS), ["id"], False)
    assert json.loads(json.dumps(schema)) == schema
    assert {"integer", "array"} <= {one.get("type") for one in schema["properties"]["gpus"]["anyOf"]}


def fits(value: str, schema: Mapping[str, Any]) -> bool:
    """Whether a text value fits; enough of JSON Schema for the patterns to be tested against the parsers."""
    if "anyOf" in schema:
        return any(fits(value, one) for one in schema["anyOf"])
    if "enum" in schema:
        return value in schema["enum"]
    if "string" not in str(schema["type"]):
        return False
    return re.search(schema.get("pattern", ""), value) is not None and len(value) >= schema.get("minLength", 0)


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("bind", ["127.0.0.1:8080", "[::1]:0", "host:1"], ["8080", "::1:80"]),
        ("queue-timeout", ["10s", "1.5h", "7"], ["10 parsecs", "-1s"]),
        ("max-body", ["64MiB", "1 kb", "12"], ["1PiB", "-1"]),
        ("url", ["https://c:1"], ["c:1", "https://u@c"]),
        ("log-level", ["info"], ["loud"]),
        ("node-id", ["gpu-1"], ["-a", "a b"]),
        ("api-token", ["@/etc/x"], [API]),
    ],
)
def test_the_schema_agrees_with_the_parsers(name: str, good: list[str], bad: list[str]) -> None:
    schema = json_schema()["properties"][name]
    assert [fits(one, schema) for one in good + bad] == [True] * len(good) + [False] * len(bad)


def test_the_table_for_the_docs_has_every_setting() -> None:
    lines = settings_markdown().splitlines()
    assert any(line.startswith("| `--queue-limit` | control |  | `LLORCH_QUEUE_LIMIT` | Tasks") for line in lines)
    assert any(line.startswith("| `pools:` (YAML only) | node |  |  | Pools") for line in lines)
    assert any(line.endswith("One of debug, info, warning, error. |") for line in lines)
    assert "Not set by default.\n#tls-cert: /etc/llorch/tls.crt\n" in example_yaml(ControlSettings)
    assert "Default: 256MiB.\n#queue-body-limit: 256MiB\n" in example_yaml(ControlSettings)
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 6 for line in lines)
    for setting in SETTINGS:
        if not setting.hidden:
            assert sum(f"`{name}`" in line for line in lines for name in setting.env[:1]) >= bool(setting.env)
            assert any(setting.name in line and setting.doc.replace("|", "\\|") in line for line in lines)


# ---------------------------------------------------------------- what a pool may give its engine


@pytest.mark.parametrize(
    "word",
    ["--host", "--api-key=k3y", "--api_key", "--ssl-key-file", "--path", "--props", "--tools", "--slot-save-path", "-v",
     "--media-path", "--log-file", "-np", "-c"],
)  # fmt: skip
def test_an_argument_that_llorch_rests_on_is_refused_where_it_stands_with_the_reason(word: str) -> None:
    fault = only(faults(node, yaml=f"pools:\n  - id: a\n    args:\n      - --flash-attn\n      - {word}\n"))
    assert (fault.where, fault.key) == ("llorch.yaml:5", "pools[0].args")
    flag = word.partition("=")[0]
    assert fault.message.startswith(f"{flag} can't be given to an engine: ") and "k3y" not in fault.message
    assert only(faults(node, yaml=f"pools: [{{id: a, args: '--x 1 {word}'}}]\n")).message == fault.message
    flagged = only(faults(node, {"model": "demo", "engine-arg": [f"--x {word}"]}))
    assert flagged.message.endswith(fault.message) or fault.message in flagged.message


@pytest.mark.parametrize("name", ["LLAMA_ARG_HOST", "LLAMA_API_KEY", "LLORCH_ADMIN_TOKEN"])
def test_an_environment_name_that_says_the_same_is_refused_too(name: str) -> None:
    fault = only(faults(node, yaml=f"pools:\n  - id: a\n    env:\n      HF_HOME: /x\n      {name}: k3y\n"))
    assert fault.where == "llorch.yaml:5" and fault.message.startswith(f"{name} can't be given to an engine: ")
    assert "k3y" not in fault.message


@pytest.mark.parametrize(
    ("engine", "word"),
    [("vllm", "--uds"), ("vllm", "--middleware=x"), ("vllm", "--max_num_seqs"), ("vllm", "--enable-log-req"),
     ("sglang", "--admin-api-key"), ("sglang", "--log-level"), ("sglang", "--context-length")],
)  # fmt: skip
def test_each_engine_has_flags_of_its_own_that_a_pool_may_not_give(engine: str, word: str) -> None:
    text = f"pools:\n  - id: a\n    args:\n      - --dtype\n      - {word}\n    engine: {engine}\n"
    fault = only(faults(node, yaml=text))
    assert (fault.where, fault.key) == ("llorch.yaml:5", "pools[0].args")
    assert fault.message.startswith(f"{word.partition('=')[0]} can't be given to an engine: ")
    other = {"vllm": "sglang", "sglang": "vllm"}[engine]
    node(yaml=text.replace(engine, other))  # where it means nothing, or something else


def test_what_is_llama_cpps_own_may_mean_something_else_to_another_engine() -> None:
    assert only(faults(node, yaml="pools: [{id: a, args: [-c, '1']}]\n")).message.startswith("-c can't")
    node(yaml="pools: [{id: a, engine: vllm, model: 'hf:a/b', args: [-c, '1']}]\n")


def test_a_command_may_hold_every_flag_and_knows_its_placeholders() -> None:
    words = "[/opt/e, --host, 127.0.0.1, --port, '{port}', --api-key-file, '{key_file}', '{\"a\": 1}', '{model}']"
    pool = f"{{id: a, engine: command, model: demo, command: {words}, engine_model: 'x:1b'}}"
    (made,) = node(yaml=f"pools: [{pool}]\n").settings.pools
    assert made.command[4] == "{port}" and made.command[7] == '{"a": 1}' and made.engine_model == "x:1b"


@pytest.mark.parametrize(
    ("pool", "why", "field"),
    [
        ("engine: command", "engine command needs a command", "command"),
        ("engine: command, command: []", "engine command needs a command", "command"),
        ("engine: command, command: [/opt/e]", "does not say where to listen", "command"),
        ("engine: command, command: '/opt/e {port} {prot}'", "{prot} stands for nothing", "command"),
        ("engine: command, command: '/opt/e {port} {model}'", "has {model}, and the pool no model", "model"),
        ("engine: command, command: '/opt/e {port}', args: [x]", "engine command has no args", "args"),
        ("engine: vllm, command: '/opt/e {port}'", "only engine command has a command", "command"),
        ("engine: vllm, engine_model: x", "has an engine_model", "engine_model"),
        ("engine: external, url: 'http://127.0.0.1:1', engine_model: 'a b'", "", "engine_model"),
    ],
)
def test_a_command_that_cannot_work_is_refused_where_it_stands(pool: str, why: str, field: str) -> None:
    fault = only(faults(node, yaml=f"pools:\n  - {{id: a, {pool}}}\n"))
    assert (fault.where, fault.key) == ("llorch.yaml:2", f"pools[0].{field}") and why in fault.message
    assert fault.hint
