"""However a batch is cut into microbatches and dealt to ranks, the update is the same.

The optimizer is plain gradient descent here: Adam would divide the size of a wrong gradient away.
"""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

from learner import sharding
from learner.config import KLConfig, LearnerConfig, OptimizerConfig, PtxConfig
from tests.learner_cases import (
    Case,
    batch_table,
    case,
    fresh,
    ppo_config,
    run_ranks,
    same_bytes,
    weights_of,
    with_column,
    write_qwen2,
)

LOSS_KL = KLConfig(coef=0.2, where="loss")
VARIANTS = {
    "gae": {},
    "sequence": {"advantage": "sequence", "ratio": "sequence"},
    "grpo": {"advantage": "grpo", "ratio": "sequence_mean", "kl": LOSS_KL},
    "rloo": {"advantage": "rloo", "clip_range_high": 0.3, "dual_clip": 3.0},
    "reinforce++": {"advantage": "reinforce++"},
    "shared": {"value_model": "shared", "value_coef": 0.5},
    "adaptive kl": {"kl": KLConfig(coef=0.2, target=0.01, horizon=50)},
    "kl in the loss": {"kl": LOSS_KL},
    "behavior anchor": {"anchor": "behavior"},
    "behavior ratio": {"behavior_ratio_cap": 1.05},
    "entropy": {"entropy_coef": 0.05},
    "ptx": {"ptx": "here"},
    "shared ptx": {"value_model": "shared", "ptx": "here"},
    # Of one trajectory each: one of two ranks has nothing to do.
    "tiny minibatches": {"minibatches": 8, "epochs": 1, "entropy_coef": 0.05},
}
CRITICS = [name for name, v in VARIANTS.items() if v.get("advantage") in (None, "sequence")]


@pytest.fixture(scope="module")
def ptx(tmp_path_factory):
    path = tmp_path_factory.mktemp("ptx") / "rows.jsonl"
    rows = [{"prompt": "ab" * (i % 2 + 1), "completion": "cd" * (i % 3 + 1)} for i in range(7)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return PtxConfig(path=str(path), coef=0.3, batch_size=3)


@pytest.fixture(scope="module")
def table():
    return fresh(case().start(), batch_table(), shift=0.1)


@pytest.fixture(scope="module")
def cases(ptx):
    steep = OptimizerConfig(lr=0.05)

    def ppo(changes):
        named = {name: ptx if value == "here" else value for name, value in changes.items()}
        return ppo_config(policy=steep, value=steep, **named)

    return {name: case(ppo(changes), sgd=True) for name, changes in VARIANTS.items()}


@pytest.fixture(scope="module")
def in_one(cases, table, tmp_path_factory):
    """variant -> (weights before, weights after, metrics): one rank, one microbatch."""
    folder = tmp_path_factory.mktemp("one")
    return {name: step(one.start(), table, folder) for name, one in cases.items()}


def step(worker, table, folder):
    before = weights_of(worker)
    metrics = worker.update(table, 1, 3, str(folder))
    metrics["kl_coef after"] = worker._update.kl_coef
    return before, weights_of(worker), metrics


def same_update(a, b):
    before, after, metrics = a
    moved = {name: after[name] - before[name] for name in after}
    largest = max(change.abs().max() for change in moved.values())
    assert largest > 1e-3
    for name, change in moved.items():
        error = (b[1][name] - b[0][name] - change).abs()
        # and one rounding: of a weight of size 1, or the last bit of a norm's that has grown beyond
        weight = after[name].abs()
        rounding = (weight.nextafter(weight + 1) - weight).clamp(min=6e-8)
        assert (error <= 1e-5 * largest + rounding).all(), f"{name}: {error.max() / largest}"
    machine = ("learner/tokens_per_s", "learner/peak_memory_bytes")
    for name in metrics.keys() - set(machine):
        assert b[2][name] == pytest.approx(metrics[name], rel=1e-4, abs=2e-6), name


@pytest.mark.parametrize(
    ("name", "max_tokens"), [*((name, 12) for name in VARIANTS), ("gae", 24), ("ptx", 24)]
)
def test_an_update_does_not_depend_on_the_microbatches(
    name, max_tokens, cases, in_one, table, tmp_path
):
    one = cases[name]
    learner = LearnerConfig(max_tokens_per_microbatch=max_tokens)
    worker = case(one.ppo, sgd=True, learner=learner).start()
    same_update(in_one[name], step(worker, table, tmp_path))


@pytest.mark.parametrize("name", CRITICS)
def test_every_critic_is_trained(name, in_one):
    before, after, metrics = in_one[name]
    head = next(key for key in after if key.endswith("head.weight") and "lm_head" not in key)
    assert (after[head] - before[head]).abs().max() > 1e-4
    assert metrics["learner/value_loss"] > 0


def test_the_variants_are_indeed_different(in_one):
    after = [weights["policy.lm.model.norm.weight"] for _, weights, _ in in_one.values()]
    assert not any(torch.equal(a, b) for i, a in enumerate(after) for b in after[:i])
    assert in_one["adaptive kl"][2]["kl_coef after"] > 0.2
    assert in_one["behavior anchor"][2]["learner/first_ratio_error"] > 0.05


def _with_units(rank, meeting, given, table, folder):
    """Each layer gathered alone, two together with the rest in the root, everything in the root."""
    layer_bytes = 4 * sum(
        p.numel()
        for p in given.start(rank, meeting)._update.models.policy.lm.model.layers[0].parameters()
    )
    found = []
    for least in (1, layer_bytes + 1, 2**30):
        for checkpointing in (False, True):
            sharding.UNIT_BYTES = least
            given.learner = LearnerConfig(
                activation_checkpointing=checkpointing, max_tokens_per_microbatch=30
            )
            worker = given.start(rank, meeting)
            models = (worker._update.models.policy, worker._update.models.value)
            units = [isinstance(m, FSDPModule) for one in models for m in one.modules()]
            found.append((sum(units), step(worker, table, folder)[1]))
    return found


def test_an_update_does_not_depend_on_how_layers_are_gathered(tmp_path, table):
    folder = write_qwen2(tmp_path / "three layers", num_hidden_layers=3)
    given = Case(folder, folder, ppo_config())
    first, second = run_ranks(_with_units, given, table, str(tmp_path))
    assert [units for units, _ in first] == [8, 8, 6, 6, 2, 2]
    for (_, here), (_, there) in zip(first, second, strict=True):
        assert same_bytes(here, first[0][1])
        assert same_bytes(there, here)


def _at_two_ranks(rank, meeting, cases, table, folder):
    found = {}
    for name, one in cases.items():
        found[name] = step(one.start(rank, meeting), table, folder)
    worker = cases["gae"].start(rank, meeting)
    before = weights_of(worker)
    refusals = []
    scores = table["score"].to_pylist()
    shard = worker._update.models.value.trunk.norm.weight.to_local()

    spoilt = with_column(table, "score", [math.nan, *scores[1:]])
    refusals.append(worker.update(spoilt, 1, 3, folder).reason)
    unchanged = same_bytes(weights_of(worker), before)
    if rank == 1:  # only one rank's shard is spoilt
        with torch.no_grad():
            shard[0] = math.inf
    refusals.append(worker.update(table, 1, 3, folder).reason)
    return {"updates": found, "refusals": refusals, "unchanged": unchanged}


@pytest.fixture(scope="module")
def in_two(cases, table, tmp_path_factory):
    return run_ranks(_at_two_ranks, cases, table, str(tmp_path_factory.mktemp("two")))


@pytest.mark.parametrize("name", VARIANTS)
def test_an_update_does_not_depend_on_the_number_of_ranks(name, in_one, in_two):
    first, second = (rank["updates"][name] for rank in in_two)
    assert same_bytes(first[1], second[1])
    own = ("tokens_per_s", "peak_memory_bytes")
    for metric, value in second[2].items():
        assert metric.endswith(own) or first[2][metric] == value
    same_update(in_one[name], first)


def test_all_ranks_refuse_what_is_not_finite_with_the_same_words(in_two):
    first, second = in_two
    assert "score is not finite" in first["refusals"][0]
    assert "value is not finite" in first["refusals"][1]
    assert first["refusals"] == second["refusals"]
    assert first["unchanged"]
    assert second["unchanged"]
