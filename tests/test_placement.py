"""Every way a member can fail to answer becomes a RoleFailed that names it and what was asked."""

from __future__ import annotations

import asyncio
import socket
import time
from typing import Any

import pytest

from cluster import ray_host
from cluster.config import BadInput
from cluster.placement import InProcessHost, Member, RoleFailed, ask, ask_beside


class Component:
    """What a member may be: plain and async methods."""

    def __init__(self, *given: Any) -> None:
        self.given = given
        self.closed = 0

    def plain(self, number: int) -> int:
        return number + 1

    async def slow(self, number: int) -> int:
        await asyncio.sleep(0.01)
        return number + 1

    async def silent(self) -> None:
        await asyncio.sleep(60)

    async def broken(self) -> None:
        raise ValueError("no such token")

    def close(self) -> None:
        self.closed += 1


class Died(Exception):
    """What Ray raises when an actor's process is gone."""


Died.__name__ = "ActorDiedError"


class RemoteMethod:
    """As Ray's: called by .remote(), and named by _method_name."""

    _method_name = "take"

    def __init__(self, answer: Any) -> None:
        self._answer = answer

    def remote(self, *args: Any) -> Any:
        async def call() -> Any:
            if isinstance(self._answer, Exception):
                raise self._answer
            return self._answer, args

        return call()


@pytest.fixture
def member() -> Member:
    return Member("generator-1", Component())


async def test_plain_and_async_methods_and_remote_ones_are_asked_alike(member: Member) -> None:
    assert await ask(member, member.handle.plain, 1, within=1) == 2
    assert await ask(member, member.handle.slow, 1, within=1) == 2
    assert await ask(member, RemoteMethod("there"), 3, within=1) == ("there", (3,))


async def test_silence_ends_at_the_deadline_and_names_member_method_and_seconds(
    member: Member,
) -> None:
    started = time.monotonic()
    with pytest.raises(RoleFailed, match=r"^generator-1: no answer to silent within 0\.05 s$"):
        await ask(member, member.handle.silent, within=0.05)
    assert time.monotonic() - started < 1


async def test_an_exception_over_there_is_named_and_kept_as_the_cause(member: Member) -> None:
    with pytest.raises(
        RoleFailed, match="generator-1: broken: ValueError: no such token"
    ) as failed:
        await ask(member, member.handle.broken, within=1)
    assert isinstance(failed.value.__cause__, ValueError)


async def test_a_death_is_told_as_one(member: Member) -> None:
    with pytest.raises(RoleFailed, match=r"^generator-1: its process died during take"):
        await ask(member, RemoteMethod(Died("lengthy words of Ray's")), within=1)


async def test_an_answer_that_is_lost_with_its_machine_is_a_death_too(member: Member) -> None:
    class ObjectReconstructionFailedError(Exception):
        pass

    with pytest.raises(RoleFailed, match=r"generator-1: its machine was lost.* take") as failed:
        await ask(member, RemoteMethod(ObjectReconstructionFailedError("at length")), within=1)
    assert failed.value.kind == "died"
    assert failed.value.comes_back  # elsewhere, if Ray may restart it


async def test_what_ray_wraps_is_told_by_its_cause(member: Member) -> None:
    wrapped = RuntimeError("a traceback of forty lines")
    wrapped.cause = ValueError("no such token")  # type: ignore[attr-defined]
    with pytest.raises(RoleFailed, match="generator-1: take: ValueError: no such token"):
        await ask(member, RemoteMethod(wrapped), within=1)


async def test_a_cancelled_question_is_cancelled_not_failed(member: Member) -> None:
    question = asyncio.create_task(ask(member, member.handle.silent, within=10))
    await asyncio.sleep(0)
    question.cancel()
    with pytest.raises(asyncio.CancelledError):
        await question


async def test_in_one_process_a_member_is_the_object_itself() -> None:
    host = InProcessHost()
    made = host.start("reward", Component, 1, 2, env={"X": "1"}, gpus=1)
    assert (made.name, made.handle.given) == ("reward", (1, 2))
    assert await host.same_machine([made])
    value = object()
    assert host.share(value) is value
    assert await host.keep(made, value, within=1) is value
    await host.stop([made])
    assert made.handle.closed == 1


@pytest.mark.parametrize("address", ["127.0.0.1:{port}", "ray://127.0.0.1:{port}", "nonsense"])
def test_an_address_where_nothing_answers_is_bad_input_at_once(address: str) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    started = time.monotonic()
    with pytest.raises(BadInput, match="ray_address"):
        ray_host._probe(address.format(port=port))
    assert time.monotonic() - started < 6


async def test_in_one_process_an_answer_and_its_payload_come_as_they_are() -> None:
    class Pair:
        async def take(self, number: int) -> tuple[int, list[int]]:
            return number, [number]

    member = Member("generator-0", Pair())
    assert await ask_beside(member, member.handle.take, 3, within=1.0) == (3, [3])
