"""The client: retries only what failed, within one deadline, and failures stay failures."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence

import pytest

from reward_service import client as client_module
from reward_service.api import (
    FAILURES,
    FailureKind,
    InvalidScore,
    ScoreFailure,
    ScoreRequest,
    ScoreResponse,
    ScoreResult,
    ScorerRaised,
    ScoreTimeout,
)
from reward_service.client import RewardClient
from reward_service.config import RewardServiceConfig
from reward_service.service import RewardService

KINDS: list[FailureKind] = ["invalid", "raised", "timeout"]


def requests(count: int) -> list[ScoreRequest]:
    return [ScoreRequest(f"t{i}", "p", "c", (2,), (3, 1), "stop") for i in range(count)]


def config(**changes: object) -> RewardServiceConfig:
    scorer = {"kind": "function", "function": "math:fsum"}
    return RewardServiceConfig.model_validate({"scorer": scorer} | changes)


def good(request: ScoreRequest) -> ScoreResult:
    return ScoreResponse(request.trajectory_id, float(request.trajectory_id[1:]))


class FakeService:
    """Fails `trajectory_id` as often as `failures` says, with `kind`; counts what it is asked."""

    def __init__(self, failures: dict[str, int], kind: FailureKind = "raised") -> None:
        self.failures, self.kind = Counter(failures), kind
        self.calls: list[list[str]] = []

    async def __call__(self, asked: list[ScoreRequest]) -> list[ScoreResult]:
        self.calls.append([request.trajectory_id for request in asked])
        return [self._result(request) for request in asked]

    def _result(self, request: ScoreRequest) -> ScoreResult:
        if self.failures[request.trajectory_id] > 0:
            self.failures[request.trajectory_id] -= 1
            return ScoreFailure(request.trajectory_id, self.kind, "bad luck")
        return good(request)


@pytest.fixture(autouse=True)
def short_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "FIRST_BACKOFF_S", 0.001)


async def test_only_failed_requests_are_sent_again_and_the_order_is_kept() -> None:
    service = FakeService({"t1": 1, "t3": 2})
    results = await RewardClient(service, config(max_retries=2)).score(requests(5))
    assert results == [good(request) for request in requests(5)]
    assert service.calls == [["t0", "t1", "t2", "t3", "t4"], ["t1", "t3"], ["t3"]]


@pytest.mark.parametrize("max_retries", [0, 1, 3])
async def test_there_are_at_most_max_retries(max_retries: int) -> None:
    service = FakeService({"t0": 99})
    client = RewardClient(service, config(max_retries=max_retries, on_failure="drop"))
    await client.score(requests(1))
    assert len(service.calls) == 1 + max_retries


@pytest.mark.parametrize("kind", KINDS)
async def test_fail_raises_the_kind_with_id_attempts_and_reason(kind: FailureKind) -> None:
    client = RewardClient(FakeService({"t1": 99}, kind), config(max_retries=1))
    with pytest.raises(FAILURES[kind]) as caught:
        await client.score(requests(3))
    assert str(caught.value) == "t1: no score after 2 attempts: bad luck"


@pytest.mark.parametrize("kind", KINDS)
async def test_drop_returns_the_failure_in_its_place(kind: FailureKind) -> None:
    service = FakeService({"t1": 99}, kind)
    client = RewardClient(service, config(max_retries=1, on_failure="drop"))
    first, failed, last = await client.score(requests(3))
    assert [first, last] == [good(requests(3)[0]), good(requests(3)[2])]
    assert failed == ScoreFailure("t1", kind, "no score after 2 attempts: bad luck")


@pytest.mark.parametrize("error", [InvalidScore("x"), ScorerRaised("x"), ScoreTimeout("x")])
async def test_a_reward_failure_of_the_call_fails_all_it_carried(error: Exception) -> None:
    async def call(asked: list[ScoreRequest]) -> list[ScoreResult]:
        raise error

    client = RewardClient(call, config(max_retries=0, on_failure="drop"))
    results = await client.score(requests(2))
    assert [type(error)] * 2 == [FAILURES[r.kind] for r in results if isinstance(r, ScoreFailure)]


Broken = Callable[[list[ScoreResult]], list[ScoreResult]]


@pytest.mark.parametrize(
    "broken",
    [
        lambda results: results[:-1],
        lambda results: [*results, results[0]],
        lambda results: results[::-1],
        lambda results: [results[0]] * len(results),
    ],
    ids=["missing", "extra", "misplaced", "repeated"],
)
async def test_results_for_other_requests_are_never_taken(broken: Broken) -> None:
    async def call(asked: list[ScoreRequest]) -> list[ScoreResult]:
        return broken([good(request) for request in asked])

    with pytest.raises(InvalidScore):
        await RewardClient(call, config(max_retries=1)).score(requests(3))


async def test_the_deadline_holds_for_all_attempts_together() -> None:
    calls = 0

    async def call(asked: list[ScoreRequest]) -> list[ScoreResult]:
        nonlocal calls
        calls += 1
        await asyncio.sleep(0.3)
        raise ScorerRaised("bad luck")

    loop = asyncio.get_running_loop()
    started = loop.time()
    with pytest.raises(ScoreTimeout, match=r"t0: .*2 attempts.*within 0\.4 s, after: bad luck"):
        await RewardClient(call, config(deadline_s=0.4, max_retries=9)).score(requests(1))
    assert 0.35 < loop.time() - started < 5
    assert calls == 2


async def test_time_in_the_services_queue_is_not_counted() -> None:
    """Eight batches, two at once, each within the deadline, and all together not."""

    class Slow:
        async def score(self, asked: Sequence[ScoreRequest]) -> list[ScoreResult]:
            await asyncio.sleep(0.15)
            return [good(request) for request in asked]

        async def close(self) -> None:
            pass

    given = config(deadline_s=0.4, batch_size=1, max_concurrency=2)
    service = RewardService(given, merge_calls=False)
    service._scorer = Slow()
    results = await RewardClient(service.score, given, max_batches=8).score(requests(8))
    assert results == [good(request) for request in requests(8)]
    await service.close()


async def test_a_service_that_is_stuck_is_given_up_all_the_same() -> None:
    async def call(asked: list[ScoreRequest]) -> list[ScoreResult]:
        await asyncio.sleep(60)
        return []

    given = config(deadline_s=0.1, max_concurrency=2, max_retries=0)
    with pytest.raises(ScoreTimeout, match=r"within 0\.2 s"):
        await RewardClient(call, given, max_batches=4).score(requests(1))


async def test_exceptions_that_are_no_failure_of_scoring_propagate() -> None:
    async def call(asked: list[ScoreRequest]) -> list[ScoreResult]:
        raise ConnectionResetError("the actor died")

    with pytest.raises(ConnectionResetError):
        await RewardClient(call, config(on_failure="drop")).score(requests(1))


async def test_no_requests_are_no_results() -> None:
    assert await RewardClient(FakeService({}), config()).score([]) == []


def nan_for_t1(asked: list[ScoreRequest]) -> list[float]:
    return [float("nan") if r.trajectory_id == "t1" else 1.0 for r in asked]


@pytest.mark.parametrize("on_failure", ["fail", "drop"])
async def test_a_nan_score_is_never_a_number_for_the_caller(on_failure: str) -> None:
    scorer = {"kind": "function", "function": f"{__name__}:nan_for_t1"}
    settings = config(scorer=scorer, on_failure=on_failure, max_wait_s=0)
    client = RewardClient(RewardService(settings).score, settings)
    if on_failure == "fail":
        with pytest.raises(InvalidScore, match="t1"):
            await client.score(requests(3))
    else:
        results = await client.score(requests(3))
        assert [type(r) for r in results] == [ScoreResponse, ScoreFailure, ScoreResponse]
