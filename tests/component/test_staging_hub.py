"""Models of the Hugging Face hub, through its own library, from a stand-in for the hub."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.gguf_files import small
from tests.standins import staging_process
from tests.standins.blob_server import blob_server
from tests.standins.hub_server import COMMIT, HubServer, hub_server

pytest.importorskip("huggingface_hub")


@contextlib.asynccontextmanager
async def hub() -> AsyncIterator[HubServer]:
    async with blob_server() as blobs, hub_server(blobs) as running:
        yield running


async def stage(folder: Path, ref: str, url: str, hf_home: Path | None = None) -> dict[str, object]:
    """Here: what the library has read of its environment, once, is another for as long as this takes."""
    from huggingface_hub import close_session, constants

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(constants, "HF_HUB_CACHE", str((hf_home or folder / "hf") / "hub"))
        patch.delenv("SSL_CERT_FILE", raising=False)  # it wants authorities to load, whichever scheme it is asked for
        patch.delenv("SSL_CERT_DIR", raising=False)
        try:
            return await staging_process.run(str(folder / "data"), json.dumps({"ref": ref}))
        finally:
            close_session()


async def stage_elsewhere(folder: Path, ref: str, url: str, **env: str) -> dict[str, object]:
    """In a process of its own, with the library's own environment. What it printed."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "SSL_CERT_"))}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.standins.staging_process", str(folder / "data"), json.dumps({"ref": ref}),
        env={**kept, "HF_ENDPOINT": url, "HF_HOME": str(folder / "hf"), **env},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    out, err = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 0, err.decode()
    assert env.get("HF_TOKEN", "no token") not in out.decode() + err.decode()
    return dict(json.loads(out))


async def test_a_quantisation_is_found_and_its_bytes_are_fetched_without_the_token(tmp_path: Path) -> None:
    async with hub() as there:
        there.token = "hf_a_secret_token"
        data = small(3_000_000)
        there.repos["org/repo"] = {"README.md": b"x", "repo.Q4_K_M.gguf": data, "repo.Q8_0.gguf": small()}
        there.blobs.cuts.append(2_000_000)
        found = await stage_elsewhere(tmp_path, "hf:org/repo:q4_k_m", there.url, HF_TOKEN=there.token)
        assert found["id"] == "org/repo:q4_k_m"
        assert Path(str(found["path"])).read_bytes() == data
        assert there.blobs.sent - len(data) < 1_000_000  # cut once, and gone on with
        assert all("Authorization" not in headers for _, headers in there.blobs.requests)
        assert there.blobs.requests[0][0] == "/repo.Q4_K_M.gguf?X-Signature=a%2Fb"  # as it was signed
        denied = await stage(tmp_path / "other", "hf:org/repo:q4_k_m", there.url)
        assert denied["code"] == "MODEL_NOT_FOUND" and "HF_TOKEN" in str(denied["hint"])


async def test_a_split_model_comes_whole_and_a_wrong_digest_is_refused(tmp_path: Path) -> None:
    async with hub() as there:
        parts = {f"Q8_0/big-Q8_0-0000{n}-of-00002.gguf": small(200_000, first=n == 1) for n in (1, 2)}
        there.repos["org/big"] = dict(parts)
        found = await stage(tmp_path, "hf:org/big", there.url)
        path = Path(str(found["path"]))
        assert [one.read_bytes() for one in sorted(path.parent.iterdir())] == list(parts.values())
        assert found["size_bytes"] == 400_000
        there.lies["Q8_0/big-Q8_0-00002-of-00002.gguf"] = "ab" * 32
        refused = await stage(tmp_path / "other", "hf:org/big", there.url)
        assert refused["code"] == "DIGEST_MISMATCH"


async def test_what_the_hub_lacks_or_guards_is_told_with_what_there_is(tmp_path: Path) -> None:
    async with hub() as there:
        there.repos["org/repo"] = {"a.Q8_0.gguf": small(), "a.F16.gguf": small()}
        said = await stage(tmp_path, "hf:org/repo:Q2_K", there.url)
        assert (said["code"], said["message"]) == ("MODEL_NOT_FOUND", "org/repo has no GGUF of Q2_K")
        assert "a.Q8_0.gguf" in str(said["hint"])
        there.gated = True
        said = await stage(tmp_path, "hf:org/repo:Q8_0", there.url)
        assert said["code"] == "MODEL_NOT_AVAILABLE" and "licence" in str(said["message"])
    said = await stage(tmp_path, "hf:org/repo", "http://127.0.0.1:1")
    assert said["code"] == "MODEL_NOT_AVAILABLE" and "HF_ENDPOINT" in str(said["hint"])


async def test_what_the_librarys_cache_holds_is_taken_from_there(tmp_path: Path) -> None:
    async with hub() as there:
        data = small(300_000)
        there.repos["org/repo"] = {"a.gguf": data}
        repo = tmp_path / "hf" / "hub" / "models--org--repo"
        (repo / "blobs").mkdir(parents=True)
        (repo / "snapshots" / COMMIT).mkdir(parents=True)
        (repo / "blobs" / "x").write_bytes(data)
        (repo / "snapshots" / COMMIT / "a.gguf").symlink_to("../../blobs/x")
        found = await stage(tmp_path, "hf:org/repo", there.url)
        assert Path(str(found["path"])).read_bytes() == data and there.blobs.sent == 0
        assert not Path(str(found["path"])).is_symlink()
        (repo / "blobs" / "x").write_bytes(data[:-1] + b"\0")  # damaged: it is fetched after all
        found = await stage(tmp_path / "other", "hf:org/repo", there.url, hf_home=tmp_path / "hf")
        assert Path(str(found["path"])).read_bytes() == data and there.blobs.sent == len(data)


async def test_without_the_library_a_person_is_told_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "huggingface_hub.py").write_text("raise ImportError")
    path = os.pathsep.join([str(tmp_path), os.getcwd()])
    said = await stage_elsewhere(tmp_path, "hf:org/repo", "http://127.0.0.1:1", PYTHONPATH=path)
    assert said["code"] == "MODEL_NOT_AVAILABLE" and "pip install" in str(said["hint"])
