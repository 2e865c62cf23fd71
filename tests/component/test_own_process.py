"""What a role does to its own process: no core, nobody looks in, and its secrets are not handed on."""

from __future__ import annotations

import asyncio
import json
import os
import sys

import pytest

from llorch.cli.roles import secret_variables

ROLE = """
import ctypes, json, os, resource, subprocess, sys
from llorch import own_process
from llorch.cli.roles import secret_variables
own_process.close_to_others()
own_process.forget(secret_variables())
tell = "import os, json; print(json.dumps(dict(os.environ)))"
child = subprocess.run([sys.executable, "-c", tell], capture_output=True)
print(json.dumps({
    "dumpable": ctypes.CDLL(None).prctl(3, 0, 0, 0, 0),
    "core": resource.getrlimit(resource.RLIMIT_CORE),
    "files": len(os.listdir("/proc/self/fd")) > 2,
    "child": json.loads(child.stdout),
}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_DUMPABLE is Linux's")
async def test_a_role_is_closed_to_others_and_hands_no_secret_on() -> None:
    secrets = dict.fromkeys(secret_variables(), "s3cret")
    assert {"LLORCH_API_TOKEN", "LLORCH_ADMIN_TOKEN", "LLORCH_SERVICE_TOKEN", "LLORCH_NODE_TOKEN"} <= set(secrets)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", ROLE, stdout=asyncio.subprocess.PIPE, env=os.environ | secrets | {"OTHER": "stays"}
    )
    out, _ = await asyncio.wait_for(process.communicate(), 20)
    facts = json.loads(out)
    assert (facts["dumpable"], facts["core"], facts["files"]) == (0, [0, 0], True)
    assert "s3cret" not in facts["child"].values() and facts["child"]["OTHER"] == "stays"
