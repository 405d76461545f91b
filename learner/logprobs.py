"""Log-probabilities and entropies of chosen tokens, and KL estimators.

`token_logprobs` never holds the [N,V] logits: it walks over chunks of rows and keeps one number per
row, and log p of as many chunks as KEPT_LOGITS_BYTES allow. The backward pass computes the others'
logits again: one matmul more (4 instead of 3) for chunk_rows * V * 4 bytes instead of N * V * 4, several
times over.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from learner.config import KEPT_LOGITS_BYTES
from learner.linear import ROWS, add_product, linear


def kl_estimate(
    logprobs: Tensor, ref_logprobs: Tensor, *, kind: Literal["k1", "k2", "k3"]
) -> Tensor:
    """Per-token estimates, in nats, of KL(pi || ref) from tokens sampled by pi; any shape.

    With d = logprobs - ref_logprobs (Schulman, "Approximating KL Divergence", 2020):
    k1 = d, unbiased, any sign; k2 = d^2 / 2, biased; k3 = exp(-d) - 1 + d, unbiased and >= 0.
    """
    difference = logprobs - ref_logprobs
    if kind == "k1":
        return difference
    if kind == "k2":
        return 0.5 * difference**2
    if kind == "k3":
        return torch.expm1(-difference) + difference
    raise ValueError(f"kind {kind!r}: use k1, k2 or k3")


def token_logprobs(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    chunk_rows: int = 1024,
    with_entropy: bool = True,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """log p(targets) [N] and entropy [N] in nats of softmax((hidden @ head_weight.T + bias) / T).

    hidden [N,d], head_weight [V,d], targets int64 [N], bias [V]. The matmuls run in head_weight's
    dtype, autocast or not; everything after them, and the results, in float32 (float64 stays).
    with_entropy=False is cheaper and returns zeros without gradient. An entropy that the loss does
    not use, or weighs with 0, costs nothing in the backward pass.
    """
    hidden = hidden.to(head_weight.dtype)
    # Inside a Function it cannot be told.
    differentiable = torch.is_grad_enabled() and (hidden.requires_grad or head_weight.requires_grad)
    to_keep = KEPT_LOGITS_BYTES if differentiable else 0
    return _TokenLogprobs.apply(
        hidden, head_weight, bias, targets, temperature, chunk_rows, with_entropy, to_keep
    )


class _TokenLogprobs(torch.autograd.Function):
    """With p the softmax: d logprob / d logits = onehot - p; d H / d logits = -p (log p + H)."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: Tensor,
        head_weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_rows: int,
        with_entropy: bool,
        to_keep: int,
    ) -> tuple[Tensor, Tensor]:
        normalizer = hidden.new_empty(len(hidden), dtype=_exact(hidden.dtype))
        logprobs, entropy = torch.empty_like(normalizer), torch.zeros_like(normalizer)
        kept: list[Tensor] = []  # log p of the first chunks
        with _no_autocast(hidden):
            for rows in _chunks(len(hidden), chunk_rows):
                logits = _logits(hidden[rows], head_weight, bias, temperature)
                torch.logsumexp(logits, -1, out=normalizer[rows])
                logp = logits.sub_(normalizer[rows, None])
                logprobs[rows] = logp.gather(1, targets[rows, None])[:, 0]
                if with_entropy:
                    entropy[rows] = -torch.linalg.vecdot(logp.exp(), logp)
                to_keep -= logp.nbytes
                if to_keep >= 0:
                    kept.append(logp)
                del logits, logp  # else two chunks are alive while the next one is computed
        ctx.save_for_backward(hidden, head_weight, bias, targets, normalizer, entropy)
        ctx.kept = kept
        ctx.temperature, ctx.chunk_rows = temperature, chunk_rows
        ctx.set_materialize_grads(False)  # an unused result has gradient None, not zeros
        if not with_entropy:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore[override]
        ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden, head_weight, bias, targets, normalizer, entropy = ctx.saved_tensors
        # The factor 1 / temperature of d logits, applied where it is cheapest.
        grad = torch.zeros_like(normalizer)
        if grad_logprobs is not None:
            grad = grad_logprobs / ctx.temperature
        if grad_entropy is not None:
            grad_entropy = grad_entropy / ctx.temperature if grad_entropy.any() else None
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.zeros_like(hidden) if need_hidden else None
        # Summed over chunks, hence not in bfloat16.
        d_weight = torch.zeros_like(head_weight, dtype=grad.dtype) if need_weight else None
        d_bias = torch.zeros_like(bias, dtype=grad.dtype) if need_bias else None
        # They are overwritten: a second backward pass computes them all again.
        kept, ctx.kept = ctx.kept, []
        with _no_autocast(hidden):
            for rows in _chunks(len(hidden), ctx.chunk_rows):
                if kept:
                    logp = kept.pop(0)
                else:
                    logp = _logits(hidden[rows], head_weight, bias, ctx.temperature)
                    logp.sub_(normalizer[rows, None])
                d_logits = _logit_gradient(
                    logp,
                    targets[rows, None],
                    entropy[rows, None],
                    grad[rows, None],
                    None if grad_entropy is None else grad_entropy[rows, None],
                )
                if d_bias is not None:
                    d_bias += d_logits.sum(0)
                d_logits = d_logits.to(hidden.dtype)
                if d_hidden is not None:
                    d_hidden[rows] = linear(d_logits, head_weight.t())
                if d_weight is not None:
                    add_product(d_weight, d_logits.t(), hidden[rows])
                del logp, d_logits
        return (
            d_hidden,
            None if d_weight is None else d_weight.to(head_weight.dtype),
            None if d_bias is None else d_bias.to(bias.dtype),
            *(None,) * 5,
        )


def _chunks(num_rows: int, chunk_rows: int) -> Iterator[slice]:
    start = 0
    while start < num_rows:
        count = min(chunk_rows, num_rows - start)
        if count > ROWS:
            count -= count % ROWS  # see linear.py; what is over comes last, in a chunk of its own
        yield slice(start, start + count)
        start += count


def _logits(hidden: Tensor, head_weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    """[rows,V], divided by the temperature, in float32 or better; a buffer free to overwrite."""
    logits = linear(hidden, head_weight, bias).to(_exact(hidden.dtype))
    return logits if temperature == 1.0 else logits.div_(temperature)


def _logit_gradient(
    logp: Tensor, targets: Tensor, entropy: Tensor, grad: Tensor, grad_entropy: Tensor | None
) -> Tensor:
    """d loss / d logits [rows,V] from logp [rows,V], which it overwrites; the others [rows,1]."""
    if grad_entropy is None:
        gradient = logp.exp_().mul_(-grad)
    else:
        p = logp.exp()
        gradient = logp.add_(entropy).mul_(-grad_entropy).sub_(grad).mul_(p)
    return gradient.scatter_add_(1, targets, grad)


def _no_autocast(x: Tensor) -> torch.autocast:
    """The body of a Function still sees the caller's autocast, which casts more than matmuls."""
    return torch.autocast(x.device.type, enabled=False)


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
