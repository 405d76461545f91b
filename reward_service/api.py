"""The contract of scoring: what a scorer is given, what it must return, and how it may fail."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """One <prompt, completion> pair to be scored.

    Example: ScoreRequest("p12-0-e0", "37+5=", "42", (40, 44, 12, 42, 30), (41, 39, 1), "stop", "42", {})
    """

    trajectory_id: str
    prompt: str
    completion: str  # text without the end-of-sequence token
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]  # as sampled, end-of-sequence included
    finish_reason: str  # "stop" (end-of-sequence or stop string) or "length"
    answer: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ScoreResponse:
    """The score of one request; `parts` names what it was made of (empty where there is one part)."""

    trajectory_id: str
    score: float
    parts: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in {"score": self.score, **self.parts}.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise InvalidScore(
                    f"{self.trajectory_id}: {name} is {type(value).__name__}, not a number"
                )
            if not math.isfinite(value):
                raise InvalidScore(f"{self.trajectory_id}: {name} is {value}")


class Scorer(Protocol):
    """Scores a batch; the answer has one response a request, in the same order."""

    async def score(self, requests: Sequence[ScoreRequest]) -> list[ScoreResponse]: ...


class RewardFailure(Exception):
    """Base of every way a score can fail to come about. Never turned into a number."""


class InvalidScore(RewardFailure):
    """NaN, inf, a wrong type, a missing, an extra or a misplaced score."""


class ScorerRaised(RewardFailure):
    """The scorer raised, or the remote endpoint refused."""


class ScoreTimeout(RewardFailure):
    """No score within the deadline."""
