"""TrajectoryBatch -> PPOBatch: the forward passes before an update, then advantages.

Each rank sweeps its share of the trajectories without gradient; the shares are summed into whole
[B, C] tensors, so everything after the sweep is computed alike on every rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from learner.advantages import (
    gae,
    group_advantages,
    sequence_advantages,
    shaped_rewards,
    value_mask,
    whiten,
)
from learner.batch import PPOBatch, TrajectoryBatch
from learner.config import LearnerConfig, PPOConfig
from learner.linear import row_multiple
from learner.packing import PackedRows, plan, unpack
from learner.policy import PolicyModel, ValueModel
from learner.process_group import sum_over_ranks
from learner.refusal import check_batch

Forward = Callable[[PackedRows], Tensor]


class Sequences(Protocol):
    """What packing needs of a batch: prompts and completions as token ids."""

    @property
    def prompt_ids(self) -> Sequence[np.ndarray]: ...
    @property
    def completion_ids(self) -> Sequence[np.ndarray]: ...
    @property
    def lengths(self) -> list[int]: ...


@dataclass(frozen=True)
class Models:
    """The networks of one rank; `value` is None with a shared trunk or without a critic."""

    policy: PolicyModel
    reference: PolicyModel
    value: ValueModel | None


@dataclass(frozen=True)
class Share:
    """Which part of a batch this rank computes, and in which microbatches."""

    rank: int
    world_size: int
    learner: LearnerConfig
    device: torch.device
    even_length: float = math.inf  # see packing.work

    def of(self, batch: Sequences, indices: Sequence[int]) -> list[list[int]]:
        """Microbatches of `indices` for this rank; every rank gets equally many."""
        whole = batch.lengths
        lengths = [whole[i] for i in indices]
        most = self.learner.microbatch_tokens(self.device.type)
        mine = plan(lengths, self.world_size, most, self.even_length)[self.rank]
        return [[int(indices[i]) for i in one] for one in mine]

    def pack(self, batch: Sequences, indices: Sequence[int]) -> PackedRows:
        sequences = [
            np.concatenate([batch.prompt_ids[i], batch.completion_ids[i]]) for i in indices
        ]
        prompts = [len(batch.prompt_ids[i]) for i in indices]
        multiple = row_multiple(self.device, self.learner.dtype)
        packed = PackedRows.build(sequences, prompts, multiple)
        return packed.to(self.device)


@torch.no_grad()
def sweep(batch: Sequences, share: Share, forwards: Sequence[Forward]) -> list[Tensor]:
    """Each forward over the whole batch: [B, C] float32 on the CPU, zeros behind the completions."""
    width = max(len(ids) for ids in batch.completion_ids)
    whole = torch.zeros(len(forwards), len(batch.lengths), width)
    for indices in share.of(batch, range(len(batch.lengths))):
        packed = share.pack(batch, indices)  # once for all forwards
        values = torch.stack([forward(packed).float() for forward in forwards]).cpu()
        for number, flat in enumerate(values):
            whole[number, indices] = unpack(flat, packed.completion_lengths, width)
    return list(sum_over_ranks(whole))


def prepare(
    batch: TrajectoryBatch, models: Models, config: PPOConfig, share: Share, kl_coef: float
) -> PPOBatch:
    """All an epoch needs. BadStep if it is nothing to learn from (see refusal.py)."""
    temperature = batch.temperature

    def reference(packed: PackedRows) -> Tensor:
        return models.reference(packed, temperature)[0]

    forwards: list[Forward] = [reference]
    if config.anchor == "learner":
        forwards.append(lambda packed: models.policy(packed, temperature)[0])
    if models.value is not None:
        forwards.append(models.value)
    elif config.uses_critic:
        forwards.append(lambda packed: models.policy(packed, temperature)[2])
    swept = sweep(batch, share, forwards)
    ref_logprobs = swept[0]
    old_logprobs = swept[1] if config.anchor == "learner" else batch.behavior_logprobs
    values = swept[-1] if config.uses_critic else torch.zeros_like(ref_logprobs)
    in_reward = kl_coef if config.kl.where == "reward" else 0.0
    rewards = shaped_rewards(
        batch.scores, old_logprobs, ref_logprobs, batch.loss_mask, kl_coef=in_reward
    )
    advantages, returns, trained = _advantages(batch, rewards, values, config)
    ppo = PPOBatch(batch, old_logprobs, ref_logprobs, values, advantages, returns, trained)
    check_batch(ppo, config.refuse)
    return ppo


def _advantages(
    batch: TrajectoryBatch, rewards: Tensor, values: Tensor, config: PPOConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """(advantages, returns, value_mask), each [B, C]."""
    mask, kind = batch.loss_mask, config.advantage
    if kind == "gae":
        advantages, returns = gae(rewards, values, mask, gamma=config.gamma, lam=config.lam)
        if config.whiten_advantages:
            advantages = whiten(advantages, mask)
        return advantages, returns, value_mask(mask, kind)
    totals = rewards.sum(1)
    if kind == "sequence":
        advantages, returns = sequence_advantages(totals, values, mask)
        trained = value_mask(mask, kind)
        if config.whiten_advantages:  # over completions, not tokens: there is one number for each
            advantages = whiten(advantages[:, :1], mask[:, :1]) * mask
        return advantages, returns, trained
    grouped = group_advantages(totals, batch.group_ids, kind=kind)
    return grouped[:, None] * mask, torch.zeros_like(rewards), torch.zeros_like(mask)
