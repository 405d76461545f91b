"""The reward service: takes requests from many callers, batches them, and runs the scorer.

    callers --score()--> waiting requests --cut--> batch --slot--> Scorer --> each caller's results

Consumes ScoreRequests, produces one ScoreResult a request. A batch waits until it is full or its
oldest request has waited max_wait_s, and for one of max_concurrency slots; it is unblocked by an
arrival, by that timer, or by a scorer call that ends. A scorer call has deadline_s.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass

from reward_service.api import (
    MAX_PARTS,
    InvalidScore,
    RewardFailure,
    ScoreFailure,
    Scorer,
    ScoreRequest,
    ScoreResponse,
    ScoreResult,
    ScorerRaised,
    ScoreTimeout,
    check_results,
    one_line,
)
from reward_service.config import (
    FunctionScorerConfig,
    HttpScorerConfig,
    RewardModelScorerConfig,
    RewardServiceConfig,
    ScorerConfig,
    SumScorerConfig,
)


def build_scorer(config: ScorerConfig) -> Scorer:
    """The scorer of a config; ValueError (what, where, the fix) when it cannot be made."""
    match config:
        case FunctionScorerConfig():
            from reward_service.rules import FunctionScorer

            return FunctionScorer(config.function)
        case RewardModelScorerConfig():
            from reward_service.reward_model import RewardModelScorer  # loads torch

            return RewardModelScorer(config)
        case HttpScorerConfig():
            from reward_service.http_scorer import HttpScorer

            return HttpScorer(config)
        case SumScorerConfig():
            from reward_service.rules import SumScorer

            return SumScorer(
                {name: (p.weight, build_scorer(p.scorer)) for name, p in config.parts.items()}
            )


@dataclass(frozen=True, slots=True)
class _Waiting:
    request: ScoreRequest
    result: asyncio.Future[ScoreResult]
    arrived: float  # loop time

    def settle(self, result: ScoreResult) -> None:
        if not self.result.done():  # its caller may have given up
            self.result.set_result(result)


class RewardService:
    """`merge_calls=False`: a batch holds requests of one call only, cut in their order, so that
    results do not depend on when other calls arrive (scores may differ in the last bits with the
    composition of a batch)."""

    def __init__(self, config: RewardServiceConfig, *, merge_calls: bool = True) -> None:
        self._config = config
        self._merge_calls = merge_calls
        self._scorer = build_scorer(config.scorer)
        self._waiting: deque[_Waiting] = deque()  # merge_calls: not yet cut
        self._cut: deque[list[_Waiting]] = deque()  # not merge_calls: cut on arrival
        self._running: dict[asyncio.Task[None], list[_Waiting]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._part_names: set[str] = set()  # each is a metric for ever
        self._counts: Counter[str] = Counter()
        self._busy_s, self._busy_since = 0.0, 0.0
        self._closed = False

    async def score(self, requests: Sequence[ScoreRequest]) -> list[ScoreResult]:
        """One result a request, in the same order. Raises RuntimeError after close()."""
        if self._closed:
            raise RuntimeError("the reward service is closed")
        loop = asyncio.get_running_loop()
        arrived = [_Waiting(request, loop.create_future(), loop.time()) for request in requests]
        self._counts["requests"] += len(arrived)
        if self._merge_calls:
            self._waiting.extend(arrived)
        else:
            size = self._config.batch_size
            self._cut.extend(arrived[i : i + size] for i in range(0, len(arrived), size))
        self._start_batches()
        return await asyncio.gather(*(waiting.result for waiting in arrived))

    async def close(self) -> None:
        """Cancels what runs; whoever still waits gets a failure."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        left = [
            *self._waiting,
            *(w for batch in [*self._cut, *self._running.values()] for w in batch),
        ]
        self._waiting.clear()
        self._cut.clear()
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
        left = [waiting for waiting in left if not waiting.result.done()]
        self._fail(left, ScorerRaised("the reward service was closed"))
        await self._scorer.close()

    def stats(self) -> dict[str, float]:
        """Counts since the start, seconds with at least one scorer call under way, and the requests
        that wait now."""
        now = time.monotonic() - self._busy_since if self._running else 0.0
        waiting = len(self._waiting) + sum(map(len, self._cut))
        return {
            "reward/num_requests": float(self._counts["requests"]),
            "reward/num_batches": float(self._counts["batches"]),
            "reward/num_scored": float(self._counts["scored"]),
            "reward/num_invalid": float(self._counts["invalid"]),
            "reward/num_raised": float(self._counts["raised"]),
            "reward/num_timeout": float(self._counts["timeout"]),
            "reward/num_waiting": float(waiting),
            "reward/busy_s": self._busy_s + now,
        }

    def _start_batches(self) -> None:
        """Starts what can start; called whenever the answer to that may have changed."""
        while len(self._running) < self._config.max_concurrency and (batch := self._next_batch()):
            if not self._running:
                self._busy_since = time.monotonic()
            task = asyncio.get_running_loop().create_task(self._run(batch))
            self._running[task] = batch
            task.add_done_callback(self._ended)

    def _next_batch(self) -> list[_Waiting]:
        """The next batch, or [] where there is none yet."""
        while self._cut:
            batch = self._cut.popleft()
            if not all(waiting.result.done() for waiting in batch):
                return batch
        while self._waiting and self._waiting[0].result.done():  # its caller has given up
            self._waiting.popleft()
        if not self._waiting:
            return []
        loop = asyncio.get_running_loop()
        due = self._waiting[0].arrived + self._config.max_wait_s
        if len(self._waiting) < self._config.batch_size and loop.time() < due:
            if self._timer is None:
                self._timer = loop.call_at(due, self._waited)
            return []
        size = min(self._config.batch_size, len(self._waiting))
        return [self._waiting.popleft() for _ in range(size)]

    def _waited(self) -> None:
        self._timer = None
        self._start_batches()

    async def _run(self, batch: list[_Waiting]) -> None:
        """One scorer call. The fault-tolerance border: what it raises fails its batch, typed."""
        requests = [waiting.request for waiting in batch]
        self._counts["batches"] += 1
        limit = asyncio.timeout(self._config.deadline_s)
        try:
            async with limit:
                results = check_results(requests, await self._scorer.score(requests))
        except RewardFailure as error:
            self._fail(batch, error)
        except Exception as error:
            timed_out = isinstance(error, TimeoutError) and limit.expired()
            within = f"no score within {self._config.deadline_s:g} s"
            self._fail(batch, ScoreTimeout(within) if timed_out else ScorerRaised(one_line(error)))
        else:
            self._settle(batch, results)

    def _fail(self, batch: list[_Waiting], error: RewardFailure) -> None:
        self._settle(batch, [ScoreFailure.of(w.request.trajectory_id, error) for w in batch])

    def _settle(self, batch: list[_Waiting], results: Sequence[ScoreResult]) -> None:
        for waiting, result in zip(batch, map(self._with_known_parts, results), strict=True):
            self._counts["scored" if isinstance(result, ScoreResponse) else result.kind] += 1
            waiting.settle(result)

    def _with_known_parts(self, result: ScoreResult) -> ScoreResult:
        """A failure instead, if its parts would be more names than a run may have."""
        if isinstance(result, ScoreFailure):
            return result
        new = [name for name in result.parts if name not in self._part_names]
        if len(self._part_names) + len(new) > MAX_PARTS:
            said = f"{result.trajectory_id}: {new[0]!r:.80} is one name of a part too many, above {MAX_PARTS}"
            error = InvalidScore(f"{said} in a run; name the parts of all scores alike")
            return ScoreFailure.of(result.trajectory_id, error)
        self._part_names.update(new)
        return result

    def _ended(self, task: asyncio.Task[None]) -> None:
        del self._running[task]
        if not self._running:
            self._busy_s += time.monotonic() - self._busy_since
        if not self._closed:
            self._start_batches()
