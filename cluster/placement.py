"""Where components run: as Ray actors, or all in this process. One way to reach them for both.

A Member is a component that runs somewhere; `ask` awaits one of its methods and turns every way that
can fail (death, silence, an exception over there) into a RoleFailed that names the member.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

FOREVER_S = 1e9  # of a question whose asker sees to its end
START_TIMEOUT_S = 600.0  # for a role to load its models
# Ray's, by name. An answer is lost with the machine that it lay on, and with that its actor.
DEATHS = ("ActorDiedError", "ActorUnavailableError", "RayActorError")
LOST_ANSWERS = (
    "ObjectLostError",
    "ObjectReconstructionFailedError",
    "ObjectFetchTimedOutError",
    "OwnerDiedError",
)


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
        """Asking again may help: Ray is about to restart the process, if it may."""
        return type(self.cause).__name__ in ("ActorUnavailableError", *LOST_ANSWERS)


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
    what is returned is a reference, owned by this process, so that it outlives the actor; `Host.keep`
    makes it outlive the actor's machine."""
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
    if type(error).__name__ in LOST_ANSWERS:
        message = f"{member.name}: its machine was lost, and the answer to {label} with it"
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

    async def keep(self, member: Member, payload: Any, *, within: float) -> Any:
        """Copy a payload of `ask_beside` to this machine, so that losing the member's machine cannot lose
        it. RoleFailed if it is lost already."""
        ...

    async def same_machine(self, members: list[Member]) -> bool: ...
    async def address(self, member: Member) -> str:
        """The address of its machine, as the others reach it."""
        ...

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

    async def keep(self, member: Member, payload: Any, *, within: float) -> Any:
        return payload

    async def same_machine(self, members: list[Member]) -> bool:
        return True

    async def address(self, member: Member) -> str:
        return "127.0.0.1"

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
