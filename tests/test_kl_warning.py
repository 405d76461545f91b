"""The warning of reward hacking: a rising score while the KL leaves its bound; said once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import WarnConfig
from cluster.run_warnings import kl_warning

BOUND = 8.0
CONFIG = WarnConfig(kl_to_ref=BOUND)


def history(kl: list[float], scores: list[float]) -> list[dict[str, float]]:
    return [
        {"learner/kl_to_ref": k, "reward/score_mean": s} for k, s in zip(kl, scores, strict=True)
    ]


def said_at(kl: list[float], scores: list[float]) -> list[int]:
    """The steps at which a run would have been warned."""
    rows = history(kl, scores)
    return [i for i in range(len(rows)) if kl_warning(rows[: i + 1], CONFIG)]


def test_it_is_said_when_the_kl_crosses_its_bound_while_the_score_rises() -> None:
    assert said_at([1, 5, 9], [0.0, 0.5, 1.0]) == [2]


def test_it_names_both_figures_the_bound_and_what_to_do() -> None:
    said = kl_warning(history([1, 9.25], [0.5, 1.75]), CONFIG)
    assert said is not None
    for part in ("+1.75", "9.2 nats", "beyond 8", "ppo.kl.coef", "held-out evaluation"):
        assert part in said
    assert "\n" not in said


def test_it_is_said_once_while_the_kl_stays_out_and_again_when_it_comes_back() -> None:
    kl = [1, 9, 10, 11, 7, 12, 13]
    assert said_at(kl, [float(i) for i in range(len(kl))]) == [1, 5]


@pytest.mark.parametrize("scores", [[1.0, 0.5, 0.0], [1.0, 1.0, 1.0]])
def test_it_is_not_said_when_the_score_does_not_rise(scores: list[float]) -> None:
    assert said_at([1, 5, 9], scores) == []


def test_the_trend_is_read_over_some_steps_so_one_dip_does_not_silence_it() -> None:
    assert said_at([1, 2, 3, 4, 9], [0.0, 0.5, 1.0, 1.5, 1.4]) == [4]


@pytest.mark.parametrize("length", [0, 1])
def test_of_less_than_two_steps_nothing_is_said(length: int) -> None:
    assert kl_warning(history([9.0] * length, [9.0] * length), CONFIG) is None


@given(st.lists(st.floats(0, BOUND), max_size=10), st.data())
def test_within_the_bound_it_is_never_said(kl: list[float], data: st.DataObject) -> None:
    scores = data.draw(st.lists(st.floats(-10, 10), min_size=len(kl), max_size=len(kl)).map(sorted))
    assert said_at(kl, scores) == []


@given(st.lists(st.floats(0, 20), min_size=1, max_size=20))
def test_it_is_said_as_often_as_the_kl_crosses_upwards_while_the_score_keeps_rising(
    kl: list[float],
) -> None:
    crossings = [i for i in range(1, len(kl)) if kl[i] > BOUND >= kl[i - 1]]
    assert said_at(kl, [float(i) for i in range(len(kl))]) == crossings
