"""Function scorers and sums: values pass through, everything else is a typed failure."""

from __future__ import annotations

import asyncio
import math
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from reward_service.api import (
    InvalidScore,
    ScoreFailure,
    ScoreRequest,
    ScoreResponse,
    ScorerRaised,
    ScoreTimeout,
    check_results,
)
from reward_service.rules import FunctionScorer, SumScorer

answer: Any = None  # what `answering` returns, set by each test


def requests(count: int) -> list[ScoreRequest]:
    return [ScoreRequest(f"t{i}", "p", "c" * i, (2,), (3, 1), "stop") for i in range(count)]


def lengths(asked: list[ScoreRequest]) -> list[int]:
    return [len(request.completion) for request in asked]


async def lengths_async(asked: list[ScoreRequest]) -> list[int]:
    await asyncio.sleep(0)
    return lengths(asked)


def lengths_awaitable(asked: list[ScoreRequest]) -> Any:
    return lengths_async(asked)


def answering(asked: list[ScoreRequest]) -> Any:
    return answer(asked) if callable(answer) else answer


def answers(monkeypatch: pytest.MonkeyPatch, value: Any) -> FunctionScorer:
    monkeypatch.setattr(sys.modules[__name__], "answer", value)
    return FunctionScorer(f"{__name__}:answering")


@pytest.mark.parametrize("name", ["lengths", "lengths_async", "lengths_awaitable"])
async def test_sync_and_async_functions_score_in_order(name: str) -> None:
    results = await FunctionScorer(f"{__name__}:{name}").score(requests(5))
    assert results == [ScoreResponse(f"t{i}", float(i)) for i in range(5)]


async def test_a_blocking_function_does_not_block_the_event_loop(monkeypatch) -> None:
    release = threading.Event()
    scorer = answers(monkeypatch, lambda asked: [float(release.wait(10))] * len(asked))
    call = asyncio.create_task(scorer.score(requests(1)))
    await asyncio.sleep(0.02)
    release.set()  # reached only if the loop runs on
    assert await call == [ScoreResponse("t0", 1.0)]


async def test_a_function_that_hangs_can_be_abandoned(monkeypatch) -> None:
    scorer = answers(monkeypatch, lambda asked: time.sleep(30))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(scorer.score(requests(1)), 0.05)
    hung = [t for t in threading.enumerate() if t.name == "reward-function"]
    assert hung
    assert all(thread.daemon for thread in hung)


@pytest.mark.parametrize(
    "number", [1, 0.5, np.float32(0.5), np.int64(3), np.float64(-1), torch.tensor(0.25)]
)
async def test_numbers_become_python_floats(monkeypatch, number: Any) -> None:
    (result,) = await answers(monkeypatch, [number]).score(requests(1))
    assert isinstance(result, ScoreResponse)
    assert type(result.score) is float
    assert result.score == float(number)


BAD = [math.nan, math.inf, -math.inf, None, "1.0", True, np.bool_(1), [1.0], 10**400, np.nan]


@pytest.mark.parametrize("bad", BAD, ids=repr)
async def test_what_is_no_finite_number_fails_its_request_alone(monkeypatch, bad: Any) -> None:
    before, failed, after = await answers(monkeypatch, [1.0, bad, 2.0]).score(requests(3))
    assert (before, after) == (ScoreResponse("t0", 1.0), ScoreResponse("t2", 2.0))
    assert isinstance(failed, ScoreFailure)
    assert (failed.trajectory_id, failed.kind) == ("t1", "invalid")


@pytest.mark.parametrize("bad", [math.nan, None, "1", True])
async def test_bad_parts_fail_their_request(monkeypatch, bad: Any) -> None:
    values = [{"score": 1.0, "parts": {"a": 1, "score": bad}}, {"score": bad}, {"parts": {}}]
    for result in await answers(monkeypatch, values).score(requests(3)):
        assert isinstance(result, ScoreFailure)
        assert result.kind == "invalid"


async def test_responses_and_mappings_keep_their_parts(monkeypatch) -> None:
    values = [ScoreResponse("t0", 1, {"a": 2}), {"score": 1, "parts": {"a": np.float32(2)}}]
    results = await answers(monkeypatch, values).score(requests(2))
    assert results == [ScoreResponse(f"t{i}", 1.0, {"a": 2.0}) for i in range(2)]


async def test_a_response_for_another_request_is_invalid(monkeypatch) -> None:
    swapped = [ScoreResponse("t1", 1.0), ScoreResponse("t0", 2.0)]
    for result in await answers(monkeypatch, swapped).score(requests(2)):
        assert isinstance(result, ScoreFailure)


@pytest.mark.parametrize("value", [[], [1.0], [1.0] * 3, 1.0, None, "12", {"t0": 1.0}])
async def test_a_wrong_number_of_scores_fails_the_call(monkeypatch, value: Any) -> None:
    with pytest.raises(InvalidScore):
        await answers(monkeypatch, value).score(requests(2))


@pytest.mark.parametrize(
    "error", [ValueError("no\nluck"), StopIteration(), SystemExit(3)], ids=repr
)
async def test_an_exception_is_named_in_one_line(monkeypatch, error: BaseException) -> None:
    def raising(asked: list[ScoreRequest]) -> list[float]:
        raise error

    with pytest.raises(ScorerRaised) as caught:
        await asyncio.wait_for(answers(monkeypatch, raising).score(requests(1)), 5)
    message = str(caught.value)
    assert type(error).__name__ in message or "StopIteration" in message
    assert "\n" not in message
    assert "Traceback" not in message


async def test_where_a_function_failed_is_told_and_its_stack_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "broken_rewards.py").write_text(
        "import json\n\ndef parse(text):\n    return json.loads(text)\n\n"
        "def score(asked):\n    return [parse(request.prompt) for request in asked]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ScorerRaised, match=r"\(.*/broken_rewards\.py:4 in parse\)$"):
        await FunctionScorer("broken_rewards:score").score(requests(1))
    assert "broken_rewards.py" in caplog.text
    assert "JSONDecodeError" in caplog.text


async def test_a_failure_the_function_raises_itself_keeps_its_kind(monkeypatch) -> None:
    def raising(asked: list[ScoreRequest]) -> list[float]:
        raise ScoreTimeout("judge is slow")

    with pytest.raises(ScoreTimeout, match="judge is slow"):
        await answers(monkeypatch, raising).score(requests(1))


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("no_such_module_anywhere:score", "cannot import no_such_module_anywhere"),
        (f"{__name__}:no_such_function", "has no no_such_function"),
        (f"{__name__}:BAD", "has a non-callable BAD"),
        ("broken_rules:score", "ZeroDivisionError"),
    ],
)
def test_a_function_that_cannot_be_loaded_is_refused_in_one_line(
    tmp_path: Path, monkeypatch, spec: str, said: str
) -> None:
    (tmp_path / "broken_rules.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=said) as caught:
        FunctionScorer(spec)
    assert spec in str(caught.value)
    assert "\n" not in str(caught.value)


async def test_functions_are_found_in_the_current_directory(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "rules_here.py").write_text("def score(asked):\n    return [4.0 for _ in asked]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    (result,) = await FunctionScorer("rules_here:score").score(requests(1))
    assert result == ScoreResponse("t0", 4.0)


class Fixed:
    """A scorer with one result for all, or an exception."""

    def __init__(self, result: Any) -> None:
        self.result, self.closed = result, False

    async def score(self, asked: Any) -> list[Any]:
        if isinstance(self.result, Exception):
            raise self.result
        return [self.result(request.trajectory_id) for request in asked]

    async def close(self) -> None:
        self.closed = True


async def test_a_sum_is_weighted_and_keeps_nested_parts_unweighted() -> None:
    judge = SumScorer(
        {
            "tone": (2.0, Fixed(lambda i: ScoreResponse(i, 1.5))),
            "facts": (-1.0, Fixed(lambda i: ScoreResponse(i, 4.0, {"dates": 3.0}))),
        }
    )
    total = SumScorer(
        {"judge": (10.0, judge), "length": (0.5, Fixed(lambda i: ScoreResponse(i, 6)))}
    )
    results = await total.score(requests(2))
    parts = {"judge": -1.0, "judge/tone": 1.5, "judge/facts": 4.0, "judge/facts/dates": 3.0}
    assert results == [ScoreResponse(f"t{i}", -7.0, parts | {"length": 6.0}) for i in range(2)]


async def test_a_sum_fails_where_a_part_fails_and_says_which() -> None:
    def odd_fails(i: str) -> ScoreResponse | ScoreFailure:
        return ScoreFailure(i, "timeout", "slow") if i == "t1" else ScoreResponse(i, 1.0)

    parts = {"a": (1.0, Fixed(lambda i: ScoreResponse(i, 1.0))), "b": (0.0, Fixed(odd_fails))}
    results = await SumScorer(parts).score(requests(3))
    assert results[1] == ScoreFailure("t1", "timeout", "b: slow")
    assert [type(result) for result in results] == [ScoreResponse, ScoreFailure, ScoreResponse]


async def test_a_sum_raises_what_a_part_raises_and_closes_all_parts() -> None:
    good, bad = Fixed(lambda i: ScoreResponse(i, 1.0)), Fixed(ScoreTimeout("slow"))
    scorer = SumScorer({"good": (1.0, good), "bad": (1.0, bad)})
    with pytest.raises(ScoreTimeout, match="bad: slow"):
        await scorer.score(requests(1))
    await scorer.close()
    assert good.closed
    assert bad.closed


async def test_a_sum_that_overflows_is_no_score() -> None:
    scorer = SumScorer({"a": (1e308, Fixed(lambda i: ScoreResponse(i, 1e308)))})
    (result,) = await scorer.score(requests(1))
    assert isinstance(result, ScoreFailure)


@pytest.mark.parametrize("results", [[], [ScoreResponse("t1", 0.0)], [1.0], None, ["t0"]])
def test_results_that_do_not_match_the_requests_are_invalid(results: Any) -> None:
    with pytest.raises(InvalidScore):
        check_results(requests(1), results)
