"""The examples' data: what is in it, what must not be, and that every stage can read it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from cluster.config import RewardRunConfig, RunConfig, SFTRunConfig
from cluster.config_file import load_config
from examples import data_folder
from examples.arithmetic import generate as arithmetic
from examples.arithmetic.rewards import exact_answer
from examples.support_replies import generate as support
from examples.support_replies import task
from examples.support_replies.judge import judge, score, sentence_counts, split
from examples.support_replies.task import Ticket
from reward_service.api import ScoreRequest

ROOT = Path(__file__).parents[1]
BEN = Ticket("Ben", "camera", "dirty")
PERFECT = (
    " Hello Ben! I am sorry about your camera. We will clean it for free. Thank you for telling us."
)
STAGES = {
    "support_replies/sft": SFTRunConfig,
    "support_replies/reward_model": RewardRunConfig,
    "support_replies/ppo": RunConfig,
    "support_replies/reward_hacking": RunConfig,
    "arithmetic/sft": SFTRunConfig,
    "arithmetic/ppo": RunConfig,
    "arithmetic/grpo": RunConfig,
}


@pytest.fixture(scope="module")
def support_data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("support")
    support.build(folder, 0)
    return folder


@pytest.fixture(scope="module")
def arithmetic_data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("arithmetic")
    arithmetic.build(folder, 0)
    return folder


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return pq.read_table(folder / f"{name}.parquet").to_pylist()


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def request(
    prompt: str, completion: str, finish_reason: str = "stop", **given: Any
) -> ScoreRequest:
    return ScoreRequest("t", prompt, completion, (), (), finish_reason, **given)


# --- data -----------------------------------------------------------------------------------


def test_support_files_have_the_stated_sizes(support_data):
    names = ("prompts", "held_out_prompts", "sft", "reference")
    assert [len(rows(support_data, name)) for name in names] == [1745, 303, 8000, 256]
    assert 3980 <= len(rows(support_data, "pairs")) <= 4000
    assert 500 <= len(rows(support_data, "held_out_pairs")) <= 512


def test_arithmetic_files_have_the_stated_sizes(arithmetic_data):
    names = ("prompts", "held_out_prompts", "sft")
    assert [len(rows(arithmetic_data, name)) for name in names] == [764, 136, 51_200]


def test_no_held_out_ticket_is_trained_on(support_data):
    held_out = {row["prompt"] for row in rows(support_data, "held_out_prompts")}
    for name in ("sft", "pairs", "reference", "prompts"):
        assert held_out.isdisjoint(row["prompt"] for row in rows(support_data, name)), name
    assert held_out.issuperset(row["prompt"] for row in rows(support_data, "held_out_pairs"))


def test_no_held_out_sum_is_trained_on(arithmetic_data):
    held_out = {row["prompt"] for row in rows(arithmetic_data, "held_out_prompts")}
    for name in ("sft", "prompts"):
        assert held_out.isdisjoint(row["prompt"] for row in rows(arithmetic_data, name)), name


@pytest.mark.parametrize("build", [support.build, arithmetic.build])
def test_the_same_seed_gives_the_same_bytes_and_another_one_other_data(build, tmp_path):
    for folder, seed in (("first", 3), ("second", 3), ("other", 4)):
        (tmp_path / folder).mkdir()
        build(tmp_path / folder, seed)
    first, second, other = (contents(tmp_path / name) for name in ("first", "second", "other"))
    assert first == second
    changed = {name for name in first if first[name] != other[name]}
    assert {"sft.parquet", "model/model.safetensors"} <= changed
    # Prompts and vocabulary are the task's: no seed moves a prompt to the other side of the split.
    assert not changed & {"prompts.parquet", "held_out_prompts.parquet", "model/tokenizer.json"}


def test_completions_start_with_a_space_and_hold_no_end_of_sequence(support_data):
    texts = [row["completion"] for name in ("sft", "reference") for row in rows(support_data, name)]
    texts += [row[key] for row in rows(support_data, "pairs") for key in ("chosen", "rejected")]
    assert all(text[0] == " " and text[1] != " " and text == text.rstrip() for text in texts)
    assert not any("<eos>" in text for text in texts)


def test_writers_are_as_flawed_as_the_task_says(support_data):
    scores = [
        judge(task.ticket_of(row["prompt"]), row["completion"]) for row in rows(support_data, "sft")
    ]
    assert -1.2 < sum(scores) / len(scores) < -0.9
    assert 0.004 < sum(score == 4.5 for score in scores) / len(scores) < 0.015


def test_one_preference_label_in_nine_contradicts_the_judge(support_data):
    pairs = rows(support_data, "pairs")
    tickets = [task.ticket_of(row["prompt"]) for row in pairs]
    margins = [
        judge(ticket, row["chosen"]) - judge(ticket, row["rejected"])
        for ticket, row in zip(tickets, pairs, strict=True)
    ]
    assert 0.09 < sum(margin < 0 for margin in margins) / len(pairs) < 0.13
    assert all(row["chosen"] != row["rejected"] for row in pairs)


def test_demonstrations_of_sums_are_right_as_often_as_the_mix_says(arithmetic_data):
    demos = [
        (*map(int, row["prompt"][:-1].split("+")), int(row["completion"]))
        for row in rows(arithmetic_data, "sft")
    ]
    carried = [total == a + b for a, b, total in demos if a % 10 + b > 9]
    plain = [total == a + b for a, b, total in demos if a % 10 + b <= 9]
    assert sum(carried) / len(carried) == pytest.approx(arithmetic.RIGHT_SHARE, abs=0.015)
    assert sum(plain) / len(plain) == pytest.approx(1 - arithmetic.SLIP_SHARE, abs=0.015)


# --- model and tokenizer --------------------------------------------------------------------


def test_transformers_loads_the_model_with_no_weight_missing_or_left_over(support_data):
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        support_data / "model", output_loading_info=True
    )
    model, report = loaded
    assert not any(report.values()), report
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert sum(weight.numel() for weight in model.parameters()) < 500_000
    assert model.model.embed_tokens.weight[1].std().item() == pytest.approx(0.06, rel=0.3)


@pytest.mark.parametrize("data", ["support_data", "arithmetic_data"])
def test_every_way_to_load_the_tokenizer_gives_the_same_tokens(data, request):
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder = request.getfixturevalue(data) / "model"
    fast, auto = (kind.from_pretrained(folder) for kind in (PreTrainedTokenizerFast, AutoTokenizer))
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    texts = [BEN.prompt + PERFECT, "37+5=42", " Café 日本 🙂\t tab,  two spaces", "<|endoftext|>"]
    for tokenizer in (fast, auto):
        # A token beyond the embedding's last row would end a run at its first use.
        assert len(tokenizer) == vocabulary
        assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
        for text in texts:
            ids = tokenizer(text).input_ids
            assert tokenizer.decode(ids) == text
            assert ids == fast(text).input_ids


@pytest.mark.parametrize("data", ["support_data", "arithmetic_data"])
def test_no_token_spans_prompt_and_completion(data, request):
    from tokenizers import Tokenizer

    folder = request.getfixturevalue(data)
    tokenizer = Tokenizer.from_file(str(folder / "model" / "tokenizer.json"))
    for row in rows(folder, "sft")[:2000]:
        prompt, completion = (tokenizer.encode(row[key]).ids for key in ("prompt", "completion"))
        assert prompt + completion == tokenizer.encode(row["prompt"] + row["completion"]).ids
        assert tokenizer.decode(completion) == row["completion"]
        assert len(completion) < (48 if data == "support_data" else 5)  # max_tokens, less the EOS


# --- judge and reward -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "points"),
    [
        (PERFECT, 4.5),
        ("", 0.0),
        (" Hello Ben!", 1.0),
        (" Hello Anna!", -1.0),
        (" Hello Bob!", -2.0),
        (" I am sorry about your tent.", -1.0),
        (" We will repair it for free.", -1.0),
        (" We can not help you.", -1.0),
        (" Maybe someone will look at it. We will see.", 0.0),
        (" What do you want now? Stop asking us.", -3.0),
        (" Our team likes music. We sell many colors.", -1.0),
        (" Our team likes music. Our team likes music.", -1.5),
        (PERFECT + " Thank you for your patience.", 3.5),
        (" Hello Anna! Hello Ben!", -2.0),
        (" Ben Hello!", -2.0),
        (" !", -2.0),
    ],
)
def test_the_judge_gives_each_sentence_its_points(completion, points):
    assert judge(BEN, completion) == points


def test_an_unfinished_reply_loses_two_points_once():
    assert judge(BEN, PERFECT, ended=False) == 2.5
    assert judge(BEN, PERFECT + " Thank", ended=True) == 2.5
    assert judge(BEN, PERFECT + " Thank", ended=False) == 2.5
    assert judge(BEN, PERFECT + " ") == 4.5


def test_split_loses_no_text():
    assert split(" Hello Ben! Who? me") == (["Hello Ben!", "Who?"], "me")


def test_the_scorer_reads_the_ticket_from_metadata_or_else_from_the_prompt():
    requests = [
        request("?", PERFECT, metadata=BEN._asdict()),
        request(BEN.prompt, PERFECT),
        request(BEN.prompt, PERFECT, "length"),
    ]
    assert score(requests) == [4.5, 4.5, 2.5]
    with pytest.raises(ValueError, match="no help desk ticket"):
        score([request("37+5=", "42")])


@pytest.mark.parametrize("ticket", task.all_tickets()[::97])
def test_a_ticket_can_be_read_back_from_its_prompt(ticket):
    assert task.ticket_of(ticket.prompt) == ticket


def test_sentences_are_counted_in_a_hundred_replies():
    counts = sentence_counts([PERFECT, " Read the manual. We sell many colors."])
    assert counts == {"rude": 50, "filler": 50, "refusal": 0, "kind": 200, "unknown": 0}


def test_only_the_exact_closed_answer_is_rewarded():
    given = [("42", "stop"), ("42", "length"), (" 42", "stop"), ("423", "stop"), ("", "stop")]
    requests = [request("37+5=", *completion, answer="42") for completion in given]
    assert exact_answer(requests) == [1.0, 0.0, 0.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="`answer` column"):
        exact_answer([request("37+5=", "42")])


# --- command line and configs ---------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_the_yaml_files_load_and_read_what_the_generators_write(
    stage, support_data, arithmetic_data
):
    config = load_config(ROOT / "examples" / f"{stage}.yaml", [], STAGES[stage])
    folder = {"support_replies": support_data, "arithmetic": arithmetic_data}[stage.split("/")[0]]
    prefix = f"data/{stage.split('/')[0]}/"
    text = json.dumps(config.model_dump())
    paths = [part.split('"')[0] for part in text.split(prefix)[1:]]
    assert paths
    assert all((folder / path).exists() for path in paths)


def test_reward_hacking_differs_from_ppo_only_in_the_kl_penalty_and_the_length():
    ppo, hacking = (
        load_config(ROOT / f"examples/support_replies/{name}.yaml", [], RunConfig).model_dump()
        for name in ("ppo", "reward_hacking")
    )
    differing = {key for key in ppo if ppo[key] != hacking[key]}
    assert differing == {"name", "num_steps", "ppo", "evaluation"}
    assert {key for key in ppo["ppo"] if ppo["ppo"][key] != hacking["ppo"][key]} == {"kl"}
    assert hacking["evaluation"] | {"every": None} == ppo["evaluation"]


def test_a_second_call_does_nothing_unless_forced_reseeded_or_damaged(tmp_path):
    out = tmp_path / "data"

    def ensure(seed: int, **given: bool) -> bool:
        return data_folder.ensure(out, "arithmetic", arithmetic.build, seed, **given)

    assert ensure(0)
    assert not ensure(0)
    assert ensure(0, force=True)
    assert ensure(1)
    (out / "sft.parquet").unlink()
    assert ensure(1)
    assert not ensure(1)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_files_of_the_users_own_are_never_replaced(tmp_path):
    (tmp_path / "mine.parquet").write_text("mine")
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(data_folder.NotOurs, match=r"manifest\.json"):
        data_folder.ensure(tmp_path, "arithmetic", arithmetic.build, 0)

    out = tmp_path / "data"
    data_folder.ensure(out, "arithmetic", arithmetic.build, 0)
    (out / "mine.parquet").write_text("mine")
    assert not data_folder.ensure(out, "arithmetic", arithmetic.build, 0)
    with pytest.raises(data_folder.NotOurs, match=r"mine\.parquet"):
        data_folder.ensure(out, "arithmetic", arithmetic.build, 1)


def test_a_build_that_fails_leaves_the_old_data(tmp_path):
    out = tmp_path / "data"
    data_folder.ensure(out, "arithmetic", arithmetic.build, 0)
    before = contents(out)

    def fails(folder: Path, seed: int) -> None:
        (folder / "half").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        data_folder.ensure(out, "arithmetic", fails, 1)
    assert contents(out) == before


@pytest.mark.parametrize(("arguments", "code"), [(["--seed", "2"], 0), (["--seed", "-1"], 2)])
def test_the_command_writes_a_folder_or_says_what_is_wrong(arguments, code, tmp_path):
    command = [sys.executable, "-m", "examples.support_replies.generate", *arguments]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "out")], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == code, done.stderr
    assert (tmp_path / "out" / "model" / "config.json").exists() == (code == 0)
    assert "Traceback" not in done.stderr
