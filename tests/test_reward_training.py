"""Training a reward model: the loss in closed form, data refused early, a folder that scores."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from reward_service import reward_training
from reward_service.api import ScoreRequest
from reward_service.config import RewardTrainingConfig
from reward_service.pairs import Pair, read_pairs
from reward_service.reward_model import last_token_scores
from reward_service.reward_training import backward, lr_factor, pairwise_loss, train
from reward_service.tokenizer import load_tokenizer
from tests.test_reward_model import EOS, scorer, tiny_language_model, tiny_tokenizer

Rows = list[dict[str, Any]]


def write(path: Path, rows: Rows) -> str:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def learnable(count: int, seed: int) -> Rows:
    """The better reply says yes, among other words."""
    drawing = random.Random(seed)

    def reply(word: str) -> str:
        return " ".join(["", *drawing.choices(["so", "well", "it is"], k=2), word])

    prompts = ["".join(drawing.choices("abcdefgh", k=6)) + "?" for _ in range(count)]
    return [{"prompt": p, "chosen": reply("yes"), "rejected": reply("no")} for p in prompts]


def replies(rows: Rows) -> Rows:
    return [
        {"prompt": r["prompt"], "completion": r[k]} for r in rows for k in ("chosen", "rejected")
    ]


def unused(*_: object) -> None:
    pass


def scores(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64, requires_grad=True)


def test_the_pairwise_loss_is_minus_log_sigmoid_of_the_difference() -> None:
    loss, metrics = pairwise_loss(scores(2.0, -1.0, 0.5, 3.0), scores(1.0, 1.0, 0.5, 0.0))
    differences = [1.0, -2.0, 0.0, 3.0]
    expected = sum(math.log1p(math.exp(-d)) for d in differences) / 4
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert metrics == pytest.approx({"loss": expected, "accuracy": 2.5 / 4, "margin": 0.5})


def test_the_pairwise_loss_depends_on_differences_only() -> None:
    chosen, rejected = scores(2.0, -1.0), scores(0.3, 1.0)
    shifted = pairwise_loss(chosen + 100, rejected + 100)[0]
    assert shifted.item() == pytest.approx(pairwise_loss(chosen, rejected)[0].item(), rel=1e-9)


def test_the_pairwise_gradient_is_right_and_finite_for_large_margins() -> None:
    chosen, rejected = scores(2.0, -1.0, 0.5), scores(1.0, 1.0, 0.4)
    assert torch.autograd.gradcheck(lambda c, r: pairwise_loss(c, r)[0], (chosen, rejected))
    far = torch.tensor([-1e4, 1e4], requires_grad=True)
    loss, _ = pairwise_loss(far, torch.zeros(2))
    loss.backward()
    assert loss.item() == pytest.approx(5e3)
    assert far.grad is not None
    assert far.grad.tolist() == pytest.approx([-0.5, 0.0])


def test_equal_scores_lose_log_two_and_are_right_by_half() -> None:
    loss, metrics = pairwise_loss(scores(0.0, 0.0), scores(0.0, 0.0))
    assert (loss.item(), metrics["accuracy"]) == pytest.approx((math.log(2), 0.5))


def test_the_learning_rate_warms_up_and_ends_at_its_share() -> None:
    factors = [lr_factor(step, 100, 10, 0.1) for step in range(100)]
    assert factors[:10] == pytest.approx([i / 10 for i in range(1, 11)])
    assert factors[10] == pytest.approx(1.0)
    assert factors[-1] == pytest.approx(0.1)
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert all(0 < lr_factor(step, 3, 10, 0.1) <= 1 for step in range(3))


def test_pairs_are_prompt_reply_and_end_of_sequence(tmp_path: Path) -> None:
    rows = learnable(3, 0)
    tokenizer = tiny_tokenizer()
    for name in ("pairs.jsonl", "pairs.parquet"):
        pairs = read_pairs(write(tmp_path / name, rows), tokenizer, 64)
        for pair, row in zip(pairs, rows, strict=True):
            for ids, reply in zip(pair, (row["chosen"], row["rejected"]), strict=True):
                assert tokenizer.decode(ids[:-1]) == row["prompt"] + reply
                assert ids[-1] == EOS


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


ASKED = [said("user", "one + one ?")]
RIGHT, WRONG = said("assistant", "two"), said("assistant", "three")
TALKS = {
    "a prompt of its own": {"prompt": ASKED, "chosen": [RIGHT], "rejected": [WRONG]},
    "whole conversations": {"chosen": [*ASKED, RIGHT], "rejected": [*ASKED, WRONG]},
}


@pytest.mark.parametrize("name", TALKS)
@pytest.mark.parametrize("file", ["pairs.jsonl", "pairs.parquet"])
def test_conversations_are_cut_before_the_reply_as_the_chat_template_has_them(
    tmp_path: Path, policy: Path, name: str, file: str
) -> None:
    tokenizer = load_tokenizer(str(policy))
    (pair,) = read_pairs(write(tmp_path / file, [TALKS[name]]), tokenizer, 64)
    prompt = tokenizer.apply_chat_template(ASKED, tokenize=False, add_generation_prompt=True)
    before = tokenizer(prompt, add_special_tokens=False).input_ids
    for ids, reply in zip(pair, ("two", "three"), strict=True):
        after = tokenizer(reply, add_special_tokens=False).input_ids
        assert ids == [*before, *after, tokenizer.eos_token_id]


@pytest.mark.parametrize(
    ("row", "refusal"),
    [
        (
            {"chosen": [RIGHT], "rejected": [WRONG]},
            "row 1: chosen with its prompt must hold a context",
        ),
        ({"prompt": "a", "chosen": [RIGHT], "rejected": [WRONG]}, "row 1: chosen with its prompt"),
        (
            {"prompt": ASKED, "chosen": ASKED, "rejected": [WRONG]},
            "row 1: chosen with its prompt must hold a context and end with",
        ),
        (
            {"chosen": [*ASKED, RIGHT], "rejected": [said("user", "two ?"), WRONG]},
            "row 1: chosen and rejected answer different conversations",
        ),
        (
            {"prompt": ASKED, "chosen": [RIGHT], "rejected": "three"},
            "row 1: prompt is list, not text",
        ),
    ],
    ids=["no prompt", "a text before", "no reply", "two prompts", "half a conversation"],
)
def test_conversations_that_are_none_are_refused(
    tmp_path: Path, policy: Path, row: dict[str, Any], refusal: str
) -> None:
    with pytest.raises(ValueError, match=refusal):
        read_pairs(write(tmp_path / "pairs.jsonl", [row]), load_tokenizer(str(policy)), 64)


def test_a_conversation_needs_a_chat_template(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", [TALKS["whole conversations"]])
    with pytest.raises(ValueError, match="no chat template; use texts"):
        read_pairs(path, tiny_tokenizer(), 64)


GOOD = {"prompt": "a", "chosen": " b", "rejected": " c"}


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (None, "no such file"),
        ([], "no rows"),
        ([{"prompt": "a", "chosen": "b"}], "no column 'rejected'"),
        ([GOOD, GOOD | {"chosen": None}], "row 2: chosen is NoneType"),
        ([GOOD, {"prompt": "a", "chosen": "b"}], "row 2: rejected is NoneType"),
        ([GOOD, GOOD, GOOD | {"rejected": "z" * 40}], "row 3: prompt and rejected have 42 tokens"),
    ],
    ids=["no file", "empty", "no column", "no text", "short row", "too long"],
)
def test_wrong_data_is_refused_in_one_line_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch, rows: Rows | None, said: str
) -> None:
    model = tiny_language_model(tmp_path / "lm")
    bad, good = tmp_path / "bad.jsonl", write(tmp_path / "good.jsonl", [GOOD])
    if rows is not None:
        write(bad, rows)
    monkeypatch.setattr(reward_training, "_with_zero_head", None)  # calling it would be a TypeError
    for files in ({"pairs": str(bad)}, {"pairs": good, "held_out_pairs": str(bad)}):
        config = RewardTrainingConfig(max_tokens=40, **files)
        with pytest.raises(ValueError, match=said) as caught:
            train(config, model=model, out=tmp_path / "rm", seed=0, device="cpu", progress=unused)
        assert str(bad) in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "rm").exists()


def test_a_model_folder_that_is_not_there_and_an_output_that_is_are_refused(tmp_path: Path) -> None:
    config = RewardTrainingConfig(pairs=write(tmp_path / "pairs.jsonl", [GOOD]))
    with pytest.raises(ValueError, match=r"no config\.json"):
        train(
            config,
            model=str(tmp_path / "x"),
            out=tmp_path / "rm",
            seed=0,
            device="cpu",
            progress=unused,
        )
    with pytest.raises(ValueError, match="exists already"):
        train(
            config, model=str(tmp_path / "x"), out=tmp_path, seed=0, device="cpu", progress=unused
        )


@pytest.fixture
def random_model(tmp_path: Path) -> Any:
    path = tiny_language_model(tmp_path / "lm")
    model = reward_training._with_zero_head(path, load_tokenizer(path))
    torch.nn.init.normal_(model.score.weight)
    return model


def random_pairs(count: int) -> list[Pair]:
    drawing = random.Random(0)
    return [
        Pair(*([drawing.randrange(2, 40) for _ in range(drawing.randrange(3, 30))] for _ in "cr"))
        for _ in range(count)
    ]


def test_how_a_batch_is_cut_changes_neither_gradient_nor_metrics(random_model: Any) -> None:
    batch, found = random_pairs(9), []
    for max_batch_tokens in (10**6, 200, 1):
        random_model.zero_grad()
        metrics = backward(random_model, batch, max_batch_tokens)
        gradient = torch.cat([p.grad.flatten() for p in random_model.parameters()])
        found.append((metrics, gradient))
    chosen, rejected = zip(*batch, strict=True)
    expected = pairwise_loss(
        last_token_scores(random_model, chosen), last_token_scores(random_model, rejected)
    )[1]
    for metrics, gradient in found:
        assert metrics == pytest.approx(expected, abs=1e-5)
        torch.testing.assert_close(gradient, found[0][1], atol=1e-5, rtol=1e-4)


def test_a_loss_that_is_not_finite_stops_before_the_weights(tmp_path: Path, monkeypatch) -> None:
    model, seen = tiny_language_model(tmp_path / "lm"), []
    config = RewardTrainingConfig(pairs=write(tmp_path / "pairs.jsonl", learnable(4, 0)))

    def nan_scores(model: Any, sequences: Any) -> torch.Tensor:
        return model.score.weight.sum() * torch.full([len(sequences)], math.nan)

    monkeypatch.setattr(reward_training, "last_token_scores", nan_scores)
    with pytest.raises(FloatingPointError, match="step 1"):
        train(
            config,
            model=model,
            out=tmp_path / "rm",
            seed=0,
            device="cpu",
            progress=lambda *a: seen.append(a),
        )
    assert not seen
    assert not (tmp_path / "rm").exists()


def trained(tmp_path: Path, out: str, seed: int = 0, **changes: Any) -> tuple[dict, list, Path]:
    """Metrics, progress calls and folder of a training on 96 learnable pairs."""
    folder, calls = tmp_path / out, []
    settings = {"pairs": write(tmp_path / "pairs.parquet", learnable(96, 1)), "lr": 1e-2}
    config = RewardTrainingConfig.model_validate(
        settings | {"batch_size": 20, "max_tokens": 64, "warmup_steps": 2, "epochs": 3} | changes
    )
    model = tiny_language_model(tmp_path / "lm")
    metrics = train(
        config,
        model=model,
        out=folder,
        seed=seed,
        device="cpu",
        progress=lambda *call: calls.append(call),
    )
    return metrics, calls, folder


async def test_training_learns_and_its_folder_scores_with_mean_0_and_sd_1(tmp_path: Path) -> None:
    held_out = learnable(40, 2)
    metrics, calls, folder = trained(
        tmp_path,
        "rm",
        held_out_pairs=write(tmp_path / "held_out.jsonl", held_out),
        normalise_on=write(tmp_path / "reference.jsonl", replies(held_out)),
    )
    assert calls[0][2]["accuracy"] == 0.5  # the head is zero at first
    assert calls[0][2]["loss"] == pytest.approx(math.log(2))
    assert metrics["held_out_accuracy"] > 0.95
    assert metrics["accuracy"] > 0.95
    assert metrics["loss"] < 0.3
    assert metrics["score_sd"] > 0
    assert metrics["seconds"] > 0
    assert [call[:2] for call in calls] == [(step, 15) for step in range(1, 16)]

    tokenizer = load_tokenizer(folder)
    asked = [
        ScoreRequest(
            f"t{i}",
            row["prompt"],
            row["completion"],
            tuple(tokenizer(row["prompt"]).input_ids),
            (*tokenizer(row["completion"]).input_ids, tokenizer.eos_token_id),
            "stop",
        )
        for i, row in enumerate(replies(held_out))
    ]
    for how in ("tokens", "text"):
        got = [result.score for result in await scorer(str(folder), input=how).score(asked)]  # type: ignore[union-attr]
        assert torch.tensor(got).mean().item() == pytest.approx(0, abs=1e-4)
        assert torch.tensor(got).std(correction=0).item() == pytest.approx(1, abs=1e-4)
        right = sum(c > r for c, r in zip(got[::2], got[1::2], strict=True)) / len(held_out)
        assert right == pytest.approx(metrics["held_out_accuracy"])


def test_training_is_on_the_device_that_it_is_given_whatever_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    seen: list[torch.device] = []

    def watched(model: Any, *given: Any) -> Any:
        seen.append(next(model.parameters()).device)
        return backward(model, *given)

    monkeypatch.setattr(reward_training, "backward", watched)
    trained(tmp_path, "rm", epochs=1)
    assert {device.type for device in seen} == {"cpu"}


def test_the_same_seed_trains_the_same_weights_and_another_other_ones(tmp_path: Path) -> None:
    weights = []
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        metrics, _, folder = trained(tmp_path, out, seed, epochs=1)
        assert set(metrics) == {"loss", "accuracy", "margin", "seconds"}
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        weights.append(torch.cat([p.flatten() for p in model.parameters()]))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c", "lm", "pairs.parquet"]
    assert not list(folder.glob("*.bin"))
