"""Takes a PPO step back, to the bit: what its optimizer steps change is kept aside before the first.

Each rank keeps and restores its own shards: no collective, no gathered weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from learner.optimizer import Optimizer, local_shard

Name = tuple[nn.Parameter, str]  # "": the parameter itself, else a tensor of its optimizer state


class Undo:
    def __init__(self, optimizers: list[Optimizer]) -> None:
        self._optimizers = optimizers
        self._kept: dict[Name, Tensor] = {}  # on the CPU; the same memory in every step
        self._had_state: set[nn.Parameter] = set()
        self._holds = False

    def begin(self) -> None:
        """A step begins. Weights and moments are as they were until the first optimizer step."""
        self._rates = [group["lr"] for group in self._groups()]
        self._random = torch.get_rng_state()
        self._holds = False

    @torch.no_grad()
    def keep(self) -> None:
        """Call it before each optimizer step that others may follow; the first call of a step counts."""
        if self._holds:
            return
        self._kept = {name: _copy(it, self._kept.get(name)) for name, it in self._tensors()}
        self._had_state = {parameter for one in self._optimizers for parameter in one.adamw.state}
        self._holds = True

    @torch.no_grad()
    def restore(self) -> None:
        """Everything as it was at `begin`, gradients forgotten."""
        for optimizer in self._optimizers:
            optimizer.clear()
        if self._holds:
            self._forget_new_state()
            for name, tensor in self._tensors():
                tensor.copy_(self._kept[name])
        for group, rate in zip(self._groups(), self._rates, strict=True):
            group["lr"] = rate
        torch.set_rng_state(self._random)

    def _forget_new_state(self) -> None:
        """AdamW makes a parameter's state at its first step: before that there was none."""
        for optimizer in self._optimizers:
            for parameter in [*optimizer.adamw.state]:
                if parameter not in self._had_state:
                    del optimizer.adamw.state[parameter]

    def _groups(self) -> Iterator[dict[str, Any]]:
        for optimizer in self._optimizers:
            yield from optimizer.adamw.param_groups

    def _tensors(self) -> Iterator[tuple[Name, Tensor]]:
        """This rank's shards of all that an optimizer step changes."""
        for optimizer in self._optimizers:
            for parameter in optimizer.parameters:
                yield (parameter, ""), local_shard(parameter)
                for name, value in optimizer.adamw.state.get(parameter, {}).items():
                    if isinstance(value, Tensor):
                        yield (parameter, name), local_shard(value)


def _copy(tensor: Tensor, buffer: Tensor | None) -> Tensor:
    if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
        # Pinned: a copy from a GPU is then as fast as the bus, and runs beside what comes next.
        buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return buffer.copy_(tensor, non_blocking=True)
