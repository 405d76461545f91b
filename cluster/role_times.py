"""What each role did with its time: the seconds it worked, and what it waited for otherwise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

LEARNER = ("update", "publish", "waiting for rollouts", "evaluation", "checkpoint")

Times = dict[str, dict[str, float]]


def role_times(
    window_s: float,
    spent: Mapping[str, float],
    generators: Sequence[Mapping[str, Any]],
    reward: Mapping[str, float],
) -> Times:
    """role -> activity -> seconds; each role's sum is the window's.

    spent: seconds of the loop by activity. generators, reward: what each of them counted in the
    window. A generator that does nothing has no prompts: the staleness bound or the batch holds
    them back.
    """
    count = max(1, len(generators))
    return {
        "learner": _filled({name: spent.get(name, 0.0) for name in LEARNER}, window_s, "other"),
        "generators (mean)": _filled(
            {
                "decoding": sum(one["busy_s"] for one in generators) / count,
                "receiving weights": sum(one["weights_s"] for one in generators) / count,
            },
            window_s,
            "waiting for prompts",
        ),
        "reward service": _filled(
            {"scoring": reward["busy_s"]}, window_s, "waiting for completions"
        ),
    }


def _filled(parts: dict[str, float], window_s: float, rest: str) -> dict[str, float]:
    return parts | {rest: max(0.0, window_s - sum(parts.values()))}


def since(now: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, float]:
    """What the counters of `now` have grown by; what `before` lacks or does not know started at 0."""
    return {
        name: value - (before.get(name) or 0)
        for name, value in now.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
