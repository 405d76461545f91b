"""The service: order kept, calls merged or not, bounded concurrency, failures typed."""

from __future__ import annotations

import asyncio
import sys

import pytest

from reward_service.api import MAX_PARTS, ScoreFailure, ScoreRequest, ScoreResponse
from reward_service.config import RewardServiceConfig
from reward_service.service import RewardService, build_scorer


class Recorder:
    """What the scorer saw, and how it behaves."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.running = self.most = 0
        self.delay_s = 0.0
        self.fail: set[str] = set()


recorder = Recorder()


async def recording(asked: list[ScoreRequest]) -> list[float]:
    batch = [request.trajectory_id for request in asked]
    recorder.batches.append(batch)
    recorder.running += 1
    recorder.most = max(recorder.most, recorder.running)
    try:
        await asyncio.sleep(recorder.delay_s)
    finally:
        recorder.running -= 1
    if recorder.fail.intersection(batch):
        raise ValueError("bad batch")
    return [float(request.trajectory_id[1:]) for request in asked]


@pytest.fixture(autouse=True)
def fresh_recorder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "recorder", Recorder())


def requests(*numbers: int) -> list[ScoreRequest]:
    return [ScoreRequest(f"t{i}", "p", "c", (2,), (3, 1), "stop") for i in numbers]


def config(**changes: object) -> RewardServiceConfig:
    scorer = {"kind": "function", "function": f"{__name__}:recording"}
    return RewardServiceConfig.model_validate({"scorer": scorer, "max_wait_s": 0.05} | changes)


async def naming_each_anew(asked: list[ScoreRequest]) -> list[dict[str, object]]:
    return [{"score": 1.0, "parts": {f"of {r.trajectory_id}": 1.0, "style": 2.0}} for r in asked]


async def test_names_of_parts_have_a_bound_over_all_scores() -> None:
    scorer = {"kind": "function", "function": f"{__name__}:naming_each_anew"}
    service = RewardService(config(scorer=scorer, max_wait_s=0))
    scored = [
        result
        for i in range(3)
        for result in await service.score(requests(*range(40 * i, 40 * i + 40)))
    ]
    good = [result for result in scored if isinstance(result, ScoreResponse)]
    assert len({name for result in good for name in result.parts}) == MAX_PARTS
    bad = [result for result in scored if isinstance(result, ScoreFailure)]
    assert len(bad) == 120 - (MAX_PARTS - 1)
    assert {failure.kind for failure in bad} == {"invalid"}
    assert "'of t99' is one name" in bad[0].reason
    (again,) = await service.score(requests(3))  # a name that is known
    assert isinstance(again, ScoreResponse)
    await service.close()


async def test_results_come_in_the_order_of_the_requests_whatever_the_batches() -> None:
    service = RewardService(config(batch_size=3))
    calls = [range(0, 7), range(7, 8), range(8, 20), ()]
    results = await asyncio.gather(*(service.score(requests(*call)) for call in calls))
    for call, got in zip(calls, results, strict=True):
        assert got == [ScoreResponse(f"t{i}", float(i)) for i in call]
    assert max(map(len, recorder.batches)) <= 3


async def test_concurrent_callers_share_batches() -> None:
    service = RewardService(config(batch_size=4))
    await asyncio.gather(*(service.score(requests(i)) for i in range(8)))
    assert [len(batch) for batch in recorder.batches] == [4, 4]


async def test_without_merging_each_call_is_cut_by_itself_in_order() -> None:
    service = RewardService(config(batch_size=4), merge_calls=False)
    await asyncio.gather(service.score(requests(*range(6))), service.score(requests(7)))
    assert recorder.batches == [["t0", "t1", "t2", "t3"], ["t4", "t5"], ["t7"]]


async def test_a_batch_that_does_not_fill_leaves_after_max_wait() -> None:
    service, loop = (
        RewardService(config(batch_size=100, max_wait_s=0.05)),
        asyncio.get_running_loop(),
    )
    started = loop.time()
    await service.score(requests(1))
    assert 0.04 < loop.time() - started < 2


async def test_at_most_max_concurrency_scorer_calls_run_at_once() -> None:
    recorder.delay_s = 0.01
    for merge_calls in (True, False):
        service = RewardService(config(batch_size=1, max_concurrency=2), merge_calls=merge_calls)
        await service.score(requests(*range(8)))
    assert recorder.most == 2


async def test_a_batch_that_raises_fails_all_of_its_requests_and_no_other() -> None:
    recorder.fail = {"t1"}
    results = await RewardService(config(batch_size=2)).score(requests(0, 1, 2, 3))
    assert [type(result) for result in results] == [ScoreFailure] * 2 + [ScoreResponse] * 2
    assert isinstance(results[0], ScoreFailure)
    assert results[0].kind == "raised"
    assert "ValueError: bad batch" in results[0].reason


async def test_a_scorer_call_has_a_deadline() -> None:
    recorder.delay_s = 30
    service = RewardService(config(deadline_s=0.05, max_wait_s=0))
    (result,) = await service.score(requests(1))
    assert isinstance(result, ScoreFailure)
    assert result.kind == "timeout"
    assert recorder.running == 0


async def test_a_caller_that_gives_up_takes_nothing_from_the_others() -> None:
    service = RewardService(config(batch_size=100, max_wait_s=0.1))
    first = asyncio.create_task(service.score(requests(1)))
    second = asyncio.create_task(service.score(requests(2)))
    await asyncio.sleep(0)
    first.cancel()
    assert await second == [ScoreResponse("t2", 2.0)]
    assert recorder.batches[-1][-1] == "t2"


async def test_batches_whose_caller_has_given_up_are_not_scored() -> None:
    recorder.delay_s = 0.05
    service = RewardService(config(batch_size=1, max_concurrency=1), merge_calls=False)
    call = asyncio.create_task(service.score(requests(1, 2, 3)))
    await asyncio.sleep(0.02)
    call.cancel()
    assert await service.score(requests(4)) == [ScoreResponse("t4", 4.0)]
    assert recorder.batches == [["t1"], ["t4"]]


async def test_close_fails_who_still_waits_and_refuses_new_calls() -> None:
    recorder.delay_s = 30
    service = RewardService(config(batch_size=1, max_concurrency=1))
    call = asyncio.create_task(service.score(requests(1, 2)))
    await asyncio.sleep(0.02)
    await service.close()
    assert [result.kind for result in await call] == ["raised", "raised"]  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match="closed"):
        await service.score(requests(3))


async def test_stats_count_every_request_once() -> None:
    recorder.fail, recorder.delay_s = {"t0"}, 0.01
    service = RewardService(config(batch_size=2), merge_calls=False)
    await service.score(requests(0, 1, 2, 3, 4))
    stats = service.stats()
    assert stats["reward/num_requests"] == 5
    assert stats["reward/num_batches"] == 3
    assert (stats["reward/num_scored"], stats["reward/num_raised"]) == (3, 2)
    assert stats["reward/num_waiting"] == 0
    assert 0.005 < stats["reward/busy_s"] < 5
    assert all(isinstance(value, float) for value in stats.values())


async def test_sums_of_scorers_are_built_from_the_config() -> None:
    part = {"kind": "function", "function": f"{__name__}:recording"}
    nested = {"kind": "sum", "parts": {"c": {"weight": 1, "scorer": part}}}
    parts = {"a": {"weight": 2, "scorer": part}, "b": {"weight": -1, "scorer": nested}}
    scorer = build_scorer(config(scorer={"kind": "sum", "parts": parts}).scorer)
    assert await scorer.score(requests(3)) == [
        ScoreResponse("t3", 3.0, {"a": 3.0, "b": 3.0, "b/c": 3.0})
    ]


def test_a_function_scorer_does_not_load_torch() -> None:
    import subprocess

    code = (
        "import sys; from reward_service.service import build_scorer; "
        "from reward_service.config import FunctionScorerConfig as C; "
        "build_scorer(C(kind='function', function='math:fsum')); "
        "assert not {'torch', 'transformers', 'aiohttp'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
