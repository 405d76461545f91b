"""The learner's ranks as one: every call goes to all of them, for each is a collective."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from actors.weight_update import WeightLayout, WeightUpdate
from cluster.metrics import reduce_ranks
from cluster.placement import Host, Member, ask
from learner.learner_spec import Rendezvous
from learner.trajectory_buffer import Batch


class LearnerGroup:
    def __init__(self, ranks: list[Member], host: Host, *, timeout_s: float) -> None:
        self.ranks = ranks
        self._host = host
        self._timeout_s = timeout_s
        self.push_bytes = 0

    async def start(self, run_dir: Path) -> list[dict[str, Any]]:
        """Bring the ranks together and load the models."""
        rendezvous = await meet(self.ranks, self._host, run_dir, self._timeout_s)
        try:
            return await self._all(lambda it: it.start, rendezvous)
        finally:
            if rendezvous.file:
                Path(rendezvous.file).unlink(missing_ok=True)

    async def prepare_publish(self, segment: str | None) -> WeightLayout:
        layout: WeightLayout = (await self._all(lambda it: it.prepare_publish, segment))[0]
        self.push_bytes = layout.total_bytes
        return layout

    async def publish(self, version: int) -> WeightUpdate:
        return (await self._all(lambda it: it.publish, version))[0]

    async def update(self, batch: Batch, step: int, version: int, folder: Path) -> dict[str, float]:
        where = str(folder.resolve())
        return reduce_ranks(
            await self._all(lambda it: it.update, step, version, where, batch.keys, *batch.chunks)
        )

    async def save_trajectories(self, batch: Batch, path: Path) -> None:
        """Write them to one Parquet file: rank 0 does, for the driver never holds any."""
        rank = self.ranks[0]
        given = (str(path.resolve()), batch.keys, *batch.chunks)
        await ask(rank, rank.handle.save_trajectories, *given, within=self._timeout_s)

    async def policy_logprobs(self, samples: Any) -> list[np.ndarray]:
        return (await self._all(lambda it: it.policy_logprobs, samples))[0]

    async def reference_logprobs(self, samples: Any) -> list[np.ndarray]:
        return (await self._all(lambda it: it.reference_logprobs, samples))[0]

    async def save(self, folder: Path) -> None:
        await self._all(lambda it: it.save, str(folder.resolve()))

    async def load(self, folder: Path) -> None:
        await self._all(lambda it: it.load, str(folder.resolve()))

    async def _all(self, method: Callable[[Any], Any], *args: Any) -> list[Any]:
        calls = [
            ask(rank, method(rank.handle), *args, within=self._timeout_s) for rank in self.ranks
        ]
        return await asyncio.gather(*calls)


async def meet(ranks: list[Member], host: Host, run_dir: Path, timeout_s: float) -> Rendezvous:
    """Where the ranks come together: a file if they share a machine, else rank 0's address."""
    if await host.same_machine(ranks):
        meeting = run_dir.resolve() / f"rendezvous-{os.getpid()}"
        meeting.unlink(missing_ok=True)
        return Rendezvous(len(ranks), file=str(meeting))
    address, port = await ask(ranks[0], ranks[0].handle.address, within=timeout_s)
    return Rendezvous(len(ranks), host=address, port=port)
