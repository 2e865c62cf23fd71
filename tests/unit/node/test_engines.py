"""How engines are started, and which one `auto` means."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llorch.config_engine_args import RESERVED, RESERVED_OF
from llorch.config_pools import PoolSpec
from llorch.errors import ConfigError
from llorch.messages import model_id_ok
from llorch.node.engines import llamacpp_server
from llorch.node.engines.auto import ENGINES, EngineFacts, choose, engine, wants_model
from llorch.node.engines.command import Command
from llorch.node.engines.environment import for_engine
from llorch.node.engines.external import External
from llorch.node.engines.llama_server import LlamaServer
from llorch.node.engines.llamacpp import LlamaCpp
from llorch.node.engines.sglang import START, Sglang
from llorch.node.engines.simulated import Simulated
from llorch.node.engines.spec import Engine, Launch
from llorch.node.engines.vllm import Vllm
from llorch.node.modelref import model_id
from llorch.node.plans import Plan, plan_pool

SPEC = PoolSpec(id="p", engine="llama-server", model="demo", slots=3, ctx=1000, args=("--flash-attn", "on"))
SERVER = LlamaServer("/usr/bin/llama-server", "b9000")


def start(made: Engine, spec: PoolSpec = SPEC) -> Launch:
    return made.launch(spec, model_id="m", port=4321, key_file="/run/key", model_path="/models/m.gguf")


def value(launch: Launch, flag: str) -> str:
    return launch.argv[launch.argv.index(flag) + 1]


@pytest.mark.parametrize("made", [SERVER, LlamaCpp("/usr/bin/python"), Simulated("/usr/bin/python")])
def test_every_engine_listens_on_loopback_behind_a_key_that_is_not_in_argv(made: Engine) -> None:
    launch = start(made)
    assert value(launch, "--host") == "127.0.0.1" and value(launch, "--port") == "4321"
    assert value(launch, "--api-key-file") == "/run/key" and "--api-key" not in launch.argv
    assert value(launch, "--alias") == "m" and value(launch, "--parallel") == "3"
    assert value(launch, "--ctx-size") == "3000", "the context is divided between the slots"
    assert launch.argv.index("--flash-attn") < launch.argv.index("--host"), "of two of a kind the last one counts"


@pytest.mark.parametrize("made", [SERVER, LlamaCpp("/usr/bin/python")])
def test_no_state_is_shared_between_requests_through_the_ram_cache(made: Engine) -> None:
    launch = start(made)
    assert value(launch, "--cache-ram") == "0"
    assert "--no-cache-idle-slots" in launch.argv and "--no-webui" in launch.argv
    assert value(launch, "--model") == "/models/m.gguf"


def test_flags_that_an_older_build_does_not_know_are_left_out() -> None:
    launch = start(replace(SERVER, flags=frozenset({"--no-webui"})))
    assert "--no-webui" in launch.argv and "--cache-ram" not in launch.argv


def test_of_the_embedded_engines_defaults_none_that_shares_or_opens_anything_is_left(tmp_path: Path) -> None:
    """The parameters that its flags become; the first six are llama.cpp's own defaults."""
    opens = {"cors_origins": "*", "cors_credentials": True, "ui": True, "endpoint_slots": True}
    shares = {"cache_ram_mib": 8192, "cache_idle_slots": True}
    library = SimpleNamespace(CommonParams=lambda: SimpleNamespace(model=SimpleNamespace(path=""), **opens, **shares))
    key_file = tmp_path / "key"
    key_file.write_text("a key\n")
    launch = LlamaCpp("/usr/bin/python").launch(
        replace(SPEC, gpus=(0,), args=()), model_id="m", port=4321, key_file=str(key_file), model_path="/models/m.gguf"
    )
    made = vars(llamacpp_server.build(library, llamacpp_server.parse(launch.argv[3:])))
    assert made.pop("model").path == "/models/m.gguf"
    assert made == {
        "cors_origins": "", "cors_credentials": False, "ui": False, "endpoint_slots": False,
        "cache_ram_mib": 0, "cache_idle_slots": False, "endpoint_metrics": True,
        "hostnames": ["127.0.0.1"], "port": 4321, "api_keys": ["a key"], "model_alias": {"m"},
        "n_parallel": 3, "n_ctx": 3000, "n_gpu_layers": 999, "verbosity": llamacpp_server.ERRORS_ONLY,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("gpus", "layers", "visible"), [(None, None, None), ((), "0", ""), ((1,), "999", "1"), ((0, 2), "999", "0,2")]
)
def test_the_gpus_of_a_pool_are_the_ones_its_engine_sees(gpus: Any, layers: str | None, visible: str | None) -> None:
    launch = start(SERVER, replace(SPEC, gpus=gpus))
    assert launch.env.get("CUDA_VISIBLE_DEVICES") == visible
    assert (value(launch, "--n-gpu-layers") if layers else None) == layers
    assert ("--n-gpu-layers" in launch.argv) is (layers is not None)


@pytest.mark.parametrize("flag", sorted(RESERVED))
@pytest.mark.parametrize("made", [SERVER, LlamaCpp("/usr/bin/python"), Simulated("/usr/bin/python")])
def test_what_llorch_rests_on_cannot_be_changed_by_args(made: Engine, flag: str) -> None:
    written = [flag] if not flag.startswith("--") else [flag, "--" + flag[2:].replace("-", "_")]
    for args in ((word, "x") for word in written), ((f"{word}=x",) for word in written):
        for words in args:
            with pytest.raises(ConfigError, match="can't be given to an engine") as caught:
                start(made, replace(SPEC, args=words))
            assert "=x" not in caught.value.message


def test_what_slots_do_is_told_by_an_engine_only_where_a_pool_says_so() -> None:
    assert "--no-slots" in start(SERVER).argv
    argv = start(SERVER, replace(SPEC, args=("--slots",))).argv
    assert argv.index("--no-slots") < argv.index("--slots")


def test_an_engine_sees_of_our_environment_what_it_needs_and_nothing_else() -> None:
    needed = {
        "PATH": "/bin", "HOME": "/root", "LANG": "C.UTF-8", "LC_ALL": "C", "TMPDIR": "/t", "LD_LIBRARY_PATH": "/l",
        "CUDA_VISIBLE_DEVICES": "1", "NVIDIA_VISIBLE_DEVICES": "all", "HIP_VISIBLE_DEVICES": "0", "HF_HOME": "/hf",
        "HSA_OVERRIDE_GFX_VERSION": "10.3.0", "ROCR_VISIBLE_DEVICES": "0", "GGML_CUDA_ENABLE_UNIFIED_MEMORY": "1",
        "OMP_NUM_THREADS": "4", "XDG_CACHE_HOME": "/c", "PYTHONPATH": "/p",
    }  # fmt: skip
    kept_back = (
        "LLORCH_ADMIN_TOKEN", "LLORCH_SERVICE_TOKEN_FILE", "ORCHESTRATORD_TLS_KEY", "POOL_MANAGERD_TLS_KEY",
        "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "GOOGLE_APPLICATION_CREDENTIALS", "AZURE_CLIENT_SECRET",
        "SSH_AUTH_SOCK", "GITHUB_TOKEN", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "OPENAI_API_KEY", "NVIDIA_API_KEY",
        "CUDA_TOKEN", "GGML_PASSWORD", "http_proxy", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "LD_PRELOAD", "LD_AUDIT",
        "LLAMA_ARG_HOST", "LLAMA_API_KEY", "NOTIFY_SOCKET", "KUBERNETES_SERVICE_HOST", "DBUS_SESSION_BUS_ADDRESS",
        "XDG_RUNTIME_DIR", "PYTHONSTARTUP", "PYTHONBREAKPOINT", "KUBECONFIG", "DATABASE_URL", "path", "",
    )  # fmt: skip
    assert for_engine(needed | dict.fromkeys(kept_back, "x")) == needed


# ---------------------------------------------------------------- vllm, sglang, a command of one's own

VLLM = Vllm(("/opt/vllm/bin/vllm",), "0.33.0")
SGLANG = Sglang("/opt/sglang/bin/python", "0.5.23")
PLAIN = replace(SPEC, engine="vllm", args=())


def test_vllm_is_started_as_its_documentation_has_it() -> None:
    launch = start(VLLM, replace(PLAIN, gpus=(1, 3), args=("--dtype", "half")))
    assert launch.argv[:3] == ("/opt/vllm/bin/vllm", "serve", "/models/m.gguf")
    assert value(launch, "--host") == "127.0.0.1" and value(launch, "--port") == "4321"
    assert value(launch, "--served-model-name") == "m"
    assert (value(launch, "--max-num-seqs"), value(launch, "--max-model-len")) == ("3", "1000"), "ctx is for a sequence"
    assert value(launch, "--tensor-parallel-size") == "2" and launch.env["CUDA_VISIBLE_DEVICES"] == "1,3"
    assert launch.argv.index("--dtype") < launch.argv.index("--host")
    assert launch.key_env == "VLLM_API_KEY" and "/run/key" not in launch.argv
    assert launch.env["VLLM_NO_USAGE_STATS"] == "1", "it would tell its makers where it runs"


@pytest.mark.parametrize("made", [VLLM, SGLANG])
@pytest.mark.parametrize("gpus", [None, (), (0,)])
def test_a_model_on_one_gpu_or_none_is_not_split(made: Engine, gpus: Any) -> None:
    assert "--tensor-parallel-size" not in start(made, replace(PLAIN, gpus=gpus)).argv


@pytest.mark.parametrize(
    ("version", "said"), [("0.9.2", True), ("0.10.0", False), ("1.0", False), (None, False), ("unknown", False)]
)
def test_a_vllm_that_would_log_every_prompt_is_told_not_to(version: str | None, said: bool) -> None:
    assert ("--disable-log-requests" in start(replace(VLLM, version=version), PLAIN).argv) is said


def test_sglang_is_started_as_its_documentation_has_it() -> None:
    launch = start(SGLANG, replace(PLAIN, gpus=(0, 1)))
    assert launch.argv[:3] == ("/opt/sglang/bin/python", "-c", START)
    assert value(launch, "--model-path") == "/models/m.gguf" and value(launch, "--served-model-name") == "m"
    assert (value(launch, "--max-running-requests"), value(launch, "--context-length")) == ("3", "1000")
    assert value(launch, "--tensor-parallel-size") == "2" and "--enable-metrics" in launch.argv
    assert value(launch, "--log-level") == "warning", "below it the key is in its log"
    assert launch.key_env is not None and launch.key_env in START and "--api-key" not in launch.argv


@pytest.mark.parametrize(("made", "name"), [(VLLM, "vllm"), (SGLANG, "sglang")])
def test_what_llorch_rests_on_cannot_be_changed_by_their_args_nor_by_a_flags_beginning(made: Engine, name: str) -> None:
    for flag in RESERVED_OF[name]:
        written = {flag, f"{flag}=x", flag.replace("_", "-")}
        if flag.startswith("--"):
            written |= {"--" + flag[2:].replace("-", "_"), flag[:-1]}
        for word in written:
            with pytest.raises(ConfigError, match="can't be given to an engine"):
                start(made, replace(PLAIN, args=(word, "x")))
    start(made, replace(PLAIN, args=("--trust-remote-code", "--dtype", "half", "-c", "--", "a=b", "x")))


@pytest.mark.parametrize("made", [VLLM, SGLANG])
@pytest.mark.parametrize("path", [None, "", "-O3", "--api-key=x"])
def test_a_model_that_would_be_a_flag_is_refused(made: Engine, path: str | None) -> None:
    with pytest.raises(ConfigError, match="no model"):
        made.launch(PLAIN, model_id="m", port=1, key_file="/k", model_path=path)


def test_a_command_is_what_the_owner_wrote_with_its_placeholders_filled() -> None:
    words = ("/opt/e", "--p={port}", "{model}", "{slots}x{ctx}", "{gpus}", "{key_file}", '{"a": {port}}', "{nothing}")
    spec = replace(SPEC, engine="command", command=words, args=(), gpus=(0, 2))
    launch = start(Command(), spec)
    assert launch.argv == (
        "/opt/e", "--p=4321", "/models/m.gguf", "3x1000", "0,2", "/run/key", '{"a": 4321}', "{nothing}",
    )  # fmt: skip
    assert launch.key_env == "LLORCH_ENGINE_KEY" and launch.env["CUDA_VISIBLE_DEVICES"] == "0,2"
    brace = Command().launch(spec, model_id="m", port=1, key_file="/k", model_path="/{port}/m")
    assert "/{port}/m" in brace.argv, "what was filled in is not filled again"
    with pytest.raises(ConfigError, match="no model"):
        Command().launch(spec, model_id="m", port=1, key_file="/k", model_path=None)
    assert wants_model(Command(), spec) and not wants_model(Command(), replace(spec, command=("x", "{port}")))
    assert wants_model(VLLM, PLAIN) and not wants_model(External(), PLAIN)


@pytest.mark.parametrize("name", ["vllm", "sglang"])
def test_one_that_is_not_here_is_told_with_the_mend(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} was not found") as caught:
        engine(name, both(SERVER_GPU, WHEEL_GPU), gpus=True, allow_cpu=False)
    assert caught.value.hint is not None and "PATH" in caught.value.hint


def test_auto_never_means_one_that_takes_the_whole_gpu() -> None:
    rich = replace(both(SERVER_GPU, WHEEL_GPU), vllm=("/bin/vllm",), sglang_python="/bin/python3")
    assert choose(rich, gpus=True, allow_cpu=False) == "llama-server"
    with pytest.raises(ConfigError):
        choose(replace(NOTHING, vllm=("/bin/vllm",)), gpus=True, allow_cpu=True)


def test_an_external_engine_is_not_started() -> None:
    with pytest.raises(ConfigError):
        start(External())


# ---------------------------------------------------------------- the choice

NOTHING = EngineFacts("/usr/bin/python")
WHEEL = replace(NOTHING, xllamacpp_version="1")
WHEEL_GPU = replace(WHEEL, xllamacpp_gpu=True)
SERVER_CPU = replace(NOTHING, llama_server="/bin/llama-server", llama_server_version="b1")
SERVER_GPU = replace(SERVER_CPU, llama_server_gpu=True)
BROKEN = replace(SERVER_GPU, llama_server_problem="it failed")


def both(one: EngineFacts, other: EngineFacts) -> EngineFacts:
    return replace(one, xllamacpp_version=other.xllamacpp_version, xllamacpp_gpu=other.xllamacpp_gpu)


@pytest.mark.parametrize(
    ("facts", "gpus", "allow_cpu", "name"),
    [
        (both(SERVER_GPU, WHEEL_GPU), True, False, "llama-server"),
        (both(SERVER_CPU, WHEEL_GPU), True, False, "llamacpp"),
        (both(BROKEN, WHEEL_GPU), True, False, "llamacpp"),
        (both(SERVER_CPU, WHEEL), True, True, "llamacpp"),
        (SERVER_CPU, True, True, "llama-server"),
        (WHEEL, False, False, "llamacpp"),
        (SERVER_GPU, False, False, "llama-server"),
    ],
)
def test_auto_takes_what_can_use_the_gpu(facts: EngineFacts, gpus: bool, allow_cpu: bool, name: str) -> None:
    assert choose(facts, gpus=gpus, allow_cpu=allow_cpu) == name
    assert engine("auto", facts, gpus=gpus, allow_cpu=allow_cpu).name == name


@pytest.mark.parametrize("facts", [WHEEL, SERVER_CPU, both(SERVER_CPU, WHEEL), both(BROKEN, WHEEL)])
def test_a_gpu_left_unused_is_refused_with_the_mend(facts: EngineFacts) -> None:
    with pytest.raises(ConfigError) as caught:
        choose(facts, gpus=True, allow_cpu=False)
    assert caught.value.hint is not None and "--allow-cpu" in caught.value.hint


@pytest.mark.parametrize("facts", [NOTHING, BROKEN])
def test_with_no_engine_at_all_it_says_what_to_install(facts: EngineFacts) -> None:
    for gpus, allow_cpu, mend in (
        (True, True, "xllamacpp"),
        (False, False, "xllamacpp"),
        (True, False, "llama-server"),
    ):
        with pytest.raises(ConfigError) as caught:
            choose(facts, gpus=gpus, allow_cpu=allow_cpu)
        assert caught.value.hint is not None and mend in caught.value.hint


def test_an_engine_that_was_asked_for_by_name_is_not_replaced() -> None:
    with pytest.raises(ConfigError, match="GPU that the engine llamacpp can't use"):
        engine("llamacpp", both(SERVER_GPU, WHEEL), gpus=True, allow_cpu=False)
    with pytest.raises(ConfigError, match="not found"):
        engine("llama-server", WHEEL, gpus=False, allow_cpu=False)
    with pytest.raises(ConfigError, match="it failed"):
        engine("llama-server", BROKEN, gpus=False, allow_cpu=False)
    everything = replace(both(SERVER_GPU, WHEEL_GPU), vllm=("/bin/vllm",), sglang_python="/bin/python3")
    for name in ENGINES:
        assert engine(name, everything, gpus=True, allow_cpu=False).name == name


# ---------------------------------------------------------------- plans


def plan(spec: PoolSpec, facts: EngineFacts = WHEEL, gpu_count: int = 0, allow_cpu: bool = False) -> Plan:
    return plan_pool(spec, facts, lambda ref: ref, gpus=frozenset(range(gpu_count)), allow_cpu=allow_cpu)


def test_a_plan_names_the_engine_that_was_chosen() -> None:
    made = plan(replace(SPEC, engine="auto"))
    assert made.engine is not None
    assert (made.spec.engine, made.engine.name, made.choices) == ("llamacpp", "llamacpp", {"demo": "demo"})
    assert made.takes_files and made.wanted.choices == {"demo": "demo"}


def test_an_engine_without_a_model_file_needs_none() -> None:
    made = plan(replace(SPEC, engine="simulated", model="llama-3-8b", gpus=(7,)), NOTHING)
    assert (made.choices, made.takes_files) == ({"llama-3-8b": "llama-3-8b"}, False)
    made = plan(replace(SPEC, engine="external", model=None, url="http://127.0.0.1:1"), NOTHING)
    assert made.choices == {"p": "p"}


@pytest.mark.parametrize(
    ("changes", "gpu_count", "why"),
    [
        ({"model": None}, 0, "pool p: it needs a model"),
        ({"gpus": (2,)}, 2, "pool p: there is no GPU 2: this machine has 0, 1"),
        ({"gpus": None}, 1, "pool p: this machine has a GPU"),
        ({"gpus": (0,)}, 1, "pool p: this machine has a GPU"),
    ],
)
def test_a_plan_that_cannot_work_is_refused(changes: dict[str, Any], gpu_count: int, why: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(replace(SPEC, engine="auto", **changes), gpu_count=gpu_count)
    assert caught.value.message.startswith(why) and caught.value.hint


def test_a_pool_kept_off_the_gpus_may_use_the_cpu() -> None:
    assert plan(replace(SPEC, engine="auto", gpus=()), gpu_count=1).spec.engine == "llamacpp"
    assert plan(replace(SPEC, engine="auto"), gpu_count=1, allow_cpu=True).spec.engine == "llamacpp"


@pytest.mark.parametrize(
    ("ref", "expected"),
    [
        ("demo", "demo"),
        ("file:/models/llama-3-8b.Q4_K_M.gguf", "llama-3-8b.Q4_K_M"),
        ("file:/m/big-00001-of-00003.gguf", "big"),
        ("file:/m/my model (v2).gguf", "my-model--v2-"),
        ("file:/m/a..b.gguf", "a.b"),
        ("file:/m/...gguf", "model"),
        ("hf:org/repo:Q4_K_M", "org/repo:Q4_K_M"),
        ("https://example.com/m/tiny.gguf?download=true", "tiny"),
        ("llama-3-8b", "llama-3-8b"),
        ("org/name:latest", "org/name:latest"),
    ],
)
def test_a_reference_is_called_by_an_id(ref: str, expected: str) -> None:
    assert model_id(ref) == expected
    assert model_id_ok(model_id(ref))
