"""A machine that is lost takes nothing with it that counts, and what is started next comes up elsewhere."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pytest

from cluster import ray_host
from cluster.placement import Member, RoleFailed, ask, ask_beside
from cluster.ray_host import RayHost
from tests.chaos.nodes import kill, nodes, raylet

LARGE = 300_000  # rows: beyond what Ray sends along with the answer


class Worker:
    async def take(self) -> tuple[str, pa.Table]:
        return "two prompts", pa.table({"x": list(range(LARGE))})

    def parent(self) -> int:
        return os.getppid()

    def length(self, table: pa.Table) -> int:
        return len(table)

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with nodes({"resources": {"far": 1}, "num_gpus": 1}, {"num_gpus": 1}) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def host(cluster: Any) -> Iterator[RayHost]:
    host = RayHost(cluster.address, "test-lost-node")
    yield host
    host.close()


def far_away(host: RayHost) -> Member:
    """A member on the other node, where only the test has a reason to want one."""
    env = {"env_vars": {"PYTHONPATH": ray_host._python_path()}}
    options = {"num_cpus": 0, "resources": {"far": 0.1}, "runtime_env": env}
    member = Member("far", host._ray.remote(Worker).options(**options).remote())
    host.locate(member)
    return member


async def test_a_members_address_is_the_one_that_ray_reaches_its_machine_by(
    cluster: Any, host: RayHost
) -> None:
    member = host.start("member", Worker, env={})
    addresses = {node["NodeManagerAddress"] for node in host._ray.nodes()}
    assert await host.address(member) in addresses
    await host.stop([member])


async def test_a_member_that_stops_gives_its_gpu_back_and_one_that_found_no_place_waits_for_none(
    host: RayHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = [host.start(f"member-{i}", Worker, env={}, gpus=1) for i in range(2)]
    with monkeypatch.context() as patch:
        patch.setattr(ray_host, "PLACEMENT_TIMEOUT_S", 1.0)
        with pytest.raises(RoleFailed, match=r"member-2: no place for 1 GPUs \(.*; 0 are free\)"):
            host.start("member-2", Worker, env={}, gpus=1)
    await host.stop(members[:1])
    # Were the one before still in the queue, it would have the only GPU.
    members[0] = host.start("member-3", Worker, env={}, gpus=1)
    assert await ask(members[0], members[0].handle.length, [], within=60) == 0
    await host.stop(members)


async def test_what_was_kept_outlives_the_machine_and_what_was_not_is_a_death_that_is_told(
    cluster: Any, host: RayHost
) -> None:
    far = far_away(host)
    payloads = [(await ask_beside(far, far.handle.take, within=60))[1] for _ in range(2)]
    kept = await host.keep(far, payloads[0], within=60)
    parent = await ask(far, far.handle.parent, within=60)
    kill(next(node for node in cluster.worker_nodes if raylet(node).pid == parent))
    # Ray still counts the node as alive, and would put some of these there.
    near = [host.start(f"near-{i}", Worker, env={}, gpus=i // 3) for i in range(4)]
    lengths = [ask(it, it.handle.length, kept, within=60) for it in near]
    assert await asyncio.gather(*lengths) == [LARGE] * 4
    assert not await host.same_machine([far, *near])
    with pytest.raises(RoleFailed, match=r"far: (its machine was lost|no answer to fetch)"):
        await host.keep(far, payloads[1], within=20)
    with pytest.raises(RoleFailed, match="far: its process died during take"):
        await ask_beside(far, far.handle.take, within=60)
