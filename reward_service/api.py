"""The contract of scoring: what a scorer is given, what it must return, and how it may fail."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, ClassVar, Literal, Protocol

FailureKind = Literal["invalid", "raised", "timeout"]

MAX_PARTS, MAX_NAME = 100, 200


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """One <prompt, completion> pair to be scored.

    Example: ScoreRequest("p12-e0-0", "37+5=", "42", (40, 44, 12, 42, 30), (41, 39, 1), "stop")
    """

    trajectory_id: str
    prompt: str
    completion: str  # text without the end-of-sequence token
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]  # as sampled, end-of-sequence included
    finish_reason: str  # "stop" (end-of-sequence or stop string) or "length"
    answer: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    # The prompt as role and content, where the data has it so.
    messages: Sequence[Mapping[str, str]] | None = None


@dataclass(frozen=True, slots=True)
class ScoreResponse:
    """The score of one request; `parts` names what it was made of (empty where there is one part).

    All numbers are finite Python floats (NumPy scalars are converted); else InvalidScore.
    """

    trajectory_id: str
    score: float
    parts: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.parts, Mapping):
            kind = type(self.parts).__name__
            raise InvalidScore(f"{self.trajectory_id}: parts is {kind}, not a mapping")
        if len(self.parts) > MAX_PARTS:
            raise InvalidScore(f"{self.trajectory_id}: {len(self.parts)} parts, above {MAX_PARTS}")
        parts = {self._name(name): self._number(name, value) for name, value in self.parts.items()}
        object.__setattr__(self, "score", self._number("score", self.score))
        object.__setattr__(self, "parts", parts)

    def _name(self, name: object) -> str:
        """Metrics are named after it, and Arrow stores it as UTF-8."""
        if not str(name).isprintable() or len(str(name)) > MAX_NAME:
            raise InvalidScore(f"{self.trajectory_id}: {name!r:.80} is no name for a part")
        return str(name)

    def _number(self, name: object, value: Any) -> float:
        if getattr(value, "ndim", None) == 0:  # a scalar of torch's, or of an array
            value = value.item()
        if isinstance(value, bool) or not isinstance(value, Real):
            kind = type(value).__name__
            raise InvalidScore(f"{self.trajectory_id}: {name} is {kind}, not a number")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise InvalidScore(f"{self.trajectory_id}: {name} is {number}")
        return number


@dataclass(frozen=True, slots=True)
class ScoreFailure:
    """Why one request has no score. It travels beside the responses, so that one bad completion
    fails alone and not with its whole batch."""

    trajectory_id: str
    kind: FailureKind
    reason: str  # one line

    @classmethod
    def of(cls, trajectory_id: str, error: RewardFailure) -> ScoreFailure:
        return cls(trajectory_id, error.kind, str(error))


ScoreResult = ScoreResponse | ScoreFailure


class Scorer(Protocol):
    """Scores a batch; the answer has one result a request, in the same order.

    What is wrong with one request is a ScoreFailure in its place; what is wrong with the whole call
    is raised as a RewardFailure.
    """

    async def score(self, requests: Sequence[ScoreRequest]) -> list[ScoreResult]: ...

    async def close(self) -> None: ...


class RewardFailure(Exception):
    """Base of every way a score can fail to come about. Never turned into a number."""

    kind: ClassVar[FailureKind] = "raised"


class InvalidScore(RewardFailure):
    """NaN, inf, a wrong type, a missing, an extra or a misplaced score."""

    kind = "invalid"


class ScorerRaised(RewardFailure):
    """The scorer raised, or the remote endpoint refused."""

    kind = "raised"


class ScoreTimeout(RewardFailure):
    """No score within the deadline."""

    kind = "timeout"


FAILURES: dict[FailureKind, type[RewardFailure]] = {
    failure.kind: failure for failure in (InvalidScore, ScorerRaised, ScoreTimeout)
}


def check_results(requests: Sequence[ScoreRequest], results: object) -> list[ScoreResult]:
    """`results` where it is one result a request, in the same order; else InvalidScore."""
    if not isinstance(results, list) or len(results) != len(requests):
        given = len(results) if isinstance(results, list) else type(results).__name__
        raise InvalidScore(f"{given} results for {len(requests)} requests")
    for request, result in zip(requests, results, strict=True):
        if not isinstance(result, ScoreResult):
            raise InvalidScore(f"{request.trajectory_id}: {type(result).__name__} is no result")
        if result.trajectory_id != request.trajectory_id:
            raise InvalidScore(f"a result for {result.trajectory_id} stands where "
                               f"{request.trajectory_id} was asked")  # fmt: skip
    return results


def one_line(error: BaseException) -> str:
    """`Type: message` without line breaks, cut to a length that a log line can carry."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 300 else f"{text[:297]}..."
