"""Ray actors: how they are started, found, ended and looked into."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import shlex
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cluster import own_ray, ray_auth
from cluster.config import BadInput
from cluster.fork_server import ForkServer
from cluster.placement import Member, RoleFailed, ask
from cluster.processes import kill_worker, stack_of
from cluster.ray_folder import RayFolder

PLACEMENT_TIMEOUT_S = 60.0
NODE_TIMEOUT_S = 1.0
NODE_LABEL = "ray.io/node-id"  # Ray gives it to every node


class RayHost:
    """Ray actors, in a namespace of their own. Ray itself restarts only what is told so: its restarts hide a
    death for seconds, and bring back no state."""

    def __init__(
        self, address: str | None, namespace: str, forks: ForkServer | None = None
    ) -> None:
        """`forks`: where workers come from; without it Ray starts them as always."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        address = _address(address)
        own = address == "local"
        if own:
            own_ray.prepare()
        else:
            _probe(address)
            ray_auth.prepare_to_join(address)
        self._forks = forks
        import ray

        ray_auth.reread()
        self._ray = ray
        self._groups: dict[str, Any] = {}  # placement groups, by the member's name
        self._places: dict[str, Any] = {}  # references to (node, pid), by the member's name
        self._known: dict[str, tuple[str, int]] = {}  # the same, once it was told
        common: dict[str, Any] = {
            # One that no other driver has: of a driver that died, names may be taken for seconds.
            "namespace": f"{namespace}-{secrets.token_hex(4)}",
            "log_to_driver": False,
            "logging_level": logging.ERROR,
        }
        if not address.startswith("ray://"):
            common["job_config"] = _without_this_folder(ray)
        self._folder: RayFolder | None = None
        if own:
            self._folder = own_ray.start(ray, **common)
        else:
            ray.init(address=address, **common)
        self._here: str = ray.get_runtime_context().get_node_id()

    def start(
        self,
        name: str,
        kind: type,
        *args: Any,
        env: Mapping[str, str],
        gpus: float = 0,
        max_restarts: int = 0,
    ) -> Member:
        env = dict(env) if gpus else {**env, "CUDA_VISIBLE_DEVICES": ""}
        runtime_env: dict[str, Any] = {
            "env_vars": {**env, "PYTHONPATH": _python_path(), "RAYLIGN_HOME": os.getcwd()}
        }
        if self._forks is not None:
            runtime_env["py_executable"] = shlex.join(self._forks.python_for(kind))
        options: dict[str, Any] = {
            "name": name,
            "num_cpus": 0,
            "num_gpus": gpus,
            "max_restarts": max_restarts,
            "runtime_env": runtime_env,
        }
        alive = self._alive()
        where = _not_on_lost(alive) if len(alive) > 1 else {}
        if gpus:
            options["scheduling_strategy"] = self._bundle(name, gpus, where)
        elif len(alive) > 1:
            # A byte, because what needs nothing Ray lets any node place, a lost one too.
            options |= {"scheduling_strategy": "SPREAD", "memory": 1, "label_selector": where}
        handle = self._ray.remote(kind).options(**options).remote(*args)
        member = Member(name, handle)
        self.locate(member)
        return member

    def locate(self, member: Member) -> None:
        """Ask the member where it runs, for `kill` and `stack`; again after Ray restarted it."""
        self._known.pop(member.name, None)
        self._places[member.name] = member.handle.__ray_call__.remote(_place)

    def _alive(self) -> list[dict[str, Any]]:
        return [node for node in self._ray.nodes() if node["Alive"]]

    def _bundle(self, name: str, gpus: float, where: dict[str, str]) -> Any:
        """A placement group of its own: one that cannot be had is an error in words, not a wait."""
        from ray.util.placement_group import (
            placement_group,
            placement_group_table,
            remove_placement_group,
        )
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        group = placement_group(
            [{"GPU": gpus}],
            strategy="STRICT_PACK",
            bundle_label_selector=[where] if where else None,
        )
        if not group.wait(PLACEMENT_TIMEOUT_S):
            state = placement_group_table(group).get("stats", {}).get("scheduling_state", "PENDING")
            remove_placement_group(group)  # or it would take what becomes free later
            free = self._ray.available_resources().get("GPU", 0)
            raise RoleFailed(f"{name}: no place for {gpus:g} GPUs ({state}; {free:g} are free)")
        self._groups[name] = group
        return PlacementGroupSchedulingStrategy(group)

    def num_gpus(self) -> float:
        return self._ray.cluster_resources().get("GPU", 0.0)

    def share(self, value: Any) -> Any:
        return self._ray.put(value)

    async def keep(self, member: Member, payload: Any, *, within: float) -> Any:
        """One that lies on another node is copied to this one: were this one lost, so were the run."""
        if self._where(member)[0] == self._here:
            return payload
        return self.share(await ask(member, fetch, payload, within=within))

    async def same_machine(self, members: list[Member]) -> bool:
        if len(self._alive()) == 1:
            return True
        asked = [
            ask(member, fetch, self._places[member.name], within=PLACEMENT_TIMEOUT_S)
            for member in members
        ]
        return len({node for node, _ in await asyncio.gather(*asked)}) == 1

    async def address(self, member: Member) -> str:
        """The node's address as Ray knows it: a machine's own name often means loopback."""
        asked = member.handle.__ray_call__.remote(_node_ip)
        address: str = await ask(member, fetch, asked, within=PLACEMENT_TIMEOUT_S)
        return address

    async def stop(self, members: list[Member]) -> None:
        closings = [ask(member, member.handle.close, within=10.0) for member in members]
        answers = await asyncio.gather(*closings, return_exceptions=True)
        for member, answer in zip(members, answers, strict=True):
            if isinstance(answer, BaseException):
                self.kill(member)
            else:  # Ray would tell people of a process that is killed otherwise
                self._ray.kill(member.handle)
                self._free_gpus(member)

    def kill(self, member: Member, *, restart: bool = False) -> None:
        node, pid = self._where(member)
        self._ray.kill(member.handle, no_restart=not restart)
        if node == self._here:
            kill_worker(pid)  # a process that is stopped does not hear Ray
        if not restart:
            self._free_gpus(member)

    def _free_gpus(self, member: Member) -> None:
        from ray.util.placement_group import remove_placement_group

        if (group := self._groups.pop(member.name, None)) is not None:
            remove_placement_group(group)

    async def stack(self, member: Member) -> str:
        node, pid = self._where(member)
        if node == self._here:
            return await stack_of(pid)
        return f"process {pid} on node {node}" if node else ""

    def _where(self, member: Member) -> tuple[str, int]:
        """(node, pid), or ("", 0) of one that never came so far as to say."""
        if member.name not in self._known:
            try:
                self._known[member.name] = self._ray.get(self._places[member.name], timeout=0.1)
            except Exception:
                return "", 0
        return self._known[member.name]

    def close(self) -> None:
        self._ray.shutdown()
        if self._folder is not None:
            self._folder.remove()
            self._folder = None


@contextlib.contextmanager
def fork_server(address: str | None, *, on_cpu: bool) -> Iterator[ForkServer | None]:
    """For a Ray of our own, on CPU. It imports what workers need beside whatever is checked before Ray
    starts, and ends with the block."""
    if _address(address) != "local" or not on_cpu:
        yield None
        return
    server = ForkServer(_python_path())
    try:
        yield server
    finally:
        server.close()


def _address(given: str | None) -> str:
    return given or os.environ.get("RAY_ADDRESS") or "local"


def fetch(reference: Any) -> Any:
    """Get what the reference points to; it can be asked like a method."""
    return reference


def _place(_: Any) -> tuple[str, int]:
    """Runs inside an actor: (node, pid)."""
    import ray

    return ray.get_runtime_context().get_node_id(), os.getpid()


def _node_ip(_: Any) -> str:
    """Runs inside an actor."""
    import ray

    return str(ray.util.get_node_ip_address())


def _not_on_lost(nodes: list[dict[str, Any]]) -> dict[str, str]:
    """A label selector against those that do not answer: it takes Ray some 15 s to count one that is
    lost as dead, and what it starts there meanwhile dies with it."""
    lost = [node["NodeID"] for node in nodes if not _answers(node)]
    return {NODE_LABEL: f"!in({','.join(lost)})"} if lost else {}


def _answers(node: dict[str, Any]) -> bool:
    """Whether the node's raylet keeps up a connection. That it is taken says little: the kernel of one
    that is being ended still does that."""
    address = node["NodeManagerAddress"], node["NodeManagerPort"]
    connected = False
    try:
        with socket.create_connection(address, timeout=NODE_TIMEOUT_S) as connection:
            connected = True
            return connection.recv(1) != b""  # it speaks first; with TLS it waits for us
    except TimeoutError:
        return connected
    except OSError:
        return False


def _python_path() -> str:
    """Actors import what this process imports, wherever their raylet was started; but the current folder
    they come to only for a reward function, after everything else."""
    code = Path(__file__).resolve().parents[1]
    paths = [str(code), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return os.pathsep.join(dict.fromkeys(filter(None, paths)))


def _without_this_folder(ray: Any) -> Any:
    """Ray would put the current folder before all others that its workers import from, unless they have a
    working directory of their own."""
    job = ray.job_config.JobConfig()
    job._runtime_env_has_working_dir = lambda: True
    return job


def _probe(address: str) -> None:
    """Refuse a dead address at once: Ray itself would retry for minutes."""
    if address == "auto":
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, ValueError):
        raise BadInput(
            f"ray_address: nothing answers at {address}; start Ray there (ray start --head) or correct it"
        ) from None
