"""The message by which new weights travel from the learner to a generator.

The layout (names, shapes, dtypes, places in one byte segment) is agreed once; an update then carries
a version, a digest for each bucket of bytes, and the probe: a token sequence and what may follow it. The
logprobs of that by the learner's own weights come after it, for learner and engine answer the probe at
the same time. Imports no torch: dtypes are names.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cached_property

import numpy as np
import xxhash

BUCKET_BYTES = 64 << 20
ALIGNMENT = 64  # bytes; every dtype may be viewed at it
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Engines fuse these into one parameter, in this order: laid side by side they are that parameter.
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
# That one receiver takes while generation waits for it; xxhash, too, lets go of the interpreter's lock.
PUSH_THREADS = min(4, os.cpu_count() or 1)


class WeightsRejected(Exception):
    """The bytes, the layout or the probe of an update are not what the learner sent."""


class NeedsAll(Exception):
    """A delta to a version that this receiver does not hold, or a segment that is not on its machine:
    it needs the update in full, in the message."""


@dataclass(frozen=True)
class Refused:
    """A worker's answer to an update that it did not apply. Not raised there, nor an exception itself: of
    those that a process of vLLM's gives vLLM keeps the words only."""

    error: WeightsRejected | NeedsAll


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
        """Tensors in the order given; those of a fused group lie together, where its first comes."""
        specs = [TensorSpec(name, tuple(shape), dtype, 0) for name, shape in shapes]
        groups: dict[object, list[tuple[int, int]]] = {}
        for index, spec in enumerate(specs):
            fused = _fused(spec.name)
            key, place = fused if fused is not None else (index, 0)
            groups.setdefault(key, []).append((place, index))
        offset = 0
        for members in groups.values():
            for _, index in sorted(members):
                specs[index] = replace(specs[index], offset=offset)
                offset += specs[index].num_bytes
            offset = -(-offset // ALIGNMENT) * ALIGNMENT
        return WeightLayout(tuple(specs))

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
    """What learner and engine are asked: the logprob (temperature 1) of each of `next_ids` as the token
    after `prompt_ids`. Every weight of a model has a part in it, if the prompt has two tokens or more: over
    one alone attention has no choice."""

    prompt_ids: tuple[int, ...]
    next_ids: tuple[int, ...]

    @staticmethod
    def of(vocabulary_size: int, special_ids: set[int]) -> Probe:
        """A fixed one, of ordinary tokens from all over the vocabulary. Two and two: a product over so
        few takes little longer than reading the matrix."""
        candidates = [i for i in range(vocabulary_size) if i not in special_ids]
        first, second, *following = map(int, np.random.default_rng(0).choice(candidates, 4))
        return Probe((first, second), tuple(following))


@dataclass(frozen=True)
class WeightUpdate:
    """One version of the weights. The bytes lie in `segment`, a file in shared memory, or come
    along in `payload` where learner and generator share no memory: uint8, one array a bucket, which
    is the bucket's bytes, or with a `base` what changed in it since that version (weight_delta)."""

    version: int
    layout_id: str
    digests: tuple[str, ...]  # of the whole image, however it is sent
    probe: Probe
    segment: str = ""
    payload: tuple[np.ndarray, ...] = ()
    base: int | None = None
    write_s: float = 0.0  # what the learner spent on bytes and digests

    @property
    def payload_bytes(self) -> int:
        return sum(piece.nbytes for piece in self.payload)


@dataclass(frozen=True)
class ProbeAnswer:
    """What an engine must answer to an update's probe: the logprobs by the learner's weights."""

    version: int
    digests: tuple[str, ...]  # the update's: a version's number may come again, of other weights
    logprobs: tuple[float, ...]
    probe_s: float = 0.0  # what the learner spent on it

    def is_to(self, update: WeightUpdate) -> bool:
        return (self.version, self.digests) == (update.version, update.digests)


def digest_bucket(data: np.ndarray, bucket: tuple[int, int]) -> str:
    """xxh3-128 of one bucket of `data` (uint8 [total_bytes]): as fast as memory, any bit counts."""
    return str(xxhash.xxh3_128_hexdigest(data[bucket[0] : bucket[1]].data))


def digest_buckets(layout: WeightLayout, data: np.ndarray) -> tuple[str, ...]:
    """The digest of each bucket of `data`."""
    return each_bucket(layout, lambda bucket: digest_bucket(data, bucket))


def each_bucket(layout: WeightLayout, digest: Callable[[tuple[int, int]], str]) -> tuple[str, ...]:
    """What `digest` makes of each bucket: in PUSH_THREADS threads, or in this one of a single bucket."""
    if len(layout.buckets) == 1:
        return (digest(layout.buckets[0]),)
    return tuple(_threads().map(digest, layout.buckets))


@functools.cache
def _threads() -> ThreadPoolExecutor:
    """Kept: new ones begin on the core of whoever makes them, and are moved apart only after milliseconds."""
    return ThreadPoolExecutor(PUSH_THREADS, "weight-push")


os.register_at_fork(after_in_child=_threads.cache_clear)  # there they do not run


def _fused(name: str) -> tuple[str, int] | None:
    """The group of tensors this one is fused with, and its place there; None if it stands alone."""
    words = name.split(".")
    for group in FUSED:
        for i, word in enumerate(words):
            if word in group:
                return ".".join([*words[:i], "+".join(group), *words[i + 1 :]]), group.index(word)
    return None


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


def probe_difference(logprobs: Iterable[float], answered: Iterable[float]) -> float:
    """max |generator - learner| over the probe's tokens; inf if either side lacks a token, or has
    one that is not finite."""
    expected, answer = (np.asarray(list(side), np.float64) for side in (logprobs, answered))
    whole = answer.size and answer.shape == expected.shape
    if not (whole and np.isfinite(answer).all() and np.isfinite(expected).all()):
        return float("inf")
    return float(np.abs(answer - expected).max())
