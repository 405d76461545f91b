"""A weight update is taken byte for byte as the learner digested it, or not at all."""

from __future__ import annotations

import math
import multiprocessing
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors import weight_update
from actors.weight_update import (
    ALIGNMENT,
    ITEM_BYTES,
    Probe,
    TensorSpec,
    WeightLayout,
    WeightsRejected,
    WeightUpdate,
    digest_buckets,
    probe_difference,
    verify,
)

LOGPROBS = (-0.5, -1.5)
dtypes = st.sampled_from(sorted(ITEM_BYTES))
shapes = st.lists(
    st.tuples(st.text(max_size=5), st.lists(st.integers(0, 9), max_size=3).map(tuple)), max_size=8
)


def sent(layout: WeightLayout, data: np.ndarray, version: int = 7) -> WeightUpdate:
    return WeightUpdate(version, layout.id, digest_buckets(layout, data), Probe((1, 2), (3, 4)))


@pytest.fixture
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_update, "BUCKET_BYTES", 4096)


@pytest.fixture
def layout(small_buckets: None) -> WeightLayout:
    """Some tensors of odd sizes over ten buckets."""
    return WeightLayout.of([("a", (33, 65)), ("b", (7,)), ("c", ()), ("d", (90, 90))], "float32")


@pytest.fixture
def data(layout: WeightLayout) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, layout.total_bytes, np.uint8)


def test_the_bytes_that_were_sent_are_taken(layout: WeightLayout, data: np.ndarray) -> None:
    verify(sent(layout, data), layout, data)
    assert len(layout.buckets) == 11


def test_a_process_forked_from_one_that_has_digested_digests_with_threads_of_its_own(
    layout: WeightLayout, data: np.ndarray
) -> None:
    update = sent(layout, data)
    forked = multiprocessing.get_context("fork").Process(
        target=verify, args=(update, layout, data), daemon=True
    )
    forked.start()
    forked.join(20)
    assert forked.exitcode == 0


def test_of_a_thousand_flipped_bits_a_thousand_are_refused(
    layout: WeightLayout, data: np.ndarray
) -> None:
    update = sent(layout, data)
    random = np.random.default_rng(1)
    refused = 0
    for place, bit in zip(
        random.integers(0, layout.total_bytes, 1000), random.integers(0, 8, 1000), strict=True
    ):
        data[place] ^= 1 << bit
        with pytest.raises(WeightsRejected, match=f"bucket {place // 4096} of 11"):
            verify(update, layout, data)
        refused += 1
        data[place] ^= 1 << bit
    assert refused == 1000
    verify(update, layout, data)


def test_padding_between_tensors_counts_too(layout: WeightLayout, data: np.ndarray) -> None:
    spec = layout.tensors[1]
    data_after = data.copy()
    data_after[spec.offset + spec.num_bytes] ^= 1
    with pytest.raises(WeightsRejected):
        verify(sent(layout, data), layout, data_after)


def test_two_exchanged_buckets_are_refused(layout: WeightLayout, data: np.ndarray) -> None:
    exchanged = data.copy()
    exchanged[:4096], exchanged[4096:8192] = data[4096:8192], data[:4096]
    with pytest.raises(WeightsRejected, match="bucket 0"):
        verify(sent(layout, data), layout, exchanged)


@pytest.mark.parametrize("length", [-1, -4096, 1, 64])
def test_bytes_too_few_or_too_many_are_refused(
    layout: WeightLayout, data: np.ndarray, length: int
) -> None:
    received = np.resize(data, layout.total_bytes + length)
    with pytest.raises(WeightsRejected, match=f"{len(received)} bytes received"):
        verify(sent(layout, data), layout, received)


def test_a_payload_without_one_bucket_is_refused(layout: WeightLayout, data: np.ndarray) -> None:
    pieces = [data[start:end] for start, end in layout.buckets]
    with pytest.raises(WeightsRejected, match="bytes received"):
        verify(sent(layout, data), layout, np.concatenate(pieces[:3] + pieces[4:]))


@pytest.mark.parametrize("keep", [slice(0, -1), slice(0, 0), slice(1, None)])
def test_a_missing_digest_is_refused(layout: WeightLayout, data: np.ndarray, keep: slice) -> None:
    update = sent(layout, data)
    with pytest.raises(WeightsRejected, match="digests for 11 buckets"):
        verify(replace(update, digests=update.digests[keep]), layout, data)


def test_an_update_of_another_layout_is_refused_by_both_ids(
    layout: WeightLayout, data: np.ndarray
) -> None:
    with pytest.raises(WeightsRejected, match=f"layout other, but {layout.id} was agreed"):
        verify(replace(sent(layout, data), layout_id="other"), layout, data)


def test_a_refusal_names_the_version(layout: WeightLayout, data: np.ndarray) -> None:
    with pytest.raises(WeightsRejected, match="version 23"):
        verify(sent(layout, data, version=23), layout, data[:-1])


# ---- the layout


@given(shapes, dtypes)
def test_tensors_are_aligned_do_not_overlap_and_lie_within_the_segment(
    given_shapes: list[tuple[str, tuple[int, ...]]], dtype: str
) -> None:
    layout = WeightLayout.of(given_shapes, dtype)
    end = 0
    for spec, (name, shape) in zip(layout.tensors, given_shapes, strict=True):
        assert (spec.name, spec.shape, spec.dtype) == (name, shape, dtype)
        assert spec.offset % ALIGNMENT == 0
        assert spec.offset >= end
        end = spec.offset + spec.num_bytes
    assert layout.total_bytes >= end
    assert layout.total_bytes % ALIGNMENT == 0
    assert layout.total_bytes - end < ALIGNMENT


def block(layer: int) -> list[tuple[str, tuple[int, ...]]]:
    """Names and sizes of a decoder layer as transformers orders them; sizes no multiple of 64 bytes."""
    attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
    return [
        *(
            (f"{attention}.{name}_proj.weight", (rows, 5))
            for name, rows in zip("qkv", (7, 3, 3), strict=True)
        ),
        *(
            (f"{attention}.{name}_proj.bias", (rows,))
            for name, rows in zip("qkv", (7, 3, 3), strict=True)
        ),
        (f"{attention}.o_proj.weight", (5, 7)),
        (f"{mlp}.gate_proj.weight", (11, 5)),
        (f"{mlp}.up_proj.weight", (11, 5)),
    ]


@given(st.permutations(block(0) + block(1)), dtypes)
def test_tensors_that_engines_fuse_lie_side_by_side_in_their_order(
    given_shapes: list[tuple[str, tuple[int, ...]]], dtype: str
) -> None:
    layout = WeightLayout.of(given_shapes, dtype)
    assert [spec.name for spec in layout.tensors] == [name for name, _ in given_shapes]
    found = {spec.name: spec for spec in layout.tensors}
    for layer in (0, 1):
        for stem, parts in (("self_attn.{}_proj.weight", "qkv"), ("self_attn.{}_proj.bias", "qkv"),
                            ("mlp.{}_proj.weight", ("gate", "up"))):  # fmt: skip
            names = [f"model.layers.{layer}.{stem.format(part)}" for part in parts]
            assert found[names[0]].offset % ALIGNMENT == 0
            for one, two in pairwise(names):
                assert found[two].offset == found[one].offset + found[one].num_bytes
    ranges = sorted((spec.offset, spec.offset + spec.num_bytes) for spec in layout.tensors)
    assert all(one[1] <= two[0] for one, two in pairwise(ranges))
    assert ranges[-1][1] <= layout.total_bytes


@given(shapes, st.integers(1, 50))
def test_buckets_cover_the_segment_without_gap_or_overlap(
    given_shapes: list[tuple[str, tuple[int, ...]]], kilobytes: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weight_update, "BUCKET_BYTES", kilobytes * 64)
        layout = WeightLayout.of(given_shapes, "float32")
        buckets = layout.buckets
    assert buckets[0][0] == 0
    assert buckets[-1][1] == layout.total_bytes
    assert all(one[1] == two[0] for one, two in pairwise(buckets))
    assert all(end - start <= kilobytes * 64 for start, end in buckets)


@given(shapes, shapes, dtypes, dtypes)
def test_the_id_is_equal_exactly_where_the_layouts_are(
    one: list[tuple[str, tuple[int, ...]]],
    two: list[tuple[str, tuple[int, ...]]],
    dtype_one: str,
    dtype_two: str,
) -> None:
    a, b = WeightLayout.of(one, dtype_one), WeightLayout.of(two, dtype_two)
    assert (a.id == b.id) == (a.tensors == b.tensors)
    assert WeightLayout.of(one, dtype_one).id == a.id


@pytest.mark.parametrize(
    ("dtype", "num_bytes"), [("float32", 24), ("bfloat16", 12), ("float16", 12)]
)
def test_a_tensor_takes_its_dtypes_bytes(dtype: str, num_bytes: int) -> None:
    assert TensorSpec("w", (2, 3), dtype, 0).num_bytes == num_bytes


def test_a_bfloat16_layout_takes_half_and_every_dtype_can_be_viewed_at_its_offset() -> None:
    wide = WeightLayout.of([("a", (64, 64)), ("b", (64,))], "float32")
    narrow = WeightLayout.of([("a", (64, 64)), ("b", (64,))], "bfloat16")
    assert narrow.total_bytes * 2 == wide.total_bytes
    assert ALIGNMENT % max(ITEM_BYTES.values()) == 0


# ---- the probe

values = st.lists(st.floats(-100, 0), min_size=1, max_size=8)


@given(values, st.floats(-3, 3), st.data())
def test_the_probes_difference_is_the_largest_one(
    logprobs: list[float], off: float, data: st.DataObject
) -> None:
    place = data.draw(st.integers(0, len(logprobs) - 1))
    answered = [*logprobs[:place], logprobs[place] + off, *logprobs[place + 1 :]]
    assert probe_difference(logprobs, answered) == pytest.approx(abs(off), abs=1e-9)
    assert probe_difference(logprobs, logprobs) == 0.0


@pytest.mark.parametrize("answered", [[], [-0.5], [-0.5, -1.5, -1.0]])
def test_a_token_too_few_or_too_many_is_no_proof(answered: list[float]) -> None:
    assert probe_difference(LOGPROBS, answered) == math.inf


def test_a_probe_of_nothing_proves_nothing() -> None:
    assert probe_difference([], []) == math.inf


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_on_either_side_is_no_proof(value: float) -> None:
    assert probe_difference(LOGPROBS, [-0.5, value]) == math.inf
    assert probe_difference([-0.5, value], LOGPROBS) == math.inf
    assert probe_difference([-0.5, value], [-0.5, value]) == math.inf
