"""Kills and stops of roles in one asynchronous run through Ray, one after another, at random moments."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path
from typing import Any

from tests.chaos.faults import (
    KILL,
    STOP,
    Events,
    Fault,
    Hang,
    actors,
    ended_by_sigterm,
    pause,
    strike,
)
from tests.integration.runs import Workshop, wait_until

PING_S, LEARNER_S = 5.0, 12.0
SOON_S = 5.0  # after its deadline what is stopped has a name
BACK_S = 120.0  # beyond it a run hangs
# kind: actor class, signal, the event that says it was noticed, the one that says it is mended
KINDS = {
    "generator killed": ("RolloutRole", KILL, "generator_lost", "generator_replaced"),
    "generator stopped": ("RolloutRole", STOP, "generator_lost", "generator_replaced"),
    "reward service killed": ("RewardRole", KILL, "reward_lost", "reward_restarted"),
    "reward service stopped": ("RewardRole", STOP, "reward_lost", "reward_restarted"),
    "learner rank killed": ("LearnerRole", KILL, "learner_lost", "learner_replaced"),
    "learner rank stopped": ("LearnerRole", STOP, "learner_lost", "learner_replaced"),
}


def config(shop: Workshop, name: str, **changes: Any) -> Path:
    given: dict[str, Any] = {
        "name": name,
        "num_steps": 100_000,
        "max_staleness": 2,
        "prompts": {"path": str(shop.folder / "data/prompts.parquet")},
        "reward": {
            "scorer": {"kind": "function", "function": "examples.support_replies.judge:score"},
            "max_restarts": 1000,
            "deadline_s": 60.0,
        },
        "generators": {
            "count": 2,
            "max_model_len": 64,
            "max_num_seqs": 8,
            "kv_cache_bytes": 1 << 25,
            "max_restarts": 1000,
            "rollout_timeout_s": 20.0,
        },
        "learner": {"ranks": 2, "timeout_s": LEARNER_S, "max_restarts": 1000},
        "ping_timeout_s": PING_S,
        "evaluation": None,
        "checkpoint": {"every": 2, "keep": 2},
    }
    return shop.config(**(given | changes))


def run(shop: Workshop, rng: random.Random, counts: dict[str, int]) -> list[Fault]:
    """As many faults of each kind as `counts` says, in random order. Raises Hang."""
    name = "chaos-roles"
    log = shop.folder / f"{name}.log"
    process = shop.start("train", str(config(shop, name)), log=log)
    events = Events(shop.runs / name)
    todo = [kind for kind, count in counts.items() for _ in range(count)]
    rng.shuffle(todo)
    with ended_by_sigterm(process, log, BACK_S):
        wait_until(lambda: len(shop.metrics(name)) >= 2 or process.poll() is not None, "two steps")
        faults = [_inject(kind, process, events, rng) for kind in todo]
    return faults


def _inject(kind: str, process: subprocess.Popen[str], events: Events, rng: random.Random) -> Fault:
    role, how, noticed, mended = KINDS[kind]
    pause(rng, 0.0, 3.0)
    at = strike(rng.choice(actors(process, role)), how)

    def alive() -> bool:
        return process.poll() is None

    seen = events.wait(noticed, at, BACK_S, alive)
    if how == STOP:
        deadline = LEARNER_S if role == "LearnerRole" else PING_S
        if seen["time"] - at > deadline + SOON_S:
            raise Hang(
                f"{kind}: named {seen['time'] - at:.1f} s later, its deadline is {deadline} s"
            )
        if not _stack_of(seen):
            raise Hang(f"{kind}: no stack was recorded")
    back = events.wait(mended, at, BACK_S, alive)
    return Fault(kind, seen["time"] - at, back["time"] - at)


def _stack_of(event: dict[str, Any]) -> bool:
    stacks = event.get("stacks") or {"": event.get("stack", "")}
    return any("Thread" in stack for stack in stacks.values())
