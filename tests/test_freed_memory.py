"""A learner on CPU takes the memory of large tensors from the kernel once, not at each use."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from learner.learner_spec import LEARNER_ENV

COUNT = """
import resource
import torch
from learner.freed_memory import keep_freed_memory

def faults(times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.ones(12 << 20)  # 48 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults(5)
keep_freed_memory()
faults(10)
print(before, faults(5))
"""


def test_large_tensors_reuse_what_others_of_their_size_have_freed() -> None:
    done = subprocess.run(
        [sys.executable, "-c", COUNT],
        env=LEARNER_ENV,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    before, after = map(int, done.stdout.split())
    assert before > 5 * 24  # huge pages
    assert after < before / 5
