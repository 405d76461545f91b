"""Trajectories as the learner sees them, and as they are kept with what it made of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch

from actors.trajectory import from_table, to_table
from learner.batch import PPOBatch, TrajectoryBatch
from tests.learner_cases import EOS, PAD, TEMPERATURE, batch_table, trajectories, with_column


def test_a_batch_holds_exactly_what_its_rows_say():
    rows = trajectories()
    batch = TrajectoryBatch.of(to_table(rows))
    assert len(batch) == len(rows)
    assert batch.temperature == pytest.approx(TEMPERATURE)
    for i, row in enumerate(rows):
        length = len(row.completion_ids)
        assert batch.prompt_ids[i].tolist() == list(row.prompt_ids)
        assert batch.completion_ids[i].tolist() == list(row.completion_ids)
        assert batch.lengths[i] == len(row.prompt_ids) + length
        assert batch.scores[i].item() == pytest.approx(row.score)
        assert batch.policy_versions[i] == 3
        given = torch.tensor(row.behavior_logprobs, dtype=torch.float32)
        assert torch.equal(batch.behavior_logprobs[i, :length], given)
        assert not batch.behavior_logprobs[i, length:].any()


def test_masks_come_from_lengths_though_pad_and_end_ids_stand_inside_completions():
    rows = trajectories()
    inside = {token for row in rows for token in row.completion_ids[:-1]}
    assert {PAD, EOS} <= inside
    mask = TrajectoryBatch.of(to_table(rows)).loss_mask
    lengths = torch.tensor([len(row.completion_ids) for row in rows])
    assert mask.shape == (len(rows), lengths.max())
    assert torch.equal(mask, torch.arange(mask.shape[1]) < lengths[:, None])


def test_samples_of_one_prompt_share_a_group_but_not_with_its_next_epoch():
    rows = trajectories(size=6, samples=2)
    rows[5] = replace(rows[5], epoch=1)
    groups = TrajectoryBatch.of(to_table(rows)).group_ids
    assert groups[0] == groups[1]
    assert groups[2] == groups[3]
    assert len(groups.unique()) == 4


def test_a_batch_does_not_depend_on_how_its_table_is_cut_into_chunks():
    table = batch_table()
    cut = pa.concat_tables([table.slice(5, 3), table.slice(0, 5)]).slice(0, 7)
    order = [5, 6, 7, 0, 1, 2, 3]
    a, b = TrajectoryBatch.of(cut), TrajectoryBatch.of(table)
    assert all(
        np.array_equal(a.completion_ids[i], b.completion_ids[j]) for i, j in enumerate(order)
    )
    assert torch.equal(a.scores, b.scores[order])
    width = a.loss_mask.shape[1]
    assert torch.equal(a.behavior_logprobs, b.behavior_logprobs[order, :width])


def test_a_batch_of_one_row_with_one_token_is_a_batch():
    batch = TrajectoryBatch.of(batch_table().slice(1, 1))
    assert batch.loss_mask.tolist() == [[True]]


def test_mixed_temperatures_are_refused():
    table = batch_table()
    mixed = with_column(table, "temperature", [0.7] * 7 + [1.0])
    with pytest.raises(ValueError, match=r"mixes sampling temperatures \[0.69.*, 1.0\]"):
        TrajectoryBatch.of(mixed)


def test_learned_columns_give_back_each_number_at_its_token_and_keep_the_rows():
    table = batch_table()
    batch = TrajectoryBatch.of(table)
    numbers = iter(torch.randn(5, *batch.loss_mask.shape))
    ppo = PPOBatch(batch, *(next(numbers) for _ in range(5)), value_mask=batch.loss_mask)
    kept = ppo.learned_columns(step=4, version=5)
    assert from_table(kept) == from_table(table)
    assert kept["step"].to_pylist() == [4] * 8
    assert kept["staleness"].to_pylist() == [2] * 8
    for name in ("old_logprobs", "ref_logprobs", "values", "advantages", "returns"):
        for i, row in enumerate(kept[name].to_pylist()):
            length = len(batch.completion_ids[i])
            assert torch.equal(torch.tensor(row), getattr(ppo, name)[i, :length])
    assert kept.schema.metadata[b"schema_version"] == b"1"
