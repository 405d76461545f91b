"""Writes the policy's weights into an image of them, and digests them.

One rank alone digests each piece while the cache has it: the live bytes, or what it has cast or fetched
from a device. Several ranks write parts of every bucket, so they digest when all have written, each its
share of the buckets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import xxhash
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from actors.weight_update import (
    ALIGNMENT,
    ITEM_BYTES,
    TensorSpec,
    WeightLayout,
    digest_bucket,
    each_bucket,
)

# So that a core's own cache has it when it is digested; yet large enough that its copy goes past the caches
# (actors/vllm_engine.TUNABLES).
PIECE_BYTES = 1 << 20
DEVICE_PIECE_BYTES = 8 << 20  # each of them is a transfer


@dataclass(frozen=True)
class _Run:
    """Numbers of this rank that lie together in the image, in its order. Taken anew each time: a
    checkpoint or an optimizer may have replaced the parameter's storage."""

    parameter: Tensor
    start: int  # bytes
    end: int

    def numbers(self) -> Tensor:
        # Not by detach(), over which a DTensor takes longer than a copy of many a tensor.
        with torch.no_grad():
            local = self.parameter
            local = local.to_local() if isinstance(local, DTensor) else local
            return local.reshape(-1)


class WeightWriter:
    """One per rank, its making and `write` are collectives."""

    def __init__(
        self, layout: WeightLayout, parameters: Sequence[Tensor], dtype: str, *, mapped: bool
    ) -> None:
        """`parameters`: of the layout's tensors, in their order. `mapped`: every rank has the image in
        its memory; else only rank 0 has."""
        self._layout = layout
        self._parameters = parameters
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._item = ITEM_BYTES[dtype]
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._mapped = mapped
        # A collective too, so here and not when the first version is written.
        self._runs = list(self._local_runs()) if mapped or self._world_size == 1 else []

    def write(self, image: np.ndarray) -> tuple[str, ...]:
        """The weights as they are into `image` (uint8 [total_bytes]); on rank 0 the buckets' digests."""
        return self._write_together(image) if self._world_size > 1 else self._write_alone(image)

    def _write_alone(self, image: np.ndarray) -> tuple[str, ...]:
        return each_bucket(self._layout, lambda bucket: self._write_bucket(image, bucket))

    def _write_bucket(self, image: np.ndarray, bucket: tuple[int, int]) -> str:
        """All of it by this rank; its digest."""
        start, end = bucket
        digest, digested = xxhash.xxh3_128(), start
        for run in self._runs:
            for first, last, same in self._copy(
                run, image, max(run.start, start), min(run.end, end)
            ):
                if first > digested:  # what aligns tensors
                    digest.update(image[digested:first].data)
                digest.update(same.data)
                digested = last
        digest.update(image[digested:end].data)
        return digest.hexdigest()

    def _write_together(self, image: np.ndarray) -> tuple[str, ...]:
        """Every rank its shards and its share of the digests; all digests on rank 0."""
        if not self._mapped:
            self._gather(image)
            return self._digests(image, range(len(self._layout.buckets))) if self._rank == 0 else ()
        for run in self._runs:
            for _ in self._copy(run, image, run.start, run.end):
                pass
        dist.barrier()  # every shard is in place before the bytes are digested
        num_buckets = len(self._layout.buckets)
        mine = self._digests(image, range(self._rank, num_buckets, self._world_size))
        if num_buckets == 1:
            return mine
        everyone: list[Any] = [None] * self._world_size
        dist.gather_object(mine, everyone if self._rank == 0 else None)
        if self._rank != 0:
            return ()
        return tuple(
            everyone[i % self._world_size][i // self._world_size] for i in range(num_buckets)
        )

    def _digests(self, image: np.ndarray, buckets: range) -> tuple[str, ...]:
        return tuple(digest_bucket(image, self._layout.buckets[i]) for i in buckets)

    def _copy(
        self, run: _Run, image: np.ndarray, start: int, end: int
    ) -> Iterator[tuple[int, int, np.ndarray]]:
        """Bytes [start, end) of the image, which lie within the run or are none, piece by piece: [first,
        last) of each once it is written, with the same bytes where the cache has them."""
        if start >= end:
            return
        numbers = run.numbers()
        on_cpu = numbers.device.type == "cpu"
        as_they_are = numbers.dtype == self._dtype and on_cpu
        live = numbers.view(torch.uint8).numpy() if as_they_are else None
        size = PIECE_BYTES if on_cpu else DEVICE_PIECE_BYTES
        # Of one size, for a small rest would be copied through the caches.
        size = -(-(end - start) // -(-(end - start) // size) // ALIGNMENT) * ALIGNMENT
        for first in range(start, end, size):
            last = min(first + size, end)
            source = slice(first - run.start, last - run.start)
            if live is not None:  # at half the cost of torch's copy
                np.copyto(image[first:last], live[source])
                yield first, last, live[source]
            else:
                part = numbers[source.start // self._item : source.stop // self._item]
                torch.from_numpy(image[first:last]).view(self._dtype).copy_(part)
                yield first, last, image[first:last]

    def _gather(self, image: np.ndarray) -> None:
        target = torch.from_numpy(image).view(self._dtype) if self._rank == 0 else None
        for spec, parameter in zip(self._layout.tensors, self._parameters, strict=True):
            # Cast before the gather: half the bytes, and a copy, never an alias of the live weights.
            full = parameter.detach().to(self._dtype)
            full = full.full_tensor() if isinstance(full, DTensor) else full
            if target is not None:
                start = spec.offset // self._item
                target[start : start + full.numel()].copy_(full.reshape(-1))

    def _local_runs(self) -> Iterator[_Run]:
        """What this rank holds, in the order of the image."""
        by_offset = sorted(
            zip(self._layout.tensors, self._parameters, strict=True),
            key=lambda pair: pair[0].offset,
        )
        for spec, parameter in by_offset:
            start, num_bytes = _share(spec, parameter, self._item)
            if num_bytes:
                yield _Run(parameter, start, start + num_bytes)


def _share(spec: TensorSpec, parameter: Tensor, item: int) -> tuple[int, int]:
    """Where this rank's share of a tensor lies in the image, and its bytes: shards are of whole rows."""
    if not isinstance(parameter, DTensor):
        return spec.offset, parameter.numel() * item
    shape, offset = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    row = parameter.shape[1:].numel() * item
    first = offset[0] * row if offset else 0
    return spec.offset + first, torch.Size(shape).numel() * item
