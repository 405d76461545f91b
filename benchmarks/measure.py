"""Run a command and watch it: what it printed, and the most memory its processes held together."""

from __future__ import annotations

import os
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

INTERVAL_S = 1.0
# Reading memory costs the system 0.1 s of CPU for a run of 14 processes: 1 % of two cores.
MEMORY_EVERY = 5


@dataclass
class Watched:
    started: float  # time.time()
    peak_bytes: int
    output: str
    cores: list[
        tuple[float, float, float]
    ]  # time.time(), and seconds idle and stolen, of all cores

    def idle_and_stolen(self, since: float, until: float) -> tuple[float, float]:
        """The shares of the cores' time in which they had nothing to do, and in which the machine below
        this virtual one ran something else: what a program cannot use. nan if it was not long enough."""
        inside = [one for one in self.cores if since <= one[0] <= until]
        if len(inside) < 2:
            return float("nan"), float("nan")
        (start, *before), (end, *after) = inside[0], inside[-1]
        seconds = (end - start) * (os.cpu_count() or 1)
        idle, stolen = ((b - a) / seconds for a, b in zip(before, after, strict=True))
        return idle, stolen


def watch(
    command: list[str], folder: Path, log: Path, limit_s: float, env: dict[str, str] | None = None
) -> Watched:
    """The command's output goes to `log`. A failure names it and shows its end."""
    log.parent.mkdir(parents=True, exist_ok=True)
    started, peak, seen = time.time(), 0, {}
    cores: list[tuple[float, float, float]] = []
    with log.open("w") as stream:
        process = subprocess.Popen(
            command, cwd=folder, env={**os.environ, **(env or {})}, stdout=stream, stderr=stream
        )
        try:
            while process.poll() is None and time.time() < started + limit_s:
                if len(cores) % MEMORY_EVERY == 0:
                    peak = max(peak, _memory(process.pid, seen))
                spent = psutil.cpu_times()
                cores.append((time.time(), spent.idle + spent.iowait, spent.steal))
                with suppress(subprocess.TimeoutExpired):
                    process.wait(INTERVAL_S)
        finally:
            _end(process, seen)
    if time.time() >= started + limit_s:
        raise TimeoutError(f"not done after {limit_s} s: {' '.join(command)}; see {log}")
    output = log.read_text(errors="replace")
    if process.returncode:
        raise RuntimeError(f"exit {process.returncode}: {' '.join(command)}\n{output[-3000:]}")
    return Watched(started, peak, output, cores)


def _memory(pid: int, seen: dict[int, psutil.Process]) -> int:
    """The proportional set sizes of the process and all below it: shared pages count once."""
    total = 0
    try:
        root = psutil.Process(pid)
        for process in [root, *root.children(recursive=True)]:
            seen[process.pid] = process
            total += _share(process)
    except psutil.Error:  # it ended meanwhile
        pass
    return total


def _share(process: psutil.Process) -> int:
    try:
        return process.memory_full_info().pss
    except psutil.Error:
        return 0


def _end(process: subprocess.Popen[bytes], seen: dict[int, psutil.Process]) -> None:
    """Nothing that was started stays behind: it would slow down what is measured next."""
    left = [child for child in seen.values() if child.is_running()]
    if process.poll() is None:
        for child in left:
            child.terminate()
    _, alive = psutil.wait_procs(left, timeout=10)
    for child in alive:
        child.kill()
    process.wait()
