"""python -m cluster.core_rate HIDDEN MLP ROWS ...: operations a second of one core, on products of that many
rows. A process of its own, because the number of threads is fixed when numpy is loaded."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

MEASURE_S = 0.1
TIMEOUT_S = 60.0
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


def core_rates(hidden: int, mlp: int, rows: list[int]) -> list[float]:
    """The best of some tries: what else runs here only makes one slower."""
    words = [sys.executable, "-m", "cluster.core_rate", *map(str, (hidden, mlp, *rows))]
    done = subprocess.run(
        words,
        env={**os.environ, **ONE_THREAD},
        cwd=Path(__file__).resolve().parents[1],  # `-m` looks for modules there, before all others
        capture_output=True,
        text=True,
        check=True,
        timeout=TIMEOUT_S,
    )
    return [float(word) for word in done.stdout.split()]


def _rate(hidden: int, mlp: int, rows: int) -> float:
    import numpy as np

    left, right = np.ones((rows, hidden), np.float32), np.ones((hidden, mlp), np.float32)
    best, until = float("inf"), time.perf_counter() + MEASURE_S
    while best == float("inf") or time.perf_counter() < until:
        started = time.perf_counter()
        np.matmul(left, right)
        best = min(best, time.perf_counter() - started)
    return 2.0 * rows * hidden * mlp / best


if __name__ == "__main__":
    hidden, mlp, *given = map(int, sys.argv[1:])
    print(*(_rate(hidden, mlp, rows) for rows in given))
