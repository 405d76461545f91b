"""Before the first step: do generators and learner compute the same?"""

from __future__ import annotations

import numpy as np

from cluster.placement import RoleFailed
from cluster.run import Run
from learner.learner_spec import Samples

SELF_CHECK_PROMPTS = 16


async def self_check(run: Run) -> None:
    """Same weights, same tokens: generator logprobs against learner logprobs. RoleFailed if beyond bounds."""
    bounds, temperature = run.config.bounds, run.config.sampling.temperature
    samples = await run.supervisor.sample(
        run.prompts[:SELF_CHECK_PROMPTS], temperature, run.config.seed
    )
    learned = await run.learner.policy_logprobs(
        Samples(
            tuple(np.array(request.prompt_ids) for request, _ in samples),
            tuple(np.array(completion.ids) for _, completion in samples),
            temperature,
        )
    )
    generated = np.concatenate([completion.logprobs for _, completion in samples])
    difference = np.abs(generated - np.concatenate(learned))
    mean, worst = float(difference.mean()), float(difference.max())
    run.view.note(
        f"self-check: generator and learner logprobs differ by {mean:.1e} (mean), {worst:.1e} "
        f"(max) over {len(difference)} tokens"
    )
    if not (mean <= bounds.max_mean_difference and worst <= bounds.max_difference):
        raise RoleFailed(
            f"self-check: generators and learner disagree on the same weights and tokens: mean "
            f"{mean:.2g} (bound {bounds.max_mean_difference:g}), max {worst:.2g} (bound "
            f"{bounds.max_difference:g}); same dtype on both sides? see self_check in the config"
        )
