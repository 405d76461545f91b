"""What the peers' scripts share: their arguments, JSON lines on stdout, and the proof that weights change.

Imported in the peers' environments: nothing but torch.
"""

from __future__ import annotations

import argparse
import json
import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def arguments() -> argparse.Namespace:
    """What run.py tells a script."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--beta", type=float, default=0.05)
    parser.add_argument("--folder", type=Path, required=True)
    return parser.parse_args()


def line(**values: Any) -> None:
    """One JSON line, of the first process; run.py reads the lines that begin with a brace."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print("\n" + json.dumps(values), flush=True)


def leave() -> None:
    """After the last line, by all processes: at the interpreter's end torch's threads have aborted one."""
    if dist.is_initialized():
        dist.barrier()
    os._exit(0)


def total(count: float) -> Any:
    """The sum over the processes."""
    summed = torch.tensor(count, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(summed)
    return summed.item()


def difference(a: list[float], b: list[float]) -> float:
    """The largest difference of two lists, element by element."""
    return max(abs(float(x) - float(y)) for x, y in zip(a, b, strict=True))


def versions(*packages: str) -> dict[str, str]:
    """The version of each, under whichever name vLLM is installed."""
    return {name: _version(name) or _version(f"{name}-cpu") or "none" for name in packages}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def snapshot(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def change(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> float:
    """The largest difference of any weight."""
    return max((after[name] - weight).abs().max().item() for name, weight in before.items())


def spread(model: torch.nn.Module) -> float:
    """The largest difference of any weight between this process and the first."""
    differences = []
    for weight in snapshot(model).values():
        first = weight.clone()
        if dist.is_initialized():
            dist.broadcast(first, 0)
        differences.append((weight - first).abs().max().item())
    return total(max(differences))
