"""A generator with a fake engine under it: nothing leaves unproved, and nobody waits for the dead."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
import pytest_asyncio

from actors import engine_thread
from actors import generator as generator_module
from actors.config import GeneratorsConfig
from actors.engine_thread import PROBE_ID
from actors.generate_request import GenerateRequest, GeneratorFailed
from actors.generator import Generator
from actors.trajectory import Completion
from actors.weight_update import (
    NeedsAll,
    Probe,
    ProbeAnswer,
    WeightLayout,
    WeightsRejected,
    WeightUpdate,
)
from tests.integration.engines import prove

LAYOUT = WeightLayout.of([("w", (4,))], "float32")
PROBE, LOGPROBS = Probe((1, 2), (3, 4)), (-0.5, -1.5)
BOUND = 1e-3
SOON_S, LONG_S = 0.1, 5.0
MAX_NUM_SEQS = 2


@dataclass
class FakeEngine:
    """vLLM's engine as far as a generator uses it. A request takes `steps` steps; `step` waits for
    `may_step`, so that a test can hold the engine still."""

    steps: int = 2
    probe_answer: tuple[float, ...] = LOGPROBS
    probe_steps: int = 1
    running: dict[str, int] = field(default_factory=dict)
    version: str = "0"
    most_running: int = 0
    added: list[str] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    salts: dict[str, str] = field(default_factory=dict)
    at_push: list[str] = field(default_factory=list)  # what ran when weights came
    failing: dict[str, Exception] = field(default_factory=dict)
    fails_in_step: int | None = None
    num_steps: int = 0
    may_step: threading.Event = field(default_factory=threading.Event)

    def collective_rpc(self, method: str, args: tuple[Any, ...]) -> list[Any]:
        self.calls.append(method)
        self._maybe_fail(method)
        if method == "receive_weights":
            self.at_push = list(self.running)
        return [args[0].id] if method == "agree_layout" else [{"verify_s": 0.0, "apply_s": 0.0}]

    def set_weight_version(self, version: str) -> None:
        self.version = version

    def add_request(self, name: str, prompt: dict[str, Any], params: Any) -> None:
        self._maybe_fail("add_request")
        self.salts[name] = prompt["cache_salt"]
        self.added.append(name)
        self.running[name] = self.probe_steps if name == PROBE_ID else self.steps
        self.most_running = max(self.most_running, len(self.running.keys() - {PROBE_ID}))

    def has_unfinished_requests(self) -> bool:
        return bool(self.running)

    def abort_request(self, names: list[str]) -> None:
        for name in names:
            self.running.pop(name, None)  # as vLLM, of one that it has finished

    def step(self) -> list[Any]:
        self.may_step.wait(LONG_S)
        self._maybe_fail("step")
        self.num_steps += 1
        if self.num_steps == self.fails_in_step:
            raise RuntimeError("gone")
        for name in self.running:
            self.running[name] -= 1
        done = [name for name, left in self.running.items() if left <= 0]
        for name in done:
            del self.running[name]
        return [self._probed() if name == PROBE_ID else self._sampled(name) for name in done]

    def _maybe_fail(self, method: str) -> None:
        if method in self.failing:
            raise self.failing[method]

    def _sampled(self, name: str) -> Any:
        sample = SimpleNamespace(
            token_ids=[5, 6, 1],
            logprobs=SimpleNamespace(logprobs=[-1.0, -2.0, -0.5]),
            text="",
            stop_reason=None,
            finish_reason="stop",
            weight_versions=[SimpleNamespace(version=self.version, start=0)],
        )
        return SimpleNamespace(request_id=name, finished=True, outputs=[sample])

    def _probed(self) -> Any:
        answer = {
            token: SimpleNamespace(logprob=logprob)
            for token, logprob in zip(PROBE.next_ids, self.probe_answer, strict=True)
        }
        sample = SimpleNamespace(logprobs=[answer])
        return SimpleNamespace(request_id=PROBE_ID, finished=True, outputs=[sample])


Make = Callable[..., tuple[Generator, FakeEngine]]


@pytest_asyncio.fixture
async def make(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Make]:
    """make(**of the engine) -> a running generator and its engine; ended with the test."""
    made: list[tuple[Generator, FakeEngine]] = []
    monkeypatch.setattr(engine_thread, "completion_params", lambda *given: given)
    monkeypatch.setattr(engine_thread, "probe_params", lambda probe: None)
    monkeypatch.setattr(
        engine_thread, "salt_waiting", lambda engine, salt: engine.calls.append("salt_waiting")
    )

    def maker(
        weight_update: Any = "in_flight", *, finish_all: bool = False, **given: Any
    ) -> tuple[Generator, FakeEngine]:
        engine = FakeEngine(**given)
        engine.may_step.set()
        monkeypatch.setattr(generator_module, "make_engine", lambda config, model: engine)
        config = GeneratorsConfig(max_num_seqs=MAX_NUM_SEQS, weight_update=weight_update)
        made.append(
            (
                Generator(
                    config,
                    model="m",
                    name="generator-0",
                    probe_bound=BOUND,
                    finish_all=finish_all,
                    decode=lambda ids: f"{ids}",
                ),
                engine,
            )
        )
        return made[-1]

    yield maker
    for generator, engine in made:
        engine.may_step.set()
        await generator.close()
        assert not generator._thread._thread.is_alive()


def requests(*names: str) -> list[GenerateRequest]:
    return [GenerateRequest(name, (2, 3), 8, 1.0, 7) for name in names]


def update(version: int = 1) -> WeightUpdate:
    return WeightUpdate(version, LAYOUT.id, (), PROBE)


def answer(version: int = 1, **changes: Any) -> ProbeAnswer:
    return replace(ProbeAnswer(version, (), LOGPROBS), **changes)


async def pushed(generator: Generator, one: WeightUpdate) -> dict[str, float]:
    """Its proof, of an update to whose probe the learner's answer comes, too."""
    return await prove(generator, one, answer(one.version))


async def within(awaitable: Any) -> Any:
    """What everything here has to do: end."""
    return await asyncio.wait_for(awaitable, LONG_S)


async def held_still(generator: Generator, engine: FakeEngine, *names: str) -> Any:
    """The futures of requests that the engine has taken on; it waits for `may_step` now."""
    engine.may_step.clear()
    futures = await generator.generate(requests(*names))
    while len(engine.added) < min(len(names), MAX_NUM_SEQS):
        await asyncio.sleep(0.001)
    return futures


async def generated(generator: Generator, *names: str) -> list[Completion]:
    futures = await generator.generate(requests(*names))
    return await within(asyncio.gather(*futures))


async def every_call(generator: Generator) -> list[Any]:
    """What each way to reach a generator comes to: a result, or the exception."""
    (late,) = await generator.generate(requests("late"))
    calls = (
        late,
        generator.status(),
        generator.agree_layout(LAYOUT),
        generator.receive_weights(update()),
    )
    return await within(asyncio.gather(*calls, return_exceptions=True))


async def test_a_completion_is_what_the_engine_sampled(make: Make) -> None:
    generator, _ = make()
    (made,) = await generated(generator, "a")
    assert made.ids == (5, 6, 1)
    assert made.logprobs == (-1.0, -2.0, -0.5)
    assert made.text == "(5, 6, 1)"
    assert made.spans == ((0, 0),)
    assert made.finish_reason == "stop"


async def test_futures_stand_in_the_order_of_the_requests_and_none_is_an_empty_list(
    make: Make,
) -> None:
    generator, engine = make()
    assert len(await generated(generator, *"abcde")) == 5
    assert engine.added == list("abcde")
    assert await generator.generate([]) == []


async def test_the_engine_never_holds_more_than_max_num_seqs(make: Make) -> None:
    generator, engine = make()
    assert len(await generated(generator, *(f"r{i}" for i in range(9)))) == 9
    assert engine.most_running == MAX_NUM_SEQS


async def test_what_the_engine_has_no_room_for_waits_in_the_generator(make: Make) -> None:
    generator, engine = make(steps=10**6)
    await held_still(generator, engine, *"abcde")
    engine.may_step.set()
    status = await within(generator.status())
    assert (status["running"], status["waiting"]) == (MAX_NUM_SEQS, 3)
    assert len(engine.running) == MAX_NUM_SEQS


async def test_the_layout_that_is_agreed_is_the_engines(make: Make) -> None:
    generator, _ = make()
    assert await within(generator.agree_layout(LAYOUT)) == LAYOUT.id


async def test_an_update_is_applied_then_told_to_what_waits_then_proved(make: Make) -> None:
    generator, engine = make()
    proof = await within(pushed(generator, update(3)))
    assert proof["probe_difference"] == 0.0
    assert {"push_s", "verify_s", "apply_s", "probe_s"} < proof.keys()
    assert engine.calls == ["receive_weights", "salt_waiting"]
    assert (await within(generator.status()))["version"] == 3
    (made,) = await generated(generator, "a")
    assert made.spans == ((3, 0),)


async def test_prompts_share_no_cache_over_an_update_even_of_the_same_version(make: Make) -> None:
    generator, engine = make()
    await generated(generator, "a")
    await within(pushed(generator, update(3)))
    await generated(generator, "b", "c")
    await within(pushed(generator, update(3)))  # of a learner that went back
    await generated(generator, "d")
    assert engine.salts["b"] == engine.salts["c"]
    assert len({engine.salts[name] for name in "abd"}) == 3


async def test_nothing_leaves_before_the_probe_is_answered(make: Make) -> None:
    generator, engine = make(steps=3, probe_steps=10**9)
    (future,) = await held_still(generator, engine, "a")
    push = asyncio.create_task(pushed(generator, update()))
    await asyncio.sleep(0)
    engine.may_step.set()
    while "a" in engine.running:
        await asyncio.sleep(0.001)
    await asyncio.sleep(SOON_S)
    assert not future.done()  # though the engine has finished it
    assert not push.done()
    engine.may_step.clear()
    await asyncio.sleep(SOON_S)
    engine.running[PROBE_ID] = 1
    engine.may_step.set()
    await within(asyncio.gather(push, future))


async def test_nothing_leaves_before_the_learner_has_answered_the_probe_either(make: Make) -> None:
    """Generation goes on meanwhile, and the answer to another update is none."""
    generator, engine = make(steps=3)
    (future,) = await held_still(generator, engine, "a")
    push = asyncio.create_task(generator.receive_weights(update()))
    await asyncio.sleep(0)
    engine.may_step.set()
    while engine.running:
        await asyncio.sleep(0.001)
    for other in (answer(2), answer(digests=("another",))):
        await within(generator.receive_answer(other))
    await asyncio.sleep(SOON_S)
    assert not push.done()
    assert not future.done()
    assert (await within(generator.status()))["version"] is None
    await within(generator.receive_answer(answer()))
    assert (await within(push))["probe_difference"] == 0.0
    await within(future)


async def test_the_learner_s_answer_may_come_first(make: Make) -> None:
    generator, _ = make()
    await within(generator.receive_answer(answer(3)))
    assert (await within(generator.receive_weights(update(3))))["probe_difference"] == 0.0


async def test_another_answer_of_the_learner_s_stops_the_generator(make: Make) -> None:
    generator, _ = make()
    push = asyncio.create_task(generator.receive_weights(update()))
    await asyncio.sleep(SOON_S)
    with pytest.raises(WeightsRejected, match=r"differ by 0\.5"):
        await within(generator.receive_answer(answer(logprobs=(-0.5, -2.0))))
    with pytest.raises(WeightsRejected, match=r"differ by 0\.5"):
        await within(push)


@pytest.mark.parametrize("probe_steps", [1, 10**9], ids=["probed", "probing"])
@pytest.mark.parametrize("by", ["forget", "the next update"])
async def test_an_update_whose_learner_is_gone_is_given_up_and_proves_nothing(
    make: Make, by: str, probe_steps: int
) -> None:
    generator, engine = make(probe_steps=probe_steps)
    push = asyncio.create_task(generator.receive_weights(update(3)))
    await asyncio.sleep(0)
    (before,) = await generator.generate(requests("a"))
    await asyncio.sleep(SOON_S)
    engine.probe_steps = 1
    if by == "forget":
        await within(generator.forget())
        await within(generator.receive_answer(answer(3)))  # it was on its way
        (between,) = await generator.generate(requests("b"))
        await asyncio.sleep(SOON_S)
        assert not between.done()  # the engine has finished it, by weights that nobody proved
        await within(pushed(generator, update(4)))
        with pytest.raises(GeneratorFailed):
            await within(between)
    else:
        await within(pushed(generator, update(4)))
    for given_up in (push, before):
        with pytest.raises(GeneratorFailed, match="given up"):
            await within(given_up)
    (made,) = await generated(generator, "c")
    assert made.spans == ((4, 0),)
    assert engine.running == {}


async def test_a_wrong_probe_stops_the_generator_and_discards_what_was_held(make: Make) -> None:
    generator, engine = make(steps=3, probe_steps=50, probe_answer=(-0.5, -1.5 - 2 * BOUND))
    (future,) = await held_still(generator, engine, "a")
    push = asyncio.create_task(pushed(generator, update(4)))
    await asyncio.sleep(0)
    engine.may_step.set()
    with pytest.raises(WeightsRejected, match=r"generator-0: after version 4 .* differ by 0.002"):
        await within(push)
    with pytest.raises(WeightsRejected):
        await within(future)
    assert [type(answer) for answer in await every_call(generator)] == [WeightsRejected] * 4


@pytest.mark.parametrize("logprob", [float("nan"), float("inf")])
async def test_a_probe_answered_with_no_number_is_wrong(make: Make, logprob: float) -> None:
    generator, _ = make(probe_answer=(-0.5, logprob))
    with pytest.raises(WeightsRejected):
        await within(pushed(generator, update()))


async def test_a_difference_within_the_bound_is_a_proof(make: Make) -> None:
    generator, _ = make(probe_answer=(-0.5, -1.5 + BOUND / 2))
    proof = await within(pushed(generator, update()))
    assert proof["probe_difference"] == pytest.approx(BOUND / 2)


async def test_bytes_that_the_receiver_refuses_stop_the_generator(make: Make) -> None:
    generator, engine = make(failing={"receive_weights": ValueError("the bytes of bucket 3")})
    with pytest.raises(WeightsRejected, match="generator-0: the bytes of bucket 3"):
        await within(pushed(generator, update()))
    assert PROBE_ID not in engine.added
    assert [type(answer) for answer in await every_call(generator)] == [WeightsRejected] * 4


async def test_a_delta_without_its_base_leaves_everything_as_it_was(make: Make) -> None:
    generator, engine = make()
    await within(pushed(generator, update(1)))
    engine.failing["receive_weights"] = NeedsAll("send it in full")
    with pytest.raises(NeedsAll, match="generator-0: send it in full"):
        await within(pushed(generator, update(3)))
    assert (await within(generator.status()))["version"] == 1
    (made,) = await generated(generator, "a")
    assert made.spans == ((1, 0),)
    engine.failing.clear()
    await within(pushed(generator, update(3)))
    assert (await within(generator.status()))["version"] == 3


async def test_an_engine_that_fails_in_a_step_fails_all_waiters_and_all_who_come_later(
    make: Make,
) -> None:
    generator, engine = make(steps=3)
    futures = await held_still(generator, engine, *"abcd")
    engine.failing["step"] = RuntimeError("CUDA out of memory")
    engine.may_step.set()
    answers = await within(asyncio.gather(*futures, return_exceptions=True))
    answers += await every_call(generator)
    assert {type(answer) for answer in answers} == {GeneratorFailed}
    assert {str(answer) for answer in answers} == {"generator-0: RuntimeError: CUDA out of memory"}


@pytest.mark.parametrize("weight_update", ["in_flight", "drained"])
async def test_an_engine_that_fails_under_a_push_fails_the_push(
    make: Make, weight_update: str
) -> None:
    generator, engine = make(weight_update, steps=90, probe_steps=90, fails_in_step=20)
    (future,) = await held_still(generator, engine, "a")
    push = asyncio.create_task(pushed(generator, update()))
    await asyncio.sleep(0)
    engine.may_step.set()
    answers = await within(asyncio.gather(push, future, return_exceptions=True))
    assert (PROBE_ID in engine.added) == (weight_update == "in_flight")
    assert [type(answer) for answer in answers] == [GeneratorFailed] * 2


@pytest.mark.parametrize("method", ["agree_layout", "add_request"])
async def test_an_engine_that_refuses_a_call_fails_that_caller_too(make: Make, method: str) -> None:
    generator, _ = make(failing={method: RuntimeError("no")})
    if method == "agree_layout":
        calls = [generator.agree_layout(LAYOUT)]
    else:
        calls = await generator.generate(requests("a"))
    answers = await within(asyncio.gather(*calls, return_exceptions=True))
    answers += await every_call(generator)
    assert {str(answer) for answer in answers} == {"generator-0: RuntimeError: no"}


async def test_drained_an_update_waits_until_nothing_runs(make: Make) -> None:
    generator, engine = make("drained", steps=4)
    futures = await held_still(generator, engine, *"abcd")
    push = asyncio.create_task(pushed(generator, update()))
    await asyncio.sleep(0)
    engine.may_step.set()
    await within(push)
    assert engine.at_push == []
    made = await within(asyncio.gather(*futures))
    assert {len(completion.spans) for completion in made} == {1}
    assert engine.added.index(PROBE_ID) == MAX_NUM_SEQS  # the others start under the new weights


async def test_with_finish_all_weights_wait_for_every_request_that_came_before(make: Make) -> None:
    generator, engine = make(finish_all=True, steps=4)
    futures = await held_still(generator, engine, *"abcdef")
    push = asyncio.create_task(pushed(generator, update()))
    await asyncio.sleep(0)
    engine.may_step.set()
    await within(push)
    made = await within(asyncio.gather(*futures))
    assert {completion.spans for completion in made} == {((0, 0),)}
    assert engine.added.index(PROBE_ID) == 6
    assert engine.most_running == MAX_NUM_SEQS


@pytest.mark.parametrize("finish_all", [False, True])
async def test_while_it_drains_a_generator_answers_and_what_is_added_waits(
    make: Make, finish_all: bool
) -> None:
    generator, engine = make("drained", finish_all=finish_all, steps=10**9)
    old = await held_still(generator, engine, "a")
    push = asyncio.create_task(pushed(generator, update()))
    await asyncio.sleep(0)
    engine.may_step.set()
    while engine.num_steps < 10:
        await asyncio.sleep(0.001)
    assert (await within(generator.status()))["running"] == 1
    new = await within(generator.generate(requests("b")))
    assert (await within(generator.status()))["waiting"] == 1
    assert not push.done()
    engine.steps = 1
    engine.running["a"] = 1
    completions = await within(asyncio.gather(*old, *new))
    assert [completion.spans for completion in completions] == [((0, 0),), ((1, 0),)]
    await within(push)


async def test_a_generator_that_drains_can_be_told_to_forget(make: Make) -> None:
    generator, engine = make("drained", finish_all=True, steps=10**9)
    futures = await held_still(generator, engine, *"abcd")
    push = asyncio.create_task(pushed(generator, update()))
    await asyncio.sleep(0)
    engine.may_step.set()
    await within(generator.forget())
    await within(asyncio.gather(push, return_exceptions=True))
    answers = await within(asyncio.gather(*futures, return_exceptions=True))
    assert [type(answer) for answer in answers] == [GeneratorFailed] * 4


async def test_what_is_forgotten_fails_its_waiters_and_the_generator_goes_on(make: Make) -> None:
    generator, engine = make(steps=10**6)
    futures = await held_still(generator, engine, *"abcd")
    engine.may_step.set()
    await within(generator.forget())
    answers = await within(asyncio.gather(*futures, return_exceptions=True))
    assert [type(answer) for answer in answers] == [GeneratorFailed] * 4
    engine.steps = 1
    (again,) = await within(generator.generate(requests("a")))
    assert (await within(again)).ids == (5, 6, 1)
    status = await within(generator.status())
    assert (status["running"], status["waiting"]) == (0, 0)


async def test_in_flight_an_update_falls_between_two_steps_of_what_runs(make: Make) -> None:
    generator, engine = make("in_flight", steps=1000)
    futures = await held_still(generator, engine, *"ab")
    push = asyncio.create_task(pushed(generator, update()))
    await asyncio.sleep(0)
    engine.may_step.set()
    await within(push)
    assert sorted(engine.at_push) == ["a", "b"]
    await within(asyncio.gather(*futures))


async def test_status_is_answered_by_the_engine_thread_itself(make: Make) -> None:
    generator, engine = make(steps=3)
    assert (await within(generator.status()))["running"] == 0
    await held_still(generator, engine, "a")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(generator.status(), SOON_S)
    engine.may_step.set()
