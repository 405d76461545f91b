"""Writes the policy's weights where generators read them, and says what was written.

On one machine every rank writes its own shards straight into one shared-memory segment, with no
gather; two segments take turns, so that no generator reads what is being written. Between machines
each tensor is gathered once, already cast, and travels in the update's payload.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from actors.weight_update import Probe, WeightLayout, WeightUpdate, digest_buckets
from learner.policy import PolicyModel

PREFIX = "lm."  # the wrapper's name for the Hugging Face model


class WeightPublisher:
    """One per rank; `publish` is a collective."""

    def __init__(self, policy: PolicyModel, *, dtype: str, segment: str | None) -> None:
        """`segment`: path stem in shared memory, or None if generators cannot map it."""
        self._parameters = [
            (name.removeprefix(PREFIX), parameter)
            for name, parameter in policy.named_parameters()
            if name.startswith(PREFIX)
        ]
        self.layout = WeightLayout.of(((n, tuple(p.shape)) for n, p in self._parameters), dtype)
        self._rank = dist.get_rank()
        self._segment = segment
        self._buffers: dict[str, np.ndarray] = {}

    def publish(self, version: int, probe: Probe) -> WeightUpdate | None:
        """Write this version; the update on rank 0, None on the others."""
        place = f"{self._segment}-{version % 2}" if self._segment else ""
        data = self._buffer(place)
        views = torch.from_numpy(data)
        for spec, (_, parameter) in zip(self.layout.tensors, self._parameters, strict=True):
            target = views[spec.offset : spec.offset + spec.num_bytes]
            target = target.view(getattr(torch, spec.dtype)).view(spec.shape)
            self._write(parameter.detach(), target)
        dist.barrier()  # every shard is in place before the bytes are digested
        if self._rank != 0:
            return None
        digests = digest_buckets(self.layout, data)
        payload = () if place else tuple(data[s:e].copy() for s, e in self.layout.buckets)
        return WeightUpdate(version, self.layout.id, digests, probe, place, payload)

    def close(self) -> None:
        """Remove the segments; generators that mapped them keep their copy."""
        if self._rank == 0:
            for place in filter(None, self._buffers):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(place)
        self._buffers.clear()

    def _write(self, parameter: Tensor, target: Tensor) -> None:
        if not isinstance(parameter, DTensor):
            target.copy_(parameter)
        elif self._segment is not None:
            local = parameter.to_local()
            shape, offset = compute_local_shape_and_global_offset(
                parameter.shape, parameter.device_mesh, parameter.placements
            )
            if local.numel():
                target[offset[0] : offset[0] + shape[0]].copy_(local)
        else:
            # Cast before the gather: half the bytes, and a copy, never an alias of the live weights.
            full = parameter.to(target.dtype).full_tensor()
            if self._rank == 0:
                target.copy_(full)

    def _buffer(self, place: str) -> np.ndarray:
        if place not in self._buffers:
            self._buffers[place] = self._map(place) if place else _private(self.layout.total_bytes)
        return self._buffers[place]

    def _map(self, place: str) -> np.ndarray:
        if self._rank == 0:
            Path(place).unlink(missing_ok=True)
            descriptor = os.open(place, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            # Not ftruncate: where shared memory is too small, that succeeds and a write kills us.
            os.posix_fallocate(descriptor, 0, self.layout.total_bytes)
        dist.barrier()
        if self._rank != 0:
            descriptor = os.open(place, os.O_RDWR)
        try:
            return np.frombuffer(mmap.mmap(descriptor, self.layout.total_bytes), np.uint8)
        finally:
            os.close(descriptor)


def _private(num_bytes: int) -> np.ndarray:
    return np.zeros(num_bytes, np.uint8)
