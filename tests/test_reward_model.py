"""The reward model scores the true last token, whatever the batch, or refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
)

from reward_service.api import ScoreFailure, ScoreRequest, ScoreResponse
from reward_service.chat import chat_prompt
from reward_service.config import RewardModelScorerConfig
from reward_service.pairs import read_reference
from reward_service.reward_model import RewardModelScorer, length_batches
from reward_service.tokenizer import load_tokenizer
from tests import tiny

PAD, EOS, VOCABULARY = 0, 1, 64


def tiny_config(**changes: Any) -> Qwen2Config:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    tokens = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "eos_token_id": EOS}
    return Qwen2Config(**(sizes | heads | tokens | {"bos_token_id": None} | changes))


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character: lower-case letters, digits, space and a little more."""
    alphabet = ["<pad>", "<eos>", *"abcdefghijklmnopqrstuvwxyz0123456789:.!?Ġ"]
    bpe = models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[])
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def tiny_language_model(folder: Path) -> str:
    torch.manual_seed(0)
    Qwen2ForCausalLM(tiny_config(initializer_range=0.1)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return reward_folder(tmp_path / "rm")


def reward_folder(path: Path, **changes: Any) -> str:
    torch.manual_seed(0)
    config = tiny_config(num_labels=1, initializer_range=0.3, **changes)
    Qwen2ForSequenceClassification(config).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return str(path)


def edit_config(folder: str, **changes: Any) -> None:
    file = Path(folder) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def scorer(path: str, **changes: Any) -> RewardModelScorer:
    return RewardModelScorer(RewardModelScorerConfig(kind="reward_model", path=path, **changes))


def request(i: int, ids: list[int], prompt: str = "", text: str = "") -> ScoreRequest:
    return ScoreRequest(f"t{i}", prompt, text, tuple(ids[:2]), tuple(ids[2:]), "stop")


def requests(count: int) -> list[ScoreRequest]:
    """Lengths 3 to 40, no pad id."""
    drawing = torch.Generator().manual_seed(count)
    lengths = torch.randint(3, 41, (count,), generator=drawing).tolist()
    return [
        request(i, torch.randint(2, VOCABULARY, (n,), generator=drawing).tolist())
        for i, n in enumerate(lengths)
    ]


def values(results: list[Any]) -> list[float]:
    assert all(isinstance(result, ScoreResponse) for result in results)
    return [result.score for result in results]


def direct(folder: str, ids: list[int]) -> float:
    """Hugging Face's own forward of one unpadded sequence, its last token read."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        hidden = model.model(input_ids=torch.tensor([ids])).last_hidden_state
        return model.score(hidden)[0, -1, 0].item()


async def test_scores_equal_a_direct_forward_of_hugging_face(folder: str) -> None:
    asked = requests(9)
    got = values(await scorer(folder, max_batch_tokens=100).score(asked))
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = [
            model(torch.tensor([[*r.prompt_ids, *r.completion_ids]])).logits.item() for r in asked
        ]
    assert got == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 0.1  # else the comparison would say nothing


@pytest.mark.parametrize("max_batch_tokens", [1, 64, 100_000])
async def test_a_score_does_not_depend_on_its_company(folder: str, max_batch_tokens: int) -> None:
    asked = requests(12)
    reward_model = scorer(folder, max_batch_tokens=max_batch_tokens)
    alone = [values(await reward_model.score([one]))[0] for one in asked]
    together = await reward_model.score(asked)
    backwards = await reward_model.score(asked[::-1])
    assert [result.trajectory_id for result in together] == [r.trajectory_id for r in asked]
    assert values(together) == pytest.approx(alone, abs=1e-5)
    assert values(backwards[::-1]) == pytest.approx(alone, abs=1e-5)


async def test_the_same_list_gives_the_same_bits(folder: str) -> None:
    reward_model = scorer(folder, max_batch_tokens=128)
    assert await reward_model.score(requests(10)) == await reward_model.score(requests(10))


@pytest.mark.parametrize("pad_token_id", [PAD, 7, None])
async def test_pad_ids_within_and_at_the_end_are_tokens_like_others(
    tmp_path: Path, pad_token_id: int | None
) -> None:
    path = reward_folder(tmp_path / "rm", pad_token_id=pad_token_id)
    sequences = [[5, 0, 6, 7, 0], [7, 7, 7], [9, 8, 0, 0, 0, 0, 3], [0, 0, 0, 7]]
    got = await scorer(path).score([request(i, ids) for i, ids in enumerate(sequences)])
    assert values(got) == pytest.approx([direct(path, ids) for ids in sequences], abs=1e-5)


async def test_scores_are_normalised_where_the_config_says_so(folder: str) -> None:
    raw = values(await scorer(folder).score(requests(5)))
    edit_config(folder, score_mean=1.5, score_sd=0.25)
    got = values(await scorer(folder).score(requests(5)))
    assert got == pytest.approx([(x - 1.5) / 0.25 for x in raw], abs=1e-5)


@pytest.mark.parametrize(
    "numbers",
    [{"score_mean": 1.0}, {"score_sd": 1.0}, {"score_mean": 0.0, "score_sd": 0.0},
     {"score_mean": "a", "score_sd": 1.0}],
)  # fmt: skip
def test_half_a_normalisation_is_refused(folder: str, numbers: dict[str, Any]) -> None:
    edit_config(folder, **numbers)
    with pytest.raises(ValueError, match="score_sd"):
        scorer(folder)


async def test_text_is_tokenised_by_the_models_own_tokenizer(folder: str) -> None:
    stopped = request(0, [60, 61, 62], "is it late?", " yes.")
    cut = ScoreRequest("t1", "is it late?", " yes", (60,), (61,), "length")
    got = values(await scorer(folder, input="text").score([stopped, cut]))
    tokenizer = tiny_tokenizer()
    ids = [[*tokenizer("is it late? yes.").input_ids, EOS], tokenizer("is it late? yes").input_ids]
    assert got == pytest.approx([direct(folder, one) for one in ids], abs=1e-5)


def joining_tokenizer(folder: str) -> Any:
    """One that begins each text with a token of its own, and joins letters across a prompt's end."""
    vocabulary = {token: i for i, token in enumerate(["<bos>", "<eos>", *"abc?", "ab"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")]))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 0)]
    )
    named = {"bos_token": "<bos>", "eos_token": "<eos>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(folder)
    return load_tokenizer(folder)


async def test_text_is_cut_into_the_tokens_of_training(folder: str, tmp_path: Path) -> None:
    tokenizer = joining_tokenizer(folder)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}?"
    )
    asked = [{"role": "user", "content": "ca"}]
    rows: list[dict[str, Any]] = [
        {"prompt": "ca", "completion": "b"},
        {"prompt": asked, "completion": [{"role": "assistant", "content": "b"}]},
    ]
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    trained_on = read_reference(path, tokenizer, 64)
    assert trained_on == [[0, 4, 2, 3, 1], [0, 4, 2, 5, 3, 1]]
    prompts = ["ca", chat_prompt("", asked, tokenizer)]
    requests = [request(i, [60, 61, 62], prompt, "b") for i, prompt in enumerate(prompts)]
    got = values(await scorer(folder, input="text").score(requests))
    assert got == pytest.approx([direct(folder, ids) for ids in trained_on], abs=1e-5)


async def test_messages_go_through_the_models_own_chat_template(folder: str) -> None:
    tokenizer = joining_tokenizer(folder)
    tokenizer.chat_template = "{{ bos_token }}{{ messages[0]['content'] }}?"
    tokenizer.save_pretrained(folder)
    given: Any = [{"role": "user", "content": "ca"}]
    asked = [
        ScoreRequest("t0", "<|policy's|>", "b", (60,), (61,), "stop", messages=given),
        ScoreRequest("t1", "a text", "b", (60,), (61,), "stop"),
        ScoreRequest("t2", "<|policy's|>", "b", (60,), (61,), "length", messages=given),
    ]
    stopped, none, cut = await scorer(folder, input="messages").score(asked)
    expected = [direct(folder, [0, 4, 2, 5, 3, *end]) for end in ([1], [])]
    assert values([stopped, cut]) == pytest.approx(expected, abs=1e-5)
    assert isinstance(none, ScoreFailure)
    assert (none.kind, none.trajectory_id) == ("invalid", "t1")
    assert "messages is no list" in none.reason


@pytest.mark.parametrize("bad", [VOCABULARY, -1])
async def test_ids_outside_the_vocabulary_have_no_score(folder: str, bad: int) -> None:
    (result,) = await scorer(folder).score([request(0, [2, 3, bad])])
    assert isinstance(result, ScoreFailure)
    assert (result.trajectory_id, result.kind) == ("t0", "invalid")
    assert f"token id {bad} is outside this model's vocabulary of {VOCABULARY}" in result.reason
    assert result.reason.startswith(folder)


async def test_a_completion_that_cannot_be_embedded_fails_alone(folder: str) -> None:
    good = requests(3)
    bad = [request(7, [2] * 65), request(8, [2, 3, VOCABULARY]), request(9, [])]
    asked = [bad[0], good[0], bad[1], good[1], good[2], bad[2]]
    got = await scorer(folder).score(asked)
    assert [result.trajectory_id for result in got] == [one.trajectory_id for one in asked]
    failed = [result.reason for result in got if isinstance(result, ScoreFailure)]
    for reason, said in zip(failed, ("65 tokens", "token id 64", "has no tokens"), strict=True):
        assert said in reason
    scored = [result for result in got if isinstance(result, ScoreResponse)]
    assert scored == await scorer(folder).score(good)


async def test_a_model_that_yields_nan_yields_no_score(folder: str) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        model.score.weight.fill_(float("nan"))
    model.save_pretrained(folder)
    (result,) = await scorer(folder).score(requests(1))
    assert isinstance(result, ScoreFailure)
    assert result.kind == "invalid"


async def test_no_requests_are_no_scores(folder: str) -> None:
    assert await scorer(folder).score([]) == []


def test_a_folder_that_is_no_reward_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config\.json"):
        scorer(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="2 labels"):
        scorer(tiny_language_model(tmp_path / "lm"))


def test_a_head_without_weights_is_refused_instead_of_drawn_at_random(tmp_path: Path) -> None:
    path = tiny_language_model(tmp_path / "lm")
    edit_config(path, id2label={"0": "LABEL_0"}, label2id={"LABEL_0": 0})
    with pytest.raises(ValueError, match=r"lack score\.weight"):
        scorer(path)


def test_a_model_that_does_not_read_its_last_token_is_refused(tmp_path: Path) -> None:
    config = BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16,
        vocab_size=VOCABULARY, num_labels=1,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="score"):
        scorer(str(tmp_path))


@pytest.mark.parametrize("max_batch_tokens", [1, 10, 37, 1000])
def test_batches_hold_every_row_once_and_keep_the_bound(max_batch_tokens: int) -> None:
    lengths = [5, 1, 9, 9, 2, 30, 4, 4, 4]
    batches = length_batches(lengths, max_batch_tokens)
    assert sorted(row for rows in batches for row in rows) == list(range(len(lengths)))
    for rows in batches:
        assert len(rows) == 1 or len(rows) * max(lengths[r] for r in rows) <= max_batch_tokens
