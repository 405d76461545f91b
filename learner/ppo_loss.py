"""The clipped PPO losses. Pure: tensors and floats in, (loss, metrics) out.

B trajectories (any rows of them: a batch, a microbatch, none), C padded completion length;
`loss_mask` bool [B,C]. Cells outside the mask have no effect and get gradient 0.

Loss and metrics are sums over the mask divided by `num_loss_tokens`, the count of the whole
minibatch over all ranks and microbatches (default: this mask's own count). So the parts of a
minibatch ADD UP to its loss, gradient and metrics however it is cut; metrics whose name ends in
`_max` combine by max. Metrics are 0-dim detached tensors: reading one on a GPU waits for it.

The ratio, with d = logprobs - old_logprobs and len_i the tokens of completion i:
  token          exp(d_t) for each token
  sequence       exp(sum d), of the whole completion, whose term counts once: 1 / len_i on each of
                 its tokens (so with token-wise advantages: the mean of its tokens' terms)
  sequence_mean  exp(mean d) on each of its tokens (the ratio of GSPO, Zheng et al. 2025, eq. 7; its
                 objective, eq. 5, gives each completion the same weight, here it has len_i)
All three are divided by num_loss_tokens. Hence at ratio 1, with one advantage per completion, they
have the same gradient, sum_i A_i grad log pi(y_i | x_i) / num_loss_tokens, so that a learning rate
means the same under each; they differ only in which tokens are clipped together.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from learner.logprobs import kl_estimate

RatioKind = Literal["token", "sequence", "sequence_mean"]
MOST_LOG_RATIO = 80.0  # whose exp is a float32; that of a whole completion is soon larger


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    *,
    clip_range: float,
    clip_range_high: float | None = None,
    dual_clip: float | None = None,
    ratio: RatioKind = "token",
    behavior_weights: Tensor | None = None,
    num_loss_tokens: int | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """-min(ratio A, clip(ratio, 1 - clip_range, 1 + clip_range_high) A), all inputs [B,C].

    Schulman et al. 2017, eq. 7. clip_range_high, default clip_range: clip-higher (Yu et al. 2025).
    dual_clip c > 1: where A < 0 the term is at least c A (Ye et al. 2020, eq. 5).
    behavior_weights [B,C] multiply each token's term and carry no gradient.

    Metrics: clip_fraction, share of tokens whose gradient is cut by a clip; approx_kl, mean k3 of
    KL(old || current) in nats a token; ratio_error_max, largest |ratio - 1|, at most exp(80).
    """
    advantages = torch.where(loss_mask, advantages, 0.0).detach()
    old_logprobs = torch.where(loss_mask, old_logprobs, 0.0).detach()
    logprobs = torch.where(loss_mask, logprobs, 0.0)
    log_ratio, share = _log_ratio(logprobs - old_logprobs, loss_mask, ratio)

    # min(ratio A, clip(ratio) A) is A times a ratio that is bounded on one side only: above where
    # A > 0, below where A < 0. In logs, because 0 * exp(large) is a NaN gradient; so it is where A = 0.
    lower, upper = _log_bounds(advantages, clip_range, clip_range_high, dual_clip)
    bounded = torch.where(advantages == 0, 0.0, log_ratio).clamp(lower, upper)
    terms = bounded.exp() * advantages * share
    if behavior_weights is not None:
        terms = terms * torch.where(loss_mask, behavior_weights, 0.0).detach()
    loss = -token_mean(terms, loss_mask, num_loss_tokens)

    log_ratio, logprobs = log_ratio.detach(), logprobs.detach()
    cut = ((log_ratio < lower) | (log_ratio > upper)).to(loss.dtype)
    approx_kl = kl_estimate(old_logprobs, logprobs, kind="k3")
    # The clip has made the loss finite by now; a figure must not make the step look as if it were not.
    told = log_ratio.clamp(max=MOST_LOG_RATIO).expm1().abs()
    ratio_error = torch.where(loss_mask, told, 0.0)
    return loss, {
        "clip_fraction": token_mean(cut, loss_mask, num_loss_tokens),
        "approx_kl": token_mean(approx_kl, loss_mask, num_loss_tokens),
        "ratio_error_max": F.pad(ratio_error.flatten(), (0, 1)).max(),  # 0 where there are no rows
    }


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    loss_mask: Tensor,
    *,
    value_clip_range: float | None,
    num_loss_tokens: int | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """0.5 * max((v - R)^2, (clip(v, v_old +- value_clip_range) - R)^2), all inputs [B,C].

    None: no clipping. loss_mask is `advantages.value_mask` here, and num_loss_tokens its count.
    Metrics: value_clip_fraction, share of tokens where the clipped branch is the larger error.
    """
    values = torch.where(loss_mask, values, 0.0)
    old_values = torch.where(loss_mask, old_values, 0.0).detach()
    returns = torch.where(loss_mask, returns, 0.0).detach()
    errors = (values - returns) ** 2
    clipped = errors
    if value_clip_range is not None:
        change = (values - old_values).clamp(-value_clip_range, value_clip_range)
        clipped = (old_values + change - returns) ** 2
    loss = 0.5 * token_mean(torch.maximum(errors, clipped), loss_mask, num_loss_tokens)
    active = (clipped > errors).to(loss.dtype)
    return loss, {"value_clip_fraction": token_mean(active, loss_mask, num_loss_tokens)}


def token_mean(x: Tensor, loss_mask: Tensor, num_loss_tokens: int | Tensor | None = None) -> Tensor:
    """Sum of x [B,C] over the mask / num_loss_tokens (default: the mask's count); 0 if it is empty.

    For every term beside the policy loss too (entropy, KL in the loss), so that all add up alike.
    """
    if num_loss_tokens is None:
        num_loss_tokens = loss_mask.sum().clamp(min=1)
    return torch.where(loss_mask, x, 0.0).sum() / num_loss_tokens


def _log_ratio(
    difference: Tensor, loss_mask: Tensor, ratio: RatioKind
) -> tuple[Tensor, Tensor | float]:
    """Log ratio of each token, and the share of its completion's term it stands for; [B,C]."""
    if ratio == "token":
        return difference, 1.0
    lengths = loss_mask.sum(1, keepdim=True, dtype=difference.dtype).clamp(min=1)
    total = difference.sum(1, keepdim=True)
    if ratio == "sequence":
        return total.expand_as(difference), 1.0 / lengths
    if ratio == "sequence_mean":
        return (total / lengths).expand_as(difference), 1.0
    raise ValueError(f"ratio {ratio!r}: use token, sequence or sequence_mean")


def _log_bounds(
    advantages: Tensor, clip_range: float, clip_range_high: float | None, dual_clip: float | None
) -> tuple[Tensor, Tensor]:
    """Bounds [B,C] of the log ratio beyond which a token has no gradient; infinite where A = 0."""
    high = math.log1p(clip_range if clip_range_high is None else clip_range_high)
    low = math.log1p(-clip_range) if clip_range < 1 else -math.inf
    far = math.inf if dual_clip is None else math.log(dual_clip)
    free = torch.full_like(advantages, math.inf)
    lower = torch.where(advantages < 0, low, -free)
    upper = torch.where(advantages > 0, high, torch.where(advantages < 0, far, free))
    return lower, upper
