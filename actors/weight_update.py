"""The message by which new weights travel from the learner to a generator.

The layout (names, shapes, dtypes, places in one byte segment) is agreed once; an update then carries
a version, a digest for each bucket of bytes, and the probe: a token sequence with the logprobs that
the learner's own weights give it. Imports no torch: dtypes are names.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np
import xxhash

BUCKET_BYTES = 64 << 20
ALIGNMENT = 64  # bytes; every dtype may be viewed at it
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class WeightsRejected(Exception):
    """The bytes, the layout or the probe of an update are not what the learner sent."""


@dataclass(frozen=True)
class TensorSpec:
    name: str  # as in the Hugging Face checkpoint
    shape: tuple[int, ...]
    dtype: str
    offset: int  # bytes from the start of the segment

    @property
    def num_bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class WeightLayout:
    """Where each tensor lies in the segment. Both sides hold the same one or no update is taken."""

    tensors: tuple[TensorSpec, ...]

    @staticmethod
    def of(shapes: Iterable[tuple[str, tuple[int, ...]]], dtype: str) -> WeightLayout:
        tensors, offset = [], 0
        for name, shape in shapes:
            tensors.append(TensorSpec(name, tuple(shape), dtype, offset))
            offset += -(-tensors[-1].num_bytes // ALIGNMENT) * ALIGNMENT
        return WeightLayout(tuple(tensors))

    @cached_property
    def total_bytes(self) -> int:
        return max(
            (-(-(t.offset + t.num_bytes) // ALIGNMENT) * ALIGNMENT for t in self.tensors), default=0
        )

    @cached_property
    def id(self) -> str:
        """Digest of names, shapes, dtypes and offsets."""
        described = json.dumps([asdict(tensor) for tensor in self.tensors], sort_keys=True)
        return hashlib.sha256(described.encode()).hexdigest()[:16]

    @cached_property
    def buckets(self) -> tuple[tuple[int, int], ...]:
        """[start, end) byte ranges of at most BUCKET_BYTES that cover the segment."""
        ends = [*range(BUCKET_BYTES, self.total_bytes, BUCKET_BYTES), self.total_bytes]
        return tuple(zip([0, *ends[:-1]], ends, strict=True))


@dataclass(frozen=True)
class Probe:
    """A fixed token sequence, and the logprob (temperature 1) of each token but the first."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]


@dataclass(frozen=True)
class WeightUpdate:
    """One version of the weights. The bytes lie in `segment`, a file in shared memory, or come
    along in `payload` (uint8, one array a bucket) where learner and generator share no memory."""

    version: int
    layout_id: str
    digests: tuple[str, ...]
    probe: Probe
    segment: str = ""
    payload: tuple[np.ndarray, ...] = ()


def digest_buckets(layout: WeightLayout, data: np.ndarray) -> tuple[str, ...]:
    """xxh3-128 of each bucket of `data` (uint8 [total_bytes]): as fast as memory, any bit counts."""
    return tuple(xxhash.xxh3_128_hexdigest(data[start:end].data) for start, end in layout.buckets)


def verify(update: WeightUpdate, layout: WeightLayout, data: np.ndarray) -> None:
    """Raise WeightsRejected unless `data` is byte for byte what the learner digested."""
    if update.layout_id != layout.id:
        raise WeightsRejected(
            f"version {update.version}: layout {update.layout_id}, but {layout.id} was agreed"
        )
    if data.nbytes != layout.total_bytes:
        raise WeightsRejected(
            f"version {update.version}: {data.nbytes} bytes received, {layout.total_bytes} agreed"
        )
    if len(update.digests) != len(layout.buckets):
        raise WeightsRejected(
            f"version {update.version}: {len(update.digests)} digests for {len(layout.buckets)} buckets"
        )
    received = digest_buckets(layout, data)
    wrong = [
        i for i, pair in enumerate(zip(received, update.digests, strict=True)) if pair[0] != pair[1]
    ]
    if wrong:
        raise WeightsRejected(
            f"version {update.version}: the bytes of bucket {wrong[0]} of {len(received)} are not "
            "those the learner digested"
        )


def probe_difference(probe: Probe, answered: Iterable[float]) -> float:
    """max |generator - learner| over the probe's tokens; inf if either side lacks a token, or has
    one that is not finite."""
    answer, expected = np.asarray(list(answered), np.float64), np.asarray(probe.logprobs)
    whole = answer.size and answer.shape == expected.shape
    if not (whole and np.isfinite(answer).all() and np.isfinite(expected).all()):
        return float("inf")
    return float(np.abs(answer - expected).max())
