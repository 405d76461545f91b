"""A generator whose engine is two worker processes; what it did, as JSON: test_tensor_parallel.py runs it."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any


async def pushed_and_sampled(folder: Path) -> dict[str, Any]:
    import numpy as np

    from actors.generate_request import GenerateRequest
    from learner.learner_spec import Samples
    from tests.integration.engines import learner_and_engine, prove

    learner, layout, make = learner_and_engine(folder)
    generator = make(tensor_parallel_size=2)
    await generator.agree_layout(layout)
    proof = await prove(generator, learner.publish(1), learner.answer_probe(1))
    prompt = (40, 41, 42, 43)
    request = GenerateRequest("a", prompt, max_tokens=16, temperature=1.0, seed=1)
    completion = await (await generator.generate([request]))[0]
    samples = Samples((np.array(prompt),), (np.array(completion.ids),), 1.0)
    difference = np.abs(learner.policy_logprobs(samples)[0] - np.array(completion.logprobs)).max()
    update = learner.publish(2)
    refusals = []
    wrong = replace(update, digests=("0" * 32,) * len(update.digests))
    for bad in (replace(update, segment=f"{update.segment}-elsewhere"), wrong):
        try:
            await generator.receive_weights(bad)
        except Exception as error:
            refusals.append([type(error).__name__, str(error)])
    return {
        "probe_difference": proof["probe_difference"],
        "difference": float(difference),
        "spans": completion.spans,
        "refusals": refusals,
    }


if __name__ == "__main__":
    from actors.vllm_engine import CPU_ENGINE_ENV

    os.environ.update(CPU_ENGINE_ENV)
    print(json.dumps(asyncio.run(pushed_and_sampled(Path(sys.argv[1])))), flush=True)
    os._exit(0)
