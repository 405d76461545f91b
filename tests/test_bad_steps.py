"""A refused step leaves no trace: every byte that decides the next step is as it was before it."""

from __future__ import annotations

import math
import pickle
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from cluster.learner_group import LearnerGroup
from cluster.placement import InProcessHost, Member, RoleFailed
from learner.config import KLConfig, RefuseConfig
from learner.learner_spec import StepRefused
from learner.trajectory_buffer import Batch
from learner.undo import Undo
from tests.learner_cases import (
    batch_table,
    case,
    everything,
    fresh,
    ppo_config,
    run_ranks,
    same_bytes,
    with_column,
)

KL = KLConfig(coef=0.1, target=0.01, horizon=50)  # a coefficient that every good step moves
CRITICS = {
    "separate": {},
    "shared": {"value_model": "shared"},
    "none": {"advantage": "grpo", "minibatches": 4},
}
# what is refused -> (bounds, what the reason starts with, optimizer steps taken until then)
CAUSES = {
    "score": ({}, "score is not finite in 1 of 8 trajectories: p0-e0-0", 0),
    "behavior_logprob": ({}, "behavior_logprob is not finite in 1 of 8 trajectories: p3-e0-1", 0),
    "behavior_difference": (
        {"behavior_difference": 1e-9},
        "behavior_difference_mean 0.",
        0,
    ),
    "grad_norm": ({"grad_norm": 1e-6}, "grad_norm_policy", 0),
    "approx_kl": ({"approx_kl": 1e-7}, "approx_kl", 1),
    "gradient": ({}, "grad_norm_policy is not finite in minibatch 3", 2),
}


def spoilt(cause, table):
    if cause == "score":
        return with_column(table, "score", [math.nan, *table["score"].to_pylist()[1:]])
    if cause == "behavior_logprob":
        rows = table["behavior_logprobs"].to_pylist()
        return with_column(table, "behavior_logprobs", [*rows[:-1], [-math.inf, *rows[-1][1:]]])
    return table


def spoil_gradients(worker, minibatch):
    """Make the gradient of one parameter infinite in that minibatch (of one microbatch each)."""
    parameter = next(worker._update.models.policy.parameters())
    seen = []

    def spoil(it):
        seen.append(1)
        if len(seen) == minibatch:
            it.grad.to_local().view(-1)[:1].fill_(math.inf)

    return parameter.register_post_accumulate_grad_hook(spoil)


def draw_numbers(worker):
    """Forward passes that draw random numbers, as dropout would."""

    def draw(*_):
        torch.rand(1)

    worker._update.models.policy.register_forward_pre_hook(draw)


def count_steps(worker):
    taken = []
    worker._update.policy_optimizer.adamw.register_step_post_hook(lambda *_: taken.append(1))
    return taken


def state_of(worker):
    """As bytes, learning rates among it: NaN is not equal to itself."""
    update = worker._update
    optimizers = [one for one in (update.policy_optimizer, update.value_optimizer) if one]
    rates = [group["lr"] for one in optimizers for group in one.adamw.param_groups]
    found = everything(worker) | {"rates": torch.tensor(rates, dtype=torch.float64)}
    return {name: tensor.reshape(-1).view(torch.uint8) for name, tensor in found.items()}


def refuse_one(worker, table, cause, folder, step):
    """(what update returned, the optimizer steps it had taken, whether all is as before)."""
    before, taken = state_of(worker), count_steps(worker)
    hook = spoil_gradients(worker, 3) if cause == "gradient" else None
    outcome = worker.update(spoilt(cause, table), step, 3, str(folder))
    if hook is not None:
        hook.remove()
    return outcome, len(taken), same_bytes(state_of(worker), before)


def allow(worker):
    worker._update._config = worker._update._config.model_copy(update={"refuse": RefuseConfig()})


@pytest.mark.parametrize("warm", [False, True], ids=["first step", "second step"])
@pytest.mark.parametrize("critic", CRITICS)
@pytest.mark.parametrize("cause", CAUSES)
def test_after_a_refusal_every_byte_is_as_before_and_the_next_step_as_if_it_had_not_been(
    tmp_path, cause, critic, warm
):
    bounds, reason, steps = CAUSES[cause]
    ppo = ppo_config(kl=KL, **CRITICS[critic])
    straight = case(ppo).start()
    worker = case(ppo.model_copy(update={"refuse": RefuseConfig(**bounds)})).start()
    table = fresh(worker, batch_table(), shift=0.01)
    if warm:
        straight.update(table, 1, 3, str(tmp_path / "straight"))
        refusing, worker._update._config = worker._update._config, straight._update._config
        worker.update(table, 1, 3, str(tmp_path / "warm"))
        worker._update._config = refusing
    draw_numbers(worker)

    step = 1 + warm
    refused, taken, unchanged = refuse_one(worker, table, cause, tmp_path / "refused", step)
    assert isinstance(refused, StepRefused)
    assert refused.step == step
    assert refused.reason.startswith(reason)
    assert taken == steps
    assert unchanged
    assert not (tmp_path / "refused").exists()  # no trajectories were written

    allow(worker)
    again = worker.update(table, step, 3, str(tmp_path / "again"))
    expected = straight.update(table, step, 3, str(tmp_path / "straight"))
    assert same_bytes(state_of(worker), state_of(straight))
    for name in expected.keys() - {"learner/tokens_per_s", "learner/peak_memory_bytes"}:
        assert again[name] == expected[name], name


def test_without_the_copies_a_late_refusal_would_leave_its_traces(tmp_path, monkeypatch):
    """So the test above sees what is to be seen."""
    worker = case(ppo_config(refuse=RefuseConfig(approx_kl=1e-7))).start()
    table = fresh(worker, batch_table())
    monkeypatch.setattr(Undo, "keep", lambda self: None)
    refused, taken, unchanged = refuse_one(worker, table, "approx_kl", tmp_path, 1)
    assert isinstance(refused, StepRefused)
    assert taken == 1
    assert not unchanged


def test_the_refusals_metrics_show_what_it_was_judged_by(tmp_path):
    worker = case(ppo_config(refuse=RefuseConfig(grad_norm=1e-6, approx_kl=1e6))).start()
    refused = worker.update(fresh(worker, batch_table()), 1, 3, str(tmp_path))
    norm = refused.metrics["grad_norm_policy"]
    assert norm > 1e-6
    assert refused.reason == (
        f"grad_norm_policy {norm:.4g} in minibatch 1 is beyond ppo.refuse.grad_norm 1e-06"
    )
    assert pickle.loads(pickle.dumps(refused)) == refused


def test_the_critics_gradient_is_judged_too(tmp_path):
    ppo = ppo_config(advantage="gae", refuse=RefuseConfig(grad_norm=1e-6))
    worker = case(ppo).start()
    table = with_column(fresh(worker, batch_table()), "score", [1000.0 + i for i in range(8)])
    worker._update.policy_optimizer.clip = lambda: 0.0  # the policy's is fine
    refused = worker.update(table, 1, 3, str(tmp_path))
    assert refused.reason.startswith("grad_norm_value ")


def test_the_first_three_of_many_bad_trajectories_are_named(tmp_path):
    worker = case().start()
    table = fresh(worker, batch_table())
    scores = table["score"].to_pylist()
    refused = worker.update(
        with_column(table, "score", [*scores[:3], *[math.inf] * 5]), 1, 3, str(tmp_path)
    )
    assert refused.reason == (
        "score is not finite in 5 of 8 trajectories: p1-e0-1, p2-e0-0, p2-e0-1, ..."
    )
    assert refused.metrics == {"score_not_finite": 5.0}


def test_bounds_that_nothing_exceeds_change_nothing(tmp_path):
    bounds = RefuseConfig(approx_kl=1e6, grad_norm=1e6, behavior_difference=1e6)
    free, bound = case().start(), case(ppo_config(refuse=bounds)).start()
    table = fresh(free, batch_table())
    for worker in (free, bound):
        assert worker.update(table, 1, 3, str(tmp_path))["learner/minibatches"] == 4
    assert same_bytes(state_of(free), state_of(bound))


def test_an_early_stop_is_no_refusal(tmp_path):
    ppo = ppo_config(epochs=4, max_approx_kl=1e-7, refuse=RefuseConfig(approx_kl=1e6))
    worker = case(ppo).start()
    metrics = worker.update(fresh(worker, batch_table()), 1, 3, str(tmp_path))
    assert metrics["learner/minibatches"] == 2


def test_a_step_of_one_minibatch_keeps_no_copies(tmp_path):
    worker = case(ppo_config(epochs=1, minibatches=1)).start()
    worker.update(fresh(worker, batch_table()), 1, 3, str(tmp_path))
    assert not worker._update._undo._kept


def test_the_copies_are_made_in_the_same_memory_in_every_step(tmp_path):
    worker = case().start()
    table = fresh(worker, batch_table())
    found = []
    for step in (1, 2, 3):
        worker.update(table, step, 3, str(tmp_path))
        kept = worker._update._undo._kept
        found.append({name: tensor.data_ptr() for name, tensor in kept.items()})
    assert found[0].items() <= found[1].items()  # the first step has no optimizer state yet
    assert found[1] == found[2]


def test_a_behavior_bound_needs_the_learners_own_logprobs():
    with pytest.raises(ValidationError, match=r"refuse\.behavior_difference: only with anchor"):
        ppo_config(anchor="behavior", refuse={"behavior_difference": 1.0})


# ---- several ranks


def _refused_at_two_ranks(rank, meeting, given, table, folder):
    found = {}
    for cause, (bounds, _, _) in CAUSES.items():
        ppo = given.ppo.model_copy(update={"refuse": RefuseConfig(**bounds)})
        given_ = case(ppo)
        given_.policy, given_.reference = given.policy, given.reference
        worker = given_.start(rank, meeting)
        outcome, taken, unchanged = refuse_one(worker, table, cause, folder, 1)
        allow(worker)
        worker.update(table, 1, 3, folder)
        found[cause] = (outcome, taken, unchanged, state_of(worker))
    straight = given.start(rank, meeting)
    straight.update(table, 1, 3, folder)
    return found, state_of(straight)


def test_all_ranks_refuse_alike_and_go_on_alike(tmp_path):
    given = case(ppo_config(kl=KL))
    table = fresh(given.start(), batch_table(), shift=0.01)
    first, second = run_ranks(_refused_at_two_ranks, given, table, str(tmp_path))
    for cause, (_, reason, steps) in CAUSES.items():
        for (refused, taken, unchanged, after), straight in (
            (first[0][cause], first[1]),
            (second[0][cause], second[1]),
        ):
            assert refused.reason.startswith(reason)
            assert taken == steps
            assert unchanged
            assert same_bytes(after, straight)
        assert first[0][cause][0].reason == second[0][cause][0].reason


class Rank:
    def __init__(self, answer):
        self._answer = answer

    def update(self, *_):
        return self._answer


async def update_of(*answers):
    ranks = [Member(f"learner-{i}", Rank(answer)) for i, answer in enumerate(answers)]
    group = LearnerGroup(ranks, InProcessHost(), timeout_s=5.0)
    return await group.update(Batch([("p0", 0)], []), 7, 6, Path("nowhere"))


METRICS = {"learner/approx_kl": 0.5}


async def test_what_all_ranks_refuse_is_refused():
    nan = {"policy_loss": math.nan}
    refused = await update_of(StepRefused(7, "why", nan), StepRefused(7, "why", dict(nan)))
    assert refused.reason == "why"
    assert await update_of(METRICS, METRICS) == METRICS


@pytest.mark.parametrize(
    "other", [METRICS, StepRefused(7, "another reason", {})], ids=["one went on", "two reasons"]
)
async def test_ranks_that_disagree_fail_the_run(other):
    with pytest.raises(RoleFailed, match=r"of 2 ranks refused step 7 \(.*why.*\)"):
        await update_of(StepRefused(7, "why", {}), other)


def test_a_reasons_kind_is_the_reason_without_its_numbers():
    def kind(reason):
        return StepRefused(1, reason, {}).kind

    assert kind("approx_kl 3.1 in minibatch 2 is beyond ppo.refuse.approx_kl 1") == kind(
        "approx_kl 3.0999 in minibatch 2 is beyond ppo.refuse.approx_kl 1"
    )
    assert kind("grad_norm_policy 3 in minibatch 1 is ...") != kind("grad_norm_value 3 in ...")
    assert kind("score is not finite in 1 of 8") != kind("value is not finite in 1 of 8")
