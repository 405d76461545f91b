"""Why a PPO step is refused: a number that is not finite, or one beyond the bounds of `ppo.refuse`.

Whatever is judged here was summed over the ranks before: all of them refuse a step, or none does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from learner.batch import PPOBatch
from learner.config import RefuseConfig

MAX_NAMED = 3  # trajectories


class BadStep(Exception):
    """A step that must leave no trace. `metrics`: the numbers that it was judged by."""

    def __init__(self, reason: str, metrics: dict[str, float]) -> None:
        super().__init__(reason)
        self.reason = reason
        self.metrics = metrics


def check_batch(ppo: PPOBatch, config: RefuseConfig) -> None:
    """BadStep if what a step starts from is not finite, or too far from the generators' logprobs."""
    batch = ppo.trajectories
    ids = batch.table["trajectory_id"].to_pylist()
    judged = {  # causes before what they spoil
        "score": batch.scores,
        "behavior_logprob": batch.behavior_logprobs,
        "ref_logprob": ppo.ref_logprobs,
        "old_logprob": ppo.old_logprobs,
        "value": ppo.values,
        "advantage": ppo.advantages,
        "return": ppo.returns,
    }
    for name, rows in judged.items():
        _check_finite(name, rows, ids)
    name = "behavior_difference_mean"
    difference = {name: ppo.behavior_differences.mean().item()}
    _check_bound(difference, name, "", "behavior_difference", config.behavior_difference)


def check_minibatch(metrics: dict[str, float], config: RefuseConfig, number: int) -> None:
    """BadStep if minibatch `number` of a step (from 1) must not be stepped on."""
    where = f" in minibatch {number}"
    not_finite = [name for name, value in metrics.items() if not math.isfinite(value)]
    if not_finite:
        first = min(not_finite, key=lambda name: "loss" not in name)  # a loss spoils the others
        raise BadStep(f"{first} is not finite{where}", metrics)
    _check_bound(metrics, "approx_kl", where, "approx_kl", config.approx_kl)
    for name in metrics:
        if name.startswith("grad_norm"):
            _check_bound(metrics, name, where, "grad_norm", config.grad_norm)


def _check_finite(name: str, rows: Tensor, ids: Sequence[str]) -> None:
    """`rows` [B] or [B, C]."""
    finite = rows.isfinite().reshape(len(rows), -1).all(1)
    if finite.all():
        return
    bad = [ids[i] for i in (~finite).nonzero()[:, 0].tolist()]
    more = ", ..." if len(bad) > MAX_NAMED else ""
    raise BadStep(
        f"{name} is not finite in {len(bad)} of {len(ids)} trajectories: "
        f"{', '.join(bad[:MAX_NAMED])}{more}",
        {f"{name}_not_finite": float(len(bad))},
    )


def _check_bound(
    metrics: dict[str, float], name: str, where: str, key: str, bound: float | None
) -> None:
    if bound is not None and metrics[name] > bound:
        raise BadStep(
            f"{name} {metrics[name]:.4g}{where} is beyond ppo.refuse.{key} {bound:g}", metrics
        )
