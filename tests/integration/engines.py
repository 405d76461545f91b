"""A real learner of one rank in this process, and real engines beside it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any


async def prove(generator: Any, update: Any, answer: Any) -> dict[str, float]:
    """The generator's proof of an update, which comes to it with the learner's answer to the probe."""
    telling = asyncio.gather(generator.receive_answer(answer), return_exceptions=True)
    proof: dict[str, float] = await generator.receive_weights(update)
    await telling
    return proof


def learner_and_engine(folder: Path) -> tuple[Any, Any, Callable[..., Any]]:
    """(learner, layout of its weights, what makes a generator of the same model), in `folder`, the
    model in folder/model. CPU_ENGINE_ENV has to be set before: torch is imported here."""
    from actors.config import GeneratorsConfig
    from actors.generator import Generator
    from actors.weight_update import Probe
    from learner.config import LearnerConfig, OptimizerConfig, PPOConfig
    from learner.learner_spec import LearnerSpec, Rendezvous
    from learner.learner_worker import LearnerWorker
    from reward_service.tokenizer import load_tokenizer
    from tests.tiny import write_policy

    model = write_policy(folder / "model")
    tokenizer = load_tokenizer(model)
    spec = LearnerSpec(
        policy=str(model),
        reference=str(model),
        ppo=PPOConfig(advantage="reinforce++", policy=OptimizerConfig(lr=1e-3)),
        learner=LearnerConfig(),
        seed=0,
        num_steps=10,
        push_dtype="float32",
        probe=Probe.of(len(tokenizer), set(tokenizer.all_special_ids)),
    )
    learner = LearnerWorker(spec, 0)
    learner.start(Rendezvous(1, file=str(folder / "rendezvous")))

    def make(**given: Any) -> Any:
        config = {"max_model_len": 256, "max_num_seqs": 8, "kv_cache_bytes": 1 << 25}
        return Generator(
            GeneratorsConfig.model_validate(config | given),
            model=str(model),
            name="generator-0",
            probe_bound=1e-4,
            decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
        )

    return learner, learner.prepare_publish(str(folder / "segment")), make
