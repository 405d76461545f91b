"""Products of float32 matrices by oneDNN, which torch holds for other dtypes, on CPU."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

# Up to here oneDNN is given the matrix as its left side, whose rows it reads as they lie. On the right
# side it would put the whole matrix in another order first, which takes longer than so small a product.
FEW_ROWS = 32


@functools.cache
def has_onednn() -> bool:
    return hasattr(torch.ops.mkldnn, "_linear_pointwise")


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., k] @ weight [n,k].T + bias [n], float32. Not for autograd, and only with `has_onednn`."""
    rows = x.shape[:-1].numel()
    if rows > FEW_ROWS or not weight.is_contiguous():
        return _linear(x, weight, bias)
    flipped = _linear(weight, x.reshape(rows, x.shape[-1]), None)
    out = flipped.t().contiguous().view(*x.shape[:-1], len(weight))
    return out if bias is None else out.add_(bias)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
