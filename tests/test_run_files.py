"""The run folder: never another run's, always readable, and withdrawn to a checkpoint exactly."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from actors.scored import Dropped
from cluster.checkpoints import run_id
from cluster.config import BadInput, RunConfig
from cluster.config_file import load_config
from cluster.dropped import rolled_out, too_long
from cluster.report import write_report
from cluster.run_files import RunFiles
from cluster.run_status import status as status_of
from tests import tiny


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    path = tiny.write_yaml(tmp_path / "run.yaml", tiny.run_tree(tmp_path))
    return load_config(path, [], RunConfig)


@pytest.fixture
def files(config: RunConfig) -> RunFiles:
    """Of a run that has just begun."""
    made = RunFiles(config)
    made.check(resume=False, overwrite=False)
    made.create(overwrite=False)
    return made


def lines(files: RunFiles, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (files.folder / name).read_text().splitlines()]


def test_the_config_that_is_written_is_the_one_that_runs(
    files: RunFiles, config: RunConfig
) -> None:
    assert load_config(files.folder / "config.yaml", [], RunConfig) == config


def test_nothing_is_written_by_checking(config: RunConfig) -> None:
    RunFiles(config).check(resume=False, overwrite=False)
    assert not config.run_dir.exists()


@pytest.mark.parametrize(
    ("there", "flags", "said"),
    [
        (True, {}, "there is a run already; --resume"),
        (False, {"resume": True}, "no run to resume"),
        (True, {"resume": True, "overwrite": True}, "give one of the two"),
        (False, {"resume": True, "overwrite": True}, "give one of the two"),
    ],
)
def test_a_run_is_neither_overwritten_nor_resumed_by_accident(
    config: RunConfig, there: bool, flags: dict[str, bool], said: str
) -> None:
    files = RunFiles(config)
    if there:
        files.create(overwrite=False)
    with pytest.raises(BadInput, match=said):
        files.check(**{"resume": False, "overwrite": False} | flags)


@pytest.mark.parametrize("flag", ["resume", "overwrite"])
def test_a_run_that_is_there_can_be_resumed_or_overwritten(files: RunFiles, flag: str) -> None:
    files.check(**{"resume": False, "overwrite": False} | {flag: True})


def test_overwriting_leaves_nothing_of_the_earlier_run(files: RunFiles) -> None:
    (files.folder / "checkpoints/step-000001").mkdir(parents=True)
    files.event("run_started")
    files.create(overwrite=True)
    assert {path.name for path in files.folder.iterdir()} == {"config.yaml", "run_id"}


def test_a_runs_id_stays_when_it_is_resumed_and_is_a_new_ones_when_it_is_overwritten(
    files: RunFiles,
) -> None:
    own = run_id(files.folder)
    assert own.startswith("tiny-")
    files.create(overwrite=False)
    assert run_id(files.folder) == own
    files.create(overwrite=True)
    assert run_id(files.folder) not in ("", own)


def test_a_folder_that_cannot_be_written_is_bad_input(config: RunConfig) -> None:
    config.run_dir.parent.write_text("a file")
    with pytest.raises(BadInput, match="cannot write there"):
        RunFiles(config).create(overwrite=False)


def test_a_status_keeps_the_facts_that_are_not_given_anew(files: RunFiles) -> None:
    files.status("running", step=3, num_steps=9)
    files.status("failed", error="generator-1: gone")
    status = json.loads((files.folder / "status.json").read_text())
    assert (status["state"], status["step"], status["num_steps"]) == ("failed", 3, 9)
    assert (status["pid"], status["stage"]) == (os.getpid(), "train")
    assert not list(files.folder.glob("*.partial"))


@pytest.mark.parametrize("left", ["", '{"state": "runn', "[]"])
def test_a_status_that_a_machines_failure_left_unreadable_hinders_nothing(
    files: RunFiles, left: str
) -> None:
    for name in ("status.json", "summary.json"):
        (files.folder / name).write_text(left)
    files.check(resume=True, overwrite=False)
    assert status_of(files.folder).startswith("tiny: unknown")
    assert write_report(files.folder).is_file()


def test_a_drop_is_a_line_a_sample_and_what_was_too_long_is_in_no_epoch(files: RunFiles) -> None:
    assert files.num_dropped() == 0
    files.dropped(rolled_out(Dropped("p3", 2, "no score: 503"), samples=3))
    files.dropped([too_long("p9")])
    assert files.num_dropped() == 4
    *samples, long = lines(files, "dropped.jsonl")
    assert [(r["prompt_id"], r["epoch"], r["sample_index"]) for r in samples] == [
        ("p3", 2, i) for i in range(3)
    ]
    assert (long["prompt_id"], long["epoch"], long["sample_index"]) == ("p9", None, None)


def ran_to(files: RunFiles, step: int) -> None:
    """What a run leaves that dropped one sample in each step."""
    (files.folder / "trajectories").mkdir(exist_ok=True)
    for number in range(1, step + 1):
        (files.folder / f"trajectories/step-{number:06d}.parquet").write_bytes(b"rows")
        files.event("weights_published", step=number)
        files.dropped(rolled_out(Dropped(f"p{number}", 0, "503"), samples=1))


def test_rewinding_withdraws_what_came_after_the_checkpoint_and_nothing_else(
    files: RunFiles,
) -> None:
    files.event("run_started")
    ran_to(files, 5)
    files.rewind(3, num_dropped=3)
    left = sorted(path.name for path in (files.folder / "trajectories").iterdir())
    assert left == [f"step-{i:06d}.parquet" for i in (1, 2, 3)]
    assert [event.get("step", 0) for event in lines(files, "events.jsonl")] == [0, 1, 2, 3]
    assert [row["prompt_id"] for row in lines(files, "dropped.jsonl")] == ["p1", "p2", "p3"]


@pytest.mark.parametrize("name", ["events.jsonl", "dropped.jsonl"])
def test_a_line_that_a_kill_cut_short_does_not_hinder_going_on(files: RunFiles, name: str) -> None:
    ran_to(files, 2)
    with (files.folder / name).open("a") as file:
        file.write('{"time": 1.0, "ev')
    files.rewind(2, num_dropped=2)
    files.event("resumed", step=2)
    assert [e["event"] for e in lines(files, "events.jsonl")] == ["weights_published"] * 2 + [
        "resumed"
    ]
    assert len(lines(files, "dropped.jsonl")) == 2


def test_starting_over_forgets_an_attempt_without_a_checkpoint(files: RunFiles) -> None:
    assert files.start_over() is None
    ran_to(files, 2)
    assert files.start_over() == -1
    assert list((files.folder / "trajectories").iterdir()) == []
    assert files.num_dropped() == 0
    assert not (files.folder / "events.jsonl").exists()
