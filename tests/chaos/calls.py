"""A scorer that is slow, hangs, raises and answers nonsense, at random, through a whole run."""

from __future__ import annotations

import json
import os
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests.chaos.faults import Fault, Hang
from tests.integration.runs import Workshop, read_lines

DEADLINE_S = 2.0
LOG, SEED = "RAYLIGN_CHAOS_LOG", "RAYLIGN_CHAOS_SEED"
EVERY = 4  # one call of so many goes wrong
_RNG = random.Random(int(os.environ.get(SEED, "0")))


def score(requests: Any) -> Any:
    """The scorer function: lengths of completions, or a fault, which is written down."""
    kind = (
        _RNG.choice(("raises", "hangs", "slow", "NaN", "too few"))
        if _RNG.randrange(EVERY) == 0
        else ""
    )
    if kind:
        with Path(os.environ[LOG]).open("a") as log:
            log.write(json.dumps({"kind": kind, "time": time.time()}) + "\n")
    if kind == "raises":
        raise RuntimeError("as it was told")
    if kind in ("hangs", "slow"):
        time.sleep(4 * DEADLINE_S if kind == "hangs" else DEADLINE_S / 4)
    scores = [float(len(request.completion)) / 64 for request in requests]
    if kind == "NaN":
        scores[0] = float("nan")
    return scores[:-1] if kind == "too few" else scores


def run(shop: Workshop, rng: random.Random, steps: int) -> list[Fault]:
    name, log = "chaos-calls", shop.folder / "calls.jsonl"
    config = shop.config(
        name=name,
        num_steps=steps,
        max_staleness=2,
        prompts={"path": str(shop.folder / "data/prompts.parquet")},
        reward={
            "scorer": {"kind": "function", "function": "tests.chaos.calls:score"},
            "deadline_s": DEADLINE_S,
            "batch_size": 4,
            "on_failure": "drop",
        },
        evaluation=None,
    )
    os.environ |= {LOG: str(log), SEED: str(rng.randrange(1 << 30))}
    done = shop.command("train", str(config))
    if done.returncode:
        raise Hang(done.stdout + done.stderr)
    injected = read_lines(log)
    reasons = Counter(
        row["reason"].split(":")[0] for row in read_lines(shop.runs / name / "dropped.jsonl")
    )
    print(f"{sum(reasons.values())} samples were dropped with a reason")
    return [Fault(f"scorer: {one['kind']}") for one in injected]
