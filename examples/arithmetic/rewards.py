"""The reward of a verifiable task: a function of the user's, named in the config.

reward:
  scorer: {kind: function, function: "examples.arithmetic.rewards:exact_answer"}
"""

from __future__ import annotations

from reward_service.api import ScoreRequest


def exact_answer(requests: list[ScoreRequest]) -> list[float]:
    """1.0 where the completion is the answer and nothing else, closed by the model itself."""
    return [_exact(request) for request in requests]


def _exact(request: ScoreRequest) -> float:
    if request.answer is None:
        raise ValueError(f"{request.trajectory_id}: no answer; the prompts need an `answer` column")
    # A completion cut at max_tokens never ended: "423" cut to "42" must not pass for "42".
    return float(request.completion == request.answer and request.finish_reason == "stop")
