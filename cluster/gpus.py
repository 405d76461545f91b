"""The GPUs that a run asks for, and those that are there."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping

from cluster.config import BadInput, RunConfig

TORCH_TIMEOUT_S = 120.0
ASK_TORCH = """
import torch
for i in range(torch.cuda.device_count()):
    print(torch.cuda.get_device_properties(i).total_memory)
"""


def check_gpus(wanted: Mapping[str, float], available: Callable[[], float]) -> None:
    """BadInput if the roles, by the keys that say how many, ask for more GPUs than there are."""
    total = sum(wanted.values())
    if total and total > (found := available()):
        raise BadInput(
            f"device: cuda needs {gpus_in_words(wanted)}, the cluster has {found:g}; lower the "
            "counts or add nodes"
        )


def gpus_of(config: RunConfig) -> dict[str, float]:
    """How many GPUs the roles of a run take, by the key that says so."""
    if config.device == "cpu":
        return {}
    generators = config.generators.count * config.generators.tensor_parallel_size
    return {
        "generators": generators,
        "learner.ranks": config.learner.ranks,
        "reward.num_gpus": config.reward.num_gpus,
    }


def gpus_in_words(wanted: Mapping[str, float]) -> str:
    parts = ", ".join(f"{number:g} for {key}" for key, number in wanted.items())
    return f"{sum(wanted.values()):g} GPUs ({parts})"


def gpu_bytes() -> tuple[int, ...]:
    """Asked in another process, so that this one loads neither torch nor a CUDA context."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", ASK_TORCH],
            capture_output=True,
            text=True,
            timeout=TORCH_TIMEOUT_S,
        )
        return tuple(int(line) for line in done.stdout.split()) if done.returncode == 0 else ()
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return ()
