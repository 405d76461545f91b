"""The buffer gives back what it was given, by whole prompts, whatever chunks they came in."""

from __future__ import annotations

import random

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.trajectory import TRAJECTORY_SCHEMA, Trajectory, from_table, packed, select, to_table
from learner.trajectory_buffer import Batch, TrajectoryBuffer
from tests import tiny

SAMPLES = 3


def group(number: int, epoch: int = 0) -> list[Trajectory]:
    return [tiny.trajectory(number, epoch, sample) for sample in range(SAMPLES)]


def names(rows: list[Trajectory]) -> list[str]:
    return [row.trajectory_id for row in rows]


def chunk_of(*numbers: tuple[int, int]) -> pa.Buffer:
    return packed(to_table([row for number in numbers for row in group(*number)]))


def rows_of(batch: Batch) -> list[Trajectory]:
    return from_table(select(batch.chunks, batch.keys))


keys = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 2)), unique=True, max_size=8)


@given(keys, st.randoms(use_true_random=False), st.integers(1, 4))
def test_prompts_come_out_whole_in_the_order_asked_for_whatever_chunks_they_came_in(
    numbers: list[tuple[int, int]], shuffler: random.Random, calls: int
) -> None:
    buffer = TrajectoryBuffer()
    for part in (numbers[i::calls] for i in range(calls)):
        if part:
            buffer.add([(f"p{n}", e) for n, e in part], chunk_of(*part))
    assert len(buffer) == len(numbers)
    order = shuffler.sample(numbers, len(numbers))
    for cut in (order[: len(order) // 2], order[len(order) // 2 :]):
        if cut:
            taken = buffer.take([(f"p{n}", e) for n, e in cut])
            assert names(rows_of(taken)) == [t for key in cut for t in names(group(*key))]
    assert len(buffer) == 0


def test_each_chunk_is_handed_on_once_and_forgotten_with_its_last_prompt() -> None:
    buffer = TrajectoryBuffer()
    one, two = chunk_of((0, 0), (1, 0)), chunk_of((2, 0))
    buffer.add([("p0", 0), ("p1", 0)], one)
    buffer.add([("p2", 0)], two)
    assert len(buffer.contents().chunks) == 2
    assert [id(c) for c in buffer.take([("p0", 0), ("p2", 0)]).chunks] == [id(one), id(two)]
    assert [id(c) for c in buffer.contents().chunks] == [id(one)]
    buffer.take([("p1", 0)])
    assert buffer.contents() == Batch([], [])


def test_what_is_selected_is_one_table_of_the_schema_in_one_piece() -> None:
    table = select([chunk_of((0, 0), (1, 0)), chunk_of((2, 0))], [("p2", 0), ("p0", 0)])
    assert table.schema.equals(TRAJECTORY_SCHEMA, check_metadata=True)
    assert {column.num_chunks for column in table.columns} == {1}


def test_the_same_prompt_cannot_come_twice_but_again_in_another_epoch() -> None:
    buffer = TrajectoryBuffer()
    buffer.add([("p0", 0)], None)
    with pytest.raises(AssertionError, match="p0"):
        buffer.add([("p0", 0)], None)
    buffer.add([("p0", 1)], None)


def test_what_is_not_there_cannot_be_taken_or_selected() -> None:
    with pytest.raises(KeyError):
        TrajectoryBuffer().take([("p0", 0)])
    with pytest.raises(KeyError):
        select([chunk_of((0, 0))], [("p1", 0)])
