"""Prompts flow out within the bound and come back as batches; a failing generator ends the wait."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest
import pytest_asyncio

from actors.prompts import PromptStream
from actors.rollout_worker import Rollouts
from actors.scored import Dropped
from actors.trajectory import Prompt, from_table, packed, select, to_table
from actors.weight_update import (
    NeedsAll,
    Probe,
    ProbeAnswer,
    WeightLayout,
    WeightsRejected,
    WeightUpdate,
)
from cluster import polling
from cluster.generator_group import Replacement
from cluster.learner_group import LearnerLost
from cluster.ledger import Ledger
from cluster.placement import Host, InProcessHost, Member, RoleFailed
from cluster.supervisor import Supervisor
from learner.trajectory_buffer import Batch
from tests import tiny

POLL_S, TIMEOUT_S, LONG_S = 0.01, 0.25, 5.0
SAMPLES = 2
LAYOUT = WeightLayout.of([("w", (4,))], "float32")
UPDATE = WeightUpdate(3, LAYOUT.id, (), Probe((1, 2), (3, 4)))
ANSWER = ProbeAnswer(3, (), (-0.5,))


class ActorDiedError(Exception):
    """Known by its name, as Ray's is."""


class FakeWorker:
    """A rollout worker that finishes what the test lets it: by itself, or by `finish`."""

    def __init__(self, *, by_itself: bool = True) -> None:
        self.submitted: list[str] = []
        self.out: dict[str, Prompt] = {}
        self.ready: list[tuple[Rollouts, Any]] = []
        self.failure: Exception | None = None
        self.silent: set[str] = set()  # methods that never answer
        self.updates: list[Any] = []
        self.answers: list[ProbeAnswer] = []
        self.samples_for_s = 0.0
        self.dead = self.rejects = self.elsewhere = False
        self.log: list[str] = []
        self.completion_tokens = self.tokens_a_status = self.scoring = 0
        self._by_itself = by_itself

    async def submit(self, prompts: list[Prompt]) -> None:
        self._alive()
        self.log.append("submit")
        for prompt in prompts:
            self.submitted.append(f"{prompt.prompt_id}/{prompt.epoch}")
            self.out[prompt.prompt_id] = prompt
            if self._by_itself:
                self.finish(prompt.prompt_id)

    def finish(self, *names: str) -> None:
        rows = []
        for name in names:
            epoch = self.out.pop(name).epoch
            rows += [tiny.trajectory(int(name[1:]), epoch, sample) for sample in range(SAMPLES)]
        finished = list(dict.fromkeys((row.prompt_id, row.epoch) for row in rows))
        self.ready.append((Rollouts(finished), packed(to_table(rows))))

    def drop(self, name: str, reason: str) -> None:
        self.ready.append((Rollouts([], [Dropped(name, self.out.pop(name).epoch, reason)]), None))

    async def take(self, timeout_s: float, linger_s: float) -> tuple[Rollouts, Any]:
        await self._maybe_silent("take")
        self._alive()
        if self.failure is not None:
            raise self.failure
        if not self.ready:
            await asyncio.sleep(timeout_s)
            return Rollouts(), None
        return self.ready.pop(0)

    async def status(self) -> dict[str, Any]:
        await self._maybe_silent("status")
        self._alive()
        self.completion_tokens += self.tokens_a_status
        return {
            "busy_s": 0.0,
            "running": len(self.out),
            "completion_tokens": self.completion_tokens,
            "scoring": self.scoring,
        }

    async def agree_layout(self, layout: WeightLayout) -> str:
        self._alive()
        self.log.append("agree_layout")
        return layout.id

    async def reset(self) -> None:
        self.out.clear()
        self.ready.clear()

    async def close(self) -> None:
        self.log.append("close")

    def _alive(self) -> None:
        if self.dead:
            raise ActorDiedError

    async def receive_weights(self, update: WeightUpdate) -> dict[str, float]:
        await self._maybe_silent("receive_weights")
        self._alive()
        if self.rejects:
            raise WeightsRejected("the digest is another")
        if self.elsewhere and update.segment:
            raise NeedsAll("the segment is not on this machine")
        self.log.append(f"prove {update.version}")
        self.updates.append(update)
        return {"probe_difference": 0.0}

    async def receive_answer(self, answer: ProbeAnswer) -> None:
        await self._maybe_silent("receive_answer")
        self._alive()
        self.answers.append(answer)

    async def sample(self, prompts: list[Prompt], temperature: float, seed: int) -> list[Any]:
        self._alive()
        await asyncio.sleep(self.samples_for_s)
        return [(id(self), prompt.prompt_id) for prompt in prompts]

    async def _maybe_silent(self, method: str) -> None:
        if method in self.silent:
            await asyncio.sleep(60)


async def last_update(in_message: bool) -> tuple[WeightUpdate, ProbeAnswer]:
    return UPDATE, ANSWER


async def pushed(supervisor: Supervisor, update: WeightUpdate = UPDATE) -> list[dict[str, float]]:
    """Its proofs, with a learner that has answered the probe."""
    answering: asyncio.Future[ProbeAnswer] = asyncio.get_running_loop().create_future()
    answering.set_result(replace(ANSWER, version=update.version))
    return await supervisor.push(update, answering)


Make = Callable[..., tuple[Supervisor, list[FakeWorker]]]


@pytest_asyncio.fixture
async def make(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Make]:
    """make(n, ...) -> a supervisor with n prompts a step, and its fake workers."""
    monkeypatch.setattr(polling, "POLL_S", POLL_S)
    made: list[Supervisor] = []

    def maker(
        n: int = 4,
        *,
        workers: int = 2,
        staleness: int = 0,
        prompts: int = 20,
        by_itself: bool = True,
        on_drop: Callable[[Dropped], None] = lambda dropped: None,
        spares: list[FakeWorker] | None = None,
        max_restarts: int = 10,
        host: Host | None = None,
        last_update: Callable[[bool], Awaitable[tuple[WeightUpdate, ProbeAnswer]]] = last_update,
    ) -> tuple[Supervisor, list[FakeWorker]]:
        fakes = [FakeWorker(by_itself=by_itself) for _ in range(workers)]

        def start(slot: int, attempt: int) -> Member:
            assert spares is not None
            fakes.append(spares.pop(0))
            return Member(f"generator-{slot}.{attempt}", fakes[-1])

        made.append(
            Supervisor(
                [Member(f"generator-{i}", fake) for i, fake in enumerate(fakes)],
                host or InProcessHost(),
                PromptStream([tiny.prompt(i) for i in range(prompts)], seed=0, shuffle=False),
                Ledger(prompts_per_step=n, max_staleness=staleness),
                rollout_timeout_s=TIMEOUT_S,
                ping_timeout_s=0.5,
                on_drop=on_drop,
                replacement=None
                if spares is None
                else Replacement(start, last_update, max_restarts, lambda event, **facts: None),
            )
        )
        return made[-1], fakes

    yield maker
    for supervisor in made:
        await supervisor.close()


async def admit(supervisor: Supervisor, version: int) -> None:
    """As if `version` had just been proved."""
    supervisor.version = version
    await supervisor.admit()


async def take(supervisor: Supervisor, version: int = 0, stop: asyncio.Event | None = None) -> Any:
    """The prompt_ids of the batch; None where take gave none. Ends, or the test fails."""
    batch = await asyncio.wait_for(supervisor.take(version, stop or asyncio.Event()), LONG_S)
    return None if batch is None else prompt_ids(batch)


def prompt_ids(batch: Batch) -> list[str]:
    return select(batch.chunks, batch.keys)["prompt_id"].to_pylist()[::SAMPLES]


async def failure_of(supervisor: Supervisor) -> tuple[str, float]:
    """What take fails with, and after how many seconds."""
    started = time.monotonic()
    with pytest.raises(RoleFailed) as failed:
        await take(supervisor)
    return str(failed.value), time.monotonic() - started


@pytest.mark.parametrize("staleness", [0, 1, 3])
async def test_as_many_prompts_go_out_as_the_bound_allows_and_no_more(
    make: Make, staleness: int
) -> None:
    supervisor, workers = make(3, staleness=staleness)
    for version in range(3):
        await admit(supervisor, version)
        await admit(supervisor, version)
        assert sum(len(worker.submitted) for worker in workers) == 3 * (version + 1 + staleness)
        await take(supervisor, version)


async def test_each_prompt_goes_to_the_least_busy_the_first_of_equals(make: Make) -> None:
    supervisor, workers = make(5, workers=2, by_itself=False)
    await admit(supervisor, 0)
    assert [worker.submitted for worker in workers] == [["p0/0", "p2/0", "p4/0"], ["p1/0", "p3/0"]]


async def test_a_synchronous_run_deals_the_same_whatever_the_timing(make: Make) -> None:
    deals = []
    for backwards in (False, True):
        supervisor, workers = make(5, workers=3, by_itself=False)
        for version in range(4):
            await admit(supervisor, version)
            for worker in workers:
                for name in sorted(worker.out, reverse=backwards):
                    worker.finish(name)
            await take(supervisor, version)
        deals.append([worker.submitted for worker in workers])
    assert deals[0] == deals[1]


async def test_a_batch_is_sorted_by_age_and_sample_and_whole(make: Make) -> None:
    supervisor, (one, two) = make(4, by_itself=False)
    await admit(supervisor, 0)
    waiting = asyncio.create_task(supervisor.take(0, asyncio.Event()))
    for worker, name in ((two, "p3"), (one, "p2"), (two, "p1"), (one, "p0")):
        await asyncio.sleep(3 * POLL_S)
        assert not waiting.done()
        worker.finish(name)
    batch = await asyncio.wait_for(waiting, LONG_S)
    rows = from_table(select(batch.chunks, batch.keys))
    assert [row.trajectory_id for row in rows] == [
        f"p{i}-e0-{sample}" for i in range(4) for sample in range(SAMPLES)
    ]
    assert len(supervisor.buffer) == 0


async def test_above_staleness_zero_the_finished_do_not_wait_for_the_others(make: Make) -> None:
    supervisor, (one, two) = make(2, staleness=1, by_itself=False)
    await admit(supervisor, 0)
    two.finish("p1", "p3")
    assert await take(supervisor, 0) == ["p1", "p3"]
    await admit(supervisor, 1)
    one.finish("p0")
    two.finish(*two.out)
    with pytest.raises(TimeoutError):  # p2 was leased at version 0: this step must have it
        await asyncio.wait_for(supervisor.take(1, asyncio.Event()), 5 * POLL_S)
    one.finish("p2")
    assert await take(supervisor, 1) == ["p0", "p2"]


async def test_prompts_outlive_epochs(make: Make) -> None:
    supervisor, workers = make(2, workers=1, prompts=3)
    for version in range(3):
        await admit(supervisor, version)
        await take(supervisor, version)
    assert workers[0].submitted == ["p0/0", "p1/0", "p2/0", "p0/1", "p1/1", "p2/1"]


async def test_a_generators_failure_ends_take_at_once_and_names_it(make: Make) -> None:
    supervisor, (_, two) = make(by_itself=False)
    await admit(supervisor, 0)
    asyncio.get_running_loop().call_later(
        5 * POLL_S, setattr, two, "failure", RuntimeError("CUDA out of memory")
    )
    said, seconds = await failure_of(supervisor)
    assert said.startswith("generator-1: take: RuntimeError: CUDA out of memory")
    assert seconds < TIMEOUT_S


async def test_a_failure_between_two_takes_ends_the_next_one(make: Make) -> None:
    supervisor, (one, _) = make(2, by_itself=False)
    await admit(supervisor, 0)
    asyncio.get_running_loop().call_later(5 * POLL_S, setattr, one, "failure", RuntimeError("gone"))
    stop = asyncio.Event()
    asyncio.get_running_loop().call_later(2 * POLL_S, stop.set)
    assert await take(supervisor, stop=stop) is None
    await asyncio.sleep(10 * POLL_S)
    said, _ = await failure_of(supervisor)
    assert said.startswith("generator-0: take: RuntimeError: gone")


async def test_silence_longer_than_its_time_names_the_generator_and_its_prompts(make: Make) -> None:
    supervisor, (one, _) = make(4, by_itself=False)
    await admit(supervisor, 0)
    one.finish("p0", "p2")
    said, seconds = await failure_of(supervisor)
    assert said == (
        f"generator-1: no completion for {TIMEOUT_S:g} s (2 prompts were out there, p1, p3 among them)"
    )
    assert TIMEOUT_S < seconds < 10 * TIMEOUT_S


@pytest.mark.parametrize("sign", ["tokens_a_status", "scoring"])
async def test_one_that_gathers_completions_or_waits_for_scores_may_be_silent(
    make: Make, sign: str
) -> None:
    supervisor, workers = make(2, workers=1, by_itself=False)
    setattr(workers[0], sign, 1)
    await admit(supervisor, 0)
    taken = asyncio.create_task(take(supervisor))
    await asyncio.sleep(2 * TIMEOUT_S)
    assert not taken.done()
    workers[0].finish("p0", "p1")
    assert await taken == ["p0", "p1"]


async def test_a_generator_with_nothing_to_do_may_be_silent(make: Make) -> None:
    supervisor, (one, two) = make(1, by_itself=False)
    await admit(supervisor, 0)
    waiting = asyncio.create_task(supervisor.take(0, asyncio.Event()))
    await asyncio.sleep(TIMEOUT_S / 2)
    one.finish("p0")
    await asyncio.wait_for(waiting, LONG_S)
    await asyncio.sleep(2 * TIMEOUT_S)  # both have nothing to do for longer than the timeout
    await admit(supervisor, 1)
    one.finish("p1")
    assert await take(supervisor, 1) == ["p1"]
    assert two.submitted == []


@pytest.mark.parametrize("method", ["take", "status"])
async def test_a_generator_that_does_not_answer_at_all_is_named(make: Make, method: str) -> None:
    supervisor, (one, two) = make(by_itself=False)
    await admit(supervisor, 0)
    one.finish("p0", "p2")
    two.silent.add(method)
    said, _ = await failure_of(supervisor)
    assert said.startswith(f"generator-1: no answer to {method} within")


async def test_a_stop_ends_take_with_none_and_loses_nothing(make: Make) -> None:
    supervisor, (one, two) = make(2, by_itself=False)
    await admit(supervisor, 0)
    stop = asyncio.Event()
    asyncio.get_running_loop().call_later(3 * POLL_S, stop.set)
    assert await take(supervisor, stop=stop) is None
    one.finish("p0")
    two.finish("p1")
    assert await take(supervisor) == ["p0", "p1"]


async def test_what_is_ready_is_taken_even_if_a_stop_was_asked_for(make: Make) -> None:
    supervisor, _ = make(2, staleness=1)
    await admit(supervisor, 0)
    await take(supervisor)
    await asyncio.sleep(5 * POLL_S)
    stop = asyncio.Event()
    stop.set()
    assert await take(supervisor, 1, stop) == ["p2", "p3"]


async def test_a_dropped_prompt_is_reported_and_replaced_by_the_next(make: Make) -> None:
    dropped: list[Dropped] = []
    supervisor, (one, two) = make(2, by_itself=False, on_drop=dropped.append)
    await admit(supervisor, 0)
    waiting = asyncio.create_task(supervisor.take(0, asyncio.Event()))
    one.drop("p0", "no score: 503")
    two.finish("p1")
    while "p2/0" not in one.submitted + two.submitted:
        assert not waiting.done()
        await asyncio.sleep(POLL_S)
    holder = one if "p2" in one.out else two
    holder.finish("p2")
    batch = await asyncio.wait_for(waiting, LONG_S)
    assert prompt_ids(batch) == ["p1", "p2"]
    assert dropped == [Dropped("p0", 0, "no score: 503")]
    assert supervisor.ledger.num_dropped == 1


async def test_after_a_resume_what_was_out_goes_out_again_and_nothing_else(make: Make) -> None:
    first, (_, two) = make(4, staleness=0, by_itself=False)
    await admit(first, 0)
    two.finish("p1")
    await asyncio.wait({asyncio.create_task(first.take(0, asyncio.Event()))}, timeout=5 * POLL_S)
    second, workers = make(4)
    second.ledger.restore(first.ledger.state())
    second.stream.cursor = first.stream.cursor
    second.buffer.add([("p1", 0)], first.buffer.contents().chunks[0])
    await second.resubmit()
    await admit(second, 0)
    assert sorted(name for worker in workers for name in worker.submitted) == [
        "p0/0",
        "p2/0",
        "p3/0",
    ]
    assert await take(second) == ["p0", "p1", "p2", "p3"]


async def test_what_was_handed_out_already_is_not_handed_out_again(make: Make) -> None:
    """A learner is replaced: its first push leases what may be leased, then the rest goes out again."""
    supervisor, (one, two) = make(4, by_itself=False)
    supervisor.ledger.lease(tiny.prompt(9), 0)  # of the checkpoint
    await admit(supervisor, 0)
    await supervisor.resubmit()
    assert sorted(one.submitted + two.submitted) == ["p0/0", "p1/0", "p2/0", "p9/0"]


async def test_weights_are_received_when_every_generator_has_proved_them(make: Make) -> None:
    supervisor, workers = make()
    await supervisor.group.agree_layout(LAYOUT)
    assert await pushed(supervisor) == [{"probe_difference": 0.0}] * 2
    assert [worker.updates for worker in workers] == [[UPDATE]] * 2
    assert [worker.answers for worker in workers] == [[ANSWER]] * 2
    workers[1].silent.add("receive_weights")
    with pytest.raises(RoleFailed, match="generator-1: no answer to receive_weights"):
        await pushed(supervisor, replace(UPDATE, version=4))


@pytest.mark.parametrize("count", [1, 2, 3, 7])
async def test_samples_are_spread_over_all_generators_and_come_in_the_order_of_the_prompts(
    make: Make, count: int
) -> None:
    supervisor, _ = make(workers=3)
    drawn = await supervisor.group.sample([tiny.prompt(i) for i in range(count)], 1.0, 0)
    assert [name for _, name in drawn] == [f"p{i}" for i in range(count)]
    assert len({worker for worker, _ in drawn}) == min(count, 3)


# ---- replacement


async def opened(supervisor: Supervisor) -> None:
    """As a run is after its start: a layout agreed on, a first version proved."""
    await supervisor.group.agree_layout(LAYOUT)
    await pushed(supervisor)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(LONG_S):
        while not condition():
            await asyncio.sleep(POLL_S)


async def test_the_prompts_of_a_dead_generator_go_to_the_others_at_once_and_each_is_trained_once(
    make: Make,
) -> None:
    slow = FakeWorker(by_itself=False)
    slow.silent.add("status")  # it loads for ever
    supervisor, workers = make(4, by_itself=False, spares=[slow])
    await opened(supervisor)
    await admit(supervisor, 0)
    workers[0].dead = True
    await until(lambda: len(workers[1].submitted) == 4)
    assert workers[1].submitted == ["p1/0", "p3/0", "p0/0", "p2/0"]
    workers[1].finish("p0", "p1", "p2", "p3")
    assert await take(supervisor) == ["p0", "p1", "p2", "p3"]
    assert len(supervisor.ledger) == 0


async def test_a_new_generator_proves_the_newest_version_before_it_is_given_a_prompt(
    make: Make,
) -> None:
    spare = FakeWorker()
    supervisor, workers = make(2, workers=1, by_itself=False, spares=[spare])
    await opened(supervisor)
    await admit(supervisor, 0)
    workers[0].dead = True
    assert await take(supervisor) == ["p0", "p1"]
    assert spare.log == ["agree_layout", f"prove {UPDATE.version}", "submit"]
    assert supervisor.group.roster.members[0].name == "generator-0.1"


async def test_what_is_admitted_while_no_generator_is_there_waits_for_the_next_one(
    make: Make,
) -> None:
    spare = FakeWorker()
    spare.silent.add("receive_weights")
    supervisor, workers = make(3, workers=1, by_itself=False, spares=[spare, FakeWorker()])
    await opened(supervisor)
    workers[0].dead = True
    await until(lambda: supervisor.group.roster.present() == [])
    await admit(supervisor, 0)
    assert await take(supervisor) == ["p0", "p1", "p2"]  # of the second spare: the first is stuck
    assert spare.submitted == []


class LosesOne(InProcessHost):
    """A machine is lost between the answer of a generator and its payload's coming here."""

    def __init__(self) -> None:
        self.lost: list[Any] = []

    async def keep(self, member: Member, payload: Any, *, within: float) -> Any:
        if not self.lost and member.name == "generator-0":
            self.lost.append(payload)
            member.handle.dead = True
            raise RoleFailed(f"{member.name}: its machine was lost", kind="died")
        return payload


async def test_what_was_finished_on_a_lost_machine_is_rolled_out_again_and_trained_once(
    make: Make,
) -> None:
    host, spare = LosesOne(), FakeWorker()
    spare.silent.add("status")
    supervisor, workers = make(4, host=host, spares=[spare])
    await opened(supervisor)
    await admit(supervisor, 0)
    assert await take(supervisor) == ["p0", "p1", "p2", "p3"]
    assert len(host.lost) == 1
    assert {*workers[0].submitted} < {*workers[1].submitted}
    assert (len(supervisor.ledger), supervisor.ledger.num_dropped) == (0, 0)


async def test_weights_come_in_the_message_where_their_segment_is_not(make: Make) -> None:
    """A new generator on another machine, and every push to it."""
    spare, asked = FakeWorker(), []
    spare.elsewhere = True

    async def in_full(in_message: bool) -> tuple[WeightUpdate, ProbeAnswer]:
        asked.append(in_message)
        elsewhere = replace(UPDATE, segment="/dev/shm/of-another")
        return UPDATE if in_message else elsewhere, ANSWER

    supervisor, workers = make(2, workers=1, spares=[spare], last_update=in_full)
    await opened(supervisor)
    workers[0].dead = True
    await until(lambda: spare.updates == [UPDATE] and supervisor.group.roster.present() == [0])
    await pushed(supervisor, replace(UPDATE, version=4, segment="/dev/shm/of-another"))
    assert spare.updates == [UPDATE] * 2  # what in_full gives is the newest
    assert asked == [False, True, True]


async def test_a_learner_lost_while_a_generator_is_replaced_is_told_as_that(make: Make) -> None:
    """And does not use up the generators that may still be started."""

    async def lost(in_message: bool) -> tuple[WeightUpdate, ProbeAnswer]:
        raise LearnerLost("learner-0: its process died", kind="died")

    supervisor, workers = make(2, workers=1, spares=[FakeWorker()], last_update=lost)
    await opened(supervisor)
    workers[0].dead = True
    with pytest.raises(LearnerLost, match="learner-0"):
        await take(supervisor)
    assert supervisor.group.roster.present() == []


async def test_a_learner_that_is_lost_before_it_answers_the_probe_is_told_as_that(
    make: Make,
) -> None:
    """At once, though the generators' proofs would never come; and no generator is given up for it."""
    supervisor, workers = make(2, spares=[FakeWorker()])
    await opened(supervisor)
    for worker in workers:
        worker.silent.add("receive_weights")
    answering: asyncio.Future[ProbeAnswer] = asyncio.get_running_loop().create_future()
    pushing = asyncio.create_task(supervisor.push(replace(UPDATE, version=4), answering))
    await asyncio.sleep(0)
    answering.set_exception(LearnerLost("learner-0: its process died", kind="died"))
    with pytest.raises(LearnerLost, match="learner-0"):
        await asyncio.wait_for(pushing, TIMEOUT_S / 2)
    assert supervisor.group.roster.present() == [0, 1]


async def test_a_generator_that_rejects_weights_is_replaced_and_the_push_counts_for_the_others(
    make: Make,
) -> None:
    spare = FakeWorker()
    supervisor, workers = make(2, spares=[spare])
    await supervisor.group.agree_layout(LAYOUT)
    workers[1].rejects = True
    assert len(await pushed(supervisor)) == 1
    assert supervisor.version == UPDATE.version
    await until(lambda: supervisor.group.roster.present() == [0, 1])
    assert spare.updates == [UPDATE]
    assert workers[1].submitted == []


async def test_a_generator_that_joined_with_a_version_is_not_pushed_it_again(make: Make) -> None:
    spare = FakeWorker()
    supervisor, workers = make(2, spares=[spare])
    await opened(supervisor)
    workers[0].dead = True
    await until(lambda: spare.updates == [UPDATE] and supervisor.group.roster.present() == [0, 1])
    await pushed(supervisor)
    assert spare.updates == [UPDATE]
    assert workers[1].updates == [UPDATE]


async def test_when_no_more_may_be_started_the_wait_ends_and_says_so(make: Make) -> None:
    spares = [FakeWorker() for _ in range(3)]
    for spare in spares:
        spare.dead = True
    supervisor, workers = make(2, workers=1, by_itself=False, spares=spares, max_restarts=2)
    await opened(supervisor)
    await admit(supervisor, 0)
    workers[0].dead = True
    message, _ = await failure_of(supervisor)
    assert "generator-0.2" in message
    assert "died" in message
    assert "generators.max_restarts" in message
    assert len(spares) == 1


async def test_an_answer_of_a_generator_that_was_given_up_is_not_counted(make: Make) -> None:
    supervisor, workers = make(2, by_itself=False, spares=[FakeWorker()])
    await opened(supervisor)
    await admit(supervisor, 0)
    stuck = workers[0]
    supervisor.group.roster.mark_lost(
        0, supervisor.group.roster.members[0], RoleFailed("stuck", kind="silent")
    )
    await until(lambda: "p0/0" in workers[1].submitted)
    stuck.finish("p0")
    workers[1].finish("p1", "p0")
    assert await take(supervisor) == ["p0", "p1"]
    assert len(supervisor.buffer) == 0


async def test_samples_of_a_generator_that_dies_meanwhile_are_drawn_by_the_others(
    make: Make,
) -> None:
    spare = FakeWorker()
    spare.silent.add("status")
    supervisor, workers = make(2, spares=[spare])
    workers[0].dead = True
    drawn = await supervisor.group.sample([tiny.prompt(i) for i in range(5)], 1.0, 0)
    assert drawn == [(id(workers[1]), f"p{i}") for i in range(5)]


async def test_a_reset_forgets_every_prompt_here_and_there(make: Make) -> None:
    supervisor, workers = make(4, by_itself=False, spares=[])
    await opened(supervisor)
    await admit(supervisor, 0)
    workers[0].finish("p0")
    await supervisor.reset()
    assert (len(supervisor.ledger), len(supervisor.buffer)) == (0, 0)
    assert all(not worker.out and not worker.ready for worker in workers)
    supervisor.stream.cursor = 0
    await admit(supervisor, 0)
    for worker in workers:
        worker.finish(*worker.out)
    assert await take(supervisor) == ["p0", "p1", "p2", "p3"]


async def test_it_is_settled_when_nothing_older_than_the_proved_version_is_awaited(
    make: Make,
) -> None:
    supervisor, workers = make(2, workers=1, staleness=1, by_itself=False)
    await admit(supervisor, 0)
    workers[0].finish("p0", "p1")
    await take(supervisor)
    await admit(supervisor, 1)  # p2 and p3 are of version 0, p4 and p5 of version 1
    settled = asyncio.create_task(supervisor.wait_settled())
    workers[0].finish("p2", "p4")
    await asyncio.sleep(5 * POLL_S)
    assert not settled.done()
    workers[0].finish("p3")
    await asyncio.wait_for(settled, LONG_S)
    assert [prompt.prompt_id for prompt in supervisor.ledger.outstanding()] == ["p5"]


async def test_held_out_samples_may_take_long_while_their_generator_finishes_some(
    make: Make,
) -> None:
    supervisor, workers = make(2, spares=[FakeWorker()])
    for worker in workers:
        worker.samples_for_s = 3 * TIMEOUT_S
    workers[0].tokens_a_status = 1
    drawn = await supervisor.group.sample([tiny.prompt(i) for i in range(4)], 1.0, 0)
    assert drawn == [(id(workers[0]), f"p{i}") for i in range(4)]  # of the other nothing came


async def test_a_sample_fails_with_the_run_when_nobody_can_come_back(make: Make) -> None:
    supervisor, workers = make(2, workers=1, spares=[], max_restarts=0)
    await opened(supervisor)
    workers[0].dead = True
    with pytest.raises(RoleFailed, match=r"generators\.max_restarts allows no more"):
        await asyncio.wait_for(supervisor.sample([tiny.prompt(0)], 1.0, 0), LONG_S)


async def test_samples_come_through_the_supervisor_as_they_are(make: Make) -> None:
    supervisor, workers = make(2, workers=1, spares=[])
    await opened(supervisor)
    assert await supervisor.sample([tiny.prompt(3)], 1.0, 0) == [(id(workers[0]), "p3")]


async def test_first_weights_that_all_reject_end_the_run_at_once(make: Make) -> None:
    """Whoever came in their place would reject them, too."""
    supervisor, workers = make(2, spares=[FakeWorker() for _ in range(4)])
    await supervisor.group.agree_layout(LAYOUT)
    for worker in workers:
        worker.rejects = True
    with pytest.raises(RoleFailed, match="the digest is another"):
        await asyncio.wait_for(pushed(supervisor), LONG_S)


async def test_prompts_that_are_all_dropped_end_the_run_and_their_reason_is_told(
    make: Make,
) -> None:
    supervisor, workers = make(2, workers=1, by_itself=False, prompts=50)
    await admit(supervisor, 0)
    taking = asyncio.create_task(take(supervisor))
    for number in range(16):
        await until(lambda name=f"p{number}": name in workers[0].out)
        workers[0].drop(f"p{number}", "connection refused")
    with pytest.raises(RoleFailed, match=r"16 prompts in a row .* because: connection refused"):
        await asyncio.wait_for(taking, LONG_S)


async def test_drops_with_a_finished_prompt_between_them_do_not(make: Make) -> None:
    supervisor, workers = make(2, workers=1, by_itself=False, prompts=50)
    await admit(supervisor, 0)
    taking = asyncio.create_task(take(supervisor))
    for number in range(17):
        await until(lambda name=f"p{number}": name in workers[0].out)
        if number == 14:
            workers[0].finish("p14")
        else:
            workers[0].drop(f"p{number}", "connection refused")
    await until(lambda: "p17" in workers[0].out)
    workers[0].finish("p17")
    assert await asyncio.wait_for(taking, LONG_S) == ["p14", "p17"]


async def test_a_push_that_failed_with_the_learner_is_forgotten_by_a_reset(make: Make) -> None:
    async def lost() -> dict[str, float]:
        raise LearnerLost("learner-0: its process died", kind="died")

    supervisor, _ = make(2, spares=[])
    await opened(supervisor)
    supervisor.begin_push(lost())
    with pytest.raises(LearnerLost):
        await supervisor.wait_push()
    await supervisor.reset()
    supervisor.stream.cursor = 0
    await admit(supervisor, 0)
    assert await take(supervisor) == ["p0", "p1"]


# ---- more generators, and fewer


async def test_a_generator_that_is_added_proves_the_newest_version_and_then_shares_the_prompts(
    make: Make,
) -> None:
    spare = FakeWorker(by_itself=False)
    supervisor, workers = make(6, by_itself=False, spares=[spare])
    await opened(supervisor)
    assert await supervisor.scale(3)
    assert supervisor.group.roster.members[2].name == "generator-2.0"
    await admit(supervisor, 0)
    assert spare.log == ["agree_layout", f"prove {UPDATE.version}", "submit"]
    assert [len(worker.out) for worker in workers] == [2, 2, 2]
    for worker in workers:
        worker.finish(*worker.out)
    assert await take(supervisor) == [f"p{i}" for i in range(6)]


async def test_those_that_leave_give_what_they_had_begun_to_the_others_and_each_is_trained_once(
    make: Make,
) -> None:
    supervisor, workers = make(6, workers=3, by_itself=False, spares=[])
    await opened(supervisor)
    await admit(supervisor, 0)
    workers[2].finish("p2")  # of a generator that is gone before it was heard
    assert await supervisor.scale(1)
    await until(lambda: len(workers[0].out) == 6)
    assert supervisor.group.roster.present() == [0]
    assert [worker.log[-1] for worker in workers] == ["submit", "close", "close"]
    workers[0].finish(*workers[0].out)
    assert await take(supervisor) == [f"p{i}" for i in range(6)]


async def test_one_that_left_is_pushed_nothing_and_its_place_is_not_given_again(make: Make) -> None:
    supervisor, workers = make(2, workers=2, spares=[FakeWorker()])
    await opened(supervisor)
    await supervisor.scale(1)
    await supervisor.scale(2)
    assert supervisor.group.roster.present() == [0, 2]
    assert len(await pushed(supervisor, replace(UPDATE, version=4))) == 2
    assert [update.version for update in workers[1].updates] == [3]
    assert [update.version for update in workers[2].updates] == [3, 4]


async def test_one_that_does_not_come_up_is_told_and_the_others_go_on(make: Make) -> None:
    broken = FakeWorker()
    broken.rejects = True
    supervisor, _ = make(4, spares=[FakeWorker(), broken])
    await opened(supervisor)
    with pytest.raises(RoleFailed, match="the digest is another"):
        await supervisor.scale(4)
    assert supervisor.num_generators() == 3
    await until(lambda: len(supervisor.group.roster.present()) == 3)
    await admit(supervisor, 0)
    assert await take(supervisor) == [f"p{i}" for i in range(4)]


async def test_one_that_is_being_replaced_can_be_asked_to_leave(make: Make) -> None:
    spare = FakeWorker()
    spare.silent.add("status")  # loads for ever
    supervisor, workers = make(4, by_itself=False, spares=[spare, FakeWorker()])
    await opened(supervisor)
    await admit(supervisor, 0)
    workers[1].dead = True
    await until(lambda: len(workers) == 3)
    assert await supervisor.scale(1)
    assert supervisor.num_generators() == 1
    await until(lambda: len(workers[0].out) == 4)
    workers[0].finish(*workers[0].out)
    assert await take(supervisor) == [f"p{i}" for i in range(4)]
    assert len(workers) == 3


async def test_a_reset_ends_the_coming_of_new_ones(make: Make) -> None:
    spare = FakeWorker()
    spare.silent.add("status")
    supervisor, workers = make(2, spares=[spare])
    await opened(supervisor)
    scaling = asyncio.create_task(supervisor.scale(3))
    await until(lambda: len(workers) == 3)
    await supervisor.reset()
    assert not await asyncio.wait_for(scaling, LONG_S)
    assert not supervisor.collecting
    assert supervisor.num_generators() == 2
    await opened(supervisor)
    await admit(supervisor, 0)
    assert await take(supervisor) == ["p0", "p1"]


async def test_a_new_one_is_given_what_waited_for_anyone(make: Make) -> None:
    slow = FakeWorker()
    slow.silent.add("status")
    supervisor, workers = make(2, workers=1, spares=[slow, FakeWorker()])
    await opened(supervisor)
    workers[0].dead = True
    await until(lambda: supervisor.group.roster.present() == [])
    await admit(supervisor, 0)
    await supervisor.scale(2)
    assert await take(supervisor) == ["p0", "p1"]
