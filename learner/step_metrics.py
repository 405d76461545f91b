"""What a PPO step shows of itself, once its minibatches are done."""

from __future__ import annotations

import numpy as np
import torch

from learner.batch import PPOBatch


def step_metrics(ppo: PPOBatch, history: list[dict[str, float]]) -> dict[str, float]:
    """Means over the step's minibatches, what only the first shows, and what the batch itself shows."""
    mask = ppo.trajectories.loss_mask
    metrics = {
        f"learner/{name}": float(np.mean([one[name] for one in history]))
        for name in history[0]
        if name != "ratio_error_max"
    }
    metrics["learner/first_ratio_error"] = history[0]["ratio_error_max"]
    metrics["learner/first_clip_fraction"] = history[0]["clip_fraction"]
    metrics["learner/minibatches"] = len(history)
    # E[-log pi(a)] is the entropy: the sampled tokens estimate it without another pass. Where older
    # weights sampled them it is a cross-entropy, and kl_to_ref is as far off.
    metrics["learner/entropy"] = -ppo.old_logprobs[mask].mean().item()
    log_ratio = torch.where(mask, ppo.old_logprobs - ppo.ref_logprobs, 0.0)
    metrics["learner/kl_to_ref"] = log_ratio.sum(1).mean().item()
    difference = ppo.behavior_differences
    metrics["learner/behavior_difference_mean"] = difference.mean().item()
    metrics["learner/behavior_difference_max"] = difference.max().item()
    if ppo.value_mask.any():
        returns, values = ppo.returns[ppo.value_mask], ppo.values[ppo.value_mask]
        variance = returns.var(correction=0)
        if variance > 1e-12:  # else there is nothing to explain
            unexplained = (returns - values).var(correction=0) / variance
            metrics["learner/explained_variance"] = 1.0 - unexplained.item()
    return metrics
