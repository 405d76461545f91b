"""Ledger, buffer and generators that come and go: in any order, every prompt is trained once."""

from __future__ import annotations

import json

import pyarrow as pa
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from actors.prompts import PromptStream
from actors.trajectory import (
    Key,
    Prompt,
    Trajectory,
    from_table,
    keys_of,
    packed,
    select,
    to_table,
    unpacked,
)
from cluster.ledger import Ledger
from learner.trajectory_buffer import TrajectoryBuffer
from tests import tiny

SAMPLES = 2


class FlowMachine(RuleBasedStateMachine):
    """As the supervisor moves prompts: leased to generators, taken back from one that is lost and given
    to another, gathered into the buffer by chunks, consumed in steps; checkpoints in between."""

    @initialize(
        n=st.integers(1, 3),
        bound=st.integers(0, 2),
        prompts=st.integers(1, 20),
        generators=st.integers(1, 4),
    )
    def begin(self, n: int, bound: int, prompts: int, generators: int) -> None:
        self.n, self.bound = n, bound
        self.ledger, self.buffer = self.fresh(), TrajectoryBuffer()
        self.stream = PromptStream([tiny.prompt(i) for i in range(prompts)], seed=0, shuffle=True)
        self.out: list[dict[Key, Prompt]] = [{} for _ in range(generators)]
        self.version, self.batches = 0, []
        self.dropped: list[Key] = []
        self.admit()

    def fresh(self) -> Ledger:
        return Ledger(prompts_per_step=self.n, max_staleness=self.bound)

    def submit(self, prompts: list[Prompt], at: int = 0) -> None:
        for number, prompt in enumerate(prompts, at):
            self.out[number % len(self.out)][prompt.prompt_id, prompt.epoch] = prompt

    @rule(at=st.integers(0, 3))
    def admit(self, at: int = 0) -> None:
        prompts = [next(self.stream) for _ in range(max(0, self.ledger.capacity(self.version)))]
        for prompt in prompts:
            self.ledger.lease(prompt, self.version)
        self.submit(prompts, at)

    @precondition(lambda self: any(self.out))
    @rule(data=st.data())
    def a_generator_answers(self, data: st.DataObject) -> None:
        """One chunk of some of what it holds, in any order."""
        out = data.draw(st.sampled_from([out for out in self.out if out]))
        keys = data.draw(st.lists(st.sampled_from(sorted(out)), min_size=1, unique=True))
        rows = [t for key in keys for t in self.rollout(out[key])]
        self.buffer.add(keys, packed(to_table(rows)))
        for key in keys:
            self.ledger.finish(key)
            del out[key]

    @precondition(lambda self: any(self.out))
    @rule(data=st.data())
    def a_prompt_is_dropped(self, data: st.DataObject) -> None:
        out = data.draw(st.sampled_from([out for out in self.out if out]))
        key = data.draw(st.sampled_from(sorted(out)))
        self.ledger.drop(key)
        del out[key]
        self.dropped.append(key)

    @rule(place=st.integers(0, 3), at=st.integers(0, 3))
    def a_generator_is_lost(self, place: int, at: int) -> None:
        """What it held goes out again, to any of them, under the same lease; so does what it had finished
        and what was lost on the way here, for that is finished only when it is in the buffer."""
        held = self.out[place % len(self.out)]
        again = [p for p in self.ledger.outstanding() if (p.prompt_id, p.epoch) in held]
        assert len(again) == len(held)
        held.clear()
        self.submit(again, at)

    @rule()
    def step(self) -> None:
        keys = self.ledger.ready(self.version)
        if keys is None:
            return
        self.ledger.consume(keys)
        batch = self.buffer.take(keys)
        rows = from_table(select(batch.chunks, batch.keys))
        assert [r.trajectory_id for r in rows] == [
            f"{prompt_id}-e{epoch}-{sample}"
            for prompt_id, epoch in keys
            for sample in range(SAMPLES)
        ]
        assert all(0 <= self.version - row.policy_version <= self.bound for row in rows)
        self.batches.append(keys)
        self.version += 1
        self.admit()

    @rule(at=st.integers(0, 3))
    def a_checkpoint_and_a_resume(self, at: int) -> None:
        """Through JSON and one table, as the files hold them; generators start empty."""
        state, contents = json.loads(json.dumps(self.ledger.state())), self.buffer.contents()
        saved = select(contents.chunks, contents.keys) if contents.keys else to_table([])
        self.ledger, self.buffer = self.fresh(), TrajectoryBuffer()
        self.ledger.restore(state)
        self.buffer.add(dict.fromkeys(keys_of(saved)), packed(saved))
        for out in self.out:
            out.clear()
        self.submit(self.ledger.outstanding(), at)

    def rollout(self, prompt: Prompt) -> list[Trajectory]:
        version = self.version
        return [
            tiny.trajectory(
                int(prompt.prompt_id[1:]), prompt.epoch, sample,
                policy_version=version, policy_version_max=version, version_spans=((version, 0),),
            )
            for sample in range(SAMPLES)
        ]  # fmt: skip

    @invariant()
    def the_buffer_holds_what_the_ledger_calls_finished(self) -> None:
        finished = {(lease["prompt"]["prompt_id"], lease["prompt"]["epoch"])
                    for lease in self.ledger.state()["leases"] if lease["finished"]}  # fmt: skip
        assert {*self.buffer.contents().keys} == finished

    @invariant()
    def every_prompt_is_in_one_place(self) -> None:
        consumed = [key for keys in self.batches for key in keys]
        out = [key for out in self.out for key in out]
        everywhere = [*consumed, *out, *self.buffer.contents().keys, *self.dropped]
        assert len(everywhere) == len(set(everywhere)) == self.stream.cursor
        assert sorted(out) == sorted((p.prompt_id, p.epoch) for p in self.ledger.outstanding())

    @invariant()
    def chunks_are_forgotten_with_their_last_prompt(self) -> None:
        chunks: list[pa.Buffer] = self.buffer.contents().chunks
        left = {*self.buffer.contents().keys}
        assert all(left & {*keys_of(unpacked(chunk))} for chunk in chunks)


TestFlow = FlowMachine.TestCase
TestFlow.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
