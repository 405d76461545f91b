"""A scorer that is slow, hangs, raises and answers nonsense, at random, through a whole run."""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path
from typing import Any

from tests.chaos.faults import Fault, Hang
from tests.integration.runs import Workshop, read_lines

DEADLINE_S = 2.0
LOG, SEED = "RAYLIGN_CHAOS_LOG", "RAYLIGN_CHAOS_SEED"
EVERY = 4  # one call of so many goes wrong
_RNG = random.Random(int(os.environ.get(SEED, "0")))


def score(requests: Any) -> Any:
    """The scorer function: lengths of completions, or a fault. Each call is written down: when it began,
    and when it answered, which those that fail do not."""
    began, kind = time.time(), ""
    if _RNG.randrange(EVERY) == 0:
        kind = _RNG.choice(("raises", "hangs", "slow", "NaN", "too few"))
    if kind == "slow":
        time.sleep(DEADLINE_S / 4)
    ids = [request.trajectory_id for request in requests]
    if kind == "NaN":  # is one sample's fault; the others are scored
        _write(kind, began, ids[:1], answered=False)
        _write("", began, ids[1:], answered=True)
    else:
        _write(kind, began, ids, answered=kind in ("", "slow"))
    if kind == "raises":
        raise RuntimeError("as it was told")
    if kind == "hangs":
        time.sleep(4 * DEADLINE_S)
    scores = [float(len(request.completion)) / 64 for request in requests]
    if kind == "NaN":
        scores[0] = float("nan")
    return scores[:-1] if kind == "too few" else scores


def _write(kind: str, began: float, ids: list[str], *, answered: bool) -> None:
    call = {"kind": kind, "began": began, "ids": ids}
    call |= {"answered": time.time()} if answered else {}
    with Path(os.environ[LOG]).open("a") as log:
        log.write(json.dumps(call) + "\n")


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
    run_dir = shop.runs / name
    dropped = _dropped(run_dir)
    print(f"{len(dropped)} samples were dropped with a reason")
    over = read_lines(run_dir / "metrics.jsonl")[-1]["time"]
    return _faults(read_lines(log), dropped, over)


def _dropped(run_dir: Path) -> dict[str, float]:
    """When, by trajectory_id."""
    from actors.trajectory import trajectory_id

    return {
        trajectory_id(row["prompt_id"], row["epoch"], row["sample_index"]): row["time"]
        for row in read_lines(run_dir / "dropped.jsonl")
        if row["reason"]
    }


def _faults(calls: list[dict[str, Any]], dropped: dict[str, float], over: float) -> list[Fault]:
    """A fault is noticed when its samples are asked for again or dropped, and over when each has a score
    or is dropped. Of a slow call both are its answer. Left out is what the run's end cut short."""
    faults = []
    for call in calls:
        if not call["kind"]:
            continue
        began, ids = call["began"], set(call["ids"])
        later = [other for other in calls if other["began"] > began and ids & set(other["ids"])]
        drops = {one: dropped[one] for one in ids if one in dropped}
        answers = [other for other in [call, *later] if "answered" in other]
        ends = {
            one: o["answered"] for o in reversed(answers) for one in ids & set(o["ids"])
        } | drops
        lost = len(ids - ends.keys())
        if lost and began > over - 2 * DEADLINE_S:
            continue
        noticed = min([*(other["began"] for other in later), *ends.values()], default=over)
        back = max(ends.values(), default=over)
        faults.append(Fault(f"scorer: {call['kind']}", noticed - began, back - began, lost))
    return faults
