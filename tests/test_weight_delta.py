"""A delta makes the base into exactly the new version, is small where little changed, and one that is
not whole never passes as a version."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors import weight_update
from actors.weight_delta import apply, encode
from actors.weight_update import Probe, WeightLayout, WeightsRejected, WeightUpdate, verify
from actors.weight_update import digest_buckets as digests


def layout_of(dtype: str = "float32") -> WeightLayout:
    return WeightLayout.of([("a", (33, 65)), ("b", (7,)), ("c", ()), ("d", (90, 90))], dtype)


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_update, "BUCKET_BYTES", 4096)


def random_image(layout: WeightLayout, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, layout.total_bytes, np.uint8)


@given(st.sampled_from(["float32", "bfloat16"]), st.integers(0, 99), st.floats(0, 1))
def test_the_base_becomes_exactly_the_new_version(dtype: str, seed: int, share: float) -> None:
    layout = layout_of(dtype)
    base, other = random_image(layout, seed), random_image(layout, seed + 1)
    changed = np.random.default_rng(seed).random(layout.total_bytes) < share
    new = np.where(changed, other, base)
    image = base.copy()
    apply(layout, encode(layout, base, new), image)
    assert np.array_equal(image, new)


def test_it_is_as_small_as_the_change() -> None:
    layout = layout_of()
    base = random_image(layout, 0)
    new = base.copy()
    new[::400] ^= 1
    nothing = sum(piece.nbytes for piece in encode(layout, base, base))
    little = sum(piece.nbytes for piece in encode(layout, base, new))
    everything = sum(p.nbytes for p in encode(layout, base, random_image(layout, 1)))
    assert nothing < little < layout.total_bytes / 40
    assert everything < layout.total_bytes * 1.01


def test_of_many_damaged_deltas_none_passes_as_a_version() -> None:
    layout = layout_of()
    base, new = random_image(layout, 0), random_image(layout, 1)
    pieces = encode(layout, base, new)
    update = WeightUpdate(
        2, layout.id, digests(layout, new), Probe((1, 2), (3, 4)), payload=pieces, base=1
    )
    random = np.random.default_rng(2)
    for _ in range(100):
        number = int(random.integers(len(pieces)))
        damaged = [piece.copy() for piece in pieces]
        damaged[number][random.integers(len(damaged[number]))] ^= 1 << int(random.integers(8))
        image = base.copy()
        if_whole = base.copy()
        apply(layout, pieces, if_whole)
        try:
            apply(layout, tuple(damaged), image)
            verify(update, layout, image)
        except WeightsRejected:
            continue
        assert np.array_equal(image, if_whole), "other bytes were taken for the version"


@pytest.mark.parametrize("keep", [slice(0, -1), slice(0, 0), slice(1, None)])
def test_one_that_lacks_a_piece_is_refused(keep: slice) -> None:
    layout = layout_of()
    base = random_image(layout, 0)
    with pytest.raises(WeightsRejected, match="pieces of a delta for"):
        apply(layout, encode(layout, base, base)[keep], base)


def test_one_to_another_base_is_no_version() -> None:
    layout = layout_of()
    base, new, other = (random_image(layout, seed) for seed in (0, 1, 2))
    update = WeightUpdate(2, layout.id, digests(layout, new), Probe((1, 2), (3, 4)))
    apply(layout, encode(layout, base, new), other)
    with pytest.raises(WeightsRejected, match="not those the learner digested"):
        verify(update, layout, other)
