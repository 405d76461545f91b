"""Supervised fine-tuning: its rows, its loss, and that it learns the same at any number of ranks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

from learner.config import LearnerConfig, OptimizerConfig, SFTConfig
from learner.learner_spec import Rendezvous
from learner.sft import SFTSpec, SFTWorker
from learner.supervised_rows import SupervisedBatch, SupervisedRows, load_supervised
from reward_service.tokenizer import load_tokenizer
from tests.learner_cases import EOS, folders, hf_logprobs, mesh, run_ranks, write_tokenizer

NUM_STEPS = 20
ROWS = [{"prompt": f"{i}+{j}=", "completion": f"{i + j}"} for i in range(4) for j in range(3)]


def write_rows(path: Path, rows) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("sft") / "rows.jsonl", ROWS)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(folders().policy)


def spec(data: str, max_tokens: int = 8192, **changes) -> SFTSpec:
    optimizer = OptimizerConfig(lr=3e-3, warmup_steps=2)
    sft = SFTConfig(data=data, batch_size=6, optimizer=optimizer)
    learner = LearnerConfig(max_tokens_per_microbatch=max_tokens, **changes)
    return SFTSpec(folders().policy, sft, learner, NUM_STEPS, seed=0)


def train(rank, meeting, given: SFTSpec, out: str, steps: int = NUM_STEPS):
    if meeting is None:
        mesh()
        meeting = Rendezvous(1)
    worker = SFTWorker(given, rank)
    worker.start(meeting)
    metrics = [worker.train(step) for step in range(1, steps + 1)]
    worker.write(out)
    return metrics


@pytest.fixture(scope="module")
def at_one(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("sft") / "out"
    return train(0, None, spec(data), str(out)), out


def model_of(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def losses(metrics):
    return [one["sft/loss"] for one in metrics]


def test_the_first_loss_is_transformers_mean_over_completion_tokens(data, tokenizer, at_one):
    rows = SupervisedRows(load_supervised(data, tokenizer, 512), batch_size=6, seed=0).batch(0)
    model = model_of(folders().policy)
    pairs = zip(rows.prompt_ids, rows.completion_ids, strict=True)
    with torch.no_grad():
        logprobs = torch.cat([hf_logprobs(model, p.tolist(), c.tolist(), 1.0) for p, c in pairs])
    assert losses(at_one[0])[0] == pytest.approx(-logprobs.mean().item(), rel=1e-5)


def held_out_losses(rank, meeting, given: SFTSpec):
    """Before the first step, and after it."""
    if meeting is None:
        mesh()
        meeting = Rendezvous(1)
    worker = SFTWorker(given, rank)
    worker.start(meeting)
    before = worker.held_out()
    return before, worker.train(1), worker.held_out()


def test_the_held_out_loss_is_transformers_mean_at_any_number_of_ranks_and_changes_nothing(
    data, tokenizer, at_one, tmp_path
):
    held_out = write_rows(tmp_path / "held_out.jsonl", [{"prompt": "9+9=", "completion": "18"}] * 3)
    given = spec(data)
    given = replace(given, sft=given.sft.model_copy(update={"held_out_data": held_out}))
    before, trained, after = held_out_losses(0, None, given)
    prompt, completion = tokenizer("9+9=").input_ids, [*tokenizer("18").input_ids, EOS]
    with torch.no_grad():
        logprobs = hf_logprobs(model_of(folders().policy), prompt, completion, 1.0)
    assert before["sft/held_out_loss"] == pytest.approx(-logprobs.mean().item(), rel=1e-5)
    assert after["sft/held_out_loss"] < before["sft/held_out_loss"]
    assert losses([trained]) == losses(at_one[0])[:1]
    two = replace(given, learner=given.learner.model_copy(update={"ranks": 2}))
    for found in run_ranks(held_out_losses, two):
        assert found[2]["sft/held_out_loss"] == pytest.approx(after["sft/held_out_loss"], rel=1e-4)


def test_the_loss_falls_and_the_written_folder_answers_as_it_was_taught(at_one, tokenizer):
    metrics, out = at_one
    assert losses(metrics)[-1] < 0.25 * losses(metrics)[0]
    model = model_of(out)
    right = 0
    for row in ROWS:
        ids = torch.tensor([tokenizer(row["prompt"]).input_ids])
        answer = model.generate(ids, max_new_tokens=3, do_sample=False)[0, ids.shape[1] :].tolist()
        right += answer[:2] == [*tokenizer(row["completion"]).input_ids, EOS]
    assert right >= 8


def test_two_ranks_and_small_microbatches_learn_the_same(data, at_one, tmp_path):
    metrics, out = at_one
    cut = train(0, None, spec(data, max_tokens=13), str(tmp_path / "cut"))
    ranks = run_ranks(train, spec(data, ranks=2), str(tmp_path / "two"))
    assert losses(ranks[0]) == losses(ranks[1])
    for found, folder in ((cut, tmp_path / "cut"), (ranks[0], tmp_path / "two")):
        np.testing.assert_allclose(losses(found), losses(metrics), rtol=1e-3)
        np.testing.assert_allclose(losses(found)[:3], losses(metrics)[:3], rtol=1e-5)
        exact, other = model_of(out).state_dict(), model_of(folder).state_dict()
        assert max((exact[n] - other[n]).abs().max() for n in exact) < 1e-3


@pytest.mark.parametrize("batch_size", [1, 5, 12, 30])
def test_every_row_comes_once_in_each_epoch_in_an_order_of_its_own(batch_size):
    ids = tuple(np.array([i]) for i in range(12))
    rows = SupervisedRows(SupervisedBatch(ids, ids), batch_size=batch_size, seed=3)
    taken = [int(p[0]) for number in range(60) for p in rows.batch(number).prompt_ids]
    epochs = [taken[start : start + 12] for start in range(0, len(taken) - 11, 12)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_a_batch_is_a_function_of_its_number_and_the_seed_alone():
    ids = tuple(np.array([i]) for i in range(12))
    batch = SupervisedBatch(ids, ids)

    def taken(seed, number):
        rows = SupervisedRows(batch, batch_size=5, seed=seed)
        return [int(p[0]) for p in rows.batch(number).prompt_ids]

    assert taken(0, 7) == taken(0, 7)
    assert taken(0, 7) != taken(1, 7)


def test_a_completion_is_encoded_alone_and_ends_the_sequence(data, tokenizer):
    rows = load_supervised(data, tokenizer, 512)
    assert len(rows) == len(ROWS)
    for row, prompt, completion in zip(ROWS, rows.prompt_ids, rows.completion_ids, strict=True):
        assert tokenizer.decode(prompt) == row["prompt"]
        assert tokenizer.decode(completion[:-1]) == row["completion"]
        assert completion[-1] == EOS
    assert rows.num_loss_tokens == sum(len(row["completion"]) + 1 for row in ROWS)


def test_of_messages_the_last_is_the_completion_and_the_template_makes_the_prompt(
    tokenizer, tmp_path
):
    talk = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yo"},
        {"role": "user", "content": "bye"},
        {"role": "assistant", "content": "see you"},
    ]
    for path in (tmp_path / "rows.jsonl", tmp_path / "rows.parquet"):
        if path.suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist([{"messages": talk}]), path)
        else:
            write_rows(path, [{"messages": talk}])
        rows = load_supervised(str(path), tokenizer, 512)
        assert tokenizer.decode(rows.prompt_ids[0]) == "<u>hi<a>yo<u>bye<a>"
        assert tokenizer.decode(rows.completion_ids[0][:-1]) == "see you"


GOOD = {"prompt": "a", "completion": "b"}
USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}
REFUSED = {
    "too long": ({"prompt": "a" * 9, "completion": "b"}, "row 2 has 11 tokens, max_tokens is 10"),
    "empty completion": ({"prompt": "a", "completion": ""}, "row 2: prompt or completion is empty"),
    "no prompt": ({"completion": "b"}, "row 2: prompt is NoneType, not text"),
    "null completion": ({"prompt": "a", "completion": None}, "row 2: completion is NoneType, not"),
    "a list of prompts": ({"prompt": ["a", "b"], "completion": "c"}, "row 2: prompt is list, not"),
    "a number": ({"prompt": "a", "completion": 5}, "row 2: completion is int, not text"),
    "half a surrogate pair": ({"prompt": "a\ud800", "completion": "b"}, "line 2 has half of a"),
    "messages as text": ({"messages": json.dumps([USER, ASSISTANT])}, "row 2: messages is no list"),
    "one message": ({"messages": USER}, "row 2: messages is no list of role and content"),
    "null content": ({"messages": [{**USER, "content": None}, ASSISTANT]}, "row 2: messages is no"),
    "content in parts": (
        {"messages": [{**USER, "content": [{"type": "text", "text": "q"}]}, ASSISTANT]},
        "row 2: messages is no list of role and content objects",
    ),
    "an answer in parts": (
        {"messages": [USER, {**ASSISTANT, "content": [{"type": "text", "text": "q"}]}]},
        "row 2: messages is no list of role and content objects",
    ),
    "no answer": ({"messages": [USER]}, "row 2: messages must hold a context and end with the"),
    "no context": ({"messages": [ASSISTANT]}, "row 2: messages must hold a context and end with"),
    "user last": ({"messages": [ASSISTANT, USER]}, "row 2: messages must hold a context and end"),
    "no messages": ({"messages": []}, "row 2: messages is no list of role and content objects"),
    "empty answer": (
        {"messages": [USER, {**ASSISTANT, "content": ""}]},
        "row 2: prompt or completion is empty",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_row_that_cannot_be_trained_on_is_refused_in_one_line(what, tokenizer, tmp_path):
    row, message = REFUSED[what]
    path = write_rows(tmp_path / "rows.jsonl", [GOOD, row])
    with pytest.raises(ValueError, match="rows.jsonl: " + message) as refusal:
        load_supervised(path, tokenizer, 10)
    assert "\n" not in str(refusal.value)


def test_messages_without_a_chat_template_are_refused_with_the_way_out(tmp_path):
    write_tokenizer(tmp_path)
    settings = tmp_path / "tokenizer_config.json"
    kept = {k: v for k, v in json.loads(settings.read_text()).items() if k != "chat_template"}
    settings.write_text(json.dumps(kept))
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": [USER, ASSISTANT]}])
    with pytest.raises(ValueError, match="no chat template; use texts"):
        load_supervised(path, load_tokenizer(tmp_path), 512)


def test_a_file_without_the_columns_is_refused(tokenizer, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"text": "a"}])
    with pytest.raises(ValueError, match="no column 'completion' or 'messages'"):
        load_supervised(path, tokenizer, 512)
