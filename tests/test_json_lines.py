"""A line is in a JSONL file whole or not at all: whatever the disk does, and whoever died."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cluster import json_lines
from cluster.config import RunConfig
from cluster.config_file import load_config
from cluster.metrics_writer import MetricsWriter
from cluster.run_files import RunFiles
from tests import tiny


@contextmanager
def full(path: Path) -> Iterator[None]:
    """Of what is written the kernel takes ten bytes, and then refuses, as on a disk that fills up."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "rows.jsonl"


def test_what_is_appended_is_read(path: Path) -> None:
    assert json_lines.read(path) == []
    assert json_lines.count(path) == 0
    for number in range(3):
        json_lines.append(path, {"n": number, "text": "é\n"})
    assert [row["n"] for row in json_lines.read(path)] == [0, 1, 2]
    assert json_lines.count(path) == 3


def test_a_line_that_the_disk_takes_a_part_of_leaves_nothing(path: Path) -> None:
    json_lines.append(path, {"n": 0})
    with full(path):
        json_lines.append(path, {"n": 1, "text": "x" * 100})
    assert json_lines.read(path) == [{"n": 0}]
    json_lines.append(path, {"n": 2})
    assert json_lines.read(path) == [{"n": 0}, {"n": 2}]


@pytest.mark.parametrize("torn", ['{"n": 1, "te', '{"text": "' + "x" * 3 * json_lines.BLOCK])
@pytest.mark.parametrize("before", ['{"n": 0}\n', ""])
def test_a_line_that_a_writer_left_unfinished_is_passed_over_and_then_removed(
    path: Path, before: str, torn: str
) -> None:
    path.write_text(before + torn)
    there = [{"n": 0}] if before else []
    assert json_lines.read(path) == there
    assert json_lines.count(path) == len(there)
    json_lines.append(path, {"n": 2})
    assert json_lines.read(path) == [*there, {"n": 2}]


def test_what_is_kept_stays_as_it_was_written(path: Path) -> None:
    path.write_text('{"n":0}\n{ "n": 1 }\n{"n": 2}\n{"n"')
    assert json_lines.keep(path, lambda place, row: place == row["n"] == 1) == [{"n": 1}]
    assert path.read_text() == '{ "n": 1 }\n'
    assert json_lines.keep(path.with_name("none"), lambda *_: True) == []
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_line_that_is_not_json_is_named(path: Path) -> None:
    path.write_text('{"n": 1}\n{"n"\n{"n": 3}\n')
    for reading in (lambda: json_lines.read(path), lambda: json_lines.keep(path, lambda *_: True)):
        with pytest.raises(ValueError, match=r"rows\.jsonl, line 2: not JSON"):
            reading()


def test_a_run_whose_disk_was_full_for_a_moment_can_be_resumed(tmp_path: Path) -> None:
    yaml = tiny.write_yaml(tmp_path / "run.yaml", tiny.run_tree(tmp_path))
    files = RunFiles(load_config(yaml, [], RunConfig))
    files.create(overwrite=False)
    files.event("run_started")
    metrics = MetricsWriter(files.folder)
    metrics.write(1, {"learner/entropy": 1.0})
    with full(files.folder / "events.jsonl"):
        files.event("checkpoint_failed", step=1)
    with full(files.folder / "metrics.jsonl"):
        metrics.write(2, {"learner/entropy": 1.0})
    metrics.write(2, {"learner/entropy": 2.0})
    files.event("checkpoint_saved", step=2)
    metrics.close()
    files.rewind(2, 0)
    MetricsWriter(files.folder, resume_step=2).close()
    told = [event["event"] for event in json_lines.read(files.folder / "events.jsonl")]
    assert told == ["run_started", "checkpoint_saved"]
    assert [row["step"] for row in json_lines.read(files.folder / "metrics.jsonl")] == [1, 2]
