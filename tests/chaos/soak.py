"""Long runs: does anything grow? Memory, file handles, shared memory, Ray's object store and the disk,
after a warm-up and at the end.

What grows by design is no part of it: trajectories, metrics, events and TensorBoard's files.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.chaos.faults import Hang, end
from tests.integration.runs import Workshop, read_lines

WARM_UP = 0.25  # of the steps: pools, caches and the first of everything
EVERY_S = 2.0
LIMIT_S = 1800.0
GROW = ("trajectories", "tensorboard", "metrics.jsonl", "events.jsonl", "dropped.jsonl")
# Ray keeps what is smaller in its processes: as small as the batches are here, nothing would reach the store.
ALL_IN_STORE = {"RAY_max_direct_call_object_size": "1024"}
WHAT = ("resident_bytes", "handles", "shared_bytes", "store_bytes", "disk_bytes")


@dataclass(frozen=True)
class Sample:
    """All processes of the run together."""

    step: int
    resident_bytes: int  # private to them
    handles: int
    shared_bytes: int  # in shared memory, by name: the weights
    store_bytes: int  # of Ray's objects
    disk_bytes: int  # of the run's folder, but for what grows by design


def run(shop: Workshop) -> dict[str, float]:
    """Growth from the mean after the warm-up to the mean of the last quarter; 0.01 is 1 %."""
    small = {"max_model_len": 64, "kv_cache_bytes": 1 << 25, "max_num_seqs": 8}
    one = {"generators": {"count": 1, **small}, "learner": {"ranks": 1}}
    two = {"generators": {"count": 2, **small}, "learner": {"ranks": 2}, "max_staleness": 1}
    os.environ |= {**ALL_IN_STORE, "RAY_AUTH_MODE": "disabled"}
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
    samples, deadline, store = [], time.monotonic() + LIMIT_S, _Store(process)
    try:
        while process.poll() is None:
            if time.monotonic() > deadline:
                raise Hang(f"{name}: not done after {LIMIT_S:g} s")
            if step := len(read_lines(run_dir / "metrics.jsonl")):
                with contextlib.suppress(
                    Exception
                ):  # a process ended meanwhile, as all do at its end
                    samples.append(_sample(process, step, store.used_bytes(), run_dir))
            time.sleep(EVERY_S)
    finally:
        end(process)
    if process.returncode:
        raise Hang(f"{name} ended with {process.returncode}\n{log.read_text()[-3000:]}")
    return [sample for sample in samples if sample.step < steps]  # at its end it shrinks


class _Store:
    """Ray's object store, as its raylet tells of it to whoever asks; nothing without a Ray.

    The raylet is asked itself: a client of Ray's in this process would end it with the run's Ray.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._port = 0

    def used_bytes(self) -> int:
        if self._port:
            return _store_bytes(self._port)
        for port in self._ports():
            with contextlib.suppress(Exception):  # it listens on another one for other things
                used = _store_bytes(port)
                self._port = port
                return used
        return 0

    def _ports(self) -> list[int]:
        below = psutil.Process(self._process.pid).children(recursive=True)
        sockets = [
            s for child in below if child.name() == "raylet" for s in child.net_connections()
        ]
        return [socket.laddr.port for socket in sockets if socket.status == psutil.CONN_LISTEN]


def _store_bytes(port: int) -> int:
    from ray._private.internal_api import get_memory_info_reply

    reply = get_memory_info_reply(None, "127.0.0.1", port, timeout_seconds=5.0)
    used: int = reply.store_stats.object_store_bytes_used
    return used


def _sample(process: subprocess.Popen[str], step: int, store_bytes: int, run_dir: Path) -> Sample:
    resident = handles = 0
    driver = psutil.Process(process.pid)
    for one in [driver, *driver.children(recursive=True)]:
        memory = one.memory_info()
        resident += memory.rss - memory.shared
        handles += one.num_fds()
    shared = sum(
        path.stat().st_blocks * 512 for path in Path("/dev/shm").glob("*") if path.is_file()
    )
    return Sample(step, resident, handles, shared, store_bytes, _disk_bytes(run_dir))


def _disk_bytes(run_dir: Path) -> int:
    total = 0
    for path in run_dir.rglob("*"):
        parts = path.relative_to(run_dir).parts
        # What is being written is there for a moment, and counts once it is whole.
        if parts[0] in GROW or any(part.endswith(".partial") for part in parts):
            continue
        with contextlib.suppress(OSError):
            total += path.stat().st_size if path.is_file() else 0
    return total


def _growth(samples: list[Sample]) -> dict[str, float]:
    last = samples[-1].step
    late = [sample for sample in samples if sample.step >= WARM_UP * last]
    quarter = max(1, len(late) // 4)
    found = {}
    for what in WHAT:
        first, end = (
            sum(getattr(sample, what) for sample in part) / quarter
            for part in (late[:quarter], late[-quarter:])
        )
        print(f"  {what}: {first:,.0f} -> {end:,.0f} over steps {late[0].step} to {last}")
        found[f"{what}_growth"] = round(end / first - 1 if first else 0.0, 4)
    sys.stdout.flush()
    return found
