"""Configs: frozen, checked, and refusing in one line that says what, where and the fix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import ValidationError

from cluster.config import BOUNDS, BadInput, RewardRunConfig, RunConfig, SFTRunConfig
from cluster.config_file import known_keys, load_config
from tests import tiny

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").rglob("*.yaml"))
KINDS = {"train": RunConfig, "sft": SFTRunConfig, "reward_model": RewardRunConfig}


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, Any]:
    return tiny.run_tree(tmp_path)


@pytest.fixture
def load(tmp_path: Path, tree: dict[str, Any]) -> Any:
    """load(changes, *overrides) -> the RunConfig of the tiny run with these changes."""

    def loader(changes: dict[str, Any] | None = None, *overrides: str) -> RunConfig:
        path = tiny.write_yaml(tmp_path / "run.yaml", tiny.changed(tree, changes or {}))
        return load_config(path, list(overrides), RunConfig)

    return loader


def refusal(load: Any, changes: dict[str, Any], *overrides: str) -> str:
    with pytest.raises(BadInput) as refused:
        load(changes, *overrides)
    message = str(refused.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_example_loads(path: Path) -> None:
    stage = yaml.safe_load(path.read_text())["stage"]
    assert load_config(path, [], KINDS[stage]).stage == stage


def test_there_are_examples_of_every_stage() -> None:
    assert {yaml.safe_load(path.read_text())["stage"] for path in EXAMPLES} == set(KINDS)


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("bach_size", "batch_size"),
        ("ppo.clip_rang", "clip_range"),
        ("ppo.kl.coeff", "coef"),
        ("ppo.policy.learning_rate_lr", "lr"),
        ("generators.max_num_seq", "max_num_seqs"),
        ("sampling.max_token", "max_tokens"),
        ("reward.scorer.functoin", "function"),
        ("reward.batchsize", "batch_size"),
        ("checkpoint.evry", "every"),
    ],
)
def test_an_unknown_key_names_its_place_and_the_nearest_key(
    load: Any, key: str, nearest: str
) -> None:
    message = refusal(load, {key: 1})
    assert f"unknown key {key.split('.')[0]}" in message
    assert key.rsplit(".", 1)[-1] in message
    if key != "ppo.policy.learning_rate_lr":
        assert f"did you mean {nearest}?" in message
    else:
        assert "known here:" in message
        assert nearest in message


def test_in_a_union_only_the_keys_of_the_chosen_kind_are_proposed(load: Any) -> None:
    http = {"kind": "http", "url": "https://example.org", "timeout": 3}
    assert "did you mean timeout_s?" in refusal(load, {"reward.scorer": http})
    function = {"kind": "function", "function": "a:b", "timeout": 3}
    assert "timeout_s" not in refusal(load, {"reward.scorer": function})


def test_an_unknown_key_inside_a_sum_of_scorers_names_the_nearest(load: Any) -> None:
    part = {"weight": 1.0, "scorer": {"kind": "reward_model", "paht": "x"}}
    message = refusal(load, {"reward.scorer": {"kind": "sum", "parts": {"rm": part}}})
    assert "did you mean path?" in message
    assert "rm" in message


def test_an_unknown_kind_names_those_there_are(load: Any) -> None:
    message = refusal(load, {"reward.scorer": {"kind": "magic"}})
    assert "reward.scorer" in message
    assert "'function'" in message
    assert "'reward_model'" in message


def test_an_unknown_key_is_told_before_what_is_missing_because_of_it(load: Any) -> None:
    message = refusal(load, {"num_steps": None, "num_step": 3})
    assert "did you mean num_steps?" in message
    assert "and 1 more" in message


@given(st.data())
def test_every_misspelt_key_of_a_known_section_is_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    location = data.draw(
        st.sampled_from([(), ("ppo",), ("ppo", "kl"), ("generators",), ("learner",)])
    )
    known = known_keys(RunConfig, location)
    name = data.draw(st.sampled_from(known))
    place = data.draw(st.integers(0, len(name) - 1))
    wrong = name[:place] + name[place + 1 :]
    assume(wrong and wrong not in known)
    folder = tmp_path_factory.mktemp("misspelt")
    tree = tiny.changed(tiny.run_tree(folder), {".".join([*location, wrong]): 1})
    with pytest.raises(BadInput, match="unknown key"):
        load_config(tiny.write_yaml(folder / "run.yaml", tree), [], RunConfig)


def test_a_config_and_its_parts_are_frozen(load: Any) -> None:
    config = load()
    for part, key in ((config, "seed"), (config.ppo, "epochs"), (config.ppo.kl, "coef")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(part, key, 1)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "key",
    ["ppo.gamma", "ppo.kl.coef", "ppo.policy.lr", "sampling.temperature", "reward.deadline_s"],
)
def test_no_number_is_nan_or_infinite(load: Any, key: str, value: float) -> None:
    assert key in refusal(load, {key: value})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"batch_size": 7}, ("batch_size", "samples_per_prompt 2", "nearest: 6")),
        ({"batch_size": 1}, ("batch_size", "nearest: 2")),
        ({"batch_size": 10, "ppo.minibatches": 4}, ("ppo.minibatches 4", "nearest: 8")),
        ({"learner.ranks": 5}, ("learner.ranks 5", "4 trajectories a minibatch")),
        (
            {"ppo.advantage": "grpo", "sampling.samples_per_prompt": 1},
            ("samples_per_prompt", "grpo", "2 or more"),
        ),
        (
            {"ppo.advantage": "rloo", "sampling.samples_per_prompt": 1},
            ("samples_per_prompt", "rloo", "2 or more"),
        ),
        ({"sampling.max_tokens": 32}, ("sampling.max_tokens", "max_model_len 32")),
        ({"name": "a/b"}, ("name",)),
        ({"name": "../up"}, ("name",)),
        ({"name": ""}, ("name",)),
        ({"num_steps": 0}, ("num_steps", "got 0")),
        ({"max_staleness": -1}, ("max_staleness",)),
        ({"trust_remote_code": True}, ("trust_remote_code",)),
        ({"ppo.behavior_ratio_cap": 2.0, "ppo.anchor": "behavior"}, ("behavior_ratio_cap",)),
        ({"ppo.value_init": "x", "ppo.value_model": "shared"}, ("value_init",)),
        ({"reward.scorer.function": "no_colon"}, ("reward.scorer", "no_colon")),
        ({"stage": "sft"}, ("stage: sft", "stage: train is wanted")),
    ],
)
def test_what_cannot_be_run_is_refused_with_its_place(
    load: Any, changes: dict[str, Any], named: tuple[str, ...]
) -> None:
    message = refusal(load, changes)
    for part in named:
        assert part in message


@given(batch=st.integers(1, 64), samples=st.integers(1, 8), minibatches=st.integers(1, 8))
def test_the_nearest_batch_size_that_is_proposed_divides(
    tmp_path_factory: pytest.TempPathFactory, batch: int, samples: int, minibatches: int
) -> None:
    folder = tmp_path_factory.mktemp("batch")
    tree = tiny.changed(
        tiny.run_tree(folder),
        {
            "batch_size": batch,
            "sampling.samples_per_prompt": samples,
            "ppo.minibatches": minibatches,
        },
    )
    path = tiny.write_yaml(folder / "run.yaml", tree)
    divides = batch % samples == 0 and batch % minibatches == 0
    if divides:
        assert load_config(path, [], RunConfig).prompts_per_step * samples == batch
        return
    with pytest.raises(BadInput, match="batch_size") as refused:
        load_config(path, [], RunConfig)
    nearest = int(str(refused.value).rsplit("nearest: ", 1)[1])
    works = tiny.write_yaml(folder / "run.yaml", {**tree, "batch_size": nearest})
    assert load_config(works, [], RunConfig).batch_size == nearest


@pytest.mark.parametrize(
    ("override", "where", "value"),
    [
        ("seed=7", lambda c: c.seed, 7),
        ("ppo.policy.lr=1.0e-3", lambda c: c.ppo.policy.lr, 1e-3),
        ("ppo.policy.lr=1e-3", lambda c: c.ppo.policy.lr, 1e-3),
        ("prompts.shuffle=false", lambda c: c.prompts.shuffle, False),
        ("prompts.limit=null", lambda c: c.prompts.limit, None),
        ('sampling.stop=["\\n", "="]', lambda c: c.sampling.stop, ("\n", "=")),
        (
            "ppo.kl={coef: 0.5, where: loss}",
            lambda c: (c.ppo.kl.coef, c.ppo.kl.where),
            (0.5, "loss"),
        ),
        ("name=other", lambda c: c.name, "other"),
        ("reference=a=b", lambda c: c.reference, "a=b"),
    ],
)
def test_an_override_is_a_path_of_keys_and_a_yaml_value(
    load: Any, override: str, where: Any, value: object
) -> None:
    if override.startswith("ppo.policy"):
        assert where(load({"ppo.policy": {"lr": 1.0}}, override)) == value
    else:
        assert where(load({}, override)) == value


@pytest.mark.parametrize(
    ("advantage", "where"),
    [("gae", "reward"), ("rloo", "reward"), ("reinforce++", "reward"), ("grpo", "loss")],
)
def test_the_kl_has_its_usual_place_unless_the_config_says_another(
    load: Any, advantage: str, where: str
) -> None:
    config = load({"ppo.advantage": advantage})
    assert config.ppo.kl.where == where
    assert config.model_dump(mode="json")["ppo"]["kl"]["where"] == where
    assert load({"ppo.advantage": advantage, "ppo.kl.where": "loss"}).ppo.kl.where == "loss"
    free = {"ppo.advantage": advantage, "ppo.kl": {"where": "reward", "coef": 0}}
    assert load(free).ppo.kl.where == "reward"


def test_the_last_override_holds(load: Any) -> None:
    assert load({}, "seed=1", "seed=2").seed == 2


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("seed", "key.path=value"),
        ("=3", "key.path=value"),
        ("seed=[1", "YAML"),
        ("num_steps.deep=1", "not a section"),
        ("ppo.epochz=1", "did you mean epochs?"),
        ("seed=many", "seed"),
    ],
)
def test_a_bad_override_is_refused(load: Any, override: str, named: str) -> None:
    assert named in refusal(load, {}, override)


@pytest.mark.parametrize(
    ("text", "named"),
    [("a: [1", "not YAML"), ("- 1", "not a mapping"), ("", "not a mapping"), ("\x00", "not YAML")],
)
def test_a_file_that_is_no_config_is_refused(tmp_path: Path, text: str, named: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(BadInput, match=named):
        load_config(tmp_path / "run.yaml", [], RunConfig)


def test_a_file_that_is_no_text_or_not_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes(b"\xff\xfe\xfa")
    for name, named in (("run.yaml", "not YAML"), ("absent.yaml", "no such config file")):
        with pytest.raises(BadInput, match=named):
            load_config(tmp_path / name, [], RunConfig)
    with pytest.raises(BadInput, match="no such config file"):
        load_config(tmp_path, [], RunConfig)


@pytest.mark.parametrize("dtype", ["generators.dtype", "learner.dtype"])
def test_bounds_follow_from_the_dtypes_and_what_is_given_holds(load: Any, dtype: str) -> None:
    assert load({}).bounds == BOUNDS["float32"]
    assert load({dtype: "bfloat16"}).bounds == BOUNDS["bfloat16"]
    given = load({dtype: "bfloat16", "self_check.probe": 0.25}).bounds
    assert given == BOUNDS["bfloat16"]._replace(probe=0.25)


def test_a_config_written_out_and_read_again_is_the_same(load: Any, tmp_path: Path) -> None:
    config = load({"ppo.kl.target": 3.0, "sampling.stop": ["x"]})
    path = tiny.write_yaml(tmp_path / "again.yaml", config.model_dump(mode="json"))
    assert load_config(path, [], RunConfig) == config
