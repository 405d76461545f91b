"""TrajectoryBatch -> PPOBatch: what one update learns from, whole on every rank.

B trajectories, C the longest completion. A batch is small beside the weights (1,024 x 1,024 tokens are
4 MB a column), so each rank holds all of it: advantages, whitening and groups are then computed alike
everywhere, and neither depends on the number of ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import cast

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor


@dataclass(frozen=True)
class TrajectoryBatch:
    """The learner's columns of a Table of trajectories."""

    table: pa.Table
    prompt_ids: tuple[np.ndarray, ...]  # B arrays of int
    completion_ids: tuple[np.ndarray, ...]
    scores: Tensor  # [B]
    behavior_logprobs: Tensor  # [B, C]
    loss_mask: Tensor  # [B, C] bool
    group_ids: Tensor  # [B] int64: trajectories of one prompt share one
    policy_versions: np.ndarray  # [B] int64, of each first token
    temperature: float

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of prompt and completion."""
        return [len(p) + len(c) for p, c in zip(self.prompt_ids, self.completion_ids, strict=True)]

    def __len__(self) -> int:
        return len(self.prompt_ids)

    @staticmethod
    def of(table: pa.Table) -> TrajectoryBatch:
        """Raises ValueError if temperatures are mixed: one batch has one policy."""
        temperatures = set(table["temperature"].to_pylist())
        if len(temperatures) != 1:
            raise ValueError(f"a batch mixes sampling temperatures {sorted(temperatures)}")
        completions = _lists(table, "completion_ids")
        lengths = np.array([len(ids) for ids in completions])
        mask = np.arange(lengths.max())[None, :] < lengths[:, None]
        behavior = np.zeros(mask.shape, np.float32)
        behavior[mask] = np.concatenate(_lists(table, "behavior_logprobs"))
        groups = np.unique(_group_keys(table), return_inverse=True)[1]
        return TrajectoryBatch(
            table=table,
            prompt_ids=_lists(table, "prompt_ids"),
            completion_ids=completions,
            scores=torch.tensor(table["score"].to_numpy(), dtype=torch.float32),
            behavior_logprobs=torch.from_numpy(behavior),
            loss_mask=torch.from_numpy(mask),
            group_ids=torch.from_numpy(groups.astype(np.int64)),
            policy_versions=table["policy_version"].to_numpy(),
            temperature=temperatures.pop(),
        )


@dataclass(frozen=True)
class PPOBatch:
    """A TrajectoryBatch with everything an epoch needs; all [B, C] float32 but value_mask (bool)."""

    trajectories: TrajectoryBatch
    old_logprobs: Tensor  # the ratio's anchor
    ref_logprobs: Tensor
    values: Tensor  # of the critic before the update; zeros without a critic
    advantages: Tensor
    returns: Tensor
    value_mask: Tensor  # where the critic is trained

    @property
    def behavior_differences(self) -> Tensor:
        """[tokens]: how far the anchor is from what the generator said of each loss token."""
        batch = self.trajectories
        return (self.old_logprobs - batch.behavior_logprobs).abs()[batch.loss_mask]

    def learned_columns(self, step: int, version: int) -> pa.Table:
        """The trajectories' rows with what the learner made of them, as they are kept on disk."""
        batch = self.trajectories
        table = batch.table
        for name in ("old_logprobs", "ref_logprobs", "values", "advantages", "returns"):
            rows = cast(Tensor, getattr(self, name))
            table = table.append_column(name, _list_column(rows, batch.loss_mask))
        staleness = pa.array(version - batch.policy_versions, pa.int64())
        table = table.append_column("staleness", staleness)
        return table.append_column("step", pa.array(np.full(len(batch), step), pa.int64()))


def _lists(table: pa.Table, name: str) -> tuple[np.ndarray, ...]:
    column = table[name].combine_chunks()
    flat = column.flatten().to_numpy()
    ends = np.cumsum(column.value_lengths().to_numpy())
    return tuple(np.split(flat, ends[:-1]))


def _group_keys(table: pa.Table) -> np.ndarray:
    pairs = zip(table["prompt_id"].to_pylist(), table["epoch"].to_pylist(), strict=True)
    return np.array([f"{prompt}\0{epoch}" for prompt, epoch in pairs])


def _list_column(rows: Tensor, mask: Tensor) -> pa.Array:
    offsets = np.concatenate([[0], np.cumsum(mask.sum(1).numpy())]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(rows[mask].float().numpy()))
