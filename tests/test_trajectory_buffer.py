"""The buffer gives back what it was given, by whole prompts, also after a checkpoint."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.trajectory import TRAJECTORY_SCHEMA, Trajectory, from_table
from learner.trajectory_buffer import TrajectoryBuffer
from tests import tiny

SAMPLES = 3


def group(number: int, epoch: int = 0) -> list[Trajectory]:
    return [tiny.trajectory(number, epoch, sample) for sample in range(SAMPLES)]


def names(rows: list[Trajectory]) -> list[str]:
    return [row.trajectory_id for row in rows]


keys = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 2)), unique=True, max_size=8)


@given(keys, st.randoms(use_true_random=False), st.integers(1, 4))
def test_prompts_come_out_whole_in_the_order_asked_for_whatever_they_came_in(
    numbers: list[tuple[int, int]], shuffler: random.Random, calls: int
) -> None:
    buffer = TrajectoryBuffer()
    for part in (numbers[i::calls] for i in range(calls)):
        rows = [row for number in part for row in shuffler.sample(group(*number), SAMPLES)]
        assert buffer.add(rows) == [(f"p{n}", e) for n, e in part]
    assert len(buffer) == len(numbers)
    order = shuffler.sample(numbers, len(numbers))
    for cut in (order[: len(order) // 2], order[len(order) // 2 :]):
        if cut:
            taken = buffer.take([(f"p{n}", e) for n, e in cut])
            assert names(from_table(taken)) == [t for key in cut for t in names(group(*key))]
    assert len(buffer) == 0


@given(keys)
def test_a_saved_buffer_is_restored_the_same(
    tmp_path_factory: pytest.TempPathFactory, numbers: list[tuple[int, int]]
) -> None:
    path = tmp_path_factory.mktemp("buffer") / "buffer.parquet"
    one, two = TrajectoryBuffer(), TrajectoryBuffer()
    one.add([row for number in numbers for row in group(*number)])
    one.save(path)
    two.restore(path)
    assert len(two) == len(one) == len(numbers)
    if numbers:
        keys_ = [(f"p{n}", e) for n, e in numbers]
        assert two.take(keys_).equals(one.take(keys_))


def test_what_is_taken_is_one_table_of_the_schema_in_one_piece() -> None:
    buffer = TrajectoryBuffer()
    buffer.add(group(0) + group(1))
    table = buffer.take([("p1", 0), ("p0", 0)])
    assert table.schema.equals(TRAJECTORY_SCHEMA, check_metadata=True)
    assert {column.num_chunks for column in table.columns} == {1}


def test_the_same_prompt_cannot_come_twice_but_again_in_another_epoch() -> None:
    buffer = TrajectoryBuffer()
    buffer.add(group(0))
    with pytest.raises(AssertionError, match="p0"):
        buffer.add(group(0))
    buffer.add(group(0, epoch=1))


def test_what_is_not_there_cannot_be_taken(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        TrajectoryBuffer().take([("p0", 0)])
