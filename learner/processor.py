"""What the processor is, as far as it decides how the learner computes. Imports no torch."""

from __future__ import annotations

import functools
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
SLOW_WITH_MKL = ("AuthenticAMD", "HygonGenuine")


@functools.cache
def slow_with_mkl() -> bool:
    """Whether MKL, by which torch multiplies float32, does less than half of what it could."""
    return CPUINFO.exists() and any(vendor in CPUINFO.read_text() for vendor in SLOW_WITH_MKL)
