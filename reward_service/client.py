"""The caller's side of scoring: a deadline, retries, and what a failure means for the run."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

from reward_service.api import (
    FAILURES,
    RewardFailure,
    ScoreFailure,
    ScoreRequest,
    ScoreResult,
    ScoreTimeout,
    check_results,
)
from reward_service.config import RewardServiceConfig

Call = Callable[[list[ScoreRequest]], Awaitable[list[ScoreResult]]]

FIRST_BACKOFF_S, MAX_BACKOFF_S = 0.05, 1.0


class RewardClient:
    """`call` reaches the service: RewardService.score itself, or its actor's method.

    Only failed requests are sent again, max_retries times at most, all within deadline_s for each turn
    of the service's queue. An exception of the call that is no RewardFailure and no timeout (a dead
    actor) propagates.
    """

    def __init__(self, call: Call, config: RewardServiceConfig, *, max_batches: int = 1) -> None:
        """`max_batches`: the most batches that the service may have to score before it answers one call,
        over all callers. It ends each within deadline_s, so the client's limit is for a service that is
        stuck."""
        self._call = call
        self._config = config
        self._deadline_s = config.deadline_s * -(-max_batches // config.max_concurrency)

    async def score(self, requests: Sequence[ScoreRequest]) -> list[ScoreResult]:
        """One result a request, in the same order. With on_failure "fail" the first failure is
        raised as its RewardFailure and all results are ScoreResponses; with "drop" the failures
        stand in the list, for the caller to record."""
        results = await self._with_retries(list(requests))
        if self._config.on_failure == "fail":
            for result in results:
                if isinstance(result, ScoreFailure):
                    raise FAILURES[result.kind](f"{result.trajectory_id}: {result.reason}")
        return results

    async def _with_retries(self, requests: list[ScoreRequest]) -> list[ScoreResult]:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._deadline_s
        results = await self._attempt(requests, deadline)
        attempts = [1] * len(requests)
        for retry in range(self._config.max_retries):
            failed = [row for row, r in enumerate(results) if isinstance(r, ScoreFailure)]
            backoff_s = min(FIRST_BACKOFF_S * 2**retry, MAX_BACKOFF_S)
            if not failed or loop.time() + backoff_s >= deadline:
                break
            await asyncio.sleep(backoff_s)
            again = await self._attempt([requests[row] for row in failed], deadline)
            for row, result in zip(failed, again, strict=True):
                results[row] = _after(results[row], result)
                attempts[row] += 1
        return [_counted(result, n) for result, n in zip(results, attempts, strict=True)]

    async def _attempt(self, requests: list[ScoreRequest], deadline: float) -> list[ScoreResult]:
        error: RewardFailure
        try:
            async with asyncio.timeout_at(deadline):
                return list(check_results(requests, await self._call(requests)))
        except TimeoutError:
            error = ScoreTimeout(f"no score within {self._deadline_s:g} s")
        except RewardFailure as failure:
            error = failure
        return [ScoreFailure.of(request.trajectory_id, error) for request in requests]


def _after(earlier: ScoreResult, result: ScoreResult) -> ScoreResult:
    """A timeout during a retry says little: it keeps the reason why there was a retry."""
    if not isinstance(earlier, ScoreFailure) or not isinstance(result, ScoreFailure):
        return result
    if result.kind != "timeout" or earlier.kind == "timeout":
        return result
    return replace(result, reason=f"{result.reason}, after: {earlier.reason}")


def _counted(result: ScoreResult, attempts: int) -> ScoreResult:
    if isinstance(result, ScoreFailure):
        tries = f"{attempts} attempt{'s' if attempts > 1 else ''}"
        return replace(result, reason=f"no score after {tries}: {result.reason}")
    return result
