"""One PPO step: its closed forms, an implementation of it in plain torch, and what it refuses."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from weakref import WeakSet

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM

from actors.trajectory import to_table
from learner.batch import TrajectoryBatch
from learner.config import KLConfig, LearnerConfig, OptimizerConfig, PPOConfig, PtxConfig
from learner.learner_spec import StepRefused
from tests.learner_cases import (
    EOS,
    Case,
    batch_table,
    case,
    fresh,
    largest_difference,
    ppo_config,
    same_bytes,
    trajectories,
    weights_of,
    with_column,
)

SEED, STEP, NUM_STEPS = 0, 1, 10  # as Case gives them


@pytest.fixture
def ptx_rows(tmp_path):
    rows = [{"prompt": "ab" * (i % 2 + 1), "completion": "cd" * (i % 3 + 1)} for i in range(7)]
    path = tmp_path / "ptx.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return PtxConfig(path=str(path), coef=0.3, batch_size=3)


def update(worker, table, tmp_path, step=STEP):
    return worker.update(table, step, 3, str(tmp_path))


# The step again, padded and unsharded: nothing below is shared with the learner.


def plain_step(given: Case, table: pa.Table, ptx: list[list[tuple[list[int], list[int]]]]):
    """Weights after one step of `given.ppo` by transformers' own forward, torch's own AdamW and
    the textbook's formulas; `ptx` holds the pretraining rows of each minibatch."""
    ppo = given.ppo
    policy = AutoModelForCausalLM.from_pretrained(given.policy, dtype=torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(given.reference, dtype=torch.float32)
    shared = ppo.value_model == "shared"
    trunk = policy.model if shared else AutoModel.from_pretrained(given.policy, dtype=torch.float32)
    head = nn.Linear(64, 1)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    groups = [[*policy.parameters()], [*trunk.parameters(), *head.parameters()]]
    if shared:
        groups = [[*policy.parameters(), *head.parameters()]]
    optimizers = [
        torch.optim.AdamW(parameters, lr=3e-4 / 2, betas=(0.9, 0.95), weight_decay=0.01)
        for parameters in groups
    ]
    columns = ("prompt_ids", "completion_ids", "score", "temperature")
    rows = table.select(columns).to_pylist()

    def forward(i: int) -> tuple[Tensor, Tensor, Tensor]:
        return one_sequence(policy, trunk, head, rows[i])

    with torch.no_grad():
        old = [forward(i) for i in range(len(rows))]
        ref = [one_sequence(reference, trunk, head, row)[0] for row in rows]
    in_reward = ppo.kl.coef if ppo.kl.where == "reward" else 0.0
    advantages, returns = plain_gae(rows, old, ref, in_reward, ppo.gamma, ppo.lam)
    number = 0
    for epoch in range(ppo.epochs):
        order = np.random.default_rng([SEED, STEP, epoch]).permutation(len(rows))
        for chosen in np.split(order, ppo.minibatches):
            count = sum(len(rows[i]["completion_ids"]) for i in chosen)
            loss = torch.zeros(())
            for i in chosen:
                logprobs, entropy, values = forward(i)
                ratio = (logprobs - old[i][0]).exp()
                clipped = ratio.clamp(1 - ppo.clip_range, 1 + ppo.clip_range)
                terms = -torch.min(ratio * advantages[i], clipped * advantages[i])
                near = old[i][2] + (values - old[i][2]).clamp(-0.1, 0.1)
                errors = torch.max((values - returns[i]) ** 2, (near - returns[i]) ** 2)
                terms = terms + 0.5 * ppo.value_coef * errors - ppo.entropy_coef * entropy
                if ppo.kl.where == "loss":
                    d = logprobs - ref[i]
                    terms = terms + ppo.kl.coef * ((-d).exp() - 1 + d)
                loss = loss + terms.sum() / count
            if ptx:
                loss = loss + ppo.ptx.coef * plain_cross_entropy(policy, ptx[number])
            number += 1
            loss.backward()
            for parameters, optimizer in zip(groups, optimizers, strict=True):
                nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                optimizer.zero_grad()
    weights = {f"policy.lm.{name}": p for name, p in policy.named_parameters()}
    if shared:
        weights |= {f"policy.value_head.{name}": p for name, p in head.named_parameters()}
    else:
        weights |= {f"value.trunk.{name}": p for name, p in trunk.named_parameters()}
        weights |= {f"value.head.{name}": p for name, p in head.named_parameters()}
    return {name: p.detach() for name, p in weights.items()}


def one_sequence(lm, trunk, head, row):
    """(logprobs, entropy, values), each [len]."""
    prompt, completion = row["prompt_ids"], row["completion_ids"]
    ids = torch.tensor([[*prompt, *completion]])
    states = slice(len(prompt) - 1, -1)
    logp = torch.log_softmax(lm(ids).logits[0, states] / row["temperature"], -1)
    values = head(trunk(ids).last_hidden_state[0, states])[:, 0]
    picked = logp[torch.arange(len(completion)), completion]
    return picked, -(logp.exp() * logp).sum(-1), values


def plain_gae(rows, old, ref, kl_coef, gamma, lam):
    advantages, returns = [], []
    for row, (logprobs, _, values), ref_logprobs in zip(rows, old, ref, strict=True):
        rewards = -kl_coef * (logprobs - ref_logprobs)
        rewards[-1] += row["score"]
        deltas = rewards + gamma * torch.cat([values[1:], torch.zeros(1)]) - values
        length = len(rewards)
        advantage = torch.stack(
            [
                sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, length))
                for t in range(length)
            ]
        )
        advantages.append(advantage)
        returns.append(advantage + values)
    flat = torch.cat(advantages)
    mean, sd = flat.mean(), flat.std(correction=0)
    return [(advantage - mean) / sd for advantage in advantages], returns


def plain_cross_entropy(lm, rows):
    total, count = torch.zeros(()), 0
    for prompt, completion in rows:
        logits = lm(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
        total = total + nn.functional.cross_entropy(
            logits, torch.tensor(completion), reduction="sum"
        )
        count += len(completion)
    return total / count


def ptx_of(worker) -> list[list[tuple[list[int], list[int]]]]:
    batches = [worker._update._ptx_batches(number) for number in range(4)]
    return [
        [(p.tolist(), c.tolist()) for p, c in zip(b.prompt_ids, b.completion_ids, strict=True)]
        for b in batches
    ]


@pytest.mark.parametrize("max_tokens", [8192, 20])
def test_a_whole_step_equals_plain_torch(tmp_path, max_tokens):
    given = case(learner=LearnerConfig(max_tokens_per_microbatch=max_tokens))
    worker = given.start()
    table = fresh(worker, batch_table())
    before = weights_of(worker)
    metrics = update(worker, table, tmp_path)
    after, expected = weights_of(worker), plain_step(given, table, [])
    assert metrics["learner/clip_fraction"] > 0.01
    assert metrics["learner/lr_policy"] == metrics["learner/lr_value"] == 3e-4 / 2
    assert largest_difference(after, before) > 3e-4
    assert largest_difference(after, expected) <= 1e-5


@pytest.mark.parametrize("value_model", ["shared", "separate"])
def test_a_whole_step_with_ptx_entropy_and_kl_in_the_loss_equals_plain_torch(
    tmp_path, ptx_rows, value_model
):
    ppo = ppo_config(
        value_model=value_model,
        ptx=ptx_rows,
        entropy_coef=0.05,
        kl=KLConfig(coef=0.2, where="loss"),
        value_coef=0.5,
    )
    given = case(ppo, learner=LearnerConfig(max_tokens_per_microbatch=25))
    worker = given.start()
    table = fresh(worker, batch_table())
    ptx = ptx_of(worker)
    update(worker, table, tmp_path)
    assert largest_difference(weights_of(worker), plain_step(given, table, ptx)) <= 1e-5


@pytest.mark.parametrize("anchor", ["learner", "behavior"])
def test_the_first_minibatch_of_a_fresh_batch_has_ratio_one(tmp_path, anchor):
    worker = case(ppo_config(anchor=anchor)).start()
    metrics = update(worker, fresh(worker, batch_table()), tmp_path)
    assert metrics["learner/first_ratio_error"] <= 1e-5
    assert metrics["learner/first_clip_fraction"] == 0
    assert metrics["learner/behavior_difference_max"] <= 1e-5


def test_a_single_minibatch_of_a_fresh_batch_has_no_kl_and_no_clipping(tmp_path):
    worker = case(ppo_config(epochs=1, minibatches=1)).start()
    metrics = update(worker, fresh(worker, batch_table()), tmp_path)
    assert metrics["learner/minibatches"] == 1
    assert metrics["learner/clip_fraction"] == 0
    assert abs(metrics["learner/approx_kl"]) <= 1e-9


def test_the_behavior_anchor_shows_a_ratio_the_learner_anchor_does_not(tmp_path):
    tables = {}
    for anchor in ("learner", "behavior"):
        worker = case(ppo_config(anchor=anchor)).start()
        tables[anchor] = update(worker, fresh(worker, batch_table(), shift=0.1), tmp_path)
    assert tables["behavior"]["learner/first_ratio_error"] > 0.05
    assert tables["learner"]["learner/first_ratio_error"] <= 1e-5
    assert tables["learner"]["learner/behavior_difference_mean"] > 0.05


def test_what_the_step_made_of_each_row_is_kept_beside_it(tmp_path):
    import pyarrow.parquet as pq

    worker = case().start()
    table = fresh(worker, batch_table())
    update(worker, table, tmp_path)
    kept = pq.read_table(tmp_path / "step-000001.parquet")
    assert kept.select(table.column_names).equals(table)
    for given, old in zip(table["behavior_logprobs"], kept["old_logprobs"], strict=True):
        assert np.allclose(given.as_py(), old.as_py(), atol=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001.parquet"]


@pytest.mark.parametrize(("target", "direction"), [(1e-4, 1), (1e4, -1)])
def test_the_kl_coefficient_moves_toward_its_target(tmp_path, target, direction):
    ppo = ppo_config(kl=KLConfig(coef=0.1, target=target, horizon=100))
    worker = case(ppo).start()
    table = fresh(worker, batch_table())
    metrics = update(worker, table, tmp_path)
    assert metrics["learner/kl_coef"] == 0.1  # what this step used
    if direction > 0:
        assert metrics["learner/kl_to_ref"] > target
    # The proportional error is bounded at 0.2: 8 trajectories of a horizon of 100.
    assert worker._update.kl_coef == pytest.approx(0.1 * (1 + direction * 0.2 * 8 / 100))
    assert update(worker, table, tmp_path, step=2)["learner/kl_coef"] == worker._update.kl_coef / (
        1 + direction * 0.2 * 8 / 100
    )


def test_kl_to_ref_is_the_sum_over_a_completion_and_zero_for_the_reference_itself(tmp_path):
    given = case()
    given.reference = given.policy
    worker = given.start()
    table = fresh(worker, batch_table())
    assert update(worker, table, tmp_path)["learner/kl_to_ref"] == 0
    other = case().start()
    metrics = update(other, table, tmp_path)
    import pyarrow.parquet as pq

    kept = pq.read_table(tmp_path / "step-000001.parquet").to_pylist()
    sums = [sum(row["old_logprobs"]) - sum(row["ref_logprobs"]) for row in kept]
    assert metrics["learner/kl_to_ref"] == pytest.approx(np.mean(sums), rel=1e-4)


def test_a_step_that_drifts_too_far_stops_early_and_one_that_does_not_goes_on(tmp_path):
    for bound, minibatches in ((1e-6, 2), (1e6, 8)):
        worker = case(ppo_config(epochs=4, max_approx_kl=bound)).start()
        metrics = update(worker, fresh(worker, batch_table()), tmp_path)
        assert metrics["learner/minibatches"] == minibatches


CRITIC_FREE = ppo_config(advantage="grpo", minibatches=4)
BAD_INPUTS = {
    "score": ("score", lambda values: [*values[:-1], math.nan]),
    "score of 1e300": ("score", lambda values: [*values[:-1], 1e300]),  # infinite in float32
    "behavior_logprob": (
        "behavior_logprobs",
        lambda lists: [*lists[:-1], [-math.inf, *lists[-1][1:]]],
    ),
}


@pytest.mark.parametrize("ppo", [ppo_config(), CRITIC_FREE], ids=["gae", "grpo"])
@pytest.mark.parametrize("what", BAD_INPUTS)
def test_a_number_that_is_not_finite_in_the_batch_stops_the_step_before_any_weight_moves(
    tmp_path, ppo, what
):
    name, spoil = BAD_INPUTS[what]
    worker = case(ppo.model_copy(update={"anchor": "behavior"})).start()
    table = fresh(worker, batch_table())
    spoilt = with_column(table, name, spoil(table[name].to_pylist()))
    before = weights_of(worker)
    refused = update(worker, spoilt, tmp_path)
    assert isinstance(refused, StepRefused)
    assert refused.reason == (
        f"{what.split()[0]} is not finite in 1 of 8 trajectories: {table['trajectory_id'][-1]}"
    )
    assert same_bytes(weights_of(worker), before)
    assert not list(tmp_path.iterdir())
    update(worker, table, tmp_path)  # and the worker is as good as before
    assert not same_bytes(weights_of(worker), before)


@pytest.mark.parametrize("model", ["policy", "reference", "value"])
def test_a_weight_that_is_not_finite_stops_the_step(tmp_path, model):
    worker = case().start()
    table = fresh(worker, batch_table())
    norm = getattr(worker._update.models, model)
    norm = norm.lm.model.norm if model != "value" else norm.trunk.norm
    with torch.no_grad():
        norm.weight.to_local()[3] = math.nan
    before = weights_of(worker)
    refused = update(worker, table, tmp_path)
    first = {"policy": "old_logprob", "reference": "ref_logprob", "value": "value"}[model]
    assert refused.reason.startswith(f"{first} is not finite in 8 of 8 trajectories: p0-e0-0, ")
    after = weights_of(worker)
    assert before.keys() == after.keys()
    assert all(
        torch.equal(a.view(torch.int32), after[name].view(torch.int32))
        for name, a in before.items()
    )


@pytest.mark.parametrize("model", ["policy", "value"])
def test_a_gradient_that_is_not_finite_moves_neither_model_and_is_forgotten(tmp_path, model):
    straight, worker = case().start(), case().start()
    table = fresh(worker, batch_table())
    update(straight, table, tmp_path)
    before = weights_of(worker)
    parameter = next(getattr(worker._update.models, model).parameters())
    hook = parameter.register_post_accumulate_grad_hook(
        lambda p: p.grad.to_local().view(-1)[:1].fill_(math.inf)
    )
    refused = update(worker, table, tmp_path)
    assert refused.reason == f"grad_norm_{model} is not finite in minibatch 1"
    hook.remove()
    assert same_bytes(weights_of(worker), before)
    update(worker, table, tmp_path)
    assert same_bytes(weights_of(worker), weights_of(straight))


def test_explained_variance_is_one_for_a_perfect_critic_and_zero_for_a_constant_one(tmp_path):
    # Without KL and discount, and with lam 1, every return of a row is its score.
    ppo = ppo_config(kl=KLConfig(coef=0.0), lam=1.0, epochs=1, minibatches=1)
    worker = case(ppo, num_steps=40).start()
    table = fresh(worker, batch_table())
    metrics = update(worker, table, tmp_path)
    assert abs(metrics["learner/explained_variance"]) <= 1e-6
    for step in range(2, 41):
        metrics = update(worker, table, tmp_path, step=step)
    assert 0.5 < metrics["learner/explained_variance"] <= 1.0


def test_explained_variance_is_left_out_where_returns_do_not_vary(tmp_path):
    ppo = ppo_config(advantage="sequence", kl=KLConfig(coef=0.0))
    worker = case(ppo).start()
    table = with_column(fresh(worker, batch_table()), "score", [1.0] * 8)
    assert "learner/explained_variance" not in update(worker, table, tmp_path)


def test_equal_scores_without_kl_teach_a_critic_free_policy_nothing(tmp_path):
    for advantage in ("grpo", "rloo", "reinforce++"):
        decay_free = OptimizerConfig(lr=1e-3)
        ppo = ppo_config(advantage=advantage, kl=KLConfig(coef=0.0), policy=decay_free)
        worker = case(ppo).start()
        before = weights_of(worker)
        table = with_column(fresh(worker, batch_table()), "score", [2.0] * 8)
        metrics = update(worker, table, tmp_path)
        assert metrics["learner/policy_loss"] == 0
        assert same_bytes(weights_of(worker), before)


def test_grpo_weighs_a_group_of_equal_scores_with_nothing_whatever_its_kl(tmp_path):
    ppo = ppo_config(advantage="grpo", kl=KLConfig(coef=0.5))
    worker = case(ppo).start()
    scores = [2.0, 2.0, 2.0, 2.0, 0.0, 1.0, 0.0, 1.0]
    table = with_column(fresh(worker, batch_table(samples=4)), "score", scores)
    learned, metrics = worker._update.update(TrajectoryBatch.of(table), STEP)
    assert metrics["learner/kl_to_ref"] != 0
    assert not learned.advantages[:4].any()
    torch.testing.assert_close(learned.advantages[4:, 0].abs(), torch.ones(4), rtol=0, atol=1e-3)


def test_an_entropy_bonus_raises_the_entropy(tmp_path):
    """At equal scores nothing else moves the policy."""
    config = OptimizerConfig(lr=1e-3)
    ppo = ppo_config(
        advantage="grpo", kl=KLConfig(coef=0.0), entropy_coef=1.0, policy=config, max_approx_kl=None
    )
    worker = case(ppo).start()
    table = with_column(fresh(worker, batch_table()), "score", [2.0] * 8)
    bonuses = [update(worker, table, tmp_path, s)["learner/entropy_bonus"] for s in range(1, 6)]
    assert all(a < b for a, b in pairwise(bonuses))


@pytest.mark.parametrize("advantage", ["gae", "grpo"])
def test_a_few_steps_raise_the_reward(tmp_path, advantage):
    """Sampled afresh each step; the score is the share of one token in the completion."""
    wanted, length = 42, 4
    fast = OptimizerConfig(lr=5e-3, decay="constant")
    ppo = ppo_config(advantage=advantage, policy=fast, value=fast, kl=KLConfig(coef=0.0))
    given = case(ppo, learner=LearnerConfig())
    worker = given.start()
    generator = torch.Generator().manual_seed(0)
    scores = []
    for step in range(1, 9):
        rows = trajectories(size=16, samples=4, seed=step, temperature=1.0)
        sampled = sample(worker, [row.prompt_ids for row in rows], length, generator)
        shares = [float(np.mean([token == wanted for token in ids])) for ids in sampled]
        table = to_table(rows)
        table = with_column(table, "completion_ids", sampled)
        table = with_column(table, "score", shares)
        table = with_column(table, "behavior_logprobs", [[-1.0] * length] * 16)
        update(worker, fresh(worker, table), tmp_path, step)
        scores.append(float(np.mean(shares)))
    assert np.mean(scores[-2:]) > np.mean(scores[:2]) + 0.3


@torch.no_grad()
def sample(worker, prompts, length, generator) -> list[list[int]]:
    """From the live weights, by a plain model of them."""
    lm = worker._update.models.policy
    weights = {n.removeprefix("policy.lm."): w for n, w in weights_of(worker).items()}
    model = AutoModelForCausalLM.from_pretrained(worker._spec.policy, dtype=torch.float32)
    model.load_state_dict(weights, strict=False)
    assert lm.lm.config.tie_word_embeddings
    completions = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(length):
            p = model(torch.tensor([ids])).logits[0, -1].softmax(-1)
            ids.append(int(torch.multinomial(p, 1, generator=generator)))
        completions.append(ids[len(prompt) :])
    return completions


def test_activation_checkpointing_changes_memory_and_not_a_bit_of_the_weights(tmp_path):
    results = []
    for checkpointing in (False, True):
        worker = case(learner=LearnerConfig(activation_checkpointing=checkpointing)).start()
        trunk = worker._update.models.policy.lm.model
        assert trunk.is_gradient_checkpointing == checkpointing
        update(worker, fresh(worker, batch_table()), tmp_path)
        results.append(weights_of(worker))
    assert same_bytes(*results)


def test_the_critic_starts_only_when_the_policys_activations_are_gone(tmp_path):
    """Else a microbatch would need the memory of both."""
    worker = case(ppo_config(entropy_coef=0.01)).start()
    table = fresh(worker, batch_table())
    kept: WeakSet[Kept] = WeakSet()
    found = []

    def keep(tensor: Tensor) -> Kept:
        kept.add(box := Kept(tensor))
        return box

    def look(*_) -> None:
        if torch.is_grad_enabled():
            found.append(len(kept))

    worker._update.models.value.register_forward_pre_hook(look)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda box: box.tensor):
        update(worker, table, tmp_path)
    assert found == [0] * 4


class Kept:
    """A tensor that a backward pass waits for."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@pytest.mark.parametrize("value_model", ["shared", "separate"])
def test_bfloat16_computes_close_to_float32_and_keeps_float32_weights(
    tmp_path, value_model, ptx_rows
):
    ppo = ppo_config(value_model=value_model, ptx=ptx_rows, entropy_coef=0.01)
    table, results = None, {}
    for dtype in ("float32", "bfloat16"):
        learner = LearnerConfig(dtype=dtype, max_tokens_per_microbatch=30)
        worker = case(ppo, learner=learner).start()
        table = fresh(worker, batch_table()) if table is None else table
        before = weights_of(worker)
        metrics = update(worker, table, tmp_path)
        after = weights_of(worker)
        assert {w.dtype for w in after.values()} == {torch.float32}
        assert all(w.isfinite().all() for w in after.values())
        assert largest_difference(after, before) > 1e-4
        results[dtype] = metrics
    low, exact = results["bfloat16"], results["float32"]
    assert low["learner/behavior_difference_mean"] < 0.05
    assert low["learner/first_ratio_error"] < 0.2
    for name in ("learner/grad_norm_policy", "learner/value_loss", "learner/entropy"):
        assert low[name] == pytest.approx(exact[name], rel=0.1)


def test_end_of_sequence_ids_inside_a_completion_are_tokens_like_any_other(tmp_path):
    """A row whose completion goes on behind such an id has gradient and value there too."""
    rows = trajectories()
    assert EOS in rows[0].completion_ids[:-1]
    worker = case(PPOConfig.model_validate(ppo_config().model_dump())).start()
    batch = fresh(worker, to_table(rows))
    update(worker, batch, tmp_path)
    import pyarrow.parquet as pq

    kept = pq.read_table(tmp_path / "step-000001.parquet").to_pylist()[0]
    assert len(kept["advantages"]) == len(rows[0].completion_ids)
    assert all(kept["advantages"])
