"""The environment of an engine: what it needs of ours, and nothing else.

Owns the allow-list. An engine is large foreign code that reads what strangers send; whatever stands in its environment
can be read by whoever takes it over. So the agent's tokens, cloud credentials, the SSH agent, proxies and LD_PRELOAD
don't reach it unless the pool's own `env:` gives them. Nor do LLAMA_ARG_* and LLAMA_API_KEY, which would bend the flags
that llorch gives. Pure: the inherited environment comes in.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

NAMES = frozenset(
    {
        "PATH", "HOME", "USER", "LOGNAME", "LANG", "LANGUAGE", "TZ", "TMPDIR", "LD_LIBRARY_PATH",
        # the interpreter and the modules that run the engines in the box
        "PYTHONPATH", "PYTHONHOME", "PYTHONUSERBASE", "PYTHONNOUSERSITE", "PYTHONDONTWRITEBYTECODE",
        "PYTHONPYCACHEPREFIX", "PYTHONUNBUFFERED", "PYTHONUTF8",
        # where what is compiled or downloaded once is kept
        "XDG_CACHE_HOME", "HF_HOME", "HF_ENDPOINT", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HUGGINGFACE_HUB_CACHE",
        "TRANSFORMERS_CACHE", "TRANSFORMERS_OFFLINE",
    }
)  # fmt: skip
# Of GPU drivers and runtimes, and of the libraries that engines compute with.
PREFIXES = (
    "LC_", "CUDA_", "NVIDIA_", "NCCL_", "CUBLAS_", "CUDNN_", "HIP_", "ROCR_", "ROCM_", "ROCBLAS_", "MIOPEN_", "HSA_",
    "AMD_", "GPU_", "VK_", "SYCL_", "ONEAPI_", "ZE_", "GGML_", "OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_",
    "PYTORCH_", "TORCHINDUCTOR_", "TRITON_",
)  # fmt: skip
# NVIDIA_API_KEY, say, is a credential of a cloud, whatever it begins with.
_SECRET = re.compile(r"TOKEN|SECRET|PASS|CREDENTIAL|AUTH|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|_KEY$", re.IGNORECASE)


def for_engine(inherited: Mapping[str, str]) -> dict[str, str]:
    """The part of our own environment that an engine may see."""
    return {
        name: value
        for name, value in inherited.items()
        if name in NAMES or (name.startswith(PREFIXES) and not _SECRET.search(name))
    }
