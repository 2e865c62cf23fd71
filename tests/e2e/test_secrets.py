"""Canaries: no token, prompt or output reaches a log, an argument list, an error body or an engine's environment, and
neither do secrets of the node's own machine.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from pathlib import Path

from tests.cluster import Cluster, descendants, simulated

CANARY_PROMPT = f"canary{secrets.token_hex(8)}"
# Bodies that quote the canary where somebody's words stand. The first is served, the others are refused.
CHATS: list[dict[str, object]] = [
    {"messages": [{"role": "user", "content": CANARY_PROMPT}], "max_tokens": 3},
    {"messages": [{"role": "user", "content": CANARY_PROMPT}], "n_discard": -1},
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": f"http://{CANARY_PROMPT}/"}]}]},
    {"messages": [], "stop": [CANARY_PROMPT] * 300},
    {"messages": [], "grammar": {CANARY_PROMPT: 1}},
    {"messages": [], "logit_bias": {CANARY_PROMPT: "x"}},
    {"messages": [], "chat_template_kwargs": {"a": [CANARY_PROMPT]}},
    {"messages": [], "cache_salt": CANARY_PROMPT * 100},
]


def of_all(pids: set[int], what: str) -> str:
    out = ""
    for pid in pids:
        try:
            out += Path(f"/proc/{pid}/{what}").read_bytes().decode("utf-8", "replace").replace("\0", " ") + "\n"
        except OSError:
            continue
    return out


async def test_no_secret_in_argv_logs_metrics_error_bodies_or_engine_environments(llorch: Cluster) -> None:
    control = await llorch.start_control("--log-level", "debug")
    machine = {name: secrets.token_hex(16) for name in ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "NVIDIA_API_KEY")}
    pools = [simulated("p0", "sim", 2, "--tokens", "8")]
    node = await llorch.start_node("a", pools, "--log-level", "debug", **machine)
    bodies: list[str] = []
    bad_tokens = [secrets.token_hex(16), "é" * 16, "x" * 5000]
    for path in ("/v2/tasks", "/v1/chat/completions", "/v2/nodes/register"):
        for token in bad_tokens:
            async with llorch.session.post(
                llorch.url + path,
                data=b"{}",
                headers={"Authorization": f"Bearer {token}".encode("latin-1", "replace").decode("latin-1")},
            ) as response:
                bodies.append(await response.text())
    raw_bodies = [
        f'{{"model": "sim", "prompt": "{CANARY_PROMPT}", "x": 1}}',
        f'{{"model": "{CANARY_PROMPT}", "prompt": "x"}}',
        f'{{"model": "sim", "prompt": ["{CANARY_PROMPT}"]}}',
        f'{{"model": "sim", "prompt": "{CANARY_PROMPT}"',
        f'{{"model": "sim", "prompt": "{CANARY_PROMPT}", "max_tokens": 3}}',
    ]
    for raw in raw_bodies:
        for path in ("/v2/tasks", "/v1/completions"):
            async with llorch.session.post(
                llorch.url + path, data=raw.encode(), headers=llorch.headers() | {"Content-Type": "application/json"}
            ) as response:
                text = await response.text()
                if response.status != 200 and f'"model": "{CANARY_PROMPT}' not in raw:
                    bodies.append(text)
    for number, chat in enumerate(CHATS):
        async with llorch.session.post(
            f"{llorch.url}/v1/chat/completions", json={"model": "sim"} | chat, headers=llorch.headers()
        ) as response:
            assert response.status == (400 if number else 200)
            bodies += [await response.text()] if number else []
    async with llorch.session.post(f"{llorch.url}/v1/{CANARY_PROMPT}", data=b"", headers=llorch.headers()) as response:
        assert response.status == 404
    processes = {control.pid, node.pid} | descendants(control.pid) | descendants(node.pid)
    engines = descendants(node.pid)
    argv, engine_env = of_all(processes, "cmdline"), of_all(engines, "environ")
    runtime = llorch.folder / "a" / ".runtime"
    key_files = list(runtime.rglob("*.key"))
    keys = [path.read_text().strip() for path in key_files]
    assert keys
    assert engines
    handoffs, pids, engine_logs = (list((runtime / name).iterdir()) for name in ("engines", "pids", "logs"))
    assert handoffs and pids and engine_logs
    for private in (runtime, *key_files, *handoffs, *pids, *engine_logs):
        assert private.stat().st_mode & 0o077 == 0, private
    for process in processes:
        limits = Path(f"/proc/{process}/limits").read_text()
        assert re.search(r"Max core file size +0 +0 ", limits), "a core would hold all of it"
    metrics = ""
    for url in (llorch.url, node.url):
        async with llorch.session.get(url + "/metrics") as response:
            metrics += await response.text()
    assert "llorch_tasks_total" in metrics
    await asyncio.gather(control.stop(), node.stop())
    logs = "".join(path.read_text(errors="replace") for path in llorch.folder.rglob("*.log"))
    assert "task.ended" in logs
    found = {
        (where, kind)
        for kind, canaries in (
            ("token", [*llorch.tokens.values(), *machine.values(), *(token for token in bad_tokens), *keys]),
            ("prompt", [CANARY_PROMPT]),
            ("output", ["t0 t1", "t1 "]),
        )
        for where, text in (
            ("argv", argv),
            ("logs", logs if kind != "prompt" else re.sub(r"no node has the model \S+", "", logs)),
            ("error bodies", "".join(bodies)),
            ("engine environment", engine_env),
            ("metrics", metrics),
        )
        if any(canary in text for canary in canaries)
    }
    assert found == set()
    assert "LLORCH_" not in engine_env
    own_lines = (control.text() + node.text()).splitlines()
    assert [line for line in own_lines if not line.startswith(("20", "ready url="))] == []  # no traceback, none forged
