"""Products on CPU by oneDNN for float32, too: torch holds it, but takes it for other dtypes alone.

For float32 torch takes MKL, which does less than half of what an AMD processor with AVX-512 can; oneDNN does
all of it (benchmarks/linear.py). On one without AVX-512, and on Intel's, MKL is the faster over many tokens.
Over few, where the time goes into reading the matrix, oneDNN is everywhere, if it reads it as it lies; but
over up to three MKL reads it as fast as memory gives it, on Intel's; on others over up to two, and only if it
is asked for a batch of products.
The processor decides, never a measurement: a run that goes on multiplies as it did before.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

SLOW_WITH_MKL = ("AuthenticAMD", "HygonGenuine")
CPUINFO = Path("/proc/cpuinfo")
# Up to here oneDNN is given the matrix as its left side, whose rows it reads in place. On the right side it
# would put the whole matrix in another order first, which takes longer than so small a product.
FEW_ROWS = 32
# Up to so many rows, and over a matrix no wider, MKL is asked for a batch: of the matrix's two halves. Of a
# wider one it would read too many places at once.
BATCHED_ROWS, BATCHED_WIDTH = 2, 2048


@functools.cache
def has_onednn() -> bool:
    return hasattr(torch.ops.mkldnn, "_linear_pointwise")


@functools.cache
def takes_onednn() -> bool:
    """Whether products over many tokens are oneDNN's here."""
    told = _cpuinfo()
    return has_onednn() and "avx512f" in told and any(vendor in told for vendor in SLOW_WITH_MKL)


@functools.cache
def rows_of_mkl() -> int:
    """Up to how many rows a product is MKL's here, though oneDNN would take it as one over few."""
    return 3 if "GenuineIntel" in _cpuinfo() else 0


def _cpuinfo() -> str:
    return CPUINFO.read_text() if CPUINFO.exists() else ""


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., k] @ weight [n,k].T + bias [n], float32, by oneDNN, or by a batch of MKL's. Not for autograd,
    and only with `has_onednn`."""
    rows, (height, width) = x.shape[:-1].numel(), weight.shape
    if rows > FEW_ROWS or not weight.is_contiguous():
        return _linear(x, weight, bias)
    in_halves = rows <= BATCHED_ROWS and width <= BATCHED_WIDTH and height % 2 == 0
    flipped = (batch if in_halves else _linear)(weight, x.reshape(rows, width))
    out = flipped.t().contiguous().view(*x.shape[:-1], height)
    return out if bias is None else out.add_(bias)


def faster_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same, by oneDNN or MKL, whichever is the faster here; other dtypes are torch's own. Not for
    autograd."""
    few = rows_of_mkl() < x.shape[:-1].numel() <= FEW_ROWS
    if x.dtype == torch.float32 and has_onednn() and (few or takes_onednn()):
        return product(x, weight, bias)
    return torch.nn.functional.linear(x, weight, bias)


def batch(weight: Tensor, x: Tensor) -> Tensor:
    """weight [n,k] @ x [rows,k].T, n even, by MKL. Not for autograd."""
    halves = weight.view(2, -1, weight.shape[1])
    return torch.bmm(halves, x.t().expand(2, -1, -1)).view(len(weight), len(x))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
