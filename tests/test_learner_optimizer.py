"""The learning rate's closed forms, and gradients that are refused."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from learner.config import OptimizerConfig
from learner.optimizer import NotFinite, Optimizer, schedule


def config(**changes):
    return OptimizerConfig.model_validate({"lr": 0.1, **changes})


def test_a_constant_schedule_is_one_from_the_first_step_to_the_last():
    assert {schedule(config(decay="constant"), step, 10) for step in range(10)} == {1.0}


@pytest.mark.parametrize("low", [0.0, 0.1, 1.0])
def test_a_linear_schedule_falls_evenly_and_would_end_at_its_minimum(low):
    factors = [schedule(config(min_lr_ratio=low), step, 8) for step in range(9)]
    assert factors[0] == 1.0
    assert factors[8] == pytest.approx(low)
    falls = [a - b for a, b in pairwise(factors)]
    assert falls == pytest.approx([(1 - low) / 8] * 8)


def test_a_cosine_schedule_is_halfway_in_the_middle():
    given = config(decay="cosine", min_lr_ratio=0.2)
    assert schedule(given, 0, 10) == pytest.approx(1.0)
    assert schedule(given, 5, 10) == pytest.approx(0.6)
    assert schedule(given, 10, 10) == pytest.approx(0.2)
    quarter = 0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi / 4))
    assert schedule(given, 2, 8) == pytest.approx(quarter)


def test_warm_up_rises_evenly_from_above_zero_and_multiplies_the_decay():
    constant = config(decay="constant", warmup_steps=4)
    factors = [schedule(constant, step, 100) for step in range(6)]
    assert factors == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0])
    linear = config(warmup_steps=4)
    assert schedule(linear, 1, 10) == pytest.approx(0.5 * schedule(config(), 1, 10))


@pytest.mark.parametrize("decay", ["constant", "linear", "cosine"])
def test_behind_the_last_step_the_rate_stays_at_its_minimum(decay):
    given = config(decay=decay)
    assert schedule(given, 37, 10) == pytest.approx(schedule(given, 10, 10))


def test_set_step_gives_the_optimizer_the_rate_it_returns():
    optimizer = Optimizer([nn.Parameter(torch.zeros(2))], config(warmup_steps=2))
    assert optimizer.set_step(0, 10) == pytest.approx(0.05)
    assert optimizer.adamw.param_groups[0]["lr"] == optimizer.set_step(0, 10)


def test_the_gradient_is_clipped_and_its_norm_before_that_returned():
    weight = nn.Parameter(torch.zeros(2))
    optimizer = Optimizer([weight], config(max_grad_norm=2.0))
    weight.grad = torch.tensor([3.0, 4.0])
    seen = []
    optimizer.adamw.register_step_pre_hook(lambda *_: seen.append(weight.grad.clone()))
    assert optimizer.apply("policy") == pytest.approx(5.0)
    torch.testing.assert_close(seen[0], torch.tensor([1.2, 1.6]), rtol=1e-5, atol=0)
    assert weight.grad is None


def test_the_norm_is_that_of_all_gradients_together_and_a_small_one_is_left_alone():
    weights = [nn.Parameter(torch.zeros(shape)) for shape in ((2,), (1, 3), ())]
    optimizer = Optimizer(weights, config(max_grad_norm=100.0))
    weights[0].grad = torch.tensor([3.0, 4.0])
    weights[1].grad = torch.full((1, 3), 2.0)  # and none for the third
    expected = [weight.grad.clone() for weight in weights[:2]]
    assert optimizer.clip() == pytest.approx(math.sqrt(25 + 12))
    assert all(torch.equal(w.grad, g) for w, g in zip(weights, expected, strict=False))


def test_a_first_step_of_adam_moves_each_weight_by_the_rate_against_its_gradient():
    weight = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = Optimizer([weight], config(decay="constant"))
    weight.grad = torch.tensor([0.3, -0.02])
    optimizer.apply("policy")
    torch.testing.assert_close(weight.detach(), torch.tensor([0.9, -1.9]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_is_refused_and_leaves_no_trace(bad):
    weight = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = Optimizer([weight], config())
    weight.grad = torch.tensor([0.3, bad])
    with pytest.raises(NotFinite, match=r"the gradient norm of the policy is .*; its weights were"):
        optimizer.apply("policy")
    assert weight.tolist() == [1.0, -2.0]
    assert weight.grad is None
    assert not optimizer.adamw.state


def test_frozen_parameters_are_not_the_optimizers():
    frozen = nn.Parameter(torch.zeros(2), requires_grad=False)
    free = nn.Parameter(torch.zeros(2))
    assert Optimizer([frozen, free], config()).parameters == [free]
