"""From a reference to a checked local file, and what a report says of it."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest

from llorch import demo
from llorch.errors import ConfigError
from llorch.node.catalog import Catalog


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
