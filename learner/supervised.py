"""The loss on supervised rows: for SFT, and for the pretraining term of PPO-ptx."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from learner.policy import PolicyModel
from learner.supervised_rows import SupervisedBatch
from learner.sweep import Share


def supervised_loss(
    policy: PolicyModel, batch: SupervisedBatch, indices: Sequence[int], share: Share
) -> Tensor:
    """-log pi(completion | prompt), summed over the rows `indices`, over the batch's token count:
    summed over microbatches and ranks it is the mean over the batch's completion tokens."""
    logprobs, _, _ = policy(share.pack(batch, indices))
    return -logprobs.sum() / batch.num_loss_tokens
