"""FSDP's collectives among ranks on one machine's CPUs: through memory that they share.

gloo sends every byte through a socket, at two to four times the cost. Here each rank copies its part
into its slot, all meet (gloo's all_reduce of one number, with its deadline and its notice of a rank
that died), and each reads what it needs from the others' slots. Two sets of slots take turns: whoever
writes to a set again has met all others since they read it. Larger tensors go piece by piece, so the
memory is the same for every model.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

SLOT_BYTES = 8 << 20


class SharedSlots:
    """Making it is a collective; all ranks must be on one machine, and of one user."""

    def __init__(self) -> None:
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        num_bytes = 2 * self._world_size * SLOT_BYTES
        descriptor = _same_file(num_bytes)
        memory = mmap.mmap(descriptor, num_bytes)
        dist.barrier()  # until all have mapped it
        os.close(descriptor)
        slots = torch.frombuffer(memory, dtype=torch.uint8)
        self._sets = slots.view(2, self._world_size, SLOT_BYTES)
        self._turn = 0
        self._met = torch.zeros(1)

    def all_gather(self, output: Tensor, mine: Tensor) -> None:
        """output [world * n]: `mine` [n] of each rank, in their order. `mine` may lie in it already."""
        parts = output.view(self._world_size, -1)
        if parts[self._rank].data_ptr() != mine.data_ptr():
            parts[self._rank].copy_(mine)
        others = [rank for rank in range(self._world_size) if rank != self._rank]
        for start, end in _pieces(mine, SLOT_BYTES):
            slots = self._slots(mine.dtype)[:, : end - start]
            slots[self._rank].copy_(mine[start:end])
            self._meet()
            for rank in others:
                parts[rank, start:end].copy_(slots[rank])

    def reduce_scatter(self, output: Tensor, mine: Tensor) -> None:
        """output [n]: this rank's part of the sum over ranks, in their order, of `mine` [world * n]."""
        world_size = self._world_size
        parts = mine.view(world_size, -1)
        for start, end in _pieces(output, SLOT_BYTES // world_size):
            slots = self._slots(mine.dtype)[:, : world_size * (end - start)]
            slots = slots.unflatten(1, (world_size, end - start))  # [from, to, piece]
            slots[self._rank].copy_(parts[:, start:end])
            self._meet()
            total = torch.add(slots[0, self._rank], slots[1, self._rank], out=output[start:end])
            for rank in range(2, world_size):
                total += slots[rank, self._rank]

    def _slots(self, dtype: torch.dtype) -> Tensor:
        """[world, numbers] of the set whose turn it is."""
        return self._sets[self._turn].view(dtype)

    def _meet(self) -> None:
        dist.all_reduce(self._met)
        self._turn = 1 - self._turn


class AllGather:
    """As FSDP wants it."""

    def __init__(self, slots: SharedSlots) -> None:
        self._slots = slots

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, **_: Any) -> None:
        self._slots.all_gather(output_tensor, input_tensor)


class ReduceScatter(AllGather):
    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, **given: Any) -> None:
        assert given["op"] == dist.ReduceOp.SUM, given["op"]
        self._slots.reduce_scatter(output_tensor, input_tensor)


def use_shared_memory(models: Sequence[Any]) -> None:
    """A collective. From now on FSDP moves the shards of `models` through shared memory."""
    if dist.get_world_size() == 1:
        return
    slots = SharedSlots()
    for module in chain.from_iterable(model.modules() for model in models if model):
        if isinstance(module, FSDPModule):
            module.set_custom_all_gather(AllGather(slots))  # type: ignore[arg-type]
            module.set_custom_reduce_scatter(ReduceScatter(slots))  # type: ignore[arg-type]


def _same_file(num_bytes: int) -> int:
    """A file in memory, without a name that could be left behind; this rank's descriptor of it."""
    mine = os.memfd_create("raylign-collectives") if dist.get_rank() == 0 else -1
    if mine >= 0:
        os.ftruncate(mine, num_bytes)
    place: list[Any] = [f"/proc/{os.getpid()}/fd/{mine}"]
    dist.broadcast_object_list(place, src=0)
    return mine if mine >= 0 else os.open(place[0], os.O_RDWR)


def _pieces(tensor: Tensor, num_bytes: int) -> Iterator[tuple[int, int]]:
    step = num_bytes // tensor.element_size()
    for start in range(0, len(tensor), step):
        yield start, min(start + step, len(tensor))
