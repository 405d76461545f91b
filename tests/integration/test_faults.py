"""A real run goes on when its parts are killed: `make chaos` does this at length."""

from __future__ import annotations

import random

import pytest

from tests.chaos import roles
from tests.integration.runs import Workshop

pytestmark = pytest.mark.timeout(600)


def test_a_run_goes_on_when_a_generator_the_rewards_and_a_rank_are_killed(
    workshop: Workshop,
) -> None:
    kinds = ("generator killed", "reward service killed", "learner rank killed")
    faults = roles.run(workshop, random.Random(), dict.fromkeys(kinds, 1))
    for fault in faults:
        assert fault.noticed_s is not None
        assert fault.noticed_s < 5.0
    done = workshop.command("audit", "chaos-roles", "--runs-dir", str(workshop.runs))
    assert done.returncode == 0, done.stdout
    assert "0 dropped" in done.stdout
