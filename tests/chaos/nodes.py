"""Machines that are lost: kill -9 of a raylet and all it started, in a cluster of several on this machine.

The run joins the cluster's head, where its driver is; Ray puts generators, ranks and reward service where
it likes. What is killed is a node that some of them are on, whichever; another takes its place. At last
the driver's own raylet is killed, and `--max-restarts` must go on with what is left.
"""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from cluster import ray_auth
from tests.chaos import roles
from tests.chaos.faults import Events, Fault, ended_by_sigterm, pause
from tests.integration.runs import Workshop, wait_until

NAME = "chaos-nodes"
ROLES = {kind: (lost, mended) for kind, _, lost, mended in roles.KINDS.values()}
BACK_S = 240.0  # beyond it a run hangs; it takes Ray some 15 s to give a node up
WORKERS = 2  # nodes beside the head
RAY_ENV = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Trajectories lie on their machine, few as they are; Ray restarts no role whose config does.
    "RAY_max_direct_call_object_size": "4096",
    "RAY_raylet_start_wait_time_s": "120",  # a busy machine takes its time
}


def run(shop: Workshop, rng: random.Random, count: int) -> list[Fault]:
    """`count` nodes are killed, then the driver's raylet. Raises Hang."""
    with nodes(*[{}] * WORKERS) as cluster:
        return _run(shop, rng, count, cluster)


@contextlib.contextmanager
def nodes(*beside: dict[str, Any]) -> Iterator[Any]:
    """A cluster of raylets on this machine: a head, and others with the options given."""
    ray_auth.guard_own()
    before = dict(os.environ)
    os.environ |= RAY_ENV
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # the nodes' GPUs are made up
    from ray.cluster_utils import Cluster

    ray_auth.reread()
    head = {"num_cpus": 1, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        for options in beside:
            cluster.add_node(num_cpus=1, **options)
        yield cluster
    finally:
        cluster.shutdown()
        os.environ.clear()
        os.environ |= before


def _run(shop: Workshop, rng: random.Random, count: int, cluster: Any) -> list[Fault]:
    log = shop.folder / f"{NAME}.log"
    config = roles.config(shop, NAME, ray_address=cluster.address)
    process = shop.start("train", str(config), "--max-restarts", "1", log=log)
    events = Events(shop.runs / NAME)

    def alive() -> bool:
        return process.poll() is None

    with ended_by_sigterm(process, log, BACK_S):
        wait_until(lambda: len(shop.metrics(NAME)) >= 2 or not alive(), "two steps")
        faults = []
        for _ in range(count):
            pause(rng, 0.0, 3.0)
            faults.append(_lose_a_node(cluster, rng, events, shop, alive))
            cluster.add_node(num_cpus=1)
        faults.append(_lose_the_drivers_raylet(cluster, events, shop, log, alive))
    return faults


def _lose_a_node(
    cluster: Any, rng: random.Random, events: Events, shop: Workshop, alive: Callable[[], bool]
) -> Fault:
    """One that some role is on."""
    there = {node: _roles_on(node) for node in cluster.worker_nodes}
    node = rng.choice([node for node, kinds in there.items() if kinds])
    at = kill(node)
    cluster.worker_nodes.remove(node)
    waits = [ROLES[kind] for kind in sorted(there[node])]
    noticed, back = events.wait_for_all(waits, at, BACK_S, alive)
    _moves(shop, alive)
    return Fault(f"node lost: {', '.join(sorted(there[node]))}", noticed - at, back - at)


def _lose_the_drivers_raylet(
    cluster: Any, events: Events, shop: Workshop, log: Path, alive: Callable[[], bool]
) -> Fault:
    at = kill(cluster.head_node)
    wait_until(lambda: "restart 1 of 1" in log.read_text() or not alive(), "a new driver", BACK_S)
    noticed = time.time()
    back = events.wait("resumed", at, BACK_S, alive)["time"]
    _moves(shop, alive)
    return Fault("node lost: the driver's", noticed - at, back - at)


def _moves(shop: Workshop, alive: Callable[[], bool]) -> None:
    """Until two steps more are done."""
    now = time.time()
    wait_until(
        lambda: sum(row["time"] > now for row in shop.metrics(NAME)) >= 2 or not alive(), "steps"
    )


def raylet(node: Any) -> psutil.Process:
    return psutil.Process(node.all_processes["raylet"][0].process.pid)


def _roles_on(node: Any) -> set[str]:
    titles = [child.cmdline()[:1] for child in raylet(node).children()]
    return {kind for kind in ROLES if any(f"ray::{kind}" in "".join(title) for title in titles)}


def kill(node: Any) -> float:
    process = raylet(node)
    victims = [process, *process.children(recursive=True)]
    now = time.time()
    for victim in victims:
        victim.kill()
    return now
