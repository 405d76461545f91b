"""Two drivers never are in one run folder: not even between a check and what it allows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster import heartbeat
from cluster.config import BadInput, RewardRunConfig, RunConfig
from cluster.config_file import load_config
from cluster.run_files import RunFiles
from cluster.run_lock import one_driver
from cluster.stages import run_reward_model
from tests import tiny

HOLD = """
import sys, time
from pathlib import Path
from cluster.run_lock import one_driver
with one_driver(Path(sys.argv[1])):
    print("has it", flush=True)
    time.sleep(60)
"""


def held(run_dir: Path) -> subprocess.Popen[str]:
    """By another process."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run_dir)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "has it\n"
    return process


def test_a_second_driver_is_refused_and_told_of_the_first_until_that_has_died(
    tmp_path: Path,
) -> None:
    run = tmp_path / "runs/demo"
    first = held(run)
    with pytest.raises(BadInput, match=f"process {first.pid} on .* stop it first"), one_driver(run):
        pass
    first.kill()
    first.wait()
    with one_driver(run):
        pass


def test_other_names_are_other_runs_and_other_paths_are_not(tmp_path: Path) -> None:
    run = tmp_path / "runs/demo"
    run.mkdir(parents=True)
    link = tmp_path / "link"
    link.symlink_to(run)
    mine = pytest.raises(BadInput, match=f"process {os.getpid()} on")
    with one_driver(run), one_driver(run.with_name("other")), mine, one_driver(link):
        pass
    with one_driver(link):
        pass


def test_nothing_is_left_and_where_nothing_can_be_written_nothing_is_refused(
    tmp_path: Path,
) -> None:
    with one_driver(tmp_path / "demo"):
        assert [path.name for path in tmp_path.iterdir()] == [".demo.lock"]
    with one_driver(tmp_path / "runs/demo"):
        pass
    assert list(tmp_path.iterdir()) == []
    with one_driver(tmp_path / "runs/demo"):
        (tmp_path / "runs/demo").mkdir()
    assert (tmp_path / "runs/demo").is_dir()
    (tmp_path / "file").write_text("")
    with one_driver(tmp_path / "file/demo"):
        pass


def test_what_is_removed_is_looked_at_once_more(tmp_path: Path) -> None:
    """Where there are no locks another driver may come between check and create."""
    yaml = tiny.write_yaml(tmp_path / "run.yaml", tiny.run_tree(tmp_path))
    config = load_config(yaml, [], RunConfig)
    RunFiles(config).create(overwrite=False)
    late = RunFiles(config)
    late.check(resume=False, overwrite=True)
    RunFiles(config).status("running", pid=os.getppid())
    with pytest.raises(BadInput, match=f"process {os.getppid()} on .* stop it first"):
        late.create(overwrite=True)
    assert (config.run_dir / "config.yaml").exists()


def test_a_stage_is_refused_as_well(tmp_path: Path) -> None:
    config = RewardRunConfig.model_validate(
        {"stage": "reward_model", "name": "demo", "runs_dir": str(tmp_path), "model": "none",
         "training": {"pairs": "none", "batch_size": 1}}
    )  # fmt: skip
    with one_driver(config.run_dir), pytest.raises(BadInput, match="stop it first"):
        run_reward_model(config, overwrite=False)


def test_a_stage_beats_while_its_thread_is_at_work(tmp_path: Path) -> None:
    yaml = tiny.write_yaml(tmp_path / "run.yaml", tiny.run_tree(tmp_path))
    files = RunFiles(load_config(yaml, [], RunConfig))
    files.create(overwrite=False)
    files.status("running", step=1)
    with files.beating(0.01):
        beats, deadline = set(), time.monotonic() + 10
        while len(beats) < 3 and time.monotonic() < deadline:
            status = json.loads((files.folder / heartbeat.STATUS).read_text())
            beats.add(status.get("heartbeat_at"))
            files.status("running", step=2)
    assert len(beats) >= 3
    assert (status["state"], status["pid"]) == ("running", os.getpid())
