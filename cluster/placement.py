"""Where components run: as Ray actors, or all in this process. One way to reach them for both.

A Member is a component that runs somewhere; `ask` awaits one of its methods and turns every way that
can fail (death, silence, an exception over there) into a RoleFailed that names the member.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from cluster.config import BadInput

PLACEMENT_TIMEOUT_S = 60.0
STACK_TIMEOUT_S = 10.0


DEATHS = ("ActorDiedError", "ActorUnavailableError", "RayActorError")  # Ray's, by name


class RoleFailed(Exception):
    """A member died, did not answer in time (silent), or raised. The message names it and what was
    asked; what it raised is `cause`."""

    def __init__(
        self,
        message: str,
        *,
        kind: Literal["died", "silent", "raised"] = "raised",
        cause: BaseException | None = None,
    ) -> None:
        super().__init__(message)
        self.kind = kind
        self.cause = cause

    @property
    def comes_back(self) -> bool:
        """Ray is about to restart the process."""
        return type(self.cause).__name__ == "ActorUnavailableError"


@dataclass(frozen=True)
class Member:
    """A deployed component: the name people see, and the actor handle or the object itself."""

    name: str
    handle: Any


async def ask(member: Member, method: Any, *args: Any, within: float) -> Any:
    """Call `member.handle.<method>`, given as that attribute, and await the answer.

    Raises RoleFailed; the original exception is its cause.
    """
    if hasattr(method, "remote"):
        return await _answer(member, method, lambda: method.remote(*args), within)
    return await _answer(member, method, lambda: method(*args), within)


async def ask_beside(
    member: Member, method: Any, *args: Any, within: float
) -> tuple[Any, Any | None]:
    """`ask` for a method that returns (answer, payload). The payload of an actor stays where it is:
    what is returned is a reference, owned by this process, so that it outlives the actor."""
    if not hasattr(method, "remote"):
        return await ask(member, method, *args, within=within)
    payloads: list[Any] = []

    def call() -> Any:
        answer, payload = method.options(num_returns=2).remote(*args)
        payloads.append(payload)
        return answer

    return await _answer(member, method, call, within), payloads[0]


async def _answer(member: Member, method: Any, call: Callable[[], Any], within: float) -> Any:
    label = str(getattr(method, "_method_name", None) or getattr(method, "__name__", "call"))
    try:
        answer = call()
        if not inspect.isawaitable(answer):
            return answer
        task = asyncio.ensure_future(_settle(answer))
        try:
            await asyncio.wait([task], timeout=within)
            if task.done():
                return task.result()
        finally:
            task.cancel()  # or, if nobody waits any more, its failure would be reported by no one
    except Exception as error:
        raise _failed(member, label, error) from error
    raise RoleFailed(f"{member.name}: no answer to {label} within {within:g} s", kind="silent")


async def _settle(answer: Any) -> Any:
    return await answer


def _failed(member: Member, label: str, error: Exception) -> RoleFailed:
    if type(error).__name__ in DEATHS:
        message = f"{member.name}: its process died during {label}{_reason(error)}"
        return RoleFailed(message, kind="died", cause=error)
    cause = getattr(error, "cause", None) or error  # Ray wraps what the method raised
    return RoleFailed(f"{member.name}: {label}: {type(cause).__name__}: {cause}", cause=cause)


def _reason(error: Exception) -> str:
    """Ray tells at length why an actor died; the last line of a constructor's error says it all."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f": {lines[-1]}" if "creation task" in str(error) and lines else ""


class Host(Protocol):
    """Starts components somewhere."""

    def start(
        self,
        name: str,
        kind: type,
        *args: Any,
        env: Mapping[str, str],
        gpus: float = 0,
        max_restarts: int = 0,
    ) -> Member:
        """`max_restarts`: how often it is started anew where it ran, if its process dies; only for
        what has no state of its own."""
        ...

    def share(self, value: Any) -> Any:
        """`value`, or a reference to it that any number of members can be given at one copy's cost."""
        ...

    async def same_machine(self, members: list[Member]) -> bool: ...
    def num_gpus(self) -> float: ...
    async def stop(self, members: list[Member]) -> None: ...
    def kill(self, member: Member, *, restart: bool = False) -> None:
        """End its process at once, whatever it does, and give back its GPUs."""
        ...

    def locate(self, member: Member) -> None: ...
    async def stack(self, member: Member) -> str:
        """Where the member is in its code, for one that does not answer; "" if that cannot be told."""
        ...

    def close(self) -> None: ...


class InProcessHost:
    """Everything in this process: a breakpoint anywhere works."""

    def start(
        self,
        name: str,
        kind: type,
        *args: Any,
        env: Mapping[str, str],
        gpus: float = 0,
        max_restarts: int = 0,
    ) -> Member:
        return Member(name, kind(*args))

    def share(self, value: Any) -> Any:
        return value

    async def same_machine(self, members: list[Member]) -> bool:
        return True

    def num_gpus(self) -> float:
        import torch

        return float(torch.cuda.device_count())

    async def stop(self, members: list[Member]) -> None:
        for member in members:
            if inspect.isawaitable(closing := member.handle.close()):
                await closing

    def kill(self, member: Member, *, restart: bool = False) -> None:
        return

    def locate(self, member: Member) -> None:
        return

    async def stack(self, member: Member) -> str:
        return ""

    def close(self) -> None:
        return


class RayHost:
    """Ray actors, in one namespace a run. Ray itself restarts only what is told so: its restarts hide a
    death for seconds, and bring back no state."""

    def __init__(self, address: str | None, namespace: str) -> None:
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        address = address or os.environ.get("RAY_ADDRESS")
        if address is None:
            # Read when ray is imported. Without it Ray takes the machine's outer address for its
            # own, whatever address it is given, and listens on every interface.
            os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        import ray

        self._ray = ray
        self._groups: dict[str, Any] = {}  # placement groups, by the member's name
        self._places: dict[str, Any] = {}  # references to (node, pid), by the member's name
        common: dict[str, Any] = {
            "namespace": namespace,
            "log_to_driver": False,
            "logging_level": logging.ERROR,
        }
        if address is None:
            # A Ray of our own: loopback only, without the dashboard, which costs seconds to start.
            ray.init(
                address="local", _node_ip_address="127.0.0.1", include_dashboard=False, **common
            )
        else:
            _probe(address)
            ray.init(address=address, **common)

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
        options: dict[str, Any] = {
            "name": name,
            "num_cpus": 0,
            "num_gpus": gpus,
            "max_restarts": max_restarts,
            "runtime_env": {
                "env_vars": {**env, "PYTHONPATH": _python_path(), "RAYLIGN_HOME": os.getcwd()}
            },
        }
        if gpus:
            options["scheduling_strategy"] = self._bundle(name, gpus)
        handle = self._ray.remote(kind).options(**options).remote(*args)
        member = Member(name, handle)
        self.locate(member)
        return member

    def locate(self, member: Member) -> None:
        """Ask the member where it runs, for `kill` and `stack`; again after Ray restarted it."""
        self._places[member.name] = member.handle.__ray_call__.remote(_place)

    def _bundle(self, name: str, gpus: float) -> Any:
        """A placement group of its own: one that cannot be had is an error in words, not a wait."""
        from ray.util.placement_group import placement_group, placement_group_table
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        group = placement_group([{"GPU": gpus}], strategy="STRICT_PACK")
        if not group.wait(PLACEMENT_TIMEOUT_S):
            state = placement_group_table(group).get("stats", {}).get("scheduling_state", "PENDING")
            free = self._ray.available_resources().get("GPU", 0)
            raise RoleFailed(f"{name}: no place for {gpus:g} GPUs ({state}; {free:g} are free)")
        self._groups[name] = group
        return PlacementGroupSchedulingStrategy(group)

    def num_gpus(self) -> float:
        return self._ray.cluster_resources().get("GPU", 0.0)

    def share(self, value: Any) -> Any:
        return self._ray.put(value)

    async def same_machine(self, members: list[Member]) -> bool:
        if len([node for node in self._ray.nodes() if node["Alive"]]) == 1:
            return True
        nodes = [member.handle.__ray_call__.remote(_node_id) for member in members]
        found = await asyncio.wait_for(asyncio.gather(*nodes), PLACEMENT_TIMEOUT_S)
        return len(set(found)) == 1

    async def stop(self, members: list[Member]) -> None:
        closings = [ask(member, member.handle.close, within=10.0) for member in members]
        await asyncio.gather(*closings, return_exceptions=True)
        for member in members:
            self.kill(member)

    def kill(self, member: Member, *, restart: bool = False) -> None:
        node, pid = self._where(member)
        self._ray.kill(member.handle, no_restart=not restart)
        if node == self._here():
            _kill_worker(pid)  # a process that is stopped does not hear Ray
        if not restart and (group := self._groups.pop(member.name, None)) is not None:
            from ray.util.placement_group import remove_placement_group

            remove_placement_group(group)

    async def stack(self, member: Member) -> str:
        node, pid = self._where(member)
        if node == self._here():
            return await stack_of(pid)
        return f"process {pid} on node {node}" if node else ""

    def _where(self, member: Member) -> tuple[str, int]:
        """(node, pid), or ("", 0) of one that never came so far as to say."""
        try:
            where: tuple[str, int] = self._ray.get(self._places[member.name], timeout=0.1)
            return where
        except Exception:
            return "", 0

    def _here(self) -> str:
        node: str = self._ray.get_runtime_context().get_node_id()
        return node

    def close(self) -> None:
        self._ray.shutdown()


def _kill_worker(pid: int) -> None:
    import psutil

    with contextlib.suppress(psutil.Error, IndexError):
        process = psutil.Process(pid)
        if process.cmdline()[0].startswith("ray::"):  # the number may be another's by now
            process.kill()


async def stack_of(pid: int) -> str:
    """The Python stacks of a process on this machine, stopped ones too, by py-spy (it comes with Ray's
    dashboard); without it, or without the right to look, the process's state alone."""
    import psutil

    try:
        state = f"process {pid} is {psutil.Process(pid).status()}"
        spy = await asyncio.create_subprocess_exec(
            str(Path(sys.executable).with_name("py-spy")),
            *("dump", "--nonblocking", "--pid", str(pid)),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        said, _ = await asyncio.wait_for(spy.communicate(), STACK_TIMEOUT_S)
    except (OSError, psutil.Error, TimeoutError) as error:
        return f"process {pid}: {type(error).__name__}"
    return "\n".join([state, said.decode(errors="replace").strip()])


def _place(_: Any) -> tuple[str, int]:
    """Runs inside an actor: (node, pid)."""
    return _node_id(_), os.getpid()


def _node_id(_: Any) -> str:
    """Runs inside an actor."""
    import ray

    return ray.get_runtime_context().get_node_id()


def _python_path() -> str:
    """Actors import what this process imports, wherever their raylet was started."""
    code = Path(__file__).resolve().parents[1]
    paths = [str(code), os.getcwd(), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return os.pathsep.join(dict.fromkeys(filter(None, paths)))


def _probe(address: str) -> None:
    """Refuse a dead address at once: Ray itself would retry for minutes."""
    import socket

    if address in ("auto", "local"):
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, ValueError):
        raise BadInput(
            f"ray_address: nothing answers at {address}; start Ray there (ray start --head) or correct it"
        ) from None
