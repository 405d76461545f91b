"""Updates of weights with a wrong byte, digest, layout or probe, each to a real engine that samples."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from actors.vllm_engine import CPU_ENGINE_ENV
from actors.weight_update import ProbeAnswer, WeightsRejected, WeightUpdate
from tests.chaos.faults import Fault, Hang
from tests.integration.engines import learner_and_engine, prove

REQUESTS, WITHIN_S = 6, 30.0


def run(rng: random.Random, count: int) -> tuple[list[Fault], int]:
    """The faults, and how many completions came from weights that were not proved."""
    os.environ.update(CPU_ENGINE_ENV)  # before torch is imported
    faults, unproved = [], 0
    with tempfile.TemporaryDirectory(prefix="raylign-chaos-") as folder:
        learner, layout, make = learner_and_engine(Path(folder))
        for number in range(count):
            kind = ("byte", "digest", "layout", "probe")[number % 4]
            fault, sampled = asyncio.run(_one(kind, learner, layout, make, rng, number))
            faults.append(fault)
            unproved += sampled
        learner.close()
    return faults, unproved


async def _one(
    kind: str, learner: Any, layout: Any, make: Callable[[], Any], rng: random.Random, number: int
) -> tuple[Fault, int]:
    from actors.generate_request import GenerateRequest

    started = time.monotonic()
    generator = make()
    await generator.agree_layout(layout)
    await prove(generator, learner.publish(2 * number), learner.answer_probe(2 * number))
    requests = [
        GenerateRequest(f"r{i}", (40, 41, 42), max_tokens=64, temperature=1.0, seed=i)
        for i in range(REQUESTS)
    ]
    futures = await generator.generate(requests)
    await asyncio.sleep(rng.uniform(0.0, 0.05))  # somewhere among the steps
    version = 2 * number + 1
    update, answer = learner.publish(version), learner.answer_probe(version)
    wrong, answer, undo = _spoiled(update, answer, kind, rng)
    struck = time.monotonic()
    try:
        await asyncio.wait_for(prove(generator, wrong, answer), WITHIN_S)
        raise AssertionError(f"weights with a wrong {kind} were taken")
    except WeightsRejected:
        noticed = time.monotonic() - struck
    finally:
        undo()
    done = await asyncio.wait_for(asyncio.gather(*futures, return_exceptions=True), WITHIN_S)
    bad = str(version)
    unproved = sum(
        any(str(of) == bad for of, _ in one.spans)
        for one in done
        if not isinstance(one, BaseException)
    )
    if not all(isinstance(one, BaseException) or one.spans for one in done):
        raise Hang("a request was never answered")
    await generator.close()
    return Fault(f"weights: wrong {kind}", noticed, time.monotonic() - started), unproved


def _spoiled(
    update: WeightUpdate, answer: ProbeAnswer, kind: str, rng: random.Random
) -> tuple[WeightUpdate, ProbeAnswer, Callable[[], None]]:
    """Update and answer with one thing wrong, and how the segment is put right again."""
    if kind == "byte":
        image = np.memmap(update.segment, np.uint8, "r+")
        place, bit = rng.randrange(len(image)), 1 << rng.randrange(8)
        image[place] ^= bit
        return update, answer, lambda: image.__setitem__(place, image[place] ^ bit)
    if kind == "probe":
        off = tuple(logprob + rng.uniform(0.01, 1.0) for logprob in answer.logprobs)
        return update, dataclasses.replace(answer, logprobs=off), lambda: None
    changes: dict[str, Any] = {
        "digest": {"digests": ("0" * 32, *update.digests[1:])},
        "layout": {"layout_id": "another"},
    }[kind]
    return dataclasses.replace(update, **changes), answer, lambda: None
