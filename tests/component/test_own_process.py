"""What a role does to its own process once its settings are read: no core, nobody looks in, no secret is handed on."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import sys
from pathlib import Path

import pytest

from llorch.cli.roles import secret_variables

ROLE = """
import ctypes, json, os, resource, subprocess, sys
from llorch.cli.roles import role_settings
from llorch.config import ControlSettings
settings, source = role_settings(ControlSettings, {}, None)
tell = "import os, json; print(json.dumps(dict(os.environ)))"
child = subprocess.run([sys.executable, "-c", tell], capture_output=True)
print(json.dumps({
    "read": settings.api_token,
    "read again": source.read().api_token,
    "dumpable": ctypes.CDLL(None).prctl(3, 0, 0, 0, 0),
    "core": resource.getrlimit(resource.RLIMIT_CORE),
    "files": len(os.listdir("/proc/self/fd")) > 2,
    "child": json.loads(child.stdout),
}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_DUMPABLE is Linux's")
async def test_a_role_is_closed_to_others_and_hands_no_secret_on(tmp_path: Path) -> None:
    given = {name: secrets.token_hex(16) for name in secret_variables()}
    assert {"LLORCH_API_TOKEN", "LLORCH_ADMIN_TOKEN", "LLORCH_SERVICE_TOKEN", "LLORCH_NODE_TOKEN"} <= set(given)
    env = os.environ | given | {"OTHER": "stays", "HOME": str(tmp_path), "PYTHONPATH": os.getcwd()}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", ROLE, stdout=asyncio.subprocess.PIPE, env=env, cwd=tmp_path
    )
    out, _ = await asyncio.wait_for(process.communicate(), 20)
    facts = json.loads(out)
    assert facts["read"] == facts["read again"] == given["LLORCH_API_TOKEN"]
    assert (facts["dumpable"], facts["core"], facts["files"]) == (0, [0, 0], True)
    assert not set(given.values()) & set(facts["child"].values()) and facts["child"]["OTHER"] == "stays"
