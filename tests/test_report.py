"""The report shows what a run has, trusts none of its text and needs nothing from outside; and the
text of `raylign status`."""

from __future__ import annotations

import json
import math
import os
import re
import socket
import time
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster import report_charts as charts
from cluster.config import BadInput
from cluster.heartbeat import here
from cluster.metrics import METRICS
from cluster.report import write_report
from cluster.report_charts import Series
from cluster.report_layout import ALARMS, STYLE
from cluster.run_status import status

ATTACK = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)> &amp; \x1b[2J"
ROOT = Path(__file__).parents[1]
VOID = {"meta", "br", "img"}


class Page(HTMLParser):
    """Checks that tags nest, and collects what a browser would see."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_run(
    folder: Path, *, state: str = "finished", text: str = "hello", steps: int = 50
) -> Path:
    run, steps = folder / "demo", 50
    (run / "evaluation").mkdir(parents=True)
    (run / "checkpoints/step-000010").mkdir(parents=True)
    (run / "checkpoints/step-000010/manifest.json").write_text("{}")
    (run / "checkpoints/step-000020.partial").mkdir()
    (run / "checkpoints/step-000020.partial/manifest.json").write_text("{}")
    (run / "config.yaml").write_text(f"name: demo\nnote: {json.dumps(text)}\n")
    now = time.time()
    rows = [
        {"step": s, "time": now + s, **dict.fromkeys(METRICS, 1 + math.sin(s))}
        for s in range(1, steps + 1)
    ]
    write_lines(
        run / "metrics.jsonl", [{"step": 0, "time": now, "evaluation/win_rate": 0.5}, *rows]
    )
    write_lines(run / "events.jsonl", [
        {"time": now, "event": "run_started"},
        *({"time": now, "event": "weights_published", "version": v} for v in range(steps)),
        {"time": now, "event": "warning", "message": text},
    ])  # fmt: skip
    write_lines(run / "dropped.jsonl", [
        {"prompt_id": text, "epoch": 0, "sample_index": 1, "reason": "reward_failed", "time": now}
    ])  # fmt: skip
    write_status(run, state=state, step=steps, num_steps=60)
    for step, judge in ((0, 2.0), (50, 7.0)):
        write_evaluation(run, step, judge, text)
    return run


def write_status(run: Path, **values: Any) -> None:
    given = {"stage": "train", **here(), "updated_at": time.time(), "error": None}
    (run / "status.json").write_text(json.dumps({**given, **values}))


def write_evaluation(run: Path, step: int, judge: float, text: str) -> None:
    columns = {
        "prompt_id": [f"p{i}" for i in range(8)],
        "prompt": [f"{text} prompt {i}" for i in range(8)],
        "completion": [f"{text} completion of step {step}" for _ in range(8)],
        "judge_score": [judge + i / 10 for i in range(8)],
        "reward_score": pa.array([None] * 8, pa.float64()),
        "kl_to_ref": [float(step)] * 8,
        "finish_reason": ["stop"] * 8,
    }
    pq.write_table(pa.table(columns), run / f"evaluation/step-{step:06}.parquet")


def write_summary(run: Path, **values: Any) -> None:
    given = {
        "name": "demo", "stage": "train", "status": "finished", "steps": 50, "wall_s": 3671.0,
        "win_rate": 0.75, "win_rate_before": 0.5, "judge_before": 2.35, "judge_after": 7.35,
        "score_before": -1.0, "score_after": 1.5, "kl_to_ref": 4.25, "seed": 3,
        "first_token_s": 9.0, "samples": [], "versions": {"ray": "2.60.0"},
        "timing": {"generation": 30.0, "update": 10.0},
    }  # fmt: skip
    (run / "summary.json").write_text(json.dumps({**given, **values}))


def page(run: Path) -> Page:
    path = write_report(run)
    assert path == run / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def test_a_secret_that_html_writes_otherwise_is_hidden_and_the_page_stays_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "abc&def<ghi>12345")
    run = make_run(tmp_path, text="the hub said: abc&def<ghi>12345, Bearer abcdefgh")
    page = Page(write_report(run).read_text())
    assert "the hub said: ***" in page.text
    assert "def<ghi" not in page.text
    assert "abcdefgh" not in page.text


def test_a_finished_run_has_every_section(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    write_summary(run, samples=[{"prompt": "Why?", "before": "Eh.", "after": "Because.",
                                 "judge_before": 1.0, "judge_after": 9.0}])  # fmt: skip
    seen = page(run)
    for text in (
        "demo", "finished", "seed 3", "50% → 75%", "2.35 → 7.35", "-1 → 1.5", "4.25", "50 / 60",
        "1:01:11", "Progress", "PPO", "Clip fraction", "Explained variance", "Held-out comparison",
        "before, step 0", "after, step 50", "Why?", "Eh.", "Because.", "judge 9",
        "generation30 s75%",
        "warning", "and 50 weight sets published", "1 reward_failed", "name: demo", "ray 2.60.0",
    ):  # fmt: skip
        assert text in seen.text, text
    assert seen.tags.count("svg") > 20


def test_every_metric_is_drawn(tmp_path: Path) -> None:
    html = write_report(make_run(tmp_path)).read_text()
    described = {name: metric.description for name, metric in METRICS.items()}
    del described["reward/score_sd"]  # drawn as the band around the mean
    for description in described.values():
        assert escape(description) in html


def test_text_of_the_run_is_never_markup(tmp_path: Path) -> None:
    clean, attacked = tmp_path / "clean", tmp_path / "attacked"
    pages = []
    for folder, text in ((clean, "x"), (attacked, ATTACK)):
        run = make_run(folder, text=text)
        write_summary(run, samples=[dict.fromkeys(("prompt", "before", "after"), text)], name=text,
                      stage=text, seed=text, versions={text: text}, timing={text: 1.0})  # fmt: skip
        write_status(run, state=text, num_steps=text, error=text)
        pages.append(page(run))
    plain, seen = pages
    assert "script" not in seen.tags
    assert "img" not in seen.tags
    assert not [name for name, _ in seen.attributes if name.startswith("on")]
    assert "<script>alert(1)</script>" in seen.text  # to be read, not run
    assert "\x1b" not in seen.text
    assert seen.tags == plain.tags


def test_the_page_needs_nothing_from_outside_and_keeps_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_TOKEN", "very-secret-1")
    html = write_report(make_run(tmp_path, text="with very-secret-1")).read_text()
    assert "very-secret-1" not in html
    assert not re.search(r"\b(src|href|srcset|action)=|@import|url\(", html)
    assert "http" not in html


@pytest.mark.parametrize("keys", [
    {"sft/loss": 2.0, "sft/tokens_per_s": 800.0, "sft/lr": 1e-4},
    {"reward_model/loss": 0.6, "reward_model/accuracy": 0.7},
    {"an_older/name": 3.0},
    {"learner/value_loss": 0.0},
    {},
])  # fmt: skip
@pytest.mark.parametrize("steps", [0, 1, 2, 200])
def test_a_run_with_few_metrics_has_a_page_of_these(
    tmp_path: Path, keys: dict[str, float], steps: int
) -> None:
    (tmp_path / "config.yaml").write_text("name: x\n")
    rows = [{"step": s, "time": 0.0, **keys} for s in range(1, steps + 1)]
    write_lines(tmp_path / "metrics.jsonl", rows)
    seen = page(tmp_path)
    assert (seen.tags.count("svg") > 0) == bool(keys and steps)
    assert "Held-out" not in seen.text


@pytest.mark.parametrize("state", ["starting", "running", "failed", "stopped"])
def test_a_run_without_summary_shows_its_metrics(tmp_path: Path, state: str) -> None:
    seen = page(make_run(tmp_path, state=state))
    assert state in seen.text
    assert "50% → " in seen.text
    assert "completion of step 50" in seen.text


def test_a_report_is_written_again_over_the_old_one(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    write_report(run)
    write_status(run, state="failed", error="learner rank 1: gone")
    assert "learner rank 1: gone" in page(run).text
    assert not list(run.glob("*.tmp"))


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (-3, 8), (1e-7, 3e-7), (0, 123456789), (0.999, 1.001), (-5, -4.5)]
)
def test_ticks_are_few_round_and_inside(low: float, high: float) -> None:
    ticks = charts.ticks(low, high, 6)
    assert 3 <= len(ticks) <= 9
    assert low <= ticks[0]
    assert ticks[-1] <= high
    assert len({charts.number(tick) for tick in ticks}) == len(ticks) or high - low < 1e-2


def test_thinning_and_smoothing_keep_the_level_and_the_trend() -> None:
    line = [(float(x), 2.0 * x) for x in range(1000)]
    thin = charts.thin(line)
    assert len(thin) <= charts.MAX_POINTS
    assert all(y == pytest.approx(2 * x) for x, y in thin)
    assert all(y == pytest.approx(2 * x) for x, y in charts.smooth(line))


@pytest.mark.parametrize("values", [[0.0], [5.0] * 9, [1e-9, 2e-9], [-1.0, 1e6], [0.0] * 500])
def test_every_curve_stays_inside_its_frame(values: list[float]) -> None:
    drawn = charts.line_chart("t", "n", [Series("a", list(enumerate(values)))])
    for corner in " ".join(re.findall(r'points="([^"]*)"', drawn)).split():
        x, y = map(float, corner.split(","))
        assert charts.LEFT <= x <= charts.WIDTH - charts.RIGHT
        assert charts.TOP <= y <= charts.HEIGHT - charts.BOTTOM


def test_the_shares_of_a_histogram_sum_to_one() -> None:
    drawn = charts.histogram("t", "n", [("a", [1.0, 2.0, 2.0, 9.0]), ("b", [3.0])])
    shares = [float(share) for share in re.findall(r"a: ([\d.]+)% between", drawn)]
    assert sum(shares) == pytest.approx(100)
    assert charts.histogram("t", "n", [("a", [4.0, 4.0])]).count("100.0%") == 1


def test_status_tells_the_state_of_a_run(tmp_path: Path) -> None:
    run = make_run(tmp_path, state="running")
    text = status(run)
    assert text.startswith(
        f"demo: running, step 50/60 (train), process {os.getpid()} on {socket.gethostname()} alive, "
        "updated 0:0"
    )
    assert "checkpoints  step 10\n" in text
    assert "dropped      1 reward_failed" in text
    assert "last step    50 | score" in text
    assert "warning message=hello" in text
    assert "weights_published" not in text


def test_a_running_run_whose_process_is_gone_has_died(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    write_status(run, state="running", step=3, num_steps=60, pid=2**22 + 1)
    assert status(run).startswith(
        f"demo: died, step 3/60 (train), process 4194305 on {socket.gethostname()} gone"
    )
    # The same number, given to a process that began after the run's last word.
    write_status(run, state="running", step=3, num_steps=60, updated_at=1.0)
    assert status(run).startswith("demo: died")


def test_what_is_no_run_is_refused_in_one_line(tmp_path: Path) -> None:
    for refused in (status, write_report):
        with pytest.raises(BadInput, match="no such run"):
            refused(tmp_path / "nothing")
        with pytest.raises(BadInput, match="not a run"):
            refused(tmp_path)


def test_of_many_drops_the_most_common_reasons_are_told_and_how_many_others(
    tmp_path: Path,
) -> None:
    run = make_run(tmp_path)
    drops = [
        {"prompt_id": f"p{i}", "epoch": 0, "sample_index": 1, "time": 0.0,
         "reason": f"no score after 3 attempts: p{i}-e0-1: score is nan"}
        for i in range(5000)
    ]  # fmt: skip
    others = [{**drop, "reason": f"error {i} " + "x" * 999} for i, drop in enumerate(drops[:50])]
    write_lines(run / "dropped.jsonl", [*others, *drops])
    (line,) = [line for line in status(run).splitlines() if line.startswith("dropped")]
    told = "5000 no score after 3 attempts: score is nan, 1 error 0 xxx"
    assert line.removeprefix("dropped").strip().startswith(told)
    assert line.endswith("..., and 41 for other reasons")
    assert len(line) < 3000
    seen = page(run).text
    assert told in seen
    assert "and 41 for other reasons" in seen


def test_the_events_that_the_report_marks_are_ones_that_a_run_writes() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "cluster").glob("*.py"))
    written = set(re.findall(r'(?:event|on_event)\(\s*"(\w+)"', sources))
    assert {"generator_lost", "run_started"} <= written
    assert set(ALARMS) <= written
    assert "warning" in ALARMS
    for event in ALARMS:
        assert f"tr.{event} td" in STYLE
    assert {event for event in written if re.search("lost|failed|refused", event)} <= ALARMS
    assert set(re.findall(r"tr\.(\w+)", STYLE)) == ALARMS
