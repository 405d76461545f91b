"""The estimate of a step's time is arithmetic on the config, and one measurement of this machine."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster import pace
from cluster.config import RunConfig
from cluster.config_file import load_config
from cluster.core_rate import core_rates
from cluster.pace import step_seconds, work
from cluster.shapes import Shape, Shapes
from tests import tiny

SHAPE = Shape(64, 2, 128, 4, 4, 16, vocabulary=100, tied=True)
SHAPES = Shapes(SHAPE, SHAPE, SHAPE, {})
INPUTS: Any = SimpleNamespace(prompts=[tiny.prompt(0), tiny.prompt(1)], held_out=[])


@pytest.fixture
def load(tmp_path: Path, policy: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(pace, "core_rates", lambda hidden, mlp, rows: [1e9] * len(rows))
    monkeypatch.setattr("os.cpu_count", lambda: 4)

    def loader(**changes: Any) -> RunConfig:
        dotted = {key.replace("__", "."): value for key, value in changes.items()}
        tree = tiny.changed(tiny.run_tree(tmp_path, policy), dotted)
        return load_config(tiny.write_yaml(tmp_path / "run.yaml", tree), [], RunConfig)

    return loader


def test_a_step_is_one_pass_to_generate_one_to_compare_and_three_an_epoch_to_learn(
    load: Any,
) -> None:
    done = work(load(ppo__advantage="grpo", ppo__epochs=2), INPUTS, SHAPES)
    assert done.learner == pytest.approx((1 + 1 + 2 * 3) * done.generators)
    without_anchor = load(ppo__advantage="grpo", ppo__epochs=2, ppo__anchor="behavior")
    assert work(without_anchor, INPUTS, SHAPES).learner == pytest.approx(7 * done.generators)


def test_every_parameter_of_a_layer_is_one_multiplication_and_one_addition_a_token(
    load: Any,
) -> None:
    config = load()
    rows = config.batch_size * config.sampling.max_tokens
    tokens = rows + config.batch_size * len(tiny.prompt(0).ids)
    layers, head = SHAPE.layers * SHAPE.layer, SHAPE.embedding
    assert work(config, INPUTS, SHAPES).generators == 2 * (tokens * layers + rows * head)


def test_a_critic_of_its_own_costs_nearly_as_much_again(load: Any) -> None:
    shared = work(load(ppo__value_model="shared"), INPUTS, SHAPES).learner
    assert 1.5 * shared < work(load(), INPUTS, SHAPES).learner < 2 * shared


def test_what_follows_one_another_adds_up_and_what_runs_side_by_side_does_not(load: Any) -> None:
    done = work(load(), INPUTS, SHAPES)
    decoding, learning = done.generators / 1e9, done.learner / 1e9
    assert step_seconds(load(), INPUTS, SHAPES) == pytest.approx(decoding + learning)
    assert step_seconds(load(max_staleness=1), INPUTS, SHAPES) == pytest.approx(learning)
    two = load(learner__ranks=2)
    assert step_seconds(two, INPUTS, SHAPES) == pytest.approx(decoding + learning / 2)


def test_on_too_few_cores_side_by_side_is_no_faster(
    load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    in_turn = step_seconds(load(), INPUTS, SHAPES)
    assert step_seconds(load(max_staleness=1), INPUTS, SHAPES) == pytest.approx(in_turn)


def test_this_machine_is_measured_with_one_thread() -> None:
    few, many = core_rates(64, 128, [1, 256])
    assert few > 1e6
    assert 1e8 < many < 1e12
