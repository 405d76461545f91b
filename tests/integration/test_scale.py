"""A real run gets more generators and fewer while it goes on, and keeps their number when it is resumed."""

from __future__ import annotations

import signal
from typing import Any

import pytest

from cluster.audit import audit
from cluster.config import BadInput
from cluster.run_status import status
from cluster.scale import ask_to_scale
from tests.integration.runs import Workshop, wait_until

pytestmark = pytest.mark.timeout(600)
NAME = "scaled"


def scaled(workshop: Workshop) -> list[tuple[int, int]]:
    events = [event for event in workshop.events(NAME) if event["event"] == "scaled"]
    return [(event["instead_of"], event["generators"]) for event in events]


def last(workshop: Workshop) -> dict[str, Any]:
    return (workshop.metrics(NAME) or [{}])[-1]


def test_generators_come_and_go_and_every_prompt_is_trained_once(workshop: Workshop) -> None:
    config = workshop.config(
        name=NAME,
        max_staleness=1,
        num_steps=1000,
        checkpoint={"every": 1000},
        evaluation=None,
        generators={
            "count": 1,
            "max_model_len": 64,
            "max_num_seqs": 8,
            "kv_cache_bytes": 1 << 25,
        },
        learner={"ranks": 1, "timeout_s": 120},
    )
    process = workshop.start("train", str(config), log=workshop.folder / "scaled.log")
    wait_until(lambda: len(workshop.metrics(NAME)) >= 2, "two steps")
    folder = workshop.runs / NAME
    assert "generators.count=3" in ask_to_scale(folder, 3)
    wait_until(lambda: scaled(workshop) == [(1, 3)], "three generators")
    wait_until(lambda: last(workshop)["rollout/generators"] == 3, "a step of three")
    ask_to_scale(folder, 2)
    wait_until(lambda: scaled(workshop) == [(1, 3), (3, 2)], "two generators")
    wait_until(lambda: last(workshop)["rollout/generators"] == 2, "a step of two")
    assert "generators   2" in status(folder)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 143

    steps = last(workshop)["step"]
    done = workshop.command("train", str(config), "--resume", f"num_steps={steps + 2}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert last(workshop)["step"] == steps + 2
    assert last(workshop)["rollout/generators"] == 2
    assert not [event for event in workshop.events(NAME) if event["event"] == "generator_lost"]
    assert audit(folder).violation is None
    with pytest.raises(BadInput, match=r"--resume generators\.count=3"):
        ask_to_scale(folder, 3)
