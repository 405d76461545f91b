"""Products of float32 matrices by oneDNN where it is the faster (actors/onednn.py), in both directions.

oneDNN writes a program for each shape that it meets, which takes half a megabyte and as long as a product
of some hundred tokens. So tokens come in multiples of ROWS (packing.PackedRows fills them up), and a
product over another number of them stays torch's own. But FEW, as those of a probe, are oneDNN's on every
processor, unless they are so few that MKL is the faster.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from actors.onednn import has_onednn, product, rows_of_mkl, takes_onednn

ROWS = 32
FEW = 16
ROWS_AT_ONCE = 8192  # of a matrix that products are added to


def row_multiple(device: torch.device, dtype: str) -> int:
    """What the tokens of a packed row should be a multiple of. bfloat16 is oneDNN's on every CPU."""
    return ROWS if device.type == "cpu" and (dtype == "bfloat16" or takes_onednn()) else 1


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., k] @ weight [n,k].T + bias [n], for the inside of a Function: autograd does not see it."""
    if not _fits(x, x.shape[:-1].numel()):
        return F.linear(x, weight, bias)
    return product(x, weight, bias)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total [m,n] += a [m,k] @ b [k,n], k tokens; without a temporary of total's size where the dtypes
    allow it."""
    if total.dtype != a.dtype:
        total += a @ b
    elif not _fits(a, len(b)):
        total.addmm_(a, b)
    else:
        for some, rows in zip(total.split(ROWS_AT_ONCE), a.split(ROWS_AT_ONCE), strict=True):
            some += product(rows, b.t())


class Linear(nn.Linear):
    """nn.Linear, by `linear` in both directions."""

    def forward(self, x: Tensor) -> Tensor:
        if not _fits(x, x.shape[:-1].numel()) or torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        return _Linear.apply(x, self.weight, self.bias)


def use_fast_products(model: nn.Module) -> None:
    """Every nn.Linear of the model becomes a Linear, where there is oneDNN."""
    if has_onednn():
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = Linear


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        rows = grad.reshape(-1, weight.shape[0]).contiguous()
        return (
            product(rows, weight.t()).view_as(x) if need_x else None,
            product(rows.t(), x.reshape(-1, weight.shape[1]).t()) if need_weight else None,
            rows.sum(0) if need_bias else None,
        )


def _fits(x: Tensor, tokens: int) -> bool:
    on_cpu = x.device.type == "cpu" and x.dtype == torch.float32
    if not on_cpu or tokens == 0 or not has_onednn():
        return False
    return rows_of_mkl() < tokens <= FEW or (tokens % ROWS == 0 and takes_onednn())
