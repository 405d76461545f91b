"""Advantages against closed forms and brute force, on ragged rows with garbage behind them."""

from __future__ import annotations

import pytest
import torch

from learner.advantages import (
    gae,
    group_advantages,
    sequence_advantages,
    shaped_rewards,
    value_mask,
    whiten,
)

LENGTHS = [5, 1, 3, 0, 8]
MASK = torch.arange(8) < torch.tensor(LENGTHS)[:, None]
GARBAGE = [float("nan"), float("inf"), 1e30]


def random_rows(seed: int) -> torch.Tensor:
    return torch.randn(MASK.shape, generator=torch.Generator().manual_seed(seed))


def spoiled(x: torch.Tensor, garbage: float) -> torch.Tensor:
    return x.masked_fill(~MASK, garbage)


def test_shaped_rewards_put_the_score_on_each_rows_last_token_and_the_penalty_on_every_token():
    scores, old, ref = torch.tensor([1.0, 2, 3, 4, 5]), random_rows(0), random_rows(1)
    rewards = shaped_rewards(scores, old, ref, MASK, kl_coef=0.1)
    expected = -0.1 * (old - ref) * MASK
    for row, length in enumerate(LENGTHS):
        if length:
            expected[row, length - 1] += scores[row]
    torch.testing.assert_close(rewards, expected)


def test_shaped_rewards_without_penalty_sum_to_the_score():
    scores, logprobs = torch.arange(5.0), random_rows(0)
    rewards = shaped_rewards(scores, logprobs, random_rows(1), MASK, kl_coef=0.0)
    torch.testing.assert_close(rewards.sum(1), scores * MASK.any(1))


def brute_force_gae(rewards, values, length, gamma, lam):
    value = [*values[:length].tolist(), 0.0]
    delta = [rewards[t].item() + gamma * value[t + 1] - value[t] for t in range(length)]
    return [
        sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, length)) for t in range(length)
    ]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.7), (0.99, 0.0), (1.0, 1.0)])
def test_gae_is_the_discounted_double_sum_of_each_ragged_row(gamma, lam):
    rewards, values = random_rows(2), random_rows(3)
    advantages, returns = gae(
        spoiled(rewards, 7e9), spoiled(values, -3e9), MASK, gamma=gamma, lam=lam
    )
    for row, length in enumerate(LENGTHS):
        expected = torch.tensor(brute_force_gae(rewards[row], values[row], length, gamma, lam))
        torch.testing.assert_close(advantages[row, :length], expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(returns[row, :length], expected + values[row, :length])
    assert not advantages[~MASK].any()
    assert not returns[~MASK].any()


def test_gae_with_gamma_and_lam_one_is_the_reward_to_come_minus_the_value():
    rewards, values = random_rows(2) * MASK, random_rows(3)
    advantages, returns = gae(rewards, values, MASK, gamma=1.0, lam=1.0)
    to_come = rewards.flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(returns, to_come * MASK)
    torch.testing.assert_close(advantages, (to_come - values) * MASK)


def test_gae_with_lam_zero_is_the_one_step_temporal_difference():
    rewards, values = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[10.0, 20.0, 30.0]])
    mask = torch.tensor([[True, True, False]])
    advantages, _ = gae(rewards, values, mask, gamma=0.5, lam=0.0)
    torch.testing.assert_close(advantages, torch.tensor([[1 + 10 - 10.0, 2 + 0 - 20.0, 0.0]]))


def test_gae_with_gamma_zero_sees_only_the_reward_at_hand():
    rewards, values = random_rows(2), random_rows(3)
    advantages, returns = gae(rewards, values, MASK, gamma=0.0, lam=0.95)
    torch.testing.assert_close(advantages, (rewards - values) * MASK)
    torch.testing.assert_close(returns, rewards * MASK)


def test_a_perfect_critic_leaves_no_advantage():
    rewards = random_rows(2) * MASK
    values = rewards.flip(1).cumsum(1).flip(1)
    advantages, returns = gae(rewards, values, MASK, gamma=1.0, lam=0.95)
    torch.testing.assert_close(advantages, torch.zeros_like(advantages), atol=1e-5, rtol=0)
    torch.testing.assert_close(returns, values * MASK)


def test_sequence_advantage_is_score_minus_value_of_the_prompt_on_every_token():
    scores, values = torch.tensor([1.0, 2, 3, 4, 5]), random_rows(4)
    advantages, returns = sequence_advantages(scores, values, MASK)
    torch.testing.assert_close(advantages, (scores - values[:, 0])[:, None] * MASK)
    torch.testing.assert_close(returns[:, 0], scores * MASK[:, 0])
    assert not returns[:, 1:].any()


def test_sequence_advantage_equals_undiscounted_gae_at_the_first_token():
    rewards, values = random_rows(5) * MASK, random_rows(4)
    advantages, _ = sequence_advantages(rewards.sum(1), values, MASK)
    expected, _ = gae(rewards, values, MASK, gamma=1.0, lam=1.0)
    torch.testing.assert_close(advantages[:, 0], expected[:, 0])


def test_value_mask_trains_every_token_with_gae_and_only_the_prompts_value_with_sequence():
    assert torch.equal(value_mask(MASK, "gae"), MASK)
    only_first = value_mask(MASK, "sequence")
    assert torch.equal(only_first[:, 0], MASK[:, 0])
    assert not only_first[:, 1:].any()
    with pytest.raises(ValueError, match="trains no value"):
        value_mask(MASK, "grpo")  # type: ignore[arg-type]


SCORES = torch.tensor([1.0, 5.0, 2.0, 2.0, 9.0, 0.5, 3.0])
GROUPS = torch.tensor([7, 3, 7, 3, 7, 42, 3])


def members(row: int, others: bool = False) -> torch.Tensor:
    same = GROUPS.eq(GROUPS[row])
    if others:
        same[row] = False
    return SCORES[same]


def test_grpo_standardises_each_score_in_its_group():
    expected = [
        (SCORES[i] - members(i).mean()) / (members(i).std(correction=0) + 1e-4) for i in range(7)
    ]
    torch.testing.assert_close(group_advantages(SCORES, GROUPS, kind="grpo"), torch.stack(expected))


def test_rloo_subtracts_the_mean_of_the_others():
    expected = [
        SCORES[i] - members(i, others=True).mean() if len(members(i)) > 1 else torch.tensor(0.0)
        for i in range(7)
    ]
    torch.testing.assert_close(group_advantages(SCORES, GROUPS, kind="rloo"), torch.stack(expected))


def test_reinforce_plus_plus_standardises_over_the_batch_and_ignores_groups():
    advantages = group_advantages(SCORES, GROUPS, kind="reinforce++")
    torch.testing.assert_close(advantages, (SCORES - SCORES.mean()) / SCORES.std(correction=0))
    assert torch.equal(advantages, group_advantages(SCORES, GROUPS * 0, kind="reinforce++"))


@pytest.mark.parametrize("kind", ["grpo", "rloo", "reinforce++"])
def test_equal_scores_carry_no_signal_and_no_rounding_noise(kind):
    advantages = group_advantages(torch.full((7,), 0.7), GROUPS, kind=kind)
    torch.testing.assert_close(advantages, torch.zeros(7), atol=1e-9, rtol=0)


@pytest.mark.parametrize("kind", ["grpo", "rloo", "reinforce++"])
def test_group_advantages_follow_a_permutation_of_the_batch_and_ignore_a_shift(kind):
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    advantages = group_advantages(SCORES, GROUPS, kind=kind)
    torch.testing.assert_close(
        group_advantages(SCORES[order] + 100, GROUPS[order], kind=kind), advantages[order]
    )


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="use grpo, rloo or reinforce"):
        group_advantages(SCORES, GROUPS, kind="remax")  # type: ignore[arg-type]


def test_whitening_gives_mean_zero_and_population_deviation_one_over_the_mask():
    x = random_rows(6) * 3 + 10
    chosen = whiten(x, MASK)[MASK]
    assert abs(chosen.mean()) < 1e-5
    assert abs(chosen.std(correction=0) - 1) < 1e-4


def test_whitening_without_shift_keeps_the_mean():
    x = random_rows(6) * 3 + 10
    kept = whiten(x, MASK, shift_mean=False)
    torch.testing.assert_close(kept[MASK].mean(), x[MASK].mean())
    torch.testing.assert_close(kept[MASK] - x[MASK].mean(), whiten(x, MASK)[MASK])


def test_whitening_of_equal_numbers_or_of_nothing_is_finite():
    torch.testing.assert_close(whiten(torch.full(MASK.shape, 2.0), MASK), torch.zeros(MASK.shape))
    assert not whiten(random_rows(6), torch.zeros_like(MASK)).any()


@pytest.mark.parametrize("garbage", GARBAGE)
def test_masked_cells_change_nothing(garbage):
    a, b, scores = random_rows(8), random_rows(9), torch.arange(5.0)
    dirty_a, dirty_b = spoiled(a, garbage), spoiled(b, garbage)
    scores_dirty = scores.masked_fill(~MASK[:, 0], garbage)

    def everything(scores, a, b):
        yield shaped_rewards(scores, a, b, MASK, kl_coef=0.1)
        yield from gae(a, b, MASK, gamma=0.9, lam=0.8)
        yield from sequence_advantages(scores, b, MASK)
        yield whiten(a, MASK)
        yield whiten(a, MASK, shift_mean=False)

    pairs = zip(everything(scores, a, b), everything(scores_dirty, dirty_a, dirty_b), strict=True)
    for clean, dirty in pairs:
        assert torch.equal(clean, dirty)


def test_advantages_and_returns_carry_no_gradient():
    values = random_rows(3).requires_grad_()
    for result in (
        *gae(random_rows(2), values, MASK, gamma=1.0, lam=0.9),
        *sequence_advantages(torch.arange(5.0), values, MASK),
    ):
        assert not result.requires_grad
