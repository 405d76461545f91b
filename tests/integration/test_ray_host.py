"""What the driver holds of an actor's answer stays when the actor is gone."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pytest

from cluster.placement import Member, RoleFailed, ask, ask_beside
from cluster.ray_host import RayHost

LARGE = 300_000  # beyond what Ray sends along with the answer: it lies in the object store


class Worker:
    async def take(self, rows: int) -> tuple[str, pa.Table]:
        return "two prompts", pa.table({"x": list(range(rows))})

    async def broken(self) -> tuple[str, pa.Table]:
        raise ValueError("no such token")

    def pid(self) -> int:
        return os.getpid()


class Reader:
    def length(self, table: pa.Table) -> int:
        return len(table)


@pytest.fixture(scope="module")
def host() -> Iterator[RayHost]:
    host = RayHost("local", "test-ray-host")
    yield host
    host.close()


def start(host: RayHost, kind: type, *args: Any) -> Member:
    return host.start(f"{kind.__name__}-{time.monotonic_ns()}", kind, *args, env={})


@pytest.mark.parametrize("rows", [3, LARGE])
async def test_a_payload_outlives_the_actor_that_made_it(host: RayHost, rows: int) -> None:
    worker, reader = start(host, Worker), start(host, Reader)
    answer, payload = await ask_beside(worker, worker.handle.take, rows, within=60)
    assert answer == "two prompts"
    assert not isinstance(payload, pa.Table)  # a reference: nothing was fetched
    os.kill(await ask(worker, worker.handle.pid, within=60), signal.SIGKILL)
    await asyncio.sleep(1.0)
    with pytest.raises(RoleFailed, match="died"):
        await ask(worker, worker.handle.pid, within=60)
    assert await ask(reader, reader.handle.length, payload, within=60) == rows


async def test_a_failure_is_raised_with_the_answer(host: RayHost) -> None:
    worker = start(host, Worker)
    with pytest.raises(RoleFailed, match="broken: ValueError: no such token"):
        await ask_beside(worker, worker.handle.broken, within=60)
