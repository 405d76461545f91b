"""Writes the policy's weights where generators read them, and says what was written.

On one machine every rank writes its own shards straight into one shared-memory segment, with no
gather; two segments take turns, so that no generator reads what is being written. Between machines
each tensor is gathered once, already cast, and travels in the update's payload: whole, or as what
changed since the version before. weight_writer.py writes and digests the bytes.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch.distributed as dist

from actors import weight_delta
from actors.segment_owner import SegmentOwner, segments_of
from actors.weight_segment import WrittenSegment
from actors.weight_update import Probe, WeightLayout, WeightUpdate
from learner.policy import PolicyModel
from learner.weight_writer import WeightWriter

PREFIX = "lm."  # the wrapper's name for the Hugging Face model


class WeightPublisher:
    """One per rank; all but `last_update` and `close` are collectives."""

    def __init__(
        self,
        policy: PolicyModel,
        *,
        dtype: str,
        probe: Probe,
        segment: str | None,
        delta: bool = False,
    ) -> None:
        """`segment`: path stem in shared memory, or None if generators cannot map it; then `delta`
        says whether updates hold only what changed."""
        named = {
            name.removeprefix(PREFIX): parameter
            for name, parameter in policy.named_parameters()
            if name.startswith(PREFIX)
        }
        self.layout = WeightLayout.of(((n, tuple(p.shape)) for n, p in named.items()), dtype)
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._probe = probe
        self._delta = delta
        self._turn = 0
        self._last: WeightUpdate | None = None  # without its payload
        self._owner: SegmentOwner | None = None  # on rank 0, of segments
        self._segments = self._create(segment) if segment is not None else []
        self._images = [one.data for one in self._segments] or self._private(2 if delta else 1)
        mapped = bool(self._segments)
        self._writer = WeightWriter(self.layout, list(named.values()), dtype, mapped=mapped)

    def publish(self, version: int) -> WeightUpdate | None:
        """Write this version; the update on rank 0, None on the others."""
        started = time.perf_counter()
        before, turn = self._turn, (self._turn + 1) % len(self._images)
        image = self._images[turn]
        with self._writing(turn):
            digests = self._writer.write(image)
        self._turn = turn
        if self._rank != 0:
            return None
        last, place = self._last, self._segments[self._turn].path if self._segments else ""
        write_s = time.perf_counter() - started
        self._last = WeightUpdate(
            version, self.layout.id, digests, self._probe, place, write_s=write_s
        )
        if place or last is None or not self._delta:
            return self.last_update(in_message=not place)
        payload = weight_delta.encode(self.layout, self._images[before], image)
        write_s = time.perf_counter() - started
        return replace(self._last, payload=payload, base=last.version, write_s=write_s)

    @property
    def digests(self) -> tuple[str, ...]:
        """Of the version that was last published, on rank 0."""
        assert self._last is not None
        return self._last.digests

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
        if self._owner is not None:
            self._owner.close()
            self._owner = None

    # ---- where to write

    @contextlib.contextmanager
    def _writing(self, turn: int) -> Iterator[None]:
        """Hold the segment's lock, by rank 0 for all ranks, so that nobody reads what is being written."""
        if not self._segments:
            yield
            return
        segment = self._segments[turn]
        with segment.locked() if self._rank == 0 else contextlib.nullcontext():
            if self._world_size > 1:
                dist.barrier()
            yield

    def _create(self, stem: str) -> list[WrittenSegment]:
        def made() -> list[WrittenSegment]:
            num_bytes, create = self.layout.total_bytes, self._rank == 0
            return [WrittenSegment(path, num_bytes, create=create) for path in segments_of(stem)]

        if self._rank == 0:
            self._owner = SegmentOwner(stem)
        first = made() if self._rank == 0 else []
        dist.barrier()  # they are there
        return first or made()

    def _private(self, count: int) -> list[np.ndarray]:
        num_bytes = self.layout.total_bytes if self._rank == 0 else 0
        return [np.zeros(num_bytes, np.uint8) for _ in range(count)]
