"""The reward of a program: the share of its cases in which it prints what it should.

reward:
  scorer: {kind: function, function: "examples.code_reward.rewards:passed_cases"}

A prompt's metadata says them: {"cases": [["3 4\\n", "7\\n"], ...]}, what it reads and what it should print.
The latter never enters the sandbox: a program cannot pass by looking at it, or at how it is tested.
"""

from __future__ import annotations

import asyncio
import os

from reward_service.api import ScoreRequest
from reward_service.sandbox import SandboxLimits, require_isolation, run_python

require_isolation()  # where code cannot be isolated, no run begins

# The time of the CPU decides, not that of the clock: a score must not depend on how busy the machine is.
LIMITS = SandboxLimits(cpu_s=2, deadline_s=30)


async def passed_cases(requests: list[ScoreRequest]) -> list[float]:
    cores = asyncio.Semaphore(os.cpu_count() or 1)
    return await asyncio.gather(*(_passed(request, cores) for request in requests))


async def _passed(request: ScoreRequest, cores: asyncio.Semaphore) -> float:
    passed = 0
    for given, expected in request.metadata["cases"]:
        async with cores:
            done = await run_python(request.completion, stdin=given, limits=LIMITS)
        passed += done.exit_code == 0 and done.stdout == expected
    return passed / len(request.metadata["cases"])
