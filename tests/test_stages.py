"""A stage that is stopped or fails says so, how far it came, and ends with the code that tells it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.config import RunConfig
from cluster.config_file import load_config
from cluster.heartbeat import STATUS
from cluster.run_files import RunFiles
from cluster.stages import _Progress
from tests import tiny


@pytest.fixture
def progress(tmp_path: Path) -> Iterator[_Progress]:
    """Of a stage whose host is Ray: with its handlers of signals."""
    config = load_config(
        tiny.write_yaml(tmp_path / "run.yaml", tiny.run_tree(tmp_path)), [], RunConfig
    )
    files = RunFiles(config)
    files.create(overwrite=False)
    before = {
        number: signal.signal(number, lambda number, _: sys.exit(number))
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    yield _Progress(config, files)
    for number, handler in before.items():
        signal.signal(number, handler)


def status(tmp_path: Path) -> dict[str, Any]:
    return json.loads((tmp_path / "runs/tiny" / STATUS).read_text())


def in_this_thread(progress: _Progress, number: int) -> None:
    with progress:
        progress.step(1, 9, {"sft/loss": 1.0})
        os.kill(os.getpid(), number)


def in_a_loop(progress: _Progress, number: int) -> None:
    async def stage() -> None:
        with progress:
            progress.step(1, 9, {"sft/loss": 1.0})
            asyncio.get_running_loop().call_later(0.1, os.kill, os.getpid(), number)
            await asyncio.sleep(20)

    asyncio.run(stage())


@pytest.mark.parametrize("how", [in_this_thread, in_a_loop])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_a_stage(
    progress: _Progress, tmp_path: Path, how: Any, number: signal.Signals,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        how(progress, number)
    assert ended.value.code == 128 + number
    said = status(tmp_path)
    assert (said["state"], said["step"], said["num_steps"]) == ("stopped", 1, 9)
    assert "error" not in said
    assert f"stopped by {number.name} after 1 steps" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        os.kill(os.getpid(), number)
    assert ended.value.code == number  # as it was before


def fail(progress: _Progress) -> None:
    with progress:
        progress.step(3, 9, {"sft/loss": 1.0})
        raise AssertionError


def test_a_failure_is_told_with_its_step_and_never_without_a_name(
    progress: _Progress, tmp_path: Path
) -> None:
    with pytest.raises(AssertionError):
        fail(progress)
    said = status(tmp_path)
    assert (said["state"], said["step"], said["error"]) == ("failed", 3, "AssertionError")
