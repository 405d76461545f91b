"""What the doctor reads it tells: the inputs, the plan; and it refuses what would fail later."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from cluster.config import BadInput, RunConfig, load_config
from cluster.doctor import (
    FIXED_IN_PPO,
    FIXED_ON_RESUME,
    check_gpus,
    check_inputs,
    check_resume,
    estimate_parameters,
    gpus_of,
    model_config,
    plan_lines,
)
from examples import tiny_model
from tests import tiny


@pytest.fixture
def load(tmp_path: Path, policy: Path) -> Any:
    """load(changes) -> the config of the tiny run with these changes."""

    def loader(changes: dict[str, Any] | None = None) -> RunConfig:
        tree = tiny.changed(tiny.run_tree(tmp_path, policy), changes or {})
        return load_config(tiny.write_yaml(tmp_path / "run.yaml", tree), [], RunConfig)

    return loader


def test_a_run_with_nothing_in_its_way_is_read_once_and_writes_nothing(
    load: Any, tmp_path: Path
) -> None:
    config = load()
    before = sorted(tmp_path.rglob("*"))
    inputs = check_inputs(config)
    assert [prompt.text for prompt in inputs.prompts] == list(tiny.TEXTS[:8])
    assert inputs.vocabulary_size == len(inputs.tokenizer)
    assert (inputs.dropped, inputs.held_out) == ([], [])
    assert sorted(tmp_path.rglob("*")) == before


def test_the_estimate_is_the_number_of_parameters_but_for_norms_and_biases(policy: Path) -> None:
    model = model_config(str(policy), "policy")
    shapes = tiny_model._shapes(model["vocab_size"])
    exact = sum(int.__mul__(*shape) for shape in shapes.values() if len(shape) == 2)
    assert estimate_parameters(model) == exact


def test_a_model_of_unknown_form_has_no_estimate() -> None:
    assert estimate_parameters({"vocab_size": 10}) == 0


def test_the_plan_tells_the_arithmetic_of_a_step_and_the_epochs(load: Any) -> None:
    config = load({"num_steps": 4, "batch_size": 8, "ppo.epochs": 3})
    plan = "\n".join(plan_lines(config, check_inputs(config)))
    for part in (
        "8 (0 too long and dropped), 2.00 epochs in 4 steps",
        "4 prompts x 2 = 8 trajectories; 3 epochs x 2 minibatches of 4",
        "1 x vLLM on 1 cpu each, float32",
        "1 x FSDP on cpu",
        "synchronous",
        "GiB free",
    ):
        assert part in plan


def test_the_plan_names_the_staleness_of_an_asynchronous_run(load: Any) -> None:
    config = load({"max_staleness": 2})
    assert "asynchronous, staleness at most 2" in "\n".join(
        plan_lines(config, check_inputs(config))
    )


def test_prompts_too_long_are_counted_where_they_are_dropped(load: Any) -> None:
    changes = {"prompts.max_prompt_tokens": 4, "prompts.on_too_long": "drop"}
    with pytest.raises(BadInput, match="every prompt is longer"):
        check_inputs(load(changes))
    config = load({**changes, "prompts.max_prompt_tokens": 5})
    assert check_inputs(config).dropped == []


# ---- GPUs


@pytest.mark.parametrize(
    ("available", "fits"), [(6.5, True), (8.0, True), (6.0, False), (0.0, False)]
)
def test_roles_need_as_many_gpus_as_they_name(load: Any, available: float, fits: bool) -> None:
    config = load(
        {
            "device": "cuda",
            "generators.count": 2,
            "generators.tensor_parallel_size": 2,
            "learner.ranks": 2,
            "reward.num_gpus": 0.5,
        }
    )
    if fits:
        check_gpus(gpus_of(config), lambda: available)
        return
    with pytest.raises(BadInput) as refused:
        check_gpus(gpus_of(config), lambda: available)
    for part in (
        "6.5 GPUs",
        "4 for generators",
        "2 for learner.ranks",
        f"has {available:g}",
        "lower",
    ):
        assert part in str(refused.value)


def test_on_cpu_no_gpu_is_needed(load: Any) -> None:
    check_gpus(gpus_of(load({"generators.count": 64})), lambda: 0.0)


# ---- resuming


def test_the_same_run_with_more_steps_goes_on(load: Any) -> None:
    saved = load().model_dump(mode="json")
    check_resume(load(), saved)
    check_resume(load({"num_steps": 400, "checkpoint.keep": 5, "ppo.kl.coef": 0.2}), saved)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", 5),
        ("batch_size", 16),
        ("max_staleness", 1),
        ("sampling.samples_per_prompt", 4),
        ("sampling.temperature", 0.5),
        ("prompts.limit", 3),
        ("policy", "elsewhere"),
        ("reference", "elsewhere"),
        ("ppo.advantage", "grpo"),
        ("ppo.value_model", "shared"),
    ],
)
def test_what_would_make_it_another_run_is_refused_by_name(load: Any, key: str, value: Any) -> None:
    with pytest.raises(BadInput, match="the checkpoint was made with") as refused:
        check_resume(load({key: value}), load().model_dump(mode="json"))
    section = key.split(".")[0]
    named = key if key in FIXED_ON_RESUME or key.removeprefix("ppo.") in FIXED_IN_PPO else section
    assert str(refused.value).startswith(f"{named}: ")


# ---- folders of models


@pytest.fixture
def copy(policy: Path, tmp_path: Path) -> Path:
    """A copy of the policy's folder, to be damaged."""
    return Path(shutil.copytree(policy, tmp_path / "copy"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (lambda f: (f / "config.json").write_text('{"vocab'), "not JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "no vocab_size"),
        (lambda f: edit(f / "config.json", vocab_size=None), "no vocab_size"),
        (lambda f: edit(f / "config.json", vocab_size=3), "its model 3"),
        (
            lambda f: edit(f / "config.json", max_position_embeddings=16),
            "max_position_embeddings 16",
        ),
        (lambda f: (f / "model.safetensors").unlink(), "no .safetensors"),
        (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer.json"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer cannot be read"),
        (lambda f: edit(f / "tokenizer_config.json", eos_token=None), "no eos_token"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_policy_folder_that_could_not_be_loaded_is_refused_by_name(
    load: Any, copy: Path, damage: Any, said: str
) -> None:
    damage(copy)
    with pytest.raises(BadInput, match=said.replace(".", r"\.")) as refused:
        check_inputs(load({"policy": str(copy)}))
    assert str(copy) in str(refused.value) or "max_model_len" in str(refused.value)


@pytest.mark.parametrize("key", ["reference", "ppo.value_init"])
def test_another_models_folder_is_checked_as_the_policys_is(
    load: Any, copy: Path, key: str
) -> None:
    check_inputs(load({key: str(copy)}))
    (copy / "model.safetensors").unlink()
    with pytest.raises(BadInput, match=rf"^{key}: .*no \.safetensors"):
        check_inputs(load({key: str(copy)}))


def test_a_reward_model_of_another_vocabulary_may_read_text(load: Any, stranger: Path) -> None:
    scorer = {"kind": "reward_model", "path": str(stranger)}
    with pytest.raises(BadInput, match=r"^reward\.scorer: .* its tokenizer is not the policy's"):
        check_inputs(load({"reward.scorer": scorer}))
    check_inputs(load({"reward.scorer": scorer | {"input": "text"}}))


def test_each_part_of_a_sum_is_checked_and_named(load: Any, stranger: Path) -> None:
    part = {"weight": 1.0, "scorer": {"kind": "reward_model", "path": str(stranger)}}
    with pytest.raises(BadInput, match=r"^reward\.scorer\.rm: "):
        check_inputs(load({"reward.scorer": {"kind": "sum", "parts": {"rm": part}}}))


def test_the_evaluations_prompts_and_judge_are_checked_too(load: Any, tmp_path: Path) -> None:
    held_out = tiny.write_jsonl(tmp_path / "held_out.jsonl", [{"prompt": "1+1="}])
    scorer = {"kind": "function", "function": "examples.arithmetic.rewards:exact_answer"}
    evaluation = {"prompts": {"path": held_out}, "scorer": scorer}
    assert len(check_inputs(load({"evaluation": evaluation})).held_out) == 1
    for key, value in (("prompts.path", "absent.jsonl"), ("scorer.function", "examples.none:f")):
        with pytest.raises(BadInput, match=r"absent\.jsonl|^evaluation\.scorer"):
            check_inputs(load({"evaluation": tiny.changed(evaluation, {key: value})}))
