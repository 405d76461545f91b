"""Metrics: the names, and how each is reduced over ranks. metrics_writer.py writes them."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple


class Metric(NamedTuple):
    reduction: Literal["mean", "sum", "max", "last"]  # over ranks, or over the parts of a window
    description: str


METRICS: dict[str, Metric] = {
    "time/step_s": Metric("max", "one step, everything included"),
    "time/rollout_wait_s": Metric("max", "waiting for enough trajectories"),
    "time/update_s": Metric("max", "the PPO update of the learner"),
    "time/publish_s": Metric("max", "publishing the weights, until generators have proved them"),
    "time/evaluate_s": Metric("max", "held-out evaluation"),
    "rollout/completion_tokens": Metric("sum", "completion tokens in the batch"),
    "rollout/completion_tokens_mean": Metric("mean", "tokens a completion"),
    "rollout/tokens_per_s": Metric("sum", "completion tokens generated a second, all generators"),
    "rollout/samples_per_s": Metric("sum", "completions generated a second, all generators"),
    "rollout/truncated_fraction": Metric("mean", "share of completions cut at max_tokens"),
    "rollout/generators": Metric("last", "generators that answer at the end of the step"),
    "rollout/generator_busy_share": Metric("mean", "share of time in which generators decode"),
    "reward/score_mean": Metric("mean", "mean score of the batch"),
    "reward/score_sd": Metric("mean", "standard deviation of the scores of the batch"),
    "reward/score_s_mean": Metric("mean", "seconds of the call that scored a sample, queue included"),
    "reward/dropped": Metric("last", "prompts dropped so far, reasons in dropped.jsonl"),
    "staleness/mean": Metric("mean", "learner version less policy_version, at consumption"),
    "staleness/max": Metric("max", "largest staleness in the batch"),
    "learner/policy_loss": Metric("mean", "clipped surrogate loss"),
    "learner/value_loss": Metric("mean", "clipped squared error of the value function"),
    "learner/value_clip_fraction": Metric("mean", "share of values whose clipped branch is active"),
    "learner/ptx_loss": Metric("mean", "loss of the pretraining term (PPO-ptx)"),
    "learner/entropy_bonus": Metric("mean", "exact entropy, where the loss rewards it"),
    "learner/minibatches": Metric("last", "optimizer steps in the step"),
    "learner/entropy": Metric("mean", "mean -logprob of sampled tokens; entropy at staleness 0"),
    "learner/clip_fraction": Metric("mean", "share of tokens whose clipped branch is active"),
    "learner/approx_kl": Metric("mean", "k3 estimate, old against current policy, nats a token"),
    "learner/first_clip_fraction": Metric("mean", "clip_fraction of the first minibatch"),
    "learner/first_ratio_error": Metric("max", "distance of the ratio from 1, first minibatch"),
    "learner/kl_to_ref": Metric("mean", "k1 of policy against reference, nats a completion sampled"),
    "learner/kl_coef": Metric("last", "weight of the KL penalty, in the rewards or in the loss"),
    "learner/explained_variance": Metric("mean", "share of the returns' variance explained"),
    "learner/grad_norm_policy": Metric("mean", "gradient norm of the policy before clipping"),
    "learner/grad_norm_value": Metric("mean", "gradient norm of the critic before clipping"),
    "learner/lr_policy": Metric("last", "learning rate of the policy"),
    "learner/lr_value": Metric("last", "learning rate of the value function"),
    "learner/behavior_difference_mean": Metric("mean", "mean distance to generator logprobs"),
    "learner/behavior_difference_max": Metric("max", "largest distance to generator logprobs"),
    "learner/tokens_per_s": Metric("mean", "tokens a second of the update, ranks together"),
    "learner/peak_memory_bytes": Metric("max", "peak memory of one rank"),
    "weights/push_s": Metric("max", "moving the weights to the generators"),
    "weights/bytes": Metric("sum", "bytes of weights published"),
    "weights/probe_difference_max": Metric("max", "the same on the probe, after a push"),
    "evaluation/win_rate": Metric("mean", "held-out wins over the starting policy, a tie is half"),
    "evaluation/judge_mean": Metric("mean", "held-out mean of the judge's score"),
    "evaluation/reward_mean": Metric("mean", "held-out mean of the reward score"),
    "evaluation/kl_to_ref": Metric("mean", "held-out KL to the reference, nats a completion"),
    "sft/loss": Metric("mean", "cross-entropy of the completions, nats a token"),
    "sft/held_out_loss": Metric("mean", "the same of all held-out rows"),
    "sft/tokens_per_s": Metric("sum", "tokens trained on a second, all ranks"),
    "sft/lr": Metric("last", "learning rate"),
    "sft/grad_norm": Metric("mean", "gradient norm before clipping"),
    "reward_model/loss": Metric("mean", "pairwise loss, -log sigmoid(chosen - rejected)"),
    "reward_model/accuracy": Metric("mean", "share of pairs whose chosen completion scores higher"),
    "reward_model/margin": Metric("mean", "mean score of chosen less rejected"),
    "reward_model/lr": Metric("last", "learning rate"),
    "reward_model/grad_norm": Metric("mean", "gradient norm before clipping"),
}  # fmt: skip

FAMILIES: dict[str, Metric] = {"reward/part/": Metric("mean", "mean of one part of the score")}

_REDUCE: dict[str, Callable[[list[float]], float]] = {
    "mean": lambda values: math.fsum(values) / len(values),
    "sum": sum,
    "max": max,
    "last": lambda values: values[-1],
}


def metric(name: str) -> Metric:
    """The table's entry; a name that is not in it is an error, so that none is misspelt."""
    if name in METRICS:
        return METRICS[name]
    for prefix, family in FAMILIES.items():
        if name.startswith(prefix) and name != prefix:
            return family
    near = difflib.get_close_matches(name, METRICS, 1, 0.5)
    hint = f"did you mean {near[0]}?" if near else "add it to METRICS in cluster/metrics.py"
    raise ValueError(f"unknown metric {name}; {hint}")


def reduce_ranks(ranks: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """One dict a rank (or a part of a window) -> one; each metric over those that report it."""
    names = dict.fromkeys(name for rank in ranks for name in rank)
    return {
        name: _REDUCE[metric(name).reduction]([rank[name] for rank in ranks if name in rank])
        for name in names
    }


def markdown_table() -> str:
    """The table for README."""
    rows = [*METRICS.items(), *((f"{prefix}<name>", entry) for prefix, entry in FAMILIES.items())]
    lines = [f"| `{name}` | {entry.reduction} | {entry.description} |" for name, entry in rows]
    return "\n".join(["| metric | over ranks | what it is |", "|---|---|---|", *lines])


def gauge_name(name: str) -> str:
    """The gauge's name that Ray is told; Ray exports it with "ray_" before it."""
    return "raylign_" + re.sub(r"\W", "_", name, flags=re.ASCII)
