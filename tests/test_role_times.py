"""Each role's parts are its whole time: what it did, and what it waited for."""

from __future__ import annotations

import pytest

from cluster.role_times import role_times, since


def test_every_role_accounts_for_the_whole_window() -> None:
    spent = {"update": 3.0, "publish": 0.5, "waiting for rollouts": 4.0, "generation": 99.0}
    generators = [{"busy_s": 2.0, "weights_s": 1.0}, {"busy_s": 4.0, "weights_s": 0.0}]
    times = role_times(10.0, spent, generators, {"busy_s": 1.5})
    for parts in times.values():
        assert sum(parts.values()) == pytest.approx(10.0)
    assert times["learner"]["other"] == 2.5
    assert times["generators (mean)"] == {
        "decoding": 3.0,
        "receiving weights": 0.5,
        "waiting for prompts": 6.5,
    }
    assert times["reward service"] == {"scoring": 1.5, "waiting for completions": 8.5}


def test_clocks_that_disagree_never_give_a_negative_share() -> None:
    times = role_times(1.0, {"update": 1.1}, [{"busy_s": 1.2, "weights_s": 0}], {"busy_s": 1.3})
    assert all(seconds >= 0 for parts in times.values() for seconds in parts.values())


def test_counters_are_compared_by_name_and_words_are_left_out() -> None:
    now = {"busy_s": 5.0, "running": 3, "new": 2.0, "version": None, "name": "g", "ok": True}
    assert since(now, {"busy_s": 4.0, "running": 5}) == {"busy_s": 1.0, "running": -2, "new": 2.0}


def test_what_was_not_known_before_counts_from_zero() -> None:
    assert since({"policy_version": 3}, {"policy_version": None}) == {"policy_version": 3}
