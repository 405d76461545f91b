"""Rows become token ids as they are; every prompt comes once an epoch, in an order that resumes."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.config import PromptsConfig
from actors.prompts import PromptStream, load_prompts
from reward_service.tokenizer import load_tokenizer
from tests import tiny

ROOMY = 1000


@pytest.fixture(scope="module")
def tokenizer(policy: Path) -> Any:
    return load_tokenizer(policy)


@pytest.fixture
def load(tmp_path: Path, tokenizer: Any) -> Any:
    """load(rows, **config) -> prompts and the ids of the dropped ones."""

    def loader(rows: list[Mapping[str, Any]], max_tokens: int = ROOMY, **config: Any) -> Any:
        path = tiny.write_jsonl(tmp_path / "prompts.jsonl", rows)
        return load_prompts(PromptsConfig(path=path, **config), tokenizer, max_tokens)

    return loader


def refusal(load: Any, rows: list[Mapping[str, Any]], **given: Any) -> str:
    with pytest.raises(ValueError, match="prompts") as refused:
        load(rows, **given)
    return str(refused.value)


def test_parquet_and_jsonl_of_the_same_rows_give_the_same_prompts(
    tmp_path: Path, tokenizer: Any
) -> None:
    rows = [{"prompt_id": f"x{i}", "prompt": text, "answer": str(i)} for i, text in enumerate("ab")]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    tiny.write_jsonl(tmp_path / "p.jsonl", rows)
    one, two = (
        load_prompts(PromptsConfig(path=str(tmp_path / name)), tokenizer, ROOMY)
        for name in ("p.parquet", "p.jsonl")
    )
    assert one == two
    assert [p.prompt_id for p in one[0]] == ["x0", "x1"]


def test_ids_are_the_tokenizers_and_spell_the_prompt(load: Any, tokenizer: Any) -> None:
    (prompt,), dropped = load([{"prompt": "37+5="}])
    assert dropped == []
    assert list(prompt.ids) == tokenizer("37+5=").input_ids
    assert tokenizer.decode(prompt.ids) == prompt.text == "37+5="
    assert prompt.epoch == 0


def test_messages_go_through_the_chat_template_and_no_token_is_added(
    load: Any, tokenizer: Any
) -> None:
    messages = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1+1="}]
    (prompt,), _ = load([{"messages": messages}])
    assert prompt.text == "<system>Add.<user>1+1=<assistant>"
    assert list(prompt.ids) == tokenizer(prompt.text, add_special_tokens=False).input_ids
    assert prompt.messages == messages
    assert prompt.of_epoch(3).messages == messages


def test_of_messages_role_and_content_are_kept_and_of_a_text_none(load: Any) -> None:
    said = {"role": "user", "content": "1+1="}
    (chat, text), _ = load([{"messages": [{**said, "at": 3.5}]}, {"prompt": "1+1="}])
    assert chat.messages == [said]
    assert text.messages is None


def test_messages_without_a_chat_template_are_refused(tmp_path: Path, stranger: Path) -> None:
    path = tiny.write_jsonl(
        tmp_path / "p.jsonl", [{"messages": [{"role": "user", "content": "x"}]}]
    )
    with pytest.raises(ValueError, match="row 1: messages is a conversation, but the tokenizer"):
        load_prompts(PromptsConfig(path=path), load_tokenizer(stranger), ROOMY)


@pytest.mark.parametrize(
    "messages",
    ["hello", 3, [], [{"role": "user"}], [{"role": "user", "content": None}], [["user", "x"]]],
)
def test_messages_of_another_form_name_their_row(load: Any, messages: Any) -> None:
    good = {"messages": [{"role": "user", "content": "x"}]}
    said = refusal(load, [good, {"messages": messages}])
    assert "row 2: messages" in said


def test_half_of_a_surrogate_pair_is_no_text_and_a_whole_one_is(load: Any, tokenizer: Any) -> None:
    (prompt,), _ = load([{"prompt": "🙂"}])
    assert prompt.text == "🙂"
    assert "line 2 has half of a surrogate pair" in refusal(
        load, [{"prompt": "a"}, {"prompt": "\ud83d"}]
    )


def test_messages_that_the_template_refuses_name_their_row(tmp_path: Path, policy: Path) -> None:
    tokenizer = load_tokenizer(policy)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    path = tiny.write_jsonl(tmp_path / "p.jsonl", [{"messages": [{"role": "u", "content": "x"}]}])
    with pytest.raises(ValueError, match=r"row 1: messages is refused .*roles must alternate"):
        load_prompts(PromptsConfig(path=path), tokenizer, ROOMY)


def test_a_prompt_without_an_id_is_called_after_its_row(load: Any) -> None:
    prompts, _ = load([{"prompt": "a"}, {"prompt": "b", "prompt_id": 7}, {"prompt": "c"}])
    assert [p.prompt_id for p in prompts] == ["p0", "7", "p2"]


def test_answer_and_metadata_reach_the_scorer_as_text_and_object(load: Any) -> None:
    prompts, _ = load(
        [
            {"prompt": "a", "answer": 42, "metadata": {"k": [1]}},
            {"prompt": "b", "metadata": '{"k": 2}'},
        ]
    )
    assert [(p.answer, p.metadata) for p in prompts] == [("42", {"k": [1]}), (None, {"k": 2})]


def test_an_answer_that_is_missing_from_a_column_of_numbers_is_none(load: Any) -> None:
    prompts, _ = load([{"prompt": "a", "answer": 1.5}, {"prompt": "b", "answer": float("nan")}])
    assert [p.answer for p in prompts] == ["1.5", None]


@pytest.mark.parametrize("answer", [["1", "2"], {"is": 1}, []])
def test_an_answer_of_several_values_names_its_row(load: Any, answer: Any) -> None:
    said = refusal(load, [{"prompt": "a", "answer": 1}, {"prompt": "b", "answer": answer}])
    assert f"row 2: answer is {type(answer).__name__}, not text or a number" in said


@pytest.mark.parametrize("metadata", [{"k": [float("nan")]}, '{"k": NaN}', '{"k": 1e999}'])
def test_metadata_with_numbers_that_json_does_not_have_names_its_row(
    load: Any, metadata: Any
) -> None:
    assert "row 1: metadata is not JSON" in refusal(load, [{"prompt": "a", "metadata": metadata}])


@pytest.mark.parametrize("metadata", ["{not json", "[1, 2]", [1], 3])
def test_metadata_that_is_no_json_object_names_its_row(load: Any, metadata: Any) -> None:
    assert "row 1: metadata" in refusal(load, [{"prompt": "a", "metadata": metadata}])


def test_metadata_that_a_checkpoint_could_not_hold_is_refused(
    tmp_path: Path, tokenizer: Any
) -> None:
    rows = [{"prompt": "a", "metadata": {"day": datetime.date(2026, 1, 1)}}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    with pytest.raises(ValueError, match="row 1: metadata is not JSON"):
        load_prompts(PromptsConfig(path=str(tmp_path / "p.parquet")), tokenizer, ROOMY)


@pytest.mark.parametrize(
    "rows",
    [
        [{"prompt": "a", "prompt_id": "same"}, {"prompt": "b", "prompt_id": "same"}],
        [{"prompt": "a", "prompt_id": "p1"}, {"prompt": "b"}],
        [{"prompt": "a", "prompt_id": 1}, {"prompt": "b", "prompt_id": "1"}],
    ],
)
def test_a_prompt_id_that_stands_twice_is_refused(load: Any, rows: list[Any]) -> None:
    said = refusal(load, rows)
    assert "stands twice" in said
    assert str(rows[0]["prompt_id"]) in said


@pytest.mark.parametrize("text", ["", " \n", None, 3, ["a"]])
def test_a_prompt_that_is_empty_or_no_text_names_its_row(load: Any, text: Any) -> None:
    assert "row 2: the prompt is empty" in refusal(load, [{"prompt": "a"}, {"prompt": text}])


def test_a_prompt_of_which_the_tokenizer_leaves_nothing_names_its_row(tmp_path: Path) -> None:
    class Forgetful:
        bos_token = None

        def __call__(self, text: str, **_: Any) -> Any:
            return SimpleNamespace(input_ids=[] if text == "\u200b" else [1])

    path = tiny.write_jsonl(tmp_path / "p.jsonl", [{"prompt": "a"}, {"prompt": "\u200b"}])
    with pytest.raises(ValueError, match="row 2: the prompt has no tokens"):
        load_prompts(PromptsConfig(path=path), Forgetful(), ROOMY)


def test_a_prompt_too_long_is_refused_with_its_length_and_the_remedy(load: Any) -> None:
    said = refusal(load, [{"prompt": "a"}, {"prompt": "1" * 9}], max_tokens=5)
    for part in ("1 of 2 prompts", "longer than 5 tokens", "p1 with 9", "on_too_long: drop"):
        assert part in said


def test_a_prompt_too_long_is_dropped_by_name_where_the_config_says_so(load: Any) -> None:
    rows = [{"prompt": "1" * n} for n in (9, 5, 6)]
    prompts, dropped = load(rows, max_tokens=5, on_too_long="drop")
    assert [p.prompt_id for p in prompts] == ["p1"]
    assert dropped == ["p0", "p2"]
    assert "every prompt is longer" in refusal(load, rows[::2], max_tokens=5, on_too_long="drop")


def test_the_lower_of_both_length_limits_holds(load: Any) -> None:
    rows = [{"prompt": "1" * n} for n in range(1, 9)]
    for own, room, kept in ((3, 6, 3), (6, 3, 3), (None, 4, 4)):
        prompts, _ = load(rows, max_tokens=room, max_prompt_tokens=own, on_too_long="drop")
        assert len(prompts) == kept


def test_limit_takes_the_first_rows(load: Any) -> None:
    prompts, _ = load([{"prompt": c} for c in "abcd"], limit=2)
    assert [p.text for p in prompts] == ["a", "b"]


# ---- the stream

sizes, seeds = st.integers(1, 12), st.integers(0, 2**32)


def stream(size: int, seed: int = 0, *, shuffle: bool = True, cursor: int = 0) -> PromptStream:
    return PromptStream(
        [tiny.prompt(i) for i in range(size)], seed=seed, shuffle=shuffle, cursor=cursor
    )


def draw(source: PromptStream, count: int) -> list[tuple[str, int]]:
    return [(prompt.prompt_id, prompt.epoch) for prompt in (next(source) for _ in range(count))]


@given(sizes, seeds, st.booleans(), st.integers(1, 4))
def test_every_prompt_comes_exactly_once_an_epoch(
    size: int, seed: int, shuffle: bool, epochs: int
) -> None:
    drawn = draw(stream(size, seed, shuffle=shuffle), size * epochs)
    assert sorted(drawn) == sorted((f"p{i}", epoch) for epoch in range(epochs) for i in range(size))
    assert [epoch for _, epoch in drawn] == sorted(epoch for _, epoch in drawn)


@given(sizes, seeds, st.integers(0, 40), st.integers(0, 40))
def test_a_stream_made_at_a_cursor_goes_on_exactly_there(
    size: int, seed: int, before: int, after: int
) -> None:
    straight = stream(size, seed)
    draw(straight, before)
    assert straight.cursor == before
    assert draw(stream(size, seed, cursor=before), after) == draw(straight, after)


@given(seeds)
def test_the_seed_decides_the_order_and_each_epoch_has_its_own(seed: int) -> None:
    one, again = draw(stream(30, seed), 60), draw(stream(30, seed), 60)
    assert one == again
    first, second = ([name for name, _ in one[i : i + 30]] for i in (0, 30))
    assert first != second
    assert draw(stream(30, seed + 1), 60) != one


def test_without_shuffling_the_order_is_the_files() -> None:
    assert draw(stream(3, shuffle=False), 4) == [("p0", 0), ("p1", 0), ("p2", 0), ("p0", 1)]
