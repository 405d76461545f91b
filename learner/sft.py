"""Supervised fine-tuning: the learner's policy, packing and optimizer, with cross-entropy as the loss."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from learner.config import LearnerConfig, SFTConfig
from learner.hf_folder import gather_weights, write_folder
from learner.learner_spec import Rendezvous
from learner.optimizer import NotFinite, Optimizer
from learner.policy import load_policy
from learner.process_group import free_port, join, sum_over_ranks
from learner.supervised import supervised_loss
from learner.supervised_rows import SupervisedRows, load_supervised
from learner.sweep import Share
from reward_service.tokenizer import load_tokenizer


@dataclass(frozen=True)
class SFTSpec:
    model: str
    sft: SFTConfig
    learner: LearnerConfig
    num_steps: int
    seed: int


class SFTWorker:
    """One rank. All methods but `port` are collectives."""

    def __init__(self, spec: SFTSpec, rank: int) -> None:
        self._spec = spec
        self._rank = rank

    def __repr__(self) -> str:
        return f"SFT(rank {self._rank} of {self._spec.learner.ranks})"

    def port(self) -> int:
        return free_port()

    def start(self, rendezvous: Rendezvous) -> None:
        """Join the group, load model and rows."""
        spec = self._spec
        torch.manual_seed(spec.seed)
        mesh = join(rendezvous, self._rank, spec.learner.timeout_s)
        self._policy = load_policy(spec.model, mesh, spec.learner)
        self._optimizer = Optimizer(self._policy.parameters(), spec.sft.optimizer)
        self._share = Share(
            self._rank,
            rendezvous.world_size,
            spec.learner,
            torch.device(mesh.device_type),
        )
        tokenizer, sft = load_tokenizer(spec.model), spec.sft
        rows = load_supervised(sft.data, tokenizer, sft.max_tokens)
        self._rows = SupervisedRows(rows, batch_size=sft.batch_size, seed=spec.seed)
        self._held_out = (
            load_supervised(sft.held_out_data, tokenizer, sft.max_tokens)
            if sft.held_out_data is not None
            else None
        )

    def train(self, step: int) -> dict[str, float]:
        """Optimizer step `step` (from 1); returns its metrics."""
        started = time.perf_counter()
        lr = self._optimizer.set_step(step - 1, self._spec.num_steps)
        batch = self._rows.batch(step - 1)
        total = torch.zeros((), device=self._share.device)
        microbatches = self._share.of(batch, range(len(batch)))
        for position, indices in enumerate(microbatches):
            self._policy.set_requires_gradient_sync(position == len(microbatches) - 1)  # type: ignore[operator]
            loss = supervised_loss(self._policy, batch, indices, self._share)
            loss.backward()
            total += loss.detach()
        loss_value = sum_over_ranks(total).item()
        if loss_value != loss_value:
            raise NotFinite(f"the loss of step {step} is NaN")
        norm = self._optimizer.apply("policy")
        seconds = time.perf_counter() - started
        return {
            "sft/loss": loss_value,
            "sft/lr": lr,
            "sft/grad_norm": norm,
            "sft/tokens_per_s": sum(batch.lengths) / seconds / self._spec.learner.ranks,
        }

    @torch.no_grad()
    def held_out(self) -> dict[str, float]:
        """The loss of all held-out rows under the weights as they are."""
        assert self._held_out is not None, "sft.held_out_data is not set"
        total = torch.zeros((), device=self._share.device)
        for indices in self._share.of(self._held_out, range(len(self._held_out))):
            total += supervised_loss(self._policy, self._held_out, indices, self._share)
        return {"sft/held_out_loss": sum_over_ranks(total).item()}

    def write(self, out: str) -> None:
        """The Hugging Face folder of the trained model, written by rank 0."""
        weights = gather_weights(self._policy)
        if self._rank == 0:
            write_folder(weights, self._spec.model, Path(out))

    def close(self) -> None:
        return
