"""Long runs: does anything grow? Memory, file handles and shared memory after a warm-up, and at the end."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.chaos.faults import Hang
from tests.integration.runs import Workshop, read_lines

WARM_UP = 0.25  # of the steps: pools, caches and the first of everything
EVERY_S = 2.0
LIMIT_S = 1800.0


@dataclass(frozen=True)
class Sample:
    """All processes of the run together."""

    step: int
    resident_bytes: int  # private to them
    handles: int
    shared_bytes: int  # in shared memory: Ray's objects and the weights


def run(shop: Workshop) -> dict[str, float]:
    """Growth from the mean after the warm-up to the mean of the last quarter; 0.01 is 1 %."""
    small = {"max_model_len": 64, "kv_cache_bytes": 1 << 25, "max_num_seqs": 8}
    one = {"generators": {"count": 1, **small}, "learner": {"ranks": 1}}
    two = {"generators": {"count": 2, **small}, "learner": {"ranks": 2}, "max_staleness": 1}
    figures: dict[str, float] = {}
    for name, steps, changes, flags in (
        ("one_process", 1000, one, ("--in-process",)),
        ("ray", 200, two, ()),
    ):
        grown = _growth(_watched(shop, f"soak-{name}", steps, changes, flags))
        figures |= {f"{name}_{what}": growth for what, growth in grown.items()}
    return figures


def _watched(
    shop: Workshop, name: str, steps: int, changes: dict[str, Any], flags: tuple[str, ...]
) -> list[Sample]:
    scorer = {"kind": "function", "function": "examples.support_replies.judge:score"}
    config = shop.config(
        name=name,
        num_steps=steps,
        batch_size=8,
        sampling={"max_tokens": 8},
        prompts={"path": str(shop.folder / "data/prompts.parquet")},
        reward={"scorer": scorer},
        evaluation=None,
        checkpoint={"every": 20, "keep": 2},
        **changes,
    )
    log, run_dir = shop.folder / f"{name}.log", shop.runs / name
    process = shop.start("train", str(config), *flags, log=log)
    samples, deadline = [], time.monotonic() + LIMIT_S
    try:
        while process.poll() is None:
            if time.monotonic() > deadline:
                raise Hang(f"{name}: not done after {LIMIT_S:g} s")
            if step := len(read_lines(run_dir / "metrics.jsonl")):
                samples.append(_sample(process, step))
            time.sleep(EVERY_S)
    finally:
        process.kill()
    if process.returncode:
        raise Hang(f"{name} ended with {process.returncode}\n{log.read_text()[-3000:]}")
    return [sample for sample in samples if sample.step < steps]  # at its end it shrinks


def _sample(process: subprocess.Popen[str], step: int) -> Sample:
    resident = handles = 0
    try:
        driver = psutil.Process(process.pid)
        for one in [driver, *driver.children(recursive=True)]:
            memory = one.memory_info()
            resident += memory.rss - memory.shared
            handles += one.num_fds()
    except psutil.Error:
        pass
    shared = sum(
        path.stat().st_blocks * 512 for path in Path("/dev/shm").glob("*") if path.is_file()
    )
    return Sample(step, resident, handles, shared)


def _growth(samples: list[Sample]) -> dict[str, float]:
    last = samples[-1].step
    late = [sample for sample in samples if sample.step >= WARM_UP * last]
    quarter = max(1, len(late) // 4)
    found = {}
    for what in ("resident_bytes", "handles", "shared_bytes"):
        first, end = (
            sum(getattr(sample, what) for sample in part) / quarter
            for part in (late[:quarter], late[-quarter:])
        )
        print(f"  {what}: {first:,.0f} -> {end:,.0f} over steps {late[0].step} to {last}")
        found[f"{what}_growth"] = round(end / first - 1 if first else 0.0, 4)
    sys.stdout.flush()
    return found
