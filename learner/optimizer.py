"""AdamW with a schedule, gradient clipping, and the refusal to step on a gradient that is not finite."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from learner.config import OptimizerConfig
from learner.process_group import sum_over_ranks


class NotFinite(Exception):
    """A loss, logprob or gradient is NaN or infinite; the weights were not touched."""


def schedule(config: OptimizerConfig, step: int, num_steps: int) -> float:
    """The factor on lr at `step` (from 0) of `num_steps`: linear warm-up times the decay."""
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    done = min(1.0, step / num_steps)
    low = config.min_lr_ratio
    decay = {
        "constant": 1.0,
        "linear": 1.0 - (1.0 - low) * done,
        "cosine": low + (1.0 - low) * 0.5 * (1.0 + math.cos(math.pi * done)),
    }[config.decay]
    return warm * decay


class Optimizer:
    """AdamW over one model's parameters. Build it after `fully_shard`: before, it would train nothing."""

    def __init__(self, parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> None:
        self.parameters = [p for p in parameters if p.requires_grad]
        self.config = config
        self.adamw = torch.optim.AdamW(
            self.parameters,
            lr=config.lr,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=True,
        )

    def set_step(self, step: int, num_steps: int) -> float:
        """Set the learning rate for this step and return it."""
        lr = self.config.lr * schedule(self.config, step, num_steps)
        for group in self.adamw.param_groups:
            group["lr"] = lr
        return lr

    def apply(self, what: str) -> float:
        """Clip, step, clear. Returns the gradient norm before clipping; NotFinite instead of a step."""
        if not math.isfinite(norm := self.clip()):
            self.clear()
            raise NotFinite(
                f"the gradient norm of the {what} is {norm}; its weights were not changed"
            )
        self.step()
        return norm

    def clip(self) -> float:
        """Clip the gradients; their norm before, over all ranks. They are lost if it is not finite.

        On the local shards: DTensors would add some twenty Python calls to every gradient.
        """
        shards = [local_shard(p.grad) for p in self.parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(shards).double()
        if any(isinstance(parameter, DTensor) for parameter in self.parameters):
            norm = sum_over_ranks(norm.square()).sqrt()
        factor = (self.config.max_grad_norm / (norm + 1e-6)).clamp(max=1.0).float()
        for shard in shards:
            shard.mul_(factor)
        return norm.item()

    def step(self) -> None:
        self.adamw.step()
        self.clear()

    def clear(self) -> None:
        self.adamw.zero_grad()


def local_shard(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
