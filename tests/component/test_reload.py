"""Settings that change while a role serves: taken over whole, refused whole, and told where they need a restart."""

from __future__ import annotations

import dataclasses
import secrets
import signal
from pathlib import Path

import pytest

from llorch.config import ControlSettings
from llorch.errors import ConfigError
from llorch.reload import Reloader, Source
from tests.cluster import Cluster, eventually


class Role:
    """What a role does with settings: takes them, unless it can't use them."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "settings"
        self.file.write_text("one")
        self.next = ControlSettings(log_level="debug")
        self.in_force: ControlSettings | None = None
        self.fails = False
        source = Source(self._read, (self.file, folder / "not there yet"))
        self.reloader = Reloader(ControlSettings(), source, ("log_level", "queue_limit"), self._apply)

    def _read(self) -> ControlSettings:
        if self.file.read_text() == "bad":
            raise ConfigError("1 fault in the settings")
        return self.next

    def _apply(self, settings: ControlSettings) -> None:
        if self.fails:
            raise ConfigError("the certificate can't be used")
        self.in_force = settings


async def test_nothing_is_read_again_while_nothing_has_changed(tmp_path: Path) -> None:
    role = Role(tmp_path)
    await role.reloader.step()
    assert role.in_force is None
    role.reloader.ask()
    await role.reloader.step()
    assert role.in_force is not None, "but when it is asked for"


@pytest.mark.parametrize("name", ["settings", "not there yet"])
async def test_a_file_that_changes_or_appears_is_read_and_what_can_change_does(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    caplog.set_level("INFO")
    role = Role(tmp_path)
    role.next = dataclasses.replace(role.next, queue_limit=7, data_dir="/elsewhere")
    (tmp_path / name).write_text("two two")
    await role.reloader.step()
    assert role.in_force == dataclasses.replace(ControlSettings(), log_level="debug", queue_limit=7)
    assert "settings.reloaded changed=log-level,queue-limit need_restart=data-dir" in caplog.text


async def test_what_can_not_be_used_changes_nothing_and_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    role = Role(tmp_path)
    role.file.write_text("bad")
    await role.reloader.step()
    role.fails = True
    role.file.write_text("good again")
    await role.reloader.step()
    assert role.in_force is None
    assert role.reloader.settings == ControlSettings()
    assert caplog.text.count("settings.refused") == 2
    assert "stays in force" in caplog.text


async def test_a_token_file_is_rotated_by_overlap_while_a_control_serves(llorch: Cluster) -> None:
    old, new = secrets.token_hex(20), secrets.token_hex(20)
    path = llorch.folder / "api.tokens"
    path.write_text(old)
    del llorch.tokens["LLORCH_API_TOKEN"]
    control = await llorch.start_control("--api-token-file", str(path))

    async def status(token: str) -> int:
        headers = {"Authorization": f"Bearer {token}"}
        async with llorch.session.get(f"{control.url}/v1/models", headers=headers) as response:
            return response.status

    assert (await status(old), await status(new)) == (200, 401)
    path.write_text(f"{old}\n{new}\n")
    await eventually(lambda: _is(status(new), 200), within_s=5)
    assert await status(old) == 200
    path.write_text("short")
    await eventually(lambda: "settings.refused" in control.text(), within_s=5)
    assert (await status(old), await status(new)) == (200, 200)
    path.write_text(new)
    control.process.send_signal(signal.SIGHUP)
    await eventually(lambda: _is(status(old), 401), within_s=5)
    assert await status(new) == 200
    for token in (old, new):
        assert token not in control.text()


async def _is(status: object, wanted: int) -> bool:
    return bool(await status == wanted)  # type: ignore[misc]
