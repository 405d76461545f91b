"""Whatever happens, in whatever order: a prompt is in one state, and no token is trained too stale."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from actors.prompts import PromptStream
from cluster.ledger import Key, Ledger
from tests import tiny


class LedgerMachine(RuleBasedStateMachine):
    """A run as the ledger sees it: prompts finish or are dropped in any order, steps consume."""

    @initialize(n=st.integers(1, 4), bound=st.integers(0, 3), prompts=st.integers(1, 40))
    def begin(self, n: int, bound: int, prompts: int) -> None:
        self.n, self.bound = n, bound
        self.ledger = self.fresh()
        self.stream = PromptStream([tiny.prompt(i) for i in range(prompts)], seed=0, shuffle=True)
        self.version = 0
        self.leased: dict[Key, int] = {}  # key -> version; in the order of the leases
        self.finished: set[Key] = set()
        self.consumed: list[Key] = []
        self.dropped: list[Key] = []
        self.admit()

    def fresh(self) -> Ledger:
        return Ledger(prompts_per_step=self.n, max_staleness=self.bound)

    @property
    def under_way(self) -> list[Key]:
        return [key for key in self.leased if key not in self.finished]

    @rule()
    def admit(self) -> None:
        """As many as may be leased, as the supervisor does."""
        for _ in range(max(0, self.ledger.capacity(self.version))):
            prompt = next(self.stream)
            self.ledger.lease(prompt, self.version)
            self.leased[prompt.prompt_id, prompt.epoch] = self.version
        assert self.ledger.capacity(self.version) <= 0

    @precondition(lambda self: self.under_way)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(self.under_way))
        self.ledger.finish(key)
        self.finished.add(key)

    @precondition(lambda self: self.under_way)
    @rule(count=st.integers(1, 8))
    def the_youngest_overtake(self, count: int) -> None:
        for key in self.under_way[-count:]:
            self.ledger.finish(key)
            self.finished.add(key)

    @precondition(lambda self: self.under_way)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(self.under_way))
        self.ledger.drop(key)
        del self.leased[key]
        self.dropped.append(key)

    @rule()
    def step(self) -> None:
        """Consume a batch if one is ready, publish, and admit again."""
        keys = self.ledger.ready(self.version)
        if keys is None:
            return
        by_age = [key for key in self.leased if key in self.finished]
        assert keys == by_age[: self.n], "a step takes the oldest that are finished"
        for key in keys:
            assert self.version - self.leased[key] <= self.bound, f"{key} is too stale"
        self.ledger.consume(keys)
        for key in keys:
            del self.leased[key]
            self.finished.remove(key)
            self.consumed.append(key)
        self.version += 1
        self.admit()

    @rule()
    def a_step_is_refused(self) -> None:
        """Its batch is dropped, the version stays, and the places are given again."""
        keys = self.ledger.ready(self.version)
        if keys is None:
            return
        capacity = self.ledger.capacity(self.version)
        self.ledger.consume(keys)
        self.ledger.refuse(keys)
        assert self.ledger.capacity(self.version) == capacity + self.n
        for key in keys:
            del self.leased[key]
            self.finished.remove(key)
            self.dropped.append(key)
        self.admit()

    @rule()
    def a_checkpoint_and_a_resume(self) -> None:
        saved = json.loads(json.dumps(self.ledger.state()))
        restored = self.fresh()
        restored.restore(saved)
        assert restored.state() == self.ledger.state()
        assert restored.outstanding() == self.ledger.outstanding()
        assert restored.ready(self.version) == self.ledger.ready(self.version)
        self.ledger = restored

    @invariant()
    def every_key_is_in_exactly_one_state(self) -> None:
        outstanding = [(p.prompt_id, p.epoch) for p in self.ledger.outstanding()]
        assert outstanding == self.under_way
        states = [*outstanding, *self.finished, *self.consumed, *self.dropped]
        assert len(states) == len(set(states))
        assert len(states) == self.stream.cursor

    @invariant()
    def counts_are_those_of_the_keys(self) -> None:
        ledger = self.ledger
        assert ledger.num_consumed == len(self.consumed) == self.n * self.version
        assert ledger.num_dropped == len(self.dropped)
        assert ledger.num_leased == len(self.leased) + len(self.consumed)

    @invariant()
    def no_more_are_out_than_the_bound_allows(self) -> None:
        assert len(self.leased) <= (1 + self.bound) * self.n

    @invariant()
    def a_step_is_ready_exactly_if_those_it_leaves_can_be_consumed_in_time(self) -> None:
        by_age = list(self.leased)
        keys = [key for key in by_age if key in self.finished][: self.n]
        left = [self.leased[key] for key in by_age if key not in keys]
        in_time = all(
            self.version + 1 + place // self.n - leased_at <= self.bound
            for place, leased_at in enumerate(left)
        )
        full = len(keys) == self.n and in_time
        assert self.ledger.ready(self.version) == (keys if full else None)

    @invariant()
    def a_full_ledger_that_waits_for_nothing_is_ready(self) -> None:
        if not self.under_way and len(self.finished) >= self.n:
            assert self.ledger.ready(self.version) is not None


TestLedger = LedgerMachine.TestCase
TestLedger.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)


def leased(count: int, *, n: int = 1, bound: int = 0, version: int = 0) -> Ledger:
    ledger = Ledger(prompts_per_step=n, max_staleness=bound)
    for i in range(count):
        ledger.lease(tiny.prompt(i), version)
    return ledger


def key(number: int) -> Key:
    return f"p{number}", 0


def test_two_overtaken_prompts_make_a_step_wait_before_both_are_due() -> None:
    """Both were leased at version 0 and may be consumed at 2 at the latest, one a step: the last
    step that may leave them behind is that of version 0."""
    ledger = leased(3, n=1, bound=2)
    ledger.finish(key(2))
    ledger.consume(ledger.ready(0) or [])
    ledger.lease(tiny.prompt(3), 1)
    ledger.finish(key(3))
    assert ledger.ready(1) is None
    ledger.finish(key(1))
    assert ledger.ready(1) == [key(1)]


def test_with_staleness_zero_a_step_is_the_whole_admission() -> None:
    ledger = leased(3, n=3)
    assert ledger.capacity(0) == 0
    for i in (2, 0):
        ledger.finish(key(i))
        assert ledger.ready(0) is None
    ledger.finish(key(1))
    assert ledger.ready(0) == [key(0), key(1), key(2)]


def test_in_order_a_step_takes_the_oldest_and_waits_for_them() -> None:
    ledger = Ledger(prompts_per_step=2, max_staleness=2, in_order=True)
    for i in range(6):
        ledger.lease(tiny.prompt(i), 0)
    for i in (1, 2, 3):
        ledger.finish(key(i))
    assert ledger.ready(0) is None
    assert ledger.num_awaited(0) == 0  # leased at this version
    assert ledger.num_awaited(1) == 3
    ledger.finish(key(0))
    assert ledger.ready(0) == [key(0), key(1)]


@given(st.integers(1, 5), st.integers(0, 3), st.integers(0, 5))
def test_capacity_is_what_the_next_steps_within_the_bound_consume(
    n: int, bound: int, version: int
) -> None:
    assert Ledger(prompts_per_step=n, max_staleness=bound).capacity(version) == n * (
        version + 1 + bound
    )


def test_a_drop_gives_its_place_back() -> None:
    ledger = leased(2, n=2)
    ledger.drop(key(0))
    assert ledger.capacity(0) == 1
    assert [p.prompt_id for p in ledger.outstanding()] == ["p1"]


@pytest.mark.parametrize("bound", [0, 2])
def test_after_refusals_the_step_gets_a_new_batch_that_is_no_staler(bound: int) -> None:
    """Each batch of the version is refused; what replaces it is leased at that version."""
    ledger, version = Ledger(prompts_per_step=2, max_staleness=bound), 5
    ledger.num_leased = ledger.num_consumed = 2 * version
    numbers = iter(range(100))
    for _attempt in range(4):
        for number in [next(numbers) for _ in range(ledger.capacity(version))]:
            ledger.lease(tiny.prompt(number), version)
            ledger.finish(key(number))
        assert len(ledger) == 2 * (1 + bound)
        batch = ledger.ready(version)
        assert batch is not None
        ledger.consume(batch)
        ledger.refuse(batch)
    assert ledger.num_consumed == 2 * version
    assert ledger.num_dropped == 8
    assert [number for number, _ in batch] == ["p6", "p7"]  # the oldest, never one twice


def test_only_the_step_at_hand_can_be_refused_and_only_once() -> None:
    ledger = leased(2, n=1, bound=1)
    for i in (0, 1):
        ledger.finish(key(i))
        ledger.consume([key(i)])
    with pytest.raises(AssertionError, match="step at hand"):
        ledger.refuse([key(0)])
    ledger.refuse([key(1)])
    with pytest.raises(AssertionError, match="step at hand"):
        ledger.refuse([key(1)])


@pytest.mark.parametrize(
    ("done", "wrong"),
    [
        ([], lambda ledger: ledger.lease(tiny.prompt(0), 0)),
        (["finish"], lambda ledger: ledger.finish(key(0))),
        (["finish"], lambda ledger: ledger.drop(key(0))),
        ([], lambda ledger: ledger.consume([key(0)])),
    ],
    ids=["leased twice", "finished twice", "dropped when finished", "consumed when unfinished"],
)
def test_a_prompt_cannot_be_in_two_states(done: list[str], wrong: Any) -> None:
    ledger = leased(1)
    for method in done:
        getattr(ledger, method)(key(0))
    with pytest.raises(AssertionError, match="p0"):
        wrong(ledger)


@pytest.mark.parametrize("method", ["finish", "drop"])
def test_what_was_never_leased_cannot_finish_or_be_dropped(method: str) -> None:
    with pytest.raises(KeyError):
        getattr(leased(1), method)(key(7))


def test_without_leases_is_the_state_at_the_end_of_the_last_step() -> None:
    ledger = leased(5, n=2, bound=1)
    before = Ledger(prompts_per_step=2, max_staleness=1)
    ledger.drop(key(4))
    for i in (0, 1):
        ledger.finish(key(i))
    ledger.consume(ledger.ready(0) or [])
    ledger.drop(key(2))  # comes again after the resume, and may be dropped again
    state = ledger.without_leases()
    assert state["leases"] == []
    before.restore(json.loads(json.dumps(state)))
    assert (before.num_consumed, before.num_dropped) == (2, 1)
    assert before.without_leases() == before.state()
    assert before.outstanding() == []
    assert before.capacity(1) == 4  # two steps of two, nothing out


def test_a_restored_prompt_is_whole() -> None:
    ledger = Ledger(prompts_per_step=1, max_staleness=0)
    said = [{"role": "user", "content": "a"}]
    given_ = tiny.prompt(0, epoch=3, metadata={"k": [1, {"deep": None}]}, messages=said)
    ledger.lease(given_, 5)
    restored = Ledger(prompts_per_step=1, max_staleness=0)
    restored.restore(json.loads(json.dumps(ledger.state())))
    assert restored.outstanding() == [given_]
