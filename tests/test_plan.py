"""The plan tells the data, the arithmetic of a step, who runs where, and what is there for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster import plan as plan_module
from cluster.config import BadInput, RunConfig
from cluster.config_file import load_config
from cluster.doctor import check_inputs
from cluster.plan import plan, resources, show
from tests import tiny

FUNCTION = {"kind": "function", "function": "examples.arithmetic.rewards:exact_answer"}


@pytest.fixture
def load(tmp_path: Path, policy: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("cluster.fit.available_bytes", lambda: 1 << 40)
    monkeypatch.setattr("cluster.pace.core_rates", lambda hidden, mlp, rows: [1e6] * len(rows))

    def loader(changes: dict[str, Any] | None = None) -> RunConfig:
        tree = tiny.changed(tiny.run_tree(tmp_path, policy), changes or {})
        return load_config(tiny.write_yaml(tmp_path / "run.yaml", tree), [], RunConfig)

    return loader


def text_of(config: RunConfig) -> str:
    return "\n".join(f"{label:12}{text}" for label, text in plan(config, check_inputs(config)))


def test_the_arithmetic_of_a_step_and_the_epochs(load: Any) -> None:
    config = load(
        {
            "num_steps": 4,
            "batch_size": 8,
            "ppo.epochs": 3,
            "learner.max_tokens_per_microbatch": 26,
        }
    )
    shown = text_of(config)
    for part in (
        "8 (0 too long and dropped), the longest of 5 tokens; 2.00 epochs in 4 steps",
        "4 prompts x 2 = 8 trajectories; 3 epochs x 2 minibatches of 4",
        "microbatches of one on a rank: at most 2",  # 13 tokens at most, so two in 26
        "6 optimizer steps a step, 24 in the run",
        "synchronous; up to 4 prompts in flight",
        "GiB free",
    ):
        assert part in shown


def test_an_asynchronous_run_has_more_prompts_in_flight(load: Any) -> None:
    shown = text_of(load({"max_staleness": 2}))
    assert "asynchronous, staleness at most 2; up to 12 prompts in flight" in shown


def test_who_runs_where_and_what_each_takes(load: Any, tmp_path: Path, policy: Path) -> None:
    held_out = tiny.write_jsonl(tmp_path / "held_out.jsonl", [{"prompt": "1+1="}])
    changes = {
        "generators.count": 2,
        "learner.ranks": 2,
        "reward.scorer": {
            "kind": "reward_model",
            "path": str(tiny.as_reward_model(policy, tmp_path / "reward")),
        },
        "evaluation": {"prompts": {"path": held_out}, "scorer": FUNCTION},
    }
    rows = dict(plan(load(changes), check_inputs(load(changes))))
    assert rows["generators"].startswith("2 x vLLM on 1 cpu each, float32, 64 completions together")
    assert "KV cache 0.02 GiB" in rows["generators"]
    assert rows["learner"].startswith("2 x FSDP on cpu, float32; about ")
    assert rows["reward"].startswith("1 x reward_model on cpu; about ")
    assert rows["judge"].startswith("1 x function on cpu; about ")
    assert "of this machine together" in rows["memory"]
    assert "vllm" in rows["versions"]


def test_a_warning_of_too_little_memory_stands_in_the_plan(
    load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.fit.available_bytes", lambda: 1 << 20)
    assert "WARNING: memory: " in text_of(load({"too_little_memory": "warn"}))


def test_on_gpus_the_gpus_memory_is_told_apart_from_the_machines(
    load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.fit.gpu_bytes", lambda: ())
    rows = dict(plan(load({"device": "cuda"}), check_inputs(load({"device": "cuda"}))))
    assert " of its GPU each (CUDA " in rows["learner"]
    assert "and 1.8" in rows["learner"]


def test_a_model_of_another_form_is_planned_without_a_memory_estimate(
    load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_module, "read_shapes", lambda config: None)
    shown = text_of(load())
    assert "memory not known for a model of this form" in shown
    assert "of this machine together" not in shown


# ---- data


def test_texts_that_stand_twice_are_counted(load: Any, tmp_path: Path) -> None:
    rows = [{"prompt": text} for text in ("a", "b", "a", "a")]
    shown = text_of(load({"prompts.path": tiny.write_jsonl(tmp_path / "p.jsonl", rows)}))
    assert "WARNING: 2 have the text of another one" in shown
    assert "have the text of another" not in text_of(load())


def test_held_out_prompts_that_are_trained_on_are_counted(load: Any, tmp_path: Path) -> None:
    rows = [{"prompt": text} for text in (*tiny.TEXTS[:3], "new")]
    held_out = tiny.write_jsonl(tmp_path / "held_out.jsonl", rows)
    evaluation = {"prompts": {"path": held_out}, "scorer": FUNCTION}
    assert "WARNING: 3 of 4 held-out prompts are trained on" in text_of(
        load({"evaluation": evaluation})
    )
    tiny.write_jsonl(tmp_path / "held_out.jsonl", rows[3:])
    assert "are trained on" not in text_of(load({"evaluation": evaluation}))


def test_plain_prompts_for_a_policy_with_a_chat_template_are_told(
    load: Any, tmp_path: Path, stranger: Path
) -> None:
    said = "without the policy's chat template"
    assert said in text_of(load())
    messages = [{"messages": [{"role": "user", "content": "a"}]}]
    path = tiny.write_jsonl(tmp_path / "chat.jsonl", messages)
    assert said not in text_of(load({"prompts.path": path}))
    assert said not in text_of(load({"policy": str(stranger)}))  # it has no template


def test_long_prompts_are_counted_where_they_are_dropped(load: Any, tmp_path: Path) -> None:
    rows = [{"prompt": "1"}, {"prompt": "1" * 20}]
    path = tiny.write_jsonl(tmp_path / "p.jsonl", rows)
    config = load(
        {"prompts.path": path, "prompts.on_too_long": "drop", "prompts.max_prompt_tokens": 9}
    )
    assert "1 (1 too long and dropped), the longest of 1 tokens" in text_of(config)


# ---- time


def test_the_time_is_that_of_an_earlier_run_of_the_name_else_a_rough_estimate(load: Any) -> None:
    config = load({"num_steps": 60})
    assert " s a step at the very least (a rough estimate:" in text_of(config)
    config.run_dir.mkdir(parents=True)
    lines = [json.dumps({"time/step_s": s}) for s in (30.0, 2.0, 1.0)]
    text = "\n".join([*lines, '{"sft/loss": 1}', '{"time/st'])
    (config.run_dir / "metrics.jsonl").write_text(text)
    assert "2.00 s a step in the earlier run of this name: 2.0 min for 60" in text_of(config)


def test_where_no_time_can_be_told_the_plan_says_why(
    load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.fit.gpu_bytes", lambda: ())
    said = "not known: there is no earlier run of this name, and "
    assert said + "GPUs are not measured" in text_of(load({"device": "cuda"}))
    monkeypatch.setattr(plan_module, "read_shapes", lambda config: None)
    assert said + "the model's form is not known" in text_of(load())


# ---- resources


class Joined:
    """A cluster with two GPUs."""

    closed = False

    def __init__(self, address: str, namespace: str) -> None:
        assert address == "auto"

    def num_gpus(self) -> float:
        return 2.0

    def close(self) -> None:
        Joined.closed = True


def test_a_cluster_that_answers_is_asked_and_let_go(load: Any) -> None:
    config = load({"device": "cuda", "ray_address": "auto"})
    line = resources(config, Joined)[1]  # type: ignore[arg-type]
    assert line.startswith("2 GPUs (1 for generators, 1 for learner.ranks")
    assert line.endswith("the Ray at auto has 2 GPUs")
    assert Joined.closed
    with pytest.raises(BadInput, match=r"needs 3 GPUs .*the cluster has 2"):
        resources(load({"device": "cuda", "ray_address": "auto", "learner.ranks": 2}), Joined)  # type: ignore[arg-type]


def test_a_cluster_that_does_not_answer_is_said_to(load: Any) -> None:
    line = resources(load({"ray_address": "127.0.0.1:1"}))[1]
    assert "the Ray at 127.0.0.1:1 could not be asked (ray_address: nothing answers" in line


def test_without_an_address_no_ray_is_looked_for(
    load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("a Ray was asked for")

    assert "no GPU" in resources(load(), never)[1]
    monkeypatch.setattr(plan_module, "gpu_bytes", lambda: (1, 2, 3))
    assert "this machine has 3" in resources(load({"device": "cuda"}), never)[1]


# ---- printing


def test_plain_lines_where_there_is_no_terminal_a_table_where_there_is_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [("prompts", "[bold]8[/bold] " + "word " * 40), ("", "more")]
    show(rows)
    plain = capsys.readouterr().out
    assert plain.splitlines()[0].startswith("prompts     [bold]8[/bold] word")
    assert len(plain.splitlines()) == 2
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "60")
    show(rows)
    table = capsys.readouterr().out.splitlines()
    assert len(table) > 4  # wrapped, under its own column
    assert "[bold]8[/bold]" in table[0]
