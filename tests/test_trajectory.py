"""A trajectory is complete or it is refused; what Arrow stores is what comes back."""

from __future__ import annotations

import math
import pickle
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.trajectory import (
    SCHEMA_VERSION,
    TRAJECTORY_SCHEMA,
    Trajectory,
    from_table,
    packed,
    to_table,
    trajectory_id,
    unpacked,
)
from tests import tiny

ids = st.integers(0, 2**31 - 1)
logprobs = st.floats(-50, 0, width=32)
times = st.floats(0, 1e6, width=32)
finite = st.floats(allow_nan=False, allow_infinity=False)
text = st.text(max_size=20)


@st.composite
def trajectories(draw: st.DrawFn) -> Trajectory:
    """Any trajectory that holds, over the whole range of every field."""
    completion = draw(st.lists(ids, min_size=1, max_size=8))
    starts = draw(st.sets(st.integers(0, len(completion) - 1), max_size=3)) | {0}
    first = draw(st.integers(0, 2**40))
    versions = [first, *(first + 1 + i for i in range(len(starts) - 1))]
    size = len(completion)
    return Trajectory(
        trajectory_id=draw(text),
        prompt_id=draw(text),
        sample_index=draw(st.integers(0, 1000)),
        epoch=draw(st.integers(0, 1000)),
        prompt_ids=draw(st.lists(ids, min_size=1, max_size=8)),
        completion_ids=completion,
        behavior_logprobs=draw(st.lists(logprobs, min_size=size, max_size=size)),
        policy_version=versions[0],
        policy_version_max=versions[-1],
        version_spans=list(zip(versions, sorted(starts), strict=True)),
        prompt=draw(text),
        completion=draw(text),
        finish_reason=draw(st.sampled_from(["stop", "length"])),
        score=draw(finite),
        score_parts=draw(st.dictionaries(text, finite, max_size=3)),
        temperature=draw(times),
        generator_id=draw(text),
        generated_at=draw(finite),
        generate_s=draw(times),
        score_s=draw(times),
    )


@given(st.lists(trajectories(), max_size=5))
def test_what_goes_into_a_table_comes_out_the_same(rows: list[Trajectory]) -> None:
    table = to_table(rows)
    table.validate(full=True)
    assert from_table(table) == rows


@given(st.lists(trajectories(), min_size=1, max_size=5), st.data())
def test_a_slice_of_a_table_holds_the_same_rows(
    rows: list[Trajectory], data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, len(rows)))
    length = data.draw(st.integers(0, len(rows)))
    table = to_table(rows)
    for part in (table.slice(start, length), table.slice(start, length).combine_chunks()):
        assert from_table(part) == rows[start : start + length]


@given(st.lists(trajectories(), min_size=1, max_size=5), st.data())
def test_what_is_packed_and_sent_is_the_same(rows: list[Trajectory], data: st.DataObject) -> None:
    length = data.draw(st.integers(0, len(rows)))
    part = to_table(rows).slice(0, length)
    sent = pickle.loads(pickle.dumps(packed(part), protocol=5))
    got = unpacked(sent)
    assert got.schema.equals(TRAJECTORY_SCHEMA, check_metadata=True)
    assert got.equals(part)


@given(st.lists(trajectories(), min_size=1, max_size=4), st.lists(trajectories(), max_size=4))
def test_tables_joined_hold_both_ones_rows(one: list[Trajectory], two: list[Trajectory]) -> None:
    joined = pa.concat_tables([to_table(one), to_table(two)]).combine_chunks()
    assert from_table(joined) == one + two


def test_numpy_columns_make_the_same_table_as_python_lists() -> None:
    arrays = tiny.trajectory().prompt_ids, tiny.trajectory().completion_ids
    rows = [tiny.trajectory(prompt_ids=list(arrays[0]), completion_ids=list(arrays[1]))]
    flat = to_table(rows)["completion_ids"].combine_chunks().flatten().to_numpy()
    assert flat.dtype == np.int32
    assert flat.tolist() == list(arrays[1])


def test_no_trajectories_make_an_empty_table_of_the_same_schema() -> None:
    table = to_table([])
    assert table.num_rows == 0
    assert table.schema.equals(TRAJECTORY_SCHEMA, check_metadata=True)
    assert from_table(table) == []


def test_the_schema_has_the_fields_in_order_and_names_its_version(tmp_path: Path) -> None:
    assert TRAJECTORY_SCHEMA.names == [field.name for field in fields(Trajectory)]
    pq.write_table(to_table([tiny.trajectory()]), tmp_path / "t.parquet")
    read = pq.read_table(tmp_path / "t.parquet")
    assert read.schema.metadata[b"schema_version"] == SCHEMA_VERSION.encode()
    assert from_table(read) == from_table(to_table([tiny.trajectory()]))


def test_columns_that_the_learner_adds_do_not_hinder_reading() -> None:
    table = to_table([tiny.trajectory()]).append_column("step", pa.array([3]))
    assert from_table(table)[0].prompt_id == "p0"


def test_a_trajectory_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        tiny.trajectory().score = 2.0  # type: ignore[misc]


spans = "version spans"
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"prompt_ids": ()}, "at least one token"),
    ({"completion_ids": (), "behavior_logprobs": ()}, "at least one token"),
    ({"behavior_logprobs": (-1.0, -1.0)}, "2 logprobs for 3 tokens"),
    ({"behavior_logprobs": (-1.0,) * 4}, "4 logprobs for 3 tokens"),
    ({"score": math.nan}, "score is nan"),
    ({"score": math.inf}, "score is inf"),
    ({"score": -math.inf}, "score is -inf"),
    ({"behavior_logprobs": (-1.0, math.nan, -1.0)}, "behavior logprob"),
    ({"behavior_logprobs": (-1.0, -math.inf, -1.0)}, "behavior logprob"),
    ({"behavior_logprobs": (-1.0, 0.01, -1.0)}, "behavior logprob"),
    ({"version_spans": ()}, spans),
    ({"version_spans": ((0, 1),)}, spans),
    ({"version_spans": ((0, 0), (1, 0)), "policy_version_max": 1}, spans),
    ({"version_spans": ((0, 0), (1, 2), (2, 1)), "policy_version_max": 2}, spans),
    ({"version_spans": ((0, 0), (1, 3)), "policy_version_max": 1}, spans),
    ({"version_spans": ((1, 0), (0, 2)), "policy_version": 1}, "contradict"),
    ({"policy_version": 1}, "contradict"),
    ({"policy_version_max": 1}, "contradict"),
]


@pytest.mark.parametrize(("changes", "said"), REFUSED, ids=[f"{c}" for c, _ in REFUSED])
def test_what_is_not_whole_is_refused_by_name(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said) as refused:
        tiny.trajectory(**changes)
    assert "p0-e0-0" in str(refused.value)


def test_weights_that_changed_in_flight_leave_their_spans() -> None:
    changed = tiny.trajectory(
        policy_version=3, policy_version_max=5, version_spans=((3, 0), (4, 1), (5, 2))
    )
    assert from_table(to_table([changed]))[0].version_spans == [(3, 0), (4, 1), (5, 2)]


@given(st.lists(st.tuples(text, st.integers(0, 99), st.integers(0, 99)), unique=True, max_size=20))
def test_no_two_samples_share_a_trajectory_id(samples: list[tuple[str, int, int]]) -> None:
    assert len({trajectory_id(*sample) for sample in samples}) == len(samples)


WRONG: dict[str, Any] = {
    "trajectory_id": None, "prompt_ids": [], "completion_ids": [1], "behavior_logprobs": [0.5] * 3,
    "policy_version": 7, "policy_version_max": -1, "version_spans": [], "score": math.nan,
}  # fmt: skip


@given(st.lists(trajectories(), min_size=1, max_size=3), st.data())
def test_a_table_with_any_column_missing_empty_or_false_is_refused(
    rows: list[Trajectory], data: st.DataObject
) -> None:
    table = to_table(rows)
    name = data.draw(st.sampled_from(table.column_names))
    place = table.column_names.index(name)
    how = data.draw(st.sampled_from(["missing", "of another type", "empty"]))
    if how == "missing":
        broken = table.drop_columns([name])
    else:
        values = pa.nulls(len(rows)) if how == "empty" else pa.array([{"odd": 1}] * len(rows))
        broken = table.set_column(place, name, values)
    with pytest.raises(ValueError, match=r"no table of trajectories|null|trajectory "):
        from_table(broken)


@pytest.mark.parametrize("name", [name for name in WRONG if name != "trajectory_id"])
@given(rows=st.lists(trajectories(), min_size=1, max_size=3), data=st.data())
def test_a_row_with_one_false_value_is_refused(
    name: str, rows: list[Trajectory], data: st.DataObject
) -> None:
    place = data.draw(st.integers(0, len(rows) - 1))
    raw = to_table(rows).to_pylist()
    raw[place][name] = WRONG[name]
    if name == "completion_ids" and len(raw[place]["behavior_logprobs"]) == 1:
        raw[place][name] = [1, 2]
    if name == "policy_version" and raw[place][name] == rows[place].policy_version:
        raw[place][name] = 8
    with pytest.raises(ValueError, match="trajectory "):
        from_table(pa.Table.from_pylist(raw, TRAJECTORY_SCHEMA))
