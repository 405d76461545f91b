"""The learner's ranks as one: every call goes to all of them, for each is a collective."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from actors.weight_update import ProbeAnswer, WeightLayout, WeightUpdate
from cluster.metrics import reduce_ranks
from cluster.placement import START_TIMEOUT_S, Host, Member, RoleFailed, ask
from learner.learner_spec import Rendezvous, StepRefused
from learner.trajectory_buffer import Batch

SETTLE_S = 10.0  # the loss of a machine is told after two, the broken connections at once
SAVED_EVERY_S = 0.1


class LearnerLost(RoleFailed):
    """A rank died or does not answer: the group is of no use any more."""


class LearnerGroup:
    def __init__(
        self,
        ranks: list[Member],
        host: Host,
        *,
        timeout_s: float,
        again: Callable[[int], list[Member]] | None = None,
    ) -> None:
        """`again`: the n-th restart -> new ranks. Without it a rank that is lost fails the run."""
        self.ranks = ranks
        self.num_restarts = 0
        self._host = host
        self._timeout_s = timeout_s
        self._again = again
        self.push_bytes = 0

    async def start(self, run_dir: Path) -> list[dict[str, Any]]:
        """Bring the ranks together and load the models."""
        try:
            rendezvous = await meet(self.ranks, self._host, run_dir, self._timeout_s)
        except RoleFailed as error:
            raise await self._named([error]) from error
        with met_at(rendezvous):
            return await self._all(lambda it: it.start, rendezvous, within=START_TIMEOUT_S)

    async def restart(self, run_dir: Path) -> list[dict[str, Any]]:
        """End what is left of the ranks, and bring up new ones; they hold what a new run holds."""
        assert self._again is not None
        for rank in self.ranks:
            self._host.kill(rank)
        self.num_restarts += 1
        self.ranks = self._again(self.num_restarts)
        return await self.start(run_dir)

    async def prepare_publish(self, segment: str | None) -> WeightLayout:
        layout: WeightLayout = (await self._all(lambda it: it.prepare_publish, segment))[0]
        self.push_bytes = layout.total_bytes
        return layout

    async def publish(self, version: int) -> tuple[WeightUpdate, asyncio.Task[ProbeAnswer]]:
        """The update once it is written, and the learner's answer to its probe, which is computed beside
        the engines' own. Both are asked for at once: no step that changes the weights comes between."""
        writing = asyncio.create_task(self._all(lambda it: it.publish, version))
        answering = asyncio.create_task(self._answer_probe(version))
        answering.add_done_callback(_retrieve)
        try:
            return (await writing)[0], answering
        except BaseException:
            writing.cancel()
            answering.cancel()
            raise

    async def _answer_probe(self, version: int) -> ProbeAnswer:
        return (await self._all(lambda it: it.answer_probe, version))[0]

    async def last_update(self, in_message: bool) -> tuple[WeightUpdate, ProbeAnswer]:
        """The newest version in full and the answer to its probe, once the call at hand has ended."""
        last: tuple[WeightUpdate, ProbeAnswer] = await self._first(
            lambda it: it.last_update, in_message
        )
        return last

    async def update(
        self, batch: Batch, step: int, version: int, folder: Path
    ) -> dict[str, float] | StepRefused:
        """Metrics; or that the step is refused, of which all ranks must be of one mind."""
        given = (step, version, str(folder.resolve()), batch.keys, *batch.chunks)
        answers = await self._all(lambda it: it.update, *given)
        refusals = [answer for answer in answers if isinstance(answer, StepRefused)]
        if not refusals:
            return reduce_ranks(answers)
        reasons = sorted({refusal.reason for refusal in refusals})
        if len(refusals) < len(answers) or len(reasons) > 1:
            raise RoleFailed(
                f"learner: {len(refusals)} of {len(answers)} ranks refused step {step} "
                f"({'; '.join(reasons)}): their weights are no longer of one model"
            )
        return refusals[0]

    async def save_trajectories(self, batch: Batch, path: Path) -> None:
        """Write them to one Parquet file: rank 0 does, for the driver never holds any."""
        given = (str(path.resolve()), batch.keys, *batch.chunks)
        await self._first(lambda it: it.save_trajectories, *given)

    async def policy_logprobs(self, samples: Any) -> list[np.ndarray]:
        return (await self._all(lambda it: it.policy_logprobs, samples))[0]

    async def reference_logprobs(self, samples: Any) -> list[np.ndarray]:
        return (await self._all(lambda it: it.reference_logprobs, samples))[0]

    async def save(self, folder: Path) -> None:
        """Begin to write the learner's state as it is now to `folder`; `wait_saved` for the end, which
        must come before the next save."""
        await self._all(lambda it: it.save, str(folder.resolve()))

    async def wait_saved(self) -> None:
        """Wait until what `save` began is written."""
        deadline = time.monotonic() + self._timeout_s
        while not all(await self._all(lambda it: it.saved)):
            if time.monotonic() > deadline:
                raise RoleFailed(
                    f"learner: a checkpoint not written within {self._timeout_s:g} s: is the disk stuck?"
                )
            await asyncio.sleep(SAVED_EVERY_S)

    async def load(self, folder: Path) -> None:
        await self._all(lambda it: it.load, str(folder.resolve()))

    async def _first(self, method: Callable[[Any], Any], *args: Any) -> Any:
        """Rank 0 alone: what is no collective."""
        rank = self.ranks[0]
        try:
            return await ask(rank, method(rank.handle), *args, within=self._timeout_s)
        except RoleFailed as error:
            raise await self._named([error]) from error

    async def _all(
        self, method: Callable[[Any], Any], *args: Any, within: float | None = None
    ) -> list[Any]:
        within = within or self._timeout_s
        calls = [
            asyncio.create_task(ask(rank, method(rank.handle), *args, within=within))
            for rank in self.ranks
        ]
        try:
            return await asyncio.gather(*calls)
        except RoleFailed:
            # A rank that died takes the collectives of the others with it: who was first?
            await asyncio.wait(calls, timeout=SETTLE_S)
            failed = [call.exception() for call in calls if call.done() and not call.cancelled()]
            for call in calls:
                call.cancel()
            raise await self._named([e for e in failed if isinstance(e, RoleFailed)]) from None

    async def _named(self, errors: list[RoleFailed]) -> RoleFailed:
        """The failure that explains the others; a LearnerLost where new ranks mend it."""
        first = min(errors, key=lambda error: ("died", "silent", "raised").index(error.kind))
        if first.kind == "raised" or self._again is None:
            return first
        return LearnerLost(str(first), kind=first.kind, cause=first.cause)


def _retrieve(task: asyncio.Task[Any]) -> None:
    """Its failure is told to whoever waits for it, and not to the log if nobody does."""
    if not task.cancelled():
        task.exception()


async def meet(ranks: list[Member], host: Host, run_dir: Path, timeout_s: float) -> Rendezvous:
    """Where the ranks come together: a file if they share a machine, else rank 0's address."""
    if await host.same_machine(ranks):
        meeting = run_dir.resolve() / f"rendezvous-{os.getpid()}"
        meeting.unlink(missing_ok=True)
        return Rendezvous(len(ranks), file=str(meeting))
    port = await ask(ranks[0], ranks[0].handle.port, within=timeout_s)
    return Rendezvous(len(ranks), host=await host.address(ranks[0]), port=port)


@contextlib.contextmanager
def met_at(rendezvous: Rendezvous) -> Iterator[None]:
    """Once they have met nobody needs the file."""
    try:
        yield
    finally:
        if rendezvous.file:
            Path(rendezvous.file).unlink(missing_ok=True)
