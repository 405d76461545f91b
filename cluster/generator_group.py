"""The generators as one: who is there, how they are asked, and how one that failed is replaced.

    present --lost: died, silent, engine crashed, weights rejected--> absent
    absent  --a new process: load, agree on the layout, receive and prove the newest version--> present

Only what is present is asked; one that fails while it is asked is lost, and the others go on. A
generator that joins does so between two pushes, so no push ever meets one that is half there.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from actors.generate_request import GeneratorFailed
from actors.trajectory import Prompt
from actors.weight_update import NeedsAll, WeightLayout, WeightsRejected, WeightUpdate
from cluster.learner_group import LearnerLost
from cluster.placement import START_TIMEOUT_S, Host, Member, RoleFailed, ask

Asked = TypeVar("Asked")
MENDED = (GeneratorFailed, WeightsRejected)  # raised by a generator that samples nothing any more


@dataclass(frozen=True)
class Replacement:
    """How a new generator is made."""

    start: Callable[
        [int, int], Member
    ]  # (place, how many were started before) -> it loads by itself
    last_update: Callable[[bool], Awaitable[WeightUpdate]]  # the newest in full; in the message?
    max_restarts: int  # of all generators together
    on_event: Callable[..., None]  # (event, **facts)


class Lost(Exception):
    """The generator asked is lost; whoever holds its prompts has been told."""


class GeneratorGroup:
    def __init__(
        self,
        members: list[Member],
        host: Host,
        *,
        timeout_s: float,
        ping_s: float,
        replacement: Replacement | None = None,
    ) -> None:
        """`timeout_s`: of a call that needs the engine; `ping_s`: of any other. Without a
        `replacement` a generator that fails fails the run."""
        self.members = members
        self._host = host
        self._timeout_s = timeout_s
        self._ping_s = ping_s
        self._replacement = replacement
        self._num_restarts = 0
        self._present = [True] * len(members)
        self._came_or_went = asyncio.Event()
        self._losses: dict[int, RoleFailed] = {}
        self._layout: WeightLayout | None = None
        self._versions: dict[str, int] = {}  # proved, by name
        self._weights = asyncio.Lock()  # held while versions change

    # ---- who is there

    def present(self) -> list[int]:
        return [place for place, there in enumerate(self._present) if there]

    def is_present(self, place: int) -> bool:
        return self._present[place]

    async def lost(self, place: int) -> RoleFailed:
        """Waits until the generator is lost; why."""
        while self._present[place]:
            await self._changed()
        return self._losses[place]

    async def _changed(self) -> None:
        self._came_or_went.clear()
        await self._came_or_went.wait()  # unbounded: its callers race it against what they wait for

    def lose(self, place: int, member: Member, error: RoleFailed) -> None:
        """From now on it is asked nothing. Of several failures the first counts."""
        if self._present[place] and self.members[place] is member:
            self._present[place] = False
            self._losses[place] = error
            self._came_or_went.set()

    # ---- asking

    async def ask(self, place: int, method: Callable[[Any], Any], *args: Any, within: float) -> Any:
        """Ask one. Raises Lost if it failed in a way that a new one mends, else its RoleFailed."""
        member = self.members[place]
        return await self.or_lost(
            place, member, ask(member, method(member.handle), *args, within=within)
        )

    async def or_lost(self, place: int, member: Member, answer: Awaitable[Any]) -> Any:
        """`answer`, with its RoleFailed turned into Lost if a new generator mends it."""
        try:
            return await answer
        except RoleFailed as error:
            failure = self.given_up(place, member, error)
            if failure is error:
                raise  # and not "from" itself
            raise failure from error

    def given_up(self, place: int, member: Member, error: RoleFailed) -> Lost | RoleFailed:
        """What to raise of a failure: Lost, and so it is, if a new generator mends it."""
        if not self._mends(error):
            return error
        self.lose(place, member, error)
        return Lost(str(error))

    def _mends(self, error: RoleFailed) -> bool:
        if isinstance(error, LearnerLost):  # of whom a generator's weights are asked
            return False
        broken = error.kind in ("died", "silent") or isinstance(error.cause, MENDED)
        return self._replacement is not None and broken

    async def each(self, method: Callable[[Any], Any], *args: Any, within: float) -> dict[str, Any]:
        """The answer of each that is there, by name."""
        places = self.present()
        names = [self.members[place].name for place in places]
        calls = (self.ask(place, method, *args, within=within) for place in places)
        return _answered(names, await asyncio.gather(*calls, return_exceptions=True))

    async def started(self) -> list[dict[str, Any]]:
        """Once all have loaded. Whoever fails here fails the run: it would fail again."""
        calls = (ask(it, it.handle.status, within=START_TIMEOUT_S) for it in self.members)
        return await asyncio.gather(*calls)

    async def sample(self, prompts: list[Prompt], temperature: float, seed: int) -> list[Any]:
        """One completion a prompt, spread over those that are there; in the order of the prompts."""
        answers: list[Any] = [None] * len(prompts)
        left = list(range(len(prompts)))
        while left:
            places = self.present() or [await self._anyone()]
            shares = {place: left[i :: len(places)] for i, place in enumerate(places)}
            calls = (
                self.ask(
                    place,
                    lambda it: it.sample,
                    [prompts[i] for i in share],
                    temperature,
                    seed,
                    within=self._timeout_s,
                )
                for place, share in shares.items()
            )
            drawn = _answered(places, await asyncio.gather(*calls, return_exceptions=True))
            for place, completions in drawn.items():
                for i, completion in zip(shares[place], completions, strict=True):
                    answers[i] = completion
            left = [i for i in left if answers[i] is None]
        return answers

    async def _anyone(self) -> int:
        """One that is there, once one is."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while not (places := self.present()):
            if (left := deadline - time.monotonic()) <= 0:
                raise RoleFailed(f"generators: none came back within {START_TIMEOUT_S:g} s")
            try:
                await asyncio.wait_for(self._changed(), left)
            except TimeoutError:
                continue
        return places[0]

    # ---- weights

    async def agree_layout(self, layout: WeightLayout) -> None:
        self._layout = layout
        self._versions.clear()
        agreed = await self.each(lambda it: it.agree_layout, layout, within=self._ping_s)
        assert set(agreed.values()) <= {layout.id}

    async def push(self, update: WeightUpdate) -> dict[str, dict[str, float]]:
        """The proof of each that is there, by name, when all of them have proved the version."""
        shared = self._host.share(update) if update.payload else update
        async with self._weights:
            places = [
                place
                for place in self.present()
                if self._versions.get(self.members[place].name) != update.version
            ]
            names = [self.members[place].name for place in places]
            calls = (self._receive(place, shared) for place in places)
            proofs = _answered(names, await asyncio.gather(*calls, return_exceptions=True))
            self._versions |= dict.fromkeys(proofs, update.version)
        return proofs

    async def _receive(self, place: int, update: Any) -> Any:
        member = self.members[place]
        return await self.or_lost(place, member, self._give(member, update))

    async def _give(self, member: Member, update: Any) -> Any:
        """Its proof of the update, which it is sent in full if it can not use what others can."""
        try:
            return await ask(member, member.handle.receive_weights, update, within=self._timeout_s)
        except RoleFailed as error:
            if not isinstance(error.cause, NeedsAll) or self._replacement is None:
                raise
        full = await self._replacement.last_update(True)
        return await ask(member, member.handle.receive_weights, full, within=self._timeout_s)

    # ---- replacement

    async def replace(self, place: int) -> None:
        """End what is left of the one that was lost, and bring up another in its place. RoleFailed
        if there may be no more."""
        assert self._replacement is not None
        started, old = time.perf_counter(), self.members[place].name
        while True:
            error = self._losses[place]
            await self._end(self.members[place], error)
            if self._num_restarts == self._replacement.max_restarts:
                raise RoleFailed(
                    f"{error}; {self._num_restarts} were replaced already, and generators.max_restarts "
                    "allows no more"
                ) from error
            self._num_restarts += 1
            member = self._replacement.start(place, self._num_restarts)
            self.members[place] = member
            try:
                await self._bring_up(member)
                break
            except (asyncio.CancelledError, LearnerLost):
                self._host.kill(member)
                raise
            except RoleFailed as failed:
                if not self._mends(failed):
                    raise
                self._losses[place] = failed
        self._present[place] = True
        self._came_or_went.set()
        seconds = round(time.perf_counter() - started, 3)
        self._replacement.on_event(
            "generator_replaced", generator=member.name, instead_of=old, seconds=seconds
        )

    async def _end(self, member: Member, error: RoleFailed) -> None:
        assert self._replacement is not None
        stack = await self._host.stack(member) if error.kind == "silent" else ""
        self._replacement.on_event(
            "generator_lost", generator=member.name, reason=str(error), stack=stack
        )
        self._host.kill(member)

    async def _bring_up(self, member: Member) -> None:
        """Load, agree, receive, prove."""
        assert self._replacement is not None
        assert self._layout is not None
        await ask(member, member.handle.status, within=START_TIMEOUT_S)
        await ask(member, member.handle.agree_layout, self._layout, within=self._ping_s)
        async with self._weights:
            update = await self._replacement.last_update(False)
            await self._give(member, update)
            self._versions[member.name] = update.version


def _answered(asked: Sequence[Asked], answers: Sequence[Any]) -> dict[Asked, Any]:
    """The answers of those that were not lost meanwhile. Raises the first that is another error."""
    for answer in answers:
        if isinstance(answer, BaseException) and not isinstance(answer, Lost):
            raise answer
    return {a: b for a, b in zip(asked, answers, strict=True) if not isinstance(b, Lost)}
