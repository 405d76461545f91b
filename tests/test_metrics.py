"""Metrics: known names, finite numbers, one line a step, and after a resume one truth."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cluster.config import BadInput
from cluster.json_lines import read as read_json_lines
from cluster.metrics import (
    FAMILIES,
    METRICS,
    markdown_table,
    reduce_ranks,
)
from cluster.metrics_writer import MetricsWriter, RayMetricsSink


class ListSink:
    def __init__(self) -> None:
        self.seen: list[tuple[int, Mapping[str, float]]] = []
        self.closed = False

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self.seen.append((step, metrics))

    def close(self) -> None:
        self.closed = True


def steps(run: Path) -> list[int]:
    return [row["step"] for row in read_json_lines(run / "metrics.jsonl")]


def tensorboard(run: Path) -> EventAccumulator:
    return EventAccumulator(str(run / "tensorboard")).Reload()


def test_a_line_is_there_as_soon_as_it_is_written(tmp_path: Path) -> None:
    sink = ListSink()
    with MetricsWriter(tmp_path, sinks=[sink]) as writer:
        row = writer.write(1, {"reward/score_mean": np.float32(0.5), "staleness/max": np.int64(2)})
        assert read_json_lines(tmp_path / "metrics.jsonl") == [row]
        assert {"step": 1, "reward/score_mean": 0.5, "staleness/max": 2}.items() <= row.items()
    assert sink.seen == [(1, {"reward/score_mean": 0.5, "staleness/max": 2})]
    assert sink.closed


def test_every_known_name_is_written_and_described(tmp_path: Path) -> None:
    names = [*METRICS, *(f"{prefix}politeness" for prefix in FAMILIES)]
    with MetricsWriter(tmp_path) as writer:
        writer.write(0, dict.fromkeys(names, 1.0))
    assert set(tensorboard(tmp_path).Tags()["scalars"]) == set(names)
    table = markdown_table().splitlines()
    assert len(table) == 2 + len(METRICS) + len(FAMILIES)
    assert all(line.count("|") == 4 for line in table)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("learner/polcy_loss", "did you mean learner/policy_loss"),
        ("reward/part/", "unknown metric"),
        ("kl", "unknown metric kl"),
    ],
)
def test_an_unknown_name_is_an_error_that_names_the_nearest(
    tmp_path: Path, name: str, message: str
) -> None:
    with MetricsWriter(tmp_path) as writer, pytest.raises(ValueError, match=message):
        writer.write(1, {name: 1.0})
    with pytest.raises(ValueError, match=message):
        reduce_ranks([{name: 1.0}])


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -math.inf, np.float32("nan"), None, "1", True]
)
def test_what_is_no_finite_number_is_an_error_that_names_the_metric(
    tmp_path: Path, value: Any
) -> None:
    with MetricsWriter(tmp_path) as writer:
        with pytest.raises(ValueError, match="metric learner/entropy is"):
            writer.write(1, {"reward/score_mean": 1.0, "learner/entropy": value})
        assert steps(tmp_path) == []


def test_a_step_has_one_line(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.write(3, {})
        for step in (2, 3):
            with pytest.raises(ValueError, match="come after those of step 3"):
                writer.write(step, {})


@pytest.mark.parametrize("resume_step", [-1, 0, 2, 5])
def test_a_resumed_run_has_the_lines_of_a_run_that_never_stopped(
    tmp_path: Path, resume_step: int
) -> None:
    with MetricsWriter(tmp_path) as writer:
        for step in range(6):
            writer.write(step, {"learner/entropy": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "learner/ent')  # killed while writing
    with MetricsWriter(tmp_path, resume_step=resume_step) as writer:
        for step in range(resume_step + 1, 8):
            writer.write(step, {"learner/entropy": 2.0})
    rows = read_json_lines(tmp_path / "metrics.jsonl")
    expected = [(step, 1.0 if step <= resume_step else 2.0) for step in range(8)]
    assert [(row["step"], row["learner/entropy"]) for row in rows] == expected
    shown = tensorboard(tmp_path).Scalars("learner/entropy")
    assert [(event.step, event.value) for event in shown] == expected


def test_a_new_run_does_not_mix_with_an_old_one(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {})
    with pytest.raises(BadInput, match="earlier run"):
        MetricsWriter(tmp_path)
    assert steps(tmp_path) == [1]


def test_ranks_are_reduced_by_the_table() -> None:
    ranks = [
        {"learner/entropy": 1.0, "weights/bytes": 10, "learner/peak_memory_bytes": 7},
        {"learner/entropy": 3.0, "weights/bytes": 20, "learner/peak_memory_bytes": 5,
         "learner/kl_coef": 0.1},
        {"learner/kl_coef": 0.2},
    ]  # fmt: skip
    assert reduce_ranks(ranks) == {
        "learner/entropy": 2.0,
        "weights/bytes": 30,
        "learner/peak_memory_bytes": 7,
        "learner/kl_coef": 0.2,
    }
    assert reduce_ranks(ranks[:1]) == ranks[0]
    assert reduce_ranks([]) == {}


def test_gauges_of_ray_carry_the_run_as_a_tag(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, float, dict[str, str]]] = []

    class Gauge:
        def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
            assert description
            assert tag_keys == ("run",)
            self.name = name

        def set(self, value: float, tags: dict[str, str]) -> None:
            told.append((self.name, value, tags))

    sink = RayMetricsSink("demo")
    monkeypatch.setattr(sink, "_gauge", Gauge)
    sink.write(1, {"learner/policy_loss": 0.5, "reward/part/no-emoji é": 1.0})
    sink.write(2, {"learner/policy_loss": 0.25})
    assert told == [
        ("raylign_learner_policy_loss", 0.5, {"run": "demo"}),
        ("raylign_reward_part_no_emoji__", 1.0, {"run": "demo"}),
        ("raylign_learner_policy_loss", 0.25, {"run": "demo"}),
    ]


def test_these_modules_import_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from cluster import audit, live_view, metrics, report, run_status\n"
        "heavy = {'torch', 'ray', 'vllm', 'transformers', 'tensorflow', 'tensorboard'}\n"
        "print(sorted(heavy & sys.modules.keys()))"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_lines_are_json_of_one_level(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"learner/entropy": 1.0})
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert all(isinstance(value, int | float) for value in json.loads(line).values())
