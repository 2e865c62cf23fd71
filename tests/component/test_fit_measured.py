"""The estimate of a context's size against what the llama.cpp that is installed here says it allocated. On the CPU: a
GPU's context is laid out in the same way, and there is none here."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from llorch import demo
from llorch.node.engines.gguf import read_header
from llorch.node.fit import asked, need

START = """
import os, sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.port, params.verbosity, params.warmup = sys.argv[1], 0, 10, False
params.n_parallel, params.n_ctx, params.cache_ram_mib = int(sys.argv[3]), int(sys.argv[2]) * int(sys.argv[3]), 0
for name in ("cache_type_k", "cache_type_v"):
    setattr(params, name, getattr(xllamacpp.ggml_type, "GGML_TYPE_" + sys.argv[4].upper()))
server = xllamacpp.Server(params)  # named, and so never ended: an end so soon after its start hangs now and then
sys.stdout.flush()
os._exit(0)
"""


@pytest.mark.parametrize(
    ("ctx", "slots", "kind"), [(1000, 4, "f16"), (128, 3, "f16"), (2048, 1, "q8_0")], ids=["odd", "small", "quantised"]
)
def test_the_context_is_as_large_as_it_was_estimated(ctx: int, slots: int, kind: str) -> None:
    pytest.importorskip("xllamacpp")
    model = Path(demo.model_path())
    argv = [sys.executable, "-c", START, str(model), str(ctx), str(slots), kind]
    done = subprocess.run(argv, capture_output=True, timeout=60, check=True, text=True, errors="replace")
    said = re.search(r"llama_kv_cache: size =\s+([\d.]+) MiB", done.stderr + done.stdout)
    assert said, "llama.cpp says nothing of its cache any more"
    args = asked(["-ctk", kind, "-ctv", kind])
    needed = need(read_header(model), model.stat().st_size, ctx=ctx, slots=slots, gpus=0, args=args)
    assert needed.kv_bytes / (1 << 20) == pytest.approx(float(said[1]), abs=0.01)
