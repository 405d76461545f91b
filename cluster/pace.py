"""How long a step will take, roughly, before anything has run: the products of matrices that its models
compute, at the rate that this machine computes such products at.

Counted are forward and backward passes over every trajectory, all as long as they may get. Not counted:
attention between tokens, sampling, scoring, pushing weights, and that no model is all products. So it is
a lower bound: of support_replies' PPO (0.47 million parameters) it said 1.2 s, and the steps took 4.8 to
7.2 s on two cores that others used, too.
"""

from __future__ import annotations

import os
import statistics
from dataclasses import dataclass

from cluster.config import RunConfig
from cluster.core_rate import core_rates
from cluster.doctor import Inputs, longest_sequence
from cluster.memory import tokens_at_once
from cluster.shapes import Shape, Shapes

BACKWARD = 2  # forward passes' work
MOST_ROWS = 512  # beyond it a product is no faster


@dataclass(frozen=True)
class Work:
    """Floating-point operations of a step."""

    generators: float
    learner: float


def work(config: RunConfig, inputs: Inputs, shapes: Shapes) -> Work:
    prompt_tokens = statistics.fmean(len(prompt.ids) for prompt in inputs.prompts)
    rows = config.batch_size * config.sampling.max_tokens
    tokens = config.batch_size * prompt_tokens + rows

    def forward(shape: Shape, *, head: bool) -> float:
        """Operations of all layers on every token, and of the head on completion tokens."""
        return 2.0 * (tokens * shape.layers * shape.layer + rows * shape.embedding * head)

    ppo = config.ppo
    trained = forward(shapes.policy, head=True)
    if ppo.separate_critic:
        trained += forward(shapes.value, head=False)
    anchors = 1 if ppo.anchor == "learner" else 0
    swept = forward(shapes.reference, head=True) + anchors * trained
    generated = forward(shapes.policy, head=True)
    return Work(generated, swept + ppo.epochs * (1 + BACKWARD) * trained)


def step_seconds(config: RunConfig, inputs: Inputs, shapes: Shapes) -> float:
    """Seconds of one step on CPU, where every role's process computes with one thread."""
    done, cores = work(config, inputs, shapes), os.cpu_count() or 1
    policy, longest = shapes.policy, longest_sequence(config, inputs)
    at_once = tokens_at_once(config, config.batch_size // config.ppo.minibatches, longest)
    rows = [config.generators.max_num_seqs, min(at_once, MOST_ROWS)]
    rates = core_rates(policy.hidden, policy.mlp, rows)
    decoding, learning = done.generators / rates[0], done.learner / rates[1]
    count, ranks = config.generators.count, config.learner.ranks
    apart = decoding / min(count, cores), learning / min(ranks, cores)
    if config.max_staleness == 0:
        return sum(apart)
    return max(*apart, (decoding + learning) / cores)
