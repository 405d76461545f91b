"""The generators as one: how they are asked, how one that failed is replaced, how they become more or fewer.

    a new process: load, agree on the layout, receive and prove the newest version --> present (roster.py)

Only what is present is asked; one that fails while it is asked is lost, and the others go on. A
generator joins and leaves between two pushes, so no push ever meets one that is half there.
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
from cluster.placement import FOREVER_S, START_TIMEOUT_S, Host, Member, RoleFailed, ask
from cluster.roster import Roster

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
        self.roster = Roster(members)
        self._host = host
        self._timeout_s = timeout_s
        self._ping_s = ping_s
        self._replacement = replacement
        self._num_restarts = 0
        self._layout: WeightLayout | None = None
        self._versions: dict[str, int] = {}  # proved, by name
        self._weights = asyncio.Lock()  # held while versions change

    # ---- asking

    async def ask(self, place: int, method: Callable[[Any], Any], *args: Any, within: float) -> Any:
        """Ask one. Raises Lost if it failed in a way that a new one mends, else its RoleFailed."""
        member = self.roster.members[place]
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
        self.roster.lose(place, member, error)
        return Lost(str(error))

    def silent(self, place: int, member: Member) -> Lost | RoleFailed:
        """What to raise of one that finishes nothing."""
        said = f"{member.name}: no completion for {self._timeout_s:g} s"
        return self.given_up(place, member, RoleFailed(said, kind="silent"))

    def _mends(self, error: RoleFailed) -> bool:
        if isinstance(error, LearnerLost):  # of whom a generator's weights are asked
            return False
        broken = error.kind in ("died", "silent") or isinstance(error.cause, MENDED)
        return self._replacement is not None and broken

    async def each(self, method: Callable[[Any], Any], *args: Any, within: float) -> dict[str, Any]:
        """The answer of each that is there, by name."""
        places = self.roster.present()
        names = [self.roster.members[place].name for place in places]
        calls = (self.ask(place, method, *args, within=within) for place in places)
        return _answered(names, await asyncio.gather(*calls, return_exceptions=True))

    async def started(self) -> list[dict[str, Any]]:
        """Once all have loaded. Whoever fails here fails the run: it would fail again."""
        calls = (ask(it, it.handle.status, within=START_TIMEOUT_S) for it in self.roster.members)
        return await asyncio.gather(*calls)

    async def sample(self, prompts: list[Prompt], temperature: float, seed: int) -> list[Any]:
        """One completion a prompt, spread over those that are there; in the order of the prompts."""
        answers: list[Any] = [None] * len(prompts)
        left = list(range(len(prompts)))
        while left:
            places = self.roster.present() or [await self.roster.anyone()]
            shares = {place: left[i :: len(places)] for i, place in enumerate(places)}
            calls = (
                self._sample(place, [prompts[i] for i in share], temperature, seed)
                for place, share in shares.items()
            )
            drawn = _answered(places, await asyncio.gather(*calls, return_exceptions=True))
            for place, completions in drawn.items():
                for i, completion in zip(shares[place], completions, strict=True):
                    answers[i] = completion
            left = [i for i in left if answers[i] is None]
        return answers

    async def _sample(self, place: int, prompts: list[Prompt], *given: Any) -> Any:
        """Of one generator, which may take as long as it finishes a completion every `timeout_s`."""
        member = self.roster.members[place]
        asked = ask(member, member.handle.sample, prompts, *given, within=FOREVER_S)
        sampling = asyncio.create_task(self.or_lost(place, member, asked))
        tokens = -1
        try:
            while not (await asyncio.wait([sampling], timeout=self._timeout_s))[0]:
                status = await self.ask(place, lambda it: it.status, within=self._timeout_s)
                if status["completion_tokens"] == tokens:
                    raise self.silent(place, member)
                tokens = status["completion_tokens"]
            return await sampling
        finally:
            sampling.cancel()

    # ---- weights

    async def agree_layout(self, layout: WeightLayout) -> None:
        self._layout = layout
        self._versions.clear()
        agreed = await self.each(lambda it: it.agree_layout, layout, within=self._ping_s)
        assert set(agreed.values()) <= {layout.id}

    async def push(self, update: WeightUpdate) -> dict[str, dict[str, float]]:
        """The proof of each that is there, by name, when all of them have proved the version. RoleFailed
        if all reject the first one."""
        shared = self._host.share(update) if update.payload else update
        async with self._weights:
            places = [
                place
                for place in self.roster.present()
                if self._versions.get(self.roster.members[place].name) != update.version
            ]
            names = [self.roster.members[place].name for place in places]
            calls = (self._receive(place, shared) for place in places)
            proofs = _answered(names, await asyncio.gather(*calls, return_exceptions=True))
            self._versions |= dict.fromkeys(proofs, update.version)
        losses = [] if self._versions else [self.roster.loss(place) for place in places]
        if losses and all(isinstance(loss.cause, WeightsRejected) for loss in losses):
            raise losses[0]  # others in their place would reject the first weights, too
        return proofs

    async def _receive(self, place: int, update: Any) -> Any:
        member = self.roster.members[place]
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

    # ---- others in their place, more of them, fewer

    async def replace(self, place: int) -> None:
        """End what is left of the one that was lost, and bring up another in its place, unless that is
        closed meanwhile. RoleFailed if there may be no more."""
        assert self._replacement is not None
        started, old = time.perf_counter(), self.roster.members[place].name
        while not self.roster.is_closed(place):
            error = self.roster.loss(place)
            await self._end(self.roster.members[place], error)
            if self._num_restarts == self._replacement.max_restarts:
                raise RoleFailed(
                    f"{error}; {self._num_restarts} were replaced already, and generators.max_restarts "
                    "allows no more"
                ) from error
            self._num_restarts += 1
            if await self._comes_up(place, self._num_restarts):
                self._replacement.on_event(
                    "generator_replaced",
                    generator=self.roster.members[place].name,
                    instead_of=old,
                    seconds=round(time.perf_counter() - started, 3),
                )
                return

    async def add(self) -> int:
        """Bring up one more; its place, once it has proved the newest weights. RoleFailed if it fails:
        then all is as before."""
        place = self.roster.add()
        try:
            if await self._comes_up(place, 0):
                return place
            self._host.kill(self.roster.members[place])
            raise self.roster.loss(place)
        except BaseException:
            self.roster.close(place)
            raise

    async def dismiss(self, place: int) -> None:
        """End whoever is there or comes there, within 10 s; nobody is asked anything of it any more."""
        async with self._weights:
            self.roster.close(place)
        await self._host.stop([self.roster.members[place]])

    async def _end(self, member: Member, error: RoleFailed) -> None:
        assert self._replacement is not None
        stack = await self._host.stack(member) if error.kind == "silent" else ""
        self._replacement.on_event(
            "generator_lost", generator=member.name, reason=str(error), stack=stack
        )
        self._host.kill(member)

    async def _comes_up(self, place: int, attempt: int) -> bool:
        """Start one there. False if it fails in a way that another start may mend, or is not wanted any
        more."""
        member = self.roster.members[place] = await self._start(place, attempt)
        try:
            await self._bring_up(member)
        except BaseException as error:
            if isinstance(error, RoleFailed) and self._mends(error):
                self.roster.failed(place, error)
                return False
            self._host.kill(member)
            raise
        if self.roster.is_closed(place):
            self._host.kill(member)
            return False
        self.roster.come(place)
        return True

    async def _start(self, place: int, attempt: int) -> Member:
        """By a thread, for it may wait for a GPU, and the others go on meanwhile."""
        assert self._replacement is not None
        starting = asyncio.ensure_future(asyncio.to_thread(self._replacement.start, place, attempt))
        try:
            return await asyncio.shield(starting)
        except asyncio.CancelledError:
            starting.add_done_callback(self._kill_started)
            raise

    def _kill_started(self, starting: asyncio.Future[Member]) -> None:
        if not starting.cancelled() and starting.exception() is None:
            self._host.kill(starting.result())

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
