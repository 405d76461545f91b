"""Products of float32 matrices on processors for which torch takes the slower of its two libraries.

On CPU torch multiplies float32 by MKL, which does less than half of what an AMD processor can; oneDNN,
which torch holds for other dtypes, does all of it (benchmarks/linear.py). Both compute in float32. The
processor decides, never a measurement: a run that goes on multiplies as it did before.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

SLOW_WITH_MKL = ("AuthenticAMD", "HygonGenuine")
CPUINFO = Path("/proc/cpuinfo")
ROWS_AT_ONCE = 8192  # of a matrix that products are added to


@functools.cache
def takes_onednn() -> bool:
    """Whether products are oneDNN's here."""
    if getattr(torch.ops.mkldnn, "_linear_pointwise", None) is None or not CPUINFO.exists():
        return False
    return any(vendor in CPUINFO.read_text() for vendor in SLOW_WITH_MKL)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., k] @ weight [n,k].T + bias [n], for the inside of a Function: autograd does not see it."""
    if not _fits(x):
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total [m,n] += a [m,k] @ b [k,n], without a temporary of total's size where the dtypes allow it."""
    if total.dtype != a.dtype:
        total += a @ b
    elif not _fits(a):
        total.addmm_(a, b)
    else:
        for some, rows in zip(total.split(ROWS_AT_ONCE), a.split(ROWS_AT_ONCE), strict=True):
            some += linear(rows, b.t())


class Linear(nn.Linear):
    """nn.Linear, by `linear` in both directions."""

    def forward(self, x: Tensor) -> Tensor:
        if not _fits(x) or torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        return _Linear.apply(x, self.weight, self.bias)


def use_fast_products(model: nn.Module) -> None:
    """Every nn.Linear of the model becomes a Linear, where that is the faster."""
    if takes_onednn():
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = Linear


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, weight)
        return linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        rows = grad.reshape(-1, weight.shape[0]).contiguous()
        return (
            linear(rows, weight.t()).view_as(x) if need_x else None,
            linear(rows.t(), x.reshape(-1, weight.shape[1]).t()) if need_weight else None,
            rows.sum(0) if need_bias else None,
        )


def _fits(x: Tensor) -> bool:
    on_cpu = x.device.type == "cpu" and x.dtype == torch.float32
    return on_cpu and x.numel() > 0 and takes_onednn()
