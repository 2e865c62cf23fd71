"""Looking for engines with real programs in PATH: what they say, what they don't, and what hangs."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from llorch.node.engines import detect as module
from llorch.node.engines.detect import detect

VERSION = 'echo "version: 9000 (abc)" >&2'
HELP = 'echo "--cache-ram N  --ui, --no-webui"'
DEVICES = 'echo "Available devices:"; echo "  BLAS: OpenBLAS (0 MiB, 0 MiB free)"'
CUDA = 'echo "  CUDA0: NVIDIA H200 (143771 MiB, 143000 MiB free)"'


def program(directory: Path, version: str = VERSION, usage: str = HELP, devices: str = DEVICES) -> dict[str, str]:
    """A llama-server that answers so, and an environment in which it is found."""
    path = directory / "llama-server"
    path.write_text(
        f'#!/bin/sh\ncase "$1" in\n--version) {version};;\n--help) {usage};;\n--list-devices) {devices};;\nesac\n'
    )
    path.chmod(0o755)
    return {"PATH": f"{directory}{os.pathsep}{os.environ['PATH']}"}


def test_a_llama_server_in_the_path_is_asked_what_it_can(tmp_path: Path) -> None:
    facts = detect(None, env=program(tmp_path, devices=f"{DEVICES}; {CUDA}"), look_for_gpus=False)
    assert (facts.llama_server, facts.llama_server_version) == (str(tmp_path / "llama-server"), "9000")
    assert facts.llama_server_flags == {"--cache-ram", "--no-webui"}
    assert facts.llama_server_gpu and facts.has_llama_server
    assert facts.python == sys.executable


def test_one_without_a_gpu_says_so(tmp_path: Path) -> None:
    facts = detect(None, env=program(tmp_path), look_for_gpus=False)
    assert facts.has_llama_server and not facts.llama_server_gpu


def test_one_that_fails_is_there_and_cannot_be_used(tmp_path: Path) -> None:
    env = program(tmp_path, version='echo "libcuda.so.1: cannot open" >&2; exit 127')
    facts = detect(None, env=env, look_for_gpus=False)
    assert not facts.has_llama_server and "libcuda.so.1" in (facts.llama_server_problem or "")


def test_one_that_hangs_is_left_after_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ASK_TIMEOUT_S", 0.2)
    facts = detect(None, env=program(tmp_path, version="exec sleep 60"), look_for_gpus=False)
    assert not facts.has_llama_server and "no answer" in (facts.llama_server_problem or "")


def test_a_program_that_is_asked_sees_none_of_our_secrets_nor_settings_that_would_bend_it(tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    env = program(tmp_path, version=f'env > {seen}; echo "version: 9000"')
    env |= {
        "LLORCH_ADMIN_TOKEN": "s3cret",
        "POOL_MANAGERD_TLS_KEY": "s3cret",
        "LLAMA_ARG_HOST": "s3cret",
        "CUDA_KEPT": "yes",
        "AWS_SESSION_TOKEN": "s3cret",
    }
    assert detect(None, env=env, look_for_gpus=False).llama_server_version == "9000"
    assert "CUDA_KEPT=yes" in seen.read_text() and "s3cret" not in seen.read_text()


def test_a_version_that_no_handoff_could_carry_is_cut(tmp_path: Path) -> None:
    env = program(tmp_path, version=f'echo "version: {"9" * 500}"')
    assert detect(None, env=env, look_for_gpus=False).llama_server_version == "9" * 64


def test_a_path_that_was_given_must_exist(tmp_path: Path) -> None:
    facts = detect(str(tmp_path / "nothing"), env={"PATH": "/nowhere"}, look_for_gpus=False)
    assert facts.llama_server_problem == "there is no such program"
    facts = detect(None, env={"PATH": "/nowhere"}, look_for_gpus=False)
    assert facts.llama_server is None and facts.llama_server_problem is None


def environment(folder: Path, package: str, version: str, script: str = "#!{python}\n") -> Path:
    """A Python environment with an engine in it, and its program. Nothing of it is run."""
    site = folder / "lib/python3.12/site-packages" / f"{package}-{version}.dist-info"
    site.mkdir(parents=True)
    (site / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    python = folder / "bin/python3"
    python.parent.mkdir(exist_ok=True)
    for path, text in ((python, "#!/bin/false\n"), (folder / "bin" / package, script.format(python=python))):
        path.write_text(text)
        path.chmod(0o755)
    return python


@pytest.mark.parametrize("script", ["#!{python}\n", "#!/bin/sh\nexec x\n", "#!/usr/bin/env python3\n"])
def test_engines_with_an_environment_of_their_own_are_found_by_their_files(tmp_path: Path, script: str) -> None:
    environment(tmp_path / "v", "vllm", "0.33.0", script)
    python = environment(tmp_path / "s", "sglang", "0.5.23", script)
    facts = detect(None, env={"PATH": f"{tmp_path}/v/bin:{tmp_path}/s/bin"}, look_for_gpus=False)
    assert (facts.vllm, facts.vllm_version) == ((f"{tmp_path}/v/bin/vllm",), "0.33.0")
    assert (facts.sglang_python, facts.sglang_version) == (str(python), "0.5.23")


def test_one_that_is_linked_into_the_path_is_followed_to_its_environment(tmp_path: Path) -> None:
    python = environment(tmp_path / "s", "sglang", "0.5.23", "#!/bin/sh\n")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/sglang").symlink_to(tmp_path / "s/bin/sglang")
    facts = detect(None, env={"PATH": f"{tmp_path}/bin"}, look_for_gpus=False)
    assert (facts.sglang_python, facts.sglang_version) == (str(python), "0.5.23")


def test_an_engine_that_is_not_there_is_not_found(tmp_path: Path) -> None:
    facts = detect(None, env={"PATH": str(tmp_path)}, look_for_gpus=False)
    assert (facts.vllm, facts.vllm_version, facts.sglang_python, facts.sglang_version) == ((), None, None, None)


@pytest.mark.llama
def test_the_wheel_is_found_and_asked_for_gpus_in_a_process_of_its_own() -> None:
    before = "xllamacpp" in sys.modules
    facts = detect(None, env={"PATH": "/nowhere"})
    if facts.xllamacpp_version is None:
        pytest.skip("xllamacpp is not installed")
    assert isinstance(facts.xllamacpp_gpu, bool)
    assert ("xllamacpp" in sys.modules) is before
