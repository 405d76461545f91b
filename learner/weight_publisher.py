"""Writes the policy's weights where generators read them, and says what was written.

On one machine every rank writes its own shards straight into one shared-memory segment, with no
gather; two segments take turns, so that no generator reads what is being written. Between machines
each tensor is gathered once, already cast, and travels in the update's payload: whole, or as what
changed since the version before.

Bytes are digested right behind the write, while the cache still has them. Several ranks write parts
of every bucket, so they digest when all have written, each its share of the buckets.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import xxhash
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from actors import weight_delta
from actors.weight_segment import WrittenSegment
from actors.weight_update import (
    ITEM_BYTES,
    Probe,
    TensorSpec,
    WeightLayout,
    WeightUpdate,
    digest_bucket,
)
from learner.policy import PolicyModel

PREFIX = "lm."  # the wrapper's name for the Hugging Face model
# From here on the probe is answered beside the writing; with less, the interpreter's lock, which the
# two threads then pass to and fro, costs more than that saves.
OVERLAP_BYTES = 64 << 20
PIECE_BYTES = 256 << 10  # written, then digested while the core's own cache has it
DEVICE_PIECE_BYTES = 8 << 20  # each of them is a transfer


@dataclass(frozen=True)
class _Run:
    """Numbers of this rank that lie together in the image, in its order. Taken anew each time: a
    checkpoint or an optimizer may have replaced the parameter's storage."""

    parameter: Tensor
    start: int  # bytes
    end: int

    def numbers(self) -> Tensor:
        local = self.parameter.detach()
        local = local.to_local() if isinstance(local, DTensor) else local
        return local.reshape(-1)


class WeightPublisher:
    """One per rank; all but `last_update` and `close` are collectives."""

    def __init__(
        self, policy: PolicyModel, *, dtype: str, segment: str | None, delta: bool = False
    ) -> None:
        """`segment`: path stem in shared memory, or None if generators cannot map it; then `delta`
        says whether updates hold only what changed."""
        self._parameters = [
            (name.removeprefix(PREFIX), parameter)
            for name, parameter in policy.named_parameters()
            if name.startswith(PREFIX)
        ]
        self.layout = WeightLayout.of(((n, tuple(p.shape)) for n, p in self._parameters), dtype)
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._item = ITEM_BYTES[dtype]
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._delta = delta
        self._turn = 0
        self._last: WeightUpdate | None = None  # without its payload
        self._segments = self._create(segment) if segment is not None else []
        self._images = [one.data for one in self._segments] or self._private(2 if delta else 1)
        # A collective too, so here and not when the first version is published.
        together = self._segments or self._world_size == 1
        self._runs = list(self._local_runs()) if together else []

    def publish(self, version: int, ask_probe: Callable[[], Probe]) -> WeightUpdate | None:
        """Write this version; the update on rank 0, None on the others. `ask_probe` (a collective of
        its own) answers the probe from the weights as they are, meanwhile if the ranks allow it."""
        before, turn = self._turn, (self._turn + 1) % len(self._images)
        image = self._images[turn]
        with self._writing(turn):
            if self._world_size == 1 and self.layout.total_bytes >= OVERLAP_BYTES:
                digests, write_s, probe, probe_s = self._write_beside(image, ask_probe)
            else:
                alone = self._world_size == 1
                write = self._write_alone if alone else self._write_together
                digests, write_s = _timed(write, image)
                probe, probe_s = _timed(ask_probe)
        self._turn = turn
        if self._rank != 0:
            return None
        last, place = self._last, self._segments[self._turn].path if self._segments else ""
        self._last = WeightUpdate(
            version, self.layout.id, digests, probe, place, write_s=write_s, probe_s=probe_s
        )
        if place or last is None or not self._delta:
            return self.last_update(in_message=not place)
        payload, delta_s = _timed(weight_delta.encode, self.layout, self._images[before], image)
        return replace(self._last, payload=payload, base=last.version, write_s=write_s + delta_s)

    def last_update(self, in_message: bool) -> WeightUpdate | None:
        """The last version in full, on rank 0: for a receiver that holds none. `in_message`: even if it
        lies in a segment, for a receiver on another machine."""
        if self._last is None or (self._last.segment and not in_message):
            return self._last
        image = self._images[self._turn]
        payload = tuple(image[start:end].copy() for start, end in self.layout.buckets)
        return replace(self._last, segment="", payload=payload)

    def close(self) -> None:
        """Remove the segments; generators that mapped them keep their copy."""
        for segment in self._segments:
            segment.close()
            if self._rank == 0:
                segment.remove()
        self._segments, self._images = [], []

    # ---- writing

    def _write_beside(
        self, image: np.ndarray, ask_probe: Callable[[], Probe]
    ) -> tuple[tuple[str, ...], float, Probe, float]:
        """By a thread, while this one answers the probe and then helps: no rank waits for another, so the
        two need not wait for each other."""
        started, buckets = time.perf_counter(), self.layout.buckets
        with ThreadPoolExecutor(1) as writer:
            writing = [writer.submit(self._write, image, bucket) for bucket in buckets]
            probe, probe_s = _timed(ask_probe)
            last_first = range(len(buckets) - 1, -1, -1)
            mine = {i: self._write(image, buckets[i]) for i in last_first if writing[i].cancel()}
            digests = tuple(mine.get(i) or future.result() for i, future in enumerate(writing))
        return digests, time.perf_counter() - started, probe, probe_s

    def _write_alone(self, image: np.ndarray) -> tuple[str, ...]:
        return tuple(self._write(image, bucket) for bucket in self.layout.buckets)

    def _write(self, image: np.ndarray, bucket: tuple[int, int]) -> str:
        """A bucket, all of it by this rank; its digest."""
        start, end = bucket
        digest, digested = xxhash.xxh3_128(), start
        for run in self._runs:
            for written in self._copy(run, image, max(run.start, start), min(run.end, end)):
                if written - digested >= PIECE_BYTES:
                    digest.update(image[digested:written].data)
                    digested = written
        digest.update(image[digested:end].data)
        return digest.hexdigest()

    def _write_together(self, image: np.ndarray) -> tuple[str, ...]:
        """Every rank its shards and its share of the digests; all digests on rank 0."""
        if not self._segments:
            self._gather(image)
            return self._digests(image, range(len(self.layout.buckets))) if self._rank == 0 else ()
        for run in self._runs:
            for _ in self._copy(run, image, run.start, run.end):
                pass
        dist.barrier()  # every shard is in place before the bytes are digested
        num_buckets = len(self.layout.buckets)
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
        return tuple(digest_bucket(image, self.layout.buckets[i]) for i in buckets)

    def _copy(self, run: _Run, image: np.ndarray, start: int, end: int) -> Iterator[int]:
        """Bytes [start, end) of the image, which lie within the run or are none, piece by piece: where
        each ends, once it is written."""
        if start >= end:
            return
        numbers = run.numbers()
        on_cpu = numbers.device.type == "cpu"
        as_they_are = numbers.dtype == self._dtype and on_cpu
        raw = numbers.view(torch.uint8).numpy() if as_they_are else None
        piece = PIECE_BYTES if on_cpu else DEVICE_PIECE_BYTES
        for first in range(start, end, piece):
            last = min(first + piece, end)
            source = slice(first - run.start, last - run.start)
            if raw is not None:  # at half the cost of torch's copy
                np.copyto(image[first:last], raw[source])
            else:
                part = numbers[source.start // self._item : source.stop // self._item]
                torch.from_numpy(image[first:last]).view(self._dtype).copy_(part)
            yield last

    def _gather(self, image: np.ndarray) -> None:
        target = torch.from_numpy(image).view(self._dtype) if self._rank == 0 else None
        for spec, (_, parameter) in zip(self.layout.tensors, self._parameters, strict=True):
            # Cast before the gather: half the bytes, and a copy, never an alias of the live weights.
            full = parameter.detach().to(self._dtype)
            full = full.full_tensor() if isinstance(full, DTensor) else full
            if target is not None:
                start = spec.offset // self._item
                target[start : start + full.numel()].copy_(full.reshape(-1))

    # ---- where to write

    def _local_runs(self) -> Iterator[_Run]:
        """What this rank holds, in the order of the image."""
        by_offset = sorted(
            zip(self.layout.tensors, self._parameters, strict=True), key=lambda pair: pair[0].offset
        )
        for spec, (_, parameter) in by_offset:
            start, num_bytes = _share(spec, parameter, self._item)
            if num_bytes:
                yield _Run(parameter, start, start + num_bytes)

    @contextlib.contextmanager
    def _writing(self, turn: int) -> Iterator[None]:
        """Nobody reads the segment while we write it; rank 0 sees to that for all."""
        if not self._segments:
            yield
            return
        segment = self._segments[turn]
        with segment.locked() if self._rank == 0 else contextlib.nullcontext():
            if self._world_size > 1:
                dist.barrier()
            yield

    def _create(self, stem: str) -> list[WrittenSegment]:
        def made(turn: int) -> WrittenSegment:
            return WrittenSegment(f"{stem}-{turn}", self.layout.total_bytes, create=self._rank == 0)

        first = [made(turn) for turn in (0, 1)] if self._rank == 0 else []
        dist.barrier()  # they are there
        return first or [made(turn) for turn in (0, 1)]

    def _private(self, count: int) -> list[np.ndarray]:
        num_bytes = self.layout.total_bytes if self._rank == 0 else 0
        return [np.zeros(num_bytes, np.uint8) for _ in range(count)]


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


def _timed(function: Callable[..., Any], *args: Any) -> tuple[Any, float]:
    started = time.perf_counter()
    return function(*args), time.perf_counter() - started
