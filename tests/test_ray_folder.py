"""The folder of a Ray of our own: nobody else's, and none is left of drivers that are gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import ray_folder
from cluster.config import BadInput
from cluster.ray_folder import RayFolder

HOLDS_ONE = """
import time
from cluster.ray_folder import RayFolder
print(RayFolder().path, flush=True)
time.sleep(60)
"""


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Not pytest's own: their paths are too long for a socket."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        monkeypatch.setenv("RAY_TMPDIR", folder)
        yield Path(folder)


def made_by_another(base: Path) -> tuple[subprocess.Popen[str], Path]:
    driver = subprocess.Popen(
        [sys.executable, "-c", HOLDS_ONE], stdout=subprocess.PIPE, text=True, cwd=os.getcwd()
    )
    assert driver.stdout is not None
    inner = Path(driver.stdout.readline().strip())
    inner.mkdir()
    (inner / "a socket").touch()
    return driver, inner.parent


def test_only_its_user_can_enter_even_where_ray_opens_what_it_is_given(base: Path) -> None:
    folder = RayFolder()
    assert Path(folder.path).parent.parent == base
    assert Path(folder.path).parent.stat().st_mode & 0o777 == 0o700
    assert not Path(folder.path).exists()  # so what Ray makes, and opens, is not that one
    folder.remove()
    assert not [*base.iterdir()]


def test_that_of_a_driver_that_was_killed_goes_and_that_of_a_living_one_stays(base: Path) -> None:
    driver, folder = made_by_another(base)
    RayFolder().remove()
    assert (folder / "r/a socket").exists()
    driver.send_signal(signal.SIGKILL)
    driver.wait(10)
    RayFolder().remove()
    assert not [*base.iterdir()]


def test_folders_that_only_share_the_name_stay(base: Path) -> None:
    (base / "raylign-notes").mkdir()
    (base / "raylign-notes/kept").touch()
    elsewhere = base / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "driver").touch()
    (base / "raylign-link").symlink_to(elsewhere)
    RayFolder().remove()
    assert (base / "raylign-notes/kept").exists()
    assert (elsewhere / "driver").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make another user's folder")
def test_that_of_another_user_stays(base: Path) -> None:
    theirs = base / "raylign-theirs"
    theirs.mkdir()
    (theirs / "driver").touch()
    os.chown(theirs, 1234, 1234)
    RayFolder().remove()
    assert (theirs / "driver").exists()


def test_a_socket_in_it_has_a_path_that_the_kernel_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/tmp/" + "a-long-way-down/" * 4)
    os.makedirs(os.environ["RAY_TMPDIR"], exist_ok=True)
    try:
        folder = RayFolder()
    finally:
        os.removedirs(os.environ["RAY_TMPDIR"])
    session = "session_2026-11-29_10-37-42_707263_4194304/sockets/plasma_store"
    assert len(f"{folder.path}/{session}") <= 107
    folder.remove()


def test_without_a_short_folder_that_can_be_written_to_the_fix_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray_folder, "_is_fit", lambda _: False)
    with pytest.raises(BadInput, match=r"RAY_TMPDIR.*set it"):
        RayFolder()
