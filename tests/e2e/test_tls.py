"""TLS with certificate files: the whole way from a client over the control to a node's link."""

from __future__ import annotations

import asyncio
import json
import ssl
import subprocess
import sys

import aiohttp
import pytest

from tests.certificates import certificate
from tests.cluster import Cluster, expected_text, simulated


async def test_tasks_run_over_tls_from_client_to_node(llorch: Cluster) -> None:
    cert, key = certificate(llorch.folder)
    control = llorch.start(
        "control",
        [
            "control",
            "--bind",
            "127.0.0.1:0",
            "--tls-cert",
            str(cert),
            "--tls-key",
            str(key),
            "--data-dir",
            str(llorch.folder / "c"),
        ],
        **llorch.tokens,
    )
    llorch.control = await control.ready()
    assert llorch.url.startswith("https://")
    trusting = ssl.create_default_context(cafile=str(cert))
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=trusting)) as session:
        plain, llorch.session = llorch.session, session
        try:
            await llorch.start_node("a", [simulated("p0", "sim", 2, "--tokens", "64")], "--tls-ca", str(cert))
            assert (await llorch.complete(tokens=20))["text"] == expected_text(20)
            assert (await llorch.get("/v2/nodes/a"))["link"] is True
            submit = [sys.executable, "-m", "llorch", "submit", "--max-tokens", "3", "hi"]
            trusted, strange = await asyncio.gather(
                *(
                    asyncio.to_thread(
                        subprocess.run,
                        [*submit, *more],
                        env=llorch.client_env(),
                        capture_output=True,
                        text=True,
                        timeout=20,
                    )
                    for more in (["--tls-ca", str(cert)], [])
                )
            )
            assert (trusted.returncode, trusted.stdout) == (0, expected_text(3))
            assert strange.returncode == 5
            assert "certificate" in strange.stderr.lower()
            assert "Traceback" not in strange.stderr
        finally:
            llorch.session = plain


async def test_a_node_that_does_not_trust_the_control_sends_it_no_token(llorch: Cluster) -> None:
    cert, key = certificate(llorch.folder)
    seen: list[bytes] = []

    async def impostor(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await reader.read(65_536))
        writer.close()

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    server = await asyncio.start_server(impostor, "127.0.0.1", 0, ssl=context)
    port = server.sockets[0].getsockname()[1]
    config = llorch.folder / "n.yaml"
    config.write_text(json.dumps({"pools": [simulated()]}))
    node = llorch.start(
        "n",
        [
            "node", "--join", f"https://127.0.0.1:{port}", "--node-id", "n", "--bind", "127.0.0.1:0",
            "--config", str(config), "--data-dir", str(llorch.folder / "n"),
        ],
        **llorch.tokens,
    )  # fmt: skip
    await node.ready()
    for _ in range(500):
        if "register.failed" in node.text() or "heartbeat.failed" in node.text():
            break
        await asyncio.sleep(0.02)
    else:
        pytest.fail(f"the node said nothing of its control: {node.text()}")
    await node.stop()
    server.close()
    await server.wait_closed()
    assert b"".join(seen) == b""
