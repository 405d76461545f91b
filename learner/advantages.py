"""From scores and values to advantages and returns: constants of the update, so no gradient flows.

B trajectories, C padded completion length. The completion of row i is its first len_i columns;
`loss_mask` [B,C] is True exactly there. What stands in the other cells, even NaN, has no effect,
and every [B,C] result is 0 in them. Column j of `values` is V(s_j): prompt plus the first j tokens.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

GroupKind = Literal["grpo", "rloo", "reinforce++"]


@torch.no_grad()
def shaped_rewards(
    scores: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor, loss_mask: Tensor, *, kl_coef: float
) -> Tensor:
    """Rewards [B,C]: -kl_coef * (old - ref) nats on every token, plus scores [B] on the last one.

    The sum over a row is the objective's R(y) = score - kl_coef * k1 estimate of KL(old || ref).
    """
    penalty = -kl_coef * _masked(old_logprobs - ref_logprobs, loss_mask)
    followed = F.pad(loss_mask[:, 1:], (0, 1))
    return penalty + _masked(scores[:, None], loss_mask & ~followed)


@torch.no_grad()
def gae(
    rewards: Tensor, values: Tensor, loss_mask: Tensor, *, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16): advantages, returns [B,C].

    delta_t = r_t + gamma V(s_t+1) - V(s_t);  A_t = delta_t + gamma lam A_t+1;  returns = A + V.
    The state after a completion's last token is terminal: its value and advantage are 0.
    """
    rewards, values = _masked(rewards, loss_mask), _masked(values, loss_mask)
    deltas = rewards + gamma * F.pad(values[:, 1:], (0, 1)) - values
    advantages = torch.zeros_like(deltas)
    # Behind a row's end every delta is 0, so the recursion enters each row at its own last token.
    following = deltas.new_zeros(len(deltas))
    for t in reversed(range(deltas.shape[1])):
        following = deltas[:, t] + gamma * lam * following
        advantages[:, t] = following
    return advantages, advantages + values


@torch.no_grad()
def sequence_advantages(scores: Tensor, values: Tensor, loss_mask: Tensor) -> tuple[Tensor, Tensor]:
    """A(y, x) = R(y) - V(x), one number per completion, on each of its tokens: advantages [B,C].

    scores [B] is R(y): the score, or the row sums of `shaped_rewards`. V(x) is values[:, 0].
    returns [B,C] hold R(y) in column 0, the only value that is trained (see `value_mask`).
    """
    advantages = _masked(scores[:, None] - values[:, :1], loss_mask)
    return advantages, _masked(scores[:, None], value_mask(loss_mask, "sequence"))


def value_mask(loss_mask: Tensor, advantage: Literal["gae", "sequence"]) -> Tensor:
    """Where the value is trained, bool [B,C]: every token (gae), or only V(x), in column 0."""
    if advantage == "gae":
        return loss_mask
    if advantage == "sequence":
        return loss_mask & (torch.arange(loss_mask.shape[1], device=loss_mask.device) == 0)
    raise ValueError(f"advantage {advantage!r} trains no value; use gae or sequence")


@torch.no_grad()
def group_advantages(scores: Tensor, group_ids: Tensor, *, kind: GroupKind) -> Tensor:
    """Critic-free advantages [B] from scores [B]; equal group_ids [B] (integers) share a prompt.

    grpo: (R - mean) / (sd + 1e-4) in the group, sd of the population (Shao et al. 2024, 4.1.2).
    rloo: R - mean of the group's other scores (Ahmadian et al. 2024, eq. 8).
    reinforce++: (R - mean) / sd over the whole batch, groups ignored (after Hu et al. 2025, who take the
    KL to go for each token and whiten over tokens).
    A group of one has nothing to be compared with: grpo and rloo give it 0.
    """
    exact = scores.double()  # equal scores must give 0, not rounding noise divided by 1e-4
    if kind == "reinforce++":
        return whiten(exact, torch.ones_like(exact, dtype=torch.bool)).to(scores.dtype)
    _, group, sizes = torch.unique(group_ids, return_inverse=True, return_counts=True)
    size = sizes[group]

    def group_mean(x: Tensor) -> Tensor:
        return x.new_zeros(len(sizes)).index_add_(0, group, x)[group] / size

    centred = exact - group_mean(exact)
    if kind == "grpo":
        advantages = centred / (group_mean(centred**2).sqrt() + 1e-4)
    elif kind == "rloo":
        # R - (sum - R) / (n - 1) = (R - mean) n / (n - 1)
        advantages = centred * size / (size - 1).clamp(min=1)
    else:
        raise ValueError(f"kind {kind!r}: use grpo, rloo or reinforce++")
    return advantages.to(scores.dtype)


@torch.no_grad()
def whiten(x: Tensor, loss_mask: Tensor, *, shift_mean: bool = True) -> Tensor:
    """x scaled to standard deviation 1 (population, eps 1e-8) over the mask; same shape.

    The mean becomes 0, or with shift_mean=False stays. Call it on the whole batch: the statistics
    of a microbatch or of one rank would make the result depend on how the batch was cut.
    """
    count = loss_mask.sum().clamp(min=1)
    mean = _masked(x, loss_mask).sum() / count
    variance = _masked((x - mean) ** 2, loss_mask).sum() / count
    whitened = (x - mean) * torch.rsqrt(variance + 1e-8)
    return _masked(whitened if shift_mean else whitened + mean, loss_mask)


def _masked(x: Tensor, mask: Tensor) -> Tensor:
    """x where mask, else 0. Never x * mask, which keeps a NaN."""
    return torch.where(mask, x, 0.0)
