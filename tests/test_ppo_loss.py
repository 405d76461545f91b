"""The PPO losses against brute force, in every sign and side, and however the batch is cut."""

from __future__ import annotations

import math

import pytest
import torch

from learner.config import RefuseConfig
from learner.ppo_loss import policy_loss, token_mean, value_loss
from learner.refusal import BadStep, check_minibatch

RATIOS = ["token", "sequence", "sequence_mean"]
LENGTHS = [6, 1, 4, 0, 3, 6, 2, 5]
MASK = torch.arange(6) < torch.tensor(LENGTHS)[:, None]
COUNT = sum(LENGTHS)


def normal(seed: int, scale: float = 1.0, dtype=torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(MASK.shape, generator=generator, dtype=dtype) * scale


def batch(scale: float = 0.3, dtype=torch.float64) -> tuple[torch.Tensor, ...]:
    """logprobs, old_logprobs, advantages, loss_mask"""
    old = -normal(0, 2.0, dtype).abs()
    return old + normal(1, scale, dtype), old, normal(2, 1.0, dtype), MASK


def brute_force(logprobs, old, advantages, ratio, low, high, dual, weights):
    """One completion at a time, one token at a time, with the textbook min of two products."""
    total = cut = 0.0
    for row, length in enumerate(LENGTHS):
        differences = [(logprobs[row, t] - old[row, t]).item() for t in range(length)]
        for t in range(length):
            log_ratio = {
                "token": differences[t],
                "sequence": sum(differences),
                "sequence_mean": sum(differences) / length,
            }[ratio]
            r, a = math.exp(log_ratio), advantages[row, t].item()
            plain, clipped = r * a, min(max(r, 1 - low), 1 + high) * a
            term = min(plain, clipped)
            cut += clipped < plain
            if dual is not None and a < 0:
                cut += dual * a > term
                term = max(term, dual * a)
            total += term * weights[row, t].item() / (length if ratio == "sequence" else 1)
    return -total / COUNT, cut / COUNT


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("high", [None, 0.6])
@pytest.mark.parametrize("dual", [None, 1.5])
def test_policy_loss_is_the_textbook_surrogate_token_by_token(ratio, high, dual):
    logprobs, old, advantages, mask = batch(0.5)
    weights = normal(3).abs()
    loss, metrics = policy_loss(
        logprobs,
        old,
        advantages,
        mask,
        clip_range=0.2,
        clip_range_high=high,
        dual_clip=dual,
        ratio=ratio,
        behavior_weights=weights,
    )
    expected, cut = brute_force(logprobs, old, advantages, ratio, 0.2, high or 0.2, dual, weights)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert metrics["clip_fraction"].item() == pytest.approx(cut, rel=1e-12)


def one_token(r: float, advantage: float, **options) -> tuple[float, float, float]:
    """Loss, its gradient to the logprob, clip_fraction, for one token of that ratio."""
    logprobs = torch.tensor([[math.log(r)]], dtype=torch.float64, requires_grad=True)
    zeros, mask = torch.zeros_like(logprobs), torch.ones(1, 1, dtype=torch.bool)
    loss, metrics = policy_loss(
        logprobs, zeros, torch.full_like(zeros, advantage), mask, clip_range=0.2, **options
    )
    loss.backward()
    return loss.item(), logprobs.grad.item(), metrics["clip_fraction"].item()


@pytest.mark.parametrize(
    ("r", "advantage", "effective_ratio", "is_cut"),
    [
        (1.1, 2.0, 1.1, False),
        (1.1, -2.0, 1.1, False),
        (1.5, 2.0, 1.2, True),  # good, and already far enough
        (1.5, -2.0, 1.5, False),  # bad, and more likely than before: pushed back
        (0.5, 2.0, 0.5, False),  # good, and less likely than before: pulled up
        (0.5, -2.0, 0.8, True),  # bad, and already far enough
        (1.5, 0.0, 1.5, False),  # no advantage, no clip that could be active
    ],
)
def test_the_clip_is_active_on_exactly_one_side_for_each_sign(
    r, advantage, effective_ratio, is_cut
):
    loss, gradient, clip_fraction = one_token(r, advantage)
    assert loss == pytest.approx(-effective_ratio * advantage)
    assert gradient == pytest.approx(0.0 if is_cut else -r * advantage)
    assert clip_fraction == float(is_cut)


def test_clip_higher_moves_only_the_upper_bound():
    assert one_token(1.25, 1.0, clip_range_high=0.28)[1:] == (pytest.approx(-1.25), 0.0)
    assert one_token(1.35, 1.0, clip_range_high=0.28) == (pytest.approx(-1.28), 0.0, 1.0)
    assert one_token(0.75, -1.0, clip_range_high=0.28) == (pytest.approx(0.8), 0.0, 1.0)


def test_dual_clip_bounds_the_loss_of_bad_tokens_that_became_likely_and_nothing_else():
    assert one_token(10.0, -1.0, dual_clip=3.0) == (pytest.approx(3.0), 0.0, 1.0)
    assert one_token(2.0, -1.0, dual_clip=3.0) == (pytest.approx(2.0), pytest.approx(2.0), 0.0)
    assert one_token(10.0, 1.0, dual_clip=3.0) == one_token(10.0, 1.0)


def test_a_ratio_too_large_for_a_float_is_cut_without_a_nan_gradient():
    logprobs = torch.tensor([[500.0]], requires_grad=True)
    mask = torch.ones(1, 1, dtype=torch.bool)
    loss, _ = policy_loss(logprobs, torch.zeros(1, 1), torch.ones(1, 1), mask, clip_range=0.2)
    loss.backward()
    assert loss.item() == pytest.approx(-1.2)
    assert logprobs.grad.item() == 0.0


@pytest.mark.parametrize(("advantage", "dual"), [(1.0, None), (-1.0, 3.0)])
def test_a_long_completion_whose_ratio_no_float_holds_is_clipped_and_its_step_not_refused(
    advantage, dual
):
    logprobs = torch.full((1, 1000), -0.9, requires_grad=True)
    old, mask = torch.full((1, 1000), -1.0), torch.ones(1, 1000, dtype=torch.bool)
    loss, metrics = policy_loss(
        logprobs,
        old,
        advantage * torch.ones(1, 1000),
        mask,
        clip_range=0.2,
        dual_clip=dual,
        ratio="sequence",
    )
    loss.backward()
    figures = {name: value.item() for name, value in metrics.items()}
    check_minibatch(figures | {"policy_loss": loss.item()}, RefuseConfig(), 1)
    assert figures["clip_fraction"] == 1.0
    assert figures["ratio_error_max"] > 1e34
    assert not logprobs.grad.any()
    broken = torch.where(mask, torch.nan, old)
    _, metrics = policy_loss(broken, old, torch.ones(1, 1000), mask, clip_range=0.2)
    with pytest.raises(BadStep, match="not finite"):
        check_minibatch({name: value.item() for name, value in metrics.items()}, RefuseConfig(), 1)


@pytest.mark.parametrize("ratio", RATIOS)
def test_where_the_advantage_is_zero_no_ratio_is_too_large(ratio):
    """As of a group whose scores are all the same."""
    logprobs = torch.full((2, 2), 300.0, requires_grad=True)
    advantages = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    mask = torch.ones(2, 2, dtype=torch.bool)
    loss, metrics = policy_loss(
        logprobs, torch.zeros(2, 2), advantages, mask, clip_range=0.2, ratio=ratio
    )
    loss.backward()
    assert loss.item() == pytest.approx(-0.3 if ratio == "sequence" else -0.6)
    assert metrics["clip_fraction"].item() == 0.5
    assert (logprobs.grad == 0.0).all()


@pytest.mark.parametrize("ratio", RATIOS)
def test_unchanged_parameters_give_ratio_one_no_clip_and_the_policy_gradient(ratio):
    _, old, advantages, mask = batch()
    per_completion = advantages[:, :1].expand_as(advantages)
    logprobs = old.clone().requires_grad_()
    loss, metrics = policy_loss(logprobs, old, per_completion, mask, clip_range=0.2, ratio=ratio)
    loss.backward()
    torch.testing.assert_close(logprobs.grad, -per_completion * mask / COUNT)
    assert {name: value.item() for name, value in metrics.items()} == {
        "clip_fraction": 0.0,
        "approx_kl": 0.0,
        "ratio_error_max": 0.0,
    }


def test_metrics_are_means_over_the_mask():
    logprobs, old, advantages, mask = batch()
    _, metrics = policy_loss(logprobs, old, advantages, mask, clip_range=0.2)
    difference = (logprobs - old)[mask]
    torch.testing.assert_close(
        metrics["approx_kl"], (difference.exp() - 1 - difference).mean(), rtol=1e-9, atol=0
    )
    torch.testing.assert_close(metrics["ratio_error_max"], (difference.exp() - 1).abs().max())


def test_behavior_weights_scale_their_tokens_and_get_no_gradient():
    logprobs, old, advantages, mask = batch()
    weights = torch.full_like(logprobs, 0.5, requires_grad=True)
    options = {"clip_range": 0.2}
    full, _ = policy_loss(logprobs.requires_grad_(), old, advantages, mask, **options)
    half, _ = policy_loss(logprobs, old, advantages, mask, behavior_weights=weights, **options)
    half.backward()
    assert half.item() == pytest.approx(full.item() / 2)
    assert weights.grad is None


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_policy_loss_gradient_and_metrics_add_up_however_the_rows_are_cut(ratio, parts):
    logprobs, old, advantages, mask = batch(0.5)
    whole = logprobs.clone().requires_grad_()
    loss, metrics = policy_loss(whole, old, advantages, mask, clip_range=0.2, ratio=ratio)
    loss.backward()

    cut = logprobs.clone().requires_grad_()
    rows = zip(*(x.chunk(parts) for x in (cut, old, advantages, mask)), strict=True)
    results = [
        policy_loss(*part, clip_range=0.2, ratio=ratio, num_loss_tokens=COUNT) for part in rows
    ]
    total = sum(part_loss for part_loss, _ in results)
    total.backward()
    torch.testing.assert_close(total, loss)
    torch.testing.assert_close(cut.grad, whole.grad)
    for name, value in metrics.items():
        combine = max if name.endswith("_max") else sum
        torch.testing.assert_close(combine(part[name] for _, part in results), value)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_value_loss_gradient_and_metrics_add_up_however_the_rows_are_cut(parts):
    values, old, returns, mask = batch(0.5)
    options = {"value_clip_range": 0.2}
    whole, cut = values.clone().requires_grad_(), values.clone().requires_grad_()
    loss, metrics = value_loss(whole, old, returns, mask, **options)
    loss.backward()
    rows = zip(*(x.chunk(parts) for x in (cut, old, returns, mask)), strict=True)
    results = [value_loss(*part, num_loss_tokens=torch.tensor(COUNT), **options) for part in rows]
    total = sum(part_loss for part_loss, _ in results)
    total.backward()
    torch.testing.assert_close(total, loss)
    torch.testing.assert_close(cut.grad, whole.grad)
    torch.testing.assert_close(
        sum(part["value_clip_fraction"] for _, part in results), metrics["value_clip_fraction"]
    )


@pytest.mark.parametrize("value_clip_range", [None, 0.2])
def test_value_loss_is_the_larger_of_both_squared_errors_token_by_token(value_clip_range):
    values, old, returns, mask = batch(0.5)
    total = active = 0.0
    for v, o, r in zip(
        values[mask].tolist(), old[mask].tolist(), returns[mask].tolist(), strict=True
    ):
        plain = clipped = (v - r) ** 2
        if value_clip_range is not None:
            bounded = min(max(v, o - value_clip_range), o + value_clip_range)
            clipped = (bounded - r) ** 2
        total += 0.5 * max(plain, clipped)
        active += clipped > plain
    loss, metrics = value_loss(values, old, returns, mask, value_clip_range=value_clip_range)
    assert loss.item() == pytest.approx(total / COUNT, rel=1e-12)
    assert metrics["value_clip_fraction"].item() == pytest.approx(active / COUNT)
    assert (active > 0) == (value_clip_range is not None)


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("ratio", RATIOS)
def test_masked_cells_change_neither_loss_nor_metrics_nor_gradients(garbage, ratio):
    def run(*inputs):
        leaf = inputs[0].clone().requires_grad_()
        loss, metrics = policy_loss(
            leaf, *inputs[1:], MASK, clip_range=0.2, ratio=ratio, behavior_weights=inputs[2].abs()
        )
        v_loss, v_metrics = value_loss(leaf, *inputs[1:], MASK, value_clip_range=0.1)
        (loss + v_loss).backward()
        return [loss, v_loss, leaf.grad, *metrics.values(), *v_metrics.values()]

    clean = batch()[:3]
    dirty = [x.masked_fill(~MASK, garbage) for x in clean]
    for a, b in zip(run(*clean), run(*dirty), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("rows", [0, 1, 3])
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("num_loss_tokens", [None, 17])
def test_rows_without_a_token_give_loss_zero_and_gradient_zero(rows, ratio, num_loss_tokens):
    leaf = torch.full((rows, 4), float("nan"), requires_grad=True)
    mask = torch.zeros(rows, 4, dtype=torch.bool)
    other = leaf.detach()
    loss, metrics = policy_loss(
        leaf, other, other, mask, clip_range=0.2, ratio=ratio, num_loss_tokens=num_loss_tokens
    )
    v_loss, v_metrics = value_loss(
        leaf, other, other, mask, value_clip_range=0.2, num_loss_tokens=num_loss_tokens
    )
    (loss + v_loss).backward()
    for x in (loss, v_loss, leaf.grad, *metrics.values(), *v_metrics.values()):
        assert torch.equal(x, torch.zeros_like(x))


@pytest.mark.parametrize("ratio", RATIOS)
def test_policy_loss_gradients_equal_finite_differences(ratio):
    logprobs, old, advantages, mask = batch(0.5)

    def loss_of(x):
        return policy_loss(x, old, advantages, mask, clip_range=0.2, dual_clip=1.4, ratio=ratio)[0]

    assert torch.autograd.gradcheck(loss_of, logprobs.requires_grad_())


def test_value_loss_gradients_equal_finite_differences():
    values, old, returns, mask = batch(0.5)

    def loss_of(x):
        return value_loss(x, old, returns, mask, value_clip_range=0.2)[0]

    assert torch.autograd.gradcheck(loss_of, values.requires_grad_())


def test_only_the_current_parameters_get_a_gradient():
    inputs = [x.clone().requires_grad_() for x in batch()[:3]]
    loss, metrics = policy_loss(*inputs, MASK, clip_range=0.2)
    v_loss, v_metrics = value_loss(*inputs, MASK, value_clip_range=0.2)
    (loss + v_loss).backward()
    assert [x.grad is None for x in inputs] == [False, True, True]
    assert not any(x.requires_grad for x in (*metrics.values(), *v_metrics.values()))


def test_a_clip_range_of_one_or_more_leaves_the_lower_side_free():
    logprobs, old, advantages, mask = batch(2.0)
    loss, _ = policy_loss(logprobs, old, advantages, mask, clip_range=1e9)
    torch.testing.assert_close(
        loss, -token_mean((logprobs - old).exp() * advantages, mask), rtol=1e-9, atol=0
    )


def test_an_unknown_ratio_is_refused():
    with pytest.raises(ValueError, match="use token, sequence or sequence_mean"):
        policy_loss(*batch(), clip_range=0.2, ratio="geometric")  # type: ignore[arg-type]
