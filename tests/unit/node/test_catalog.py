"""From a reference to a checked local file, and what a report says of it."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
from pathlib import Path

import gguf
import numpy as np
import pytest

from llorch import demo
from llorch.errors import Code, ConfigError, LlorchError
from llorch.node.catalog import Catalog
from llorch.node.catalog_file import folder_name
from tests.gguf_files import small


def test_the_demo_model_is_found_and_reported() -> None:
    catalog = Catalog()
    assert catalog.find("demo") == demo.model_path()
    [report] = catalog.report()
    assert (report.id, report.ref, report.format, report.state) == ("demo", "demo", "gguf", "staged")
    assert report.size_bytes == Path(demo.model_path()).stat().st_size
    assert report.ctx_train and report.sha256 is None


def test_a_digest_is_computed_once_when_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "my-model.gguf"
    shutil.copy(demo.model_path(), path)
    catalog = Catalog()
    catalog.find(f"file:{path}")
    assert catalog.digest_all() and not catalog.digest_all()
    [report] = catalog.report()
    assert (report.id, report.sha256) == ("my-model", hashlib.sha256(path.read_bytes()).hexdigest())


def test_a_closed_catalog_gives_up_its_digests() -> None:
    catalog = Catalog()
    catalog.find("demo")
    catalog.close()
    assert not catalog.digest_all() and catalog.report()[0].sha256 is None


def remove(catalog: Catalog, model: str) -> None:
    catalog.check_removable(model)
    catalog.forget(model)


def split_model(folder: Path) -> list[Path]:
    """A model in two files as its writer makes them: only the first one describes it."""
    writer = gguf.GGUFWriter(folder / "big.gguf", "llama", split_max_tensors=2)
    writer.add_context_length(128)
    for number in range(4):
        writer.add_tensor(f"t{number}", np.zeros((32, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(folder.iterdir())


def test_all_parts_of_a_split_model_count(tmp_path: Path) -> None:
    parts = split_model(tmp_path)
    catalog = Catalog()
    assert catalog.find(f"file:{parts[0]}") == str(parts[0])
    assert catalog.report()[0].id == "big"
    assert catalog.report()[0].size_bytes == sum(part.stat().st_size for part in parts)
    assert catalog.report()[0].ctx_train == 128
    with pytest.raises(ConfigError, match="part 2"):
        catalog.find(f"file:{parts[1]}")
    parts[1].write_bytes(b"x" * 10)
    with pytest.raises(ConfigError, match=r"00002-of-00002\.gguf is not a usable GGUF"):
        Catalog().find(f"file:{parts[0]}")
    parts[1].unlink()
    with pytest.raises(ConfigError, match="can't be read"):
        Catalog().find(f"file:{parts[0]}")


@pytest.mark.parametrize(
    ("ref", "why"),
    [
        ("file:/nowhere/m.gguf", "can't be read: No such file"),
        ("file:/dev", "is not a file"),
        ("file:/dev/zero", "is not a file"),
        ("hf:org/repo", "is not staged here"),
        ("https://example.com/m.gguf", "is not staged here"),
        ("llama-3-8b", "there is no model llama-3-8b"),
    ],
)
def test_what_cannot_be_found_says_why(ref: str, why: str) -> None:
    catalog = Catalog()
    with pytest.raises(ConfigError, match=why):
        catalog.find(ref)
    assert catalog.report() == []


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + b"\xff" * 64)
    with pytest.raises(ConfigError, match="not a usable GGUF"):
        Catalog().find(f"file:{path}")


# ---------------------------------------------------------------- what is remembered on disk


def put(data: Path, model: str, *names: str, body: bytes | None = None) -> Path:
    folder = data / "models" / folder_name(model)
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).write_bytes(small() if body is None else body)
    return folder


def test_a_torn_or_missing_catalog_is_rebuilt_from_the_files_there_are(tmp_path: Path) -> None:
    put(tmp_path, "org/repo:Q4", "m.gguf")
    put(tmp_path, "half", "m.gguf.partial", "m.gguf.partial.json")
    put(tmp_path, "part", "m-00001-of-00002.gguf")
    put(tmp_path, "bad", "m.gguf", body=b"GGUF" + b"\xff" * 40)
    (tmp_path / "models" / ".hidden").mkdir()
    (tmp_path / "models" / "a-file").write_bytes(b"")
    (tmp_path / "models" / "elsewhere").symlink_to("/etc")
    for text in (None, b'{"models": [', b"\0" * 100):
        if text is not None:
            (tmp_path / "catalog.json").write_bytes(text)
        catalog = Catalog(tmp_path)
        states = {one.id: one.state for one in catalog.report()}
        assert states == {"org/repo:Q4": "staged", "half": "failed", "part": "failed", "bad": "failed"}
        found = catalog.look("hf:org/repo:Q4")  # no reference is left, and its id is that one's
        assert found is not None and found.path.name == "m.gguf" and found.header.architecture == "llama"
        assert catalog.digest_all()
        assert [one.sha256 for one in Catalog(tmp_path).report() if one.id == "org/repo:Q4"] == [
            hashlib.sha256(found.path.read_bytes()).hexdigest()
        ]


def test_a_digest_is_kept_over_restarts_until_the_file_is_another(tmp_path: Path) -> None:
    path = tmp_path / "own.gguf"
    path.write_bytes(small())
    catalog = Catalog(tmp_path / "data")
    catalog.find(f"file:{path}")
    catalog.digest_all()
    [before] = catalog.report()
    again = Catalog(tmp_path / "data")
    assert again.report() == [before] and not again.digest_all()
    found = again.look(f"file:{path}")
    assert found is not None and found.sha256 == before.sha256
    path.write_bytes(small())
    anew = Catalog(tmp_path / "data")
    assert anew.report() == []
    anew.find(f"file:{path}")
    assert anew.report()[0].sha256 is None and anew.digest_all()
    assert stat.S_IMODE((tmp_path / "data" / "catalog.json").stat().st_mode) == 0o600


def test_what_was_staged_and_is_gone_or_another_is_failed_and_not_offered(tmp_path: Path) -> None:
    folder = put(tmp_path, "m", "m.gguf")
    catalog = Catalog(tmp_path)
    assert catalog.look("m") is not None
    (folder / "m.gguf").write_bytes(small(4000))
    assert catalog.look("m") is None and catalog.report()[0].state == "failed"
    (folder / "m.gguf").unlink()
    put(tmp_path, "n", "m.gguf")
    assert {one.id: one.state for one in Catalog(tmp_path).report()} == {"m": "failed"}


def test_a_symbolic_link_among_staged_files_is_not_followed(tmp_path: Path) -> None:
    folder = put(tmp_path, "m", "m.gguf")
    catalog = Catalog(tmp_path)
    outside = tmp_path / "secret.gguf"
    outside.write_bytes((folder / "m.gguf").read_bytes())
    (folder / "m.gguf").unlink()
    (folder / "m.gguf").symlink_to(outside)
    assert catalog.look("m") is None
    entry = catalog.get("m")
    assert entry is not None and "symbolic link" in str(entry.error)
    remove(catalog, "m")
    assert outside.exists() and not folder.exists()


def test_a_model_in_use_is_not_removed_and_somebodys_own_file_never(tmp_path: Path) -> None:
    path = tmp_path / "own.gguf"
    path.write_bytes(small())
    used = {"own"}
    catalog = Catalog(tmp_path / "data", in_use=lambda: used)
    catalog.find(f"file:{path}")
    with pytest.raises(LlorchError) as refused:
        remove(catalog, "own")
    assert refused.value.code is Code.CONFLICT
    used.clear()
    remove(catalog, "own")
    assert path.exists() and catalog.report() == []
    with pytest.raises(LlorchError, match="not in this node's catalog"):
        remove(catalog, "own")


def test_a_file_that_was_damaged_is_found_by_verifying_and_its_model_fails(tmp_path: Path) -> None:
    folder = put(tmp_path, "m", "m.gguf")
    catalog = Catalog(tmp_path)
    catalog.digest_all()
    catalog.verify("m")
    whole = (folder / "m.gguf").read_bytes()
    (folder / "m.gguf").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(LlorchError) as failed:
        catalog.verify("m")
    assert failed.value.code is Code.DIGEST_MISMATCH and catalog.report()[0].state == "failed"
    assert catalog.look("m") is None
    (folder / "m.gguf").write_bytes(whole)
    catalog.verify("m")  # mended by hand
    assert catalog.report()[0].state == "staged" and catalog.look("m") is not None


def test_a_retired_model_is_reported_so_and_its_files_stay(tmp_path: Path) -> None:
    folder = put(tmp_path, "m", "m.gguf")
    catalog = Catalog(tmp_path)
    catalog.retire("m")
    assert catalog.report()[0].state == "retired" and (folder / "m.gguf").exists()
    assert Catalog(tmp_path).report()[0].state == "retired" and catalog.look("m") is not None


@pytest.mark.parametrize(
    "ref",
    ["file:rel", "file:/a/../b", "file://host/x", "hf:../x", "hf:o/r/../x", "hf:o/r//x", "-m", "", "a..b", "a\0b",
     "~/m", "http://models.example/m.gguf", "https://u:p@h/m", "https://h/m?a\nb", "./m", "file:/a\udce7"],
)  # fmt: skip
def test_what_is_no_reference_is_refused(ref: str) -> None:
    with pytest.raises(ConfigError) as refused:
        Catalog().look(ref)
    assert refused.value.code is Code.INVALID_REQUEST and "u:p" not in refused.value.message


def test_a_fifo_is_no_model_and_nobody_waits_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m.gguf")
    with pytest.raises(ConfigError, match="is not a file"):
        Catalog().find(f"file:{tmp_path}/m.gguf")


def test_a_catalog_that_is_only_looked_at_writes_nothing(tmp_path: Path) -> None:
    put(tmp_path, "m", "m.gguf")
    catalog = Catalog(tmp_path, kept=False)
    assert catalog.find("m") and catalog.find("demo") and not (tmp_path / "catalog.json").exists()
