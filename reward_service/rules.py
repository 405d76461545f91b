"""Scorers made of Python functions, and the weighted sum of scorers."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import logging
import os
import sys
import sysconfig
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from reward_service.api import (
    InvalidScore,
    RewardFailure,
    ScoreFailure,
    Scorer,
    ScoreRequest,
    ScoreResponse,
    ScoreResult,
    ScorerRaised,
    check_results,
    one_line,
)

HERE = Path(__file__).parent


class FunctionScorer:
    """Scores with `module:function`: list[ScoreRequest] in; out a list of the same length and order
    with a number, a ScoreResponse or {"score": number, "parts": {name: number}} for each request.

    An async function runs on the event loop, any other one in a thread. Raises ValueError when the
    function cannot be loaded. A value that is no finite number fails its request ("invalid"); a
    wrong length or an exception fails the call.
    """

    def __init__(self, function: str) -> None:
        self._name = function
        self._function = load_function(function)

    async def score(self, requests: Sequence[ScoreRequest]) -> list[ScoreResult]:
        values = await self._call(list(requests))
        if isinstance(values, (str, bytes, Mapping)) or not hasattr(values, "__iter__"):
            raise InvalidScore(f"{self._name} returned {type(values).__name__}, not a list")
        values = list(values)
        if len(values) != len(requests):
            raise InvalidScore(f"{self._name}: {len(values)} scores for {len(requests)} requests")
        return [
            as_result(request.trajectory_id, value)
            for request, value in zip(requests, values, strict=True)
        ]

    async def close(self) -> None:
        pass

    async def _call(self, requests: list[ScoreRequest]) -> Any:
        try:
            if not inspect.iscoroutinefunction(self._function):
                values = await _in_daemon_thread(self._function, requests)
            else:
                values = self._function(requests)
            return await values if inspect.isawaitable(values) else values
        except RewardFailure:
            raise
        except Exception as error:
            logging.getLogger(__name__).warning("%s raised", self._name, exc_info=error)
            raise ScorerRaised(f"{self._name} raised {one_line(error)}{_where(error)}") from error


class SumScorer:
    """sum_i weight_i * score_i. The parts are kept unweighted, those of a part as "part/its part".

    A request that fails in one part fails.
    """

    def __init__(self, parts: Mapping[str, tuple[float, Scorer]]) -> None:
        self._parts = dict(parts)

    async def score(self, requests: Sequence[ScoreRequest]) -> list[ScoreResult]:
        columns = await asyncio.gather(
            *(scorer.score(requests) for _, scorer in self._parts.values()), return_exceptions=True
        )
        checked = [
            self._checked(name, requests, column)
            for name, column in zip(self._parts, columns, strict=True)
        ]
        return [
            self._sum(request.trajectory_id, [column[row] for column in checked])
            for row, request in enumerate(requests)
        ]

    @staticmethod
    def _checked(
        name: str, requests: Sequence[ScoreRequest], column: list[ScoreResult] | BaseException
    ) -> list[ScoreResult]:
        try:
            if isinstance(column, BaseException):
                raise column
            return check_results(requests, column)
        except RewardFailure as error:
            raise type(error)(f"{name}: {error}") from error

    def _sum(self, trajectory_id: str, row: Sequence[Any]) -> ScoreResult:
        total, parts = 0.0, {}
        for (name, (weight, _)), result in zip(self._parts.items(), row, strict=True):
            if isinstance(result, ScoreFailure):
                return ScoreFailure(trajectory_id, result.kind, f"{name}: {result.reason}")
            total += weight * result.score
            parts[name] = result.score
            parts.update({f"{name}/{inner}": value for inner, value in result.parts.items()})
        return as_result(trajectory_id, {"score": total, "parts": parts})

    async def close(self) -> None:
        for _, scorer in self._parts.values():
            await scorer.close()


def _where(error: BaseException) -> str:
    """The innermost line of the user's own code, if there is one: neither ours nor a library's."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if Path(f.filename).parent != HERE and not _is_installed(f.filename)]
    return f" ({own[-1].filename}:{own[-1].lineno} in {own[-1].name})" if own else ""


def _is_installed(filename: str) -> bool:
    return filename.startswith("<") or any(
        filename.startswith(sysconfig.get_path(kind)) for kind in ("stdlib", "purelib", "platlib")
    )


def as_result(trajectory_id: str, value: object) -> ScoreResult:
    """A number, a ScoreResponse or {"score", "parts"} -> the result of one request."""
    try:
        if isinstance(value, ScoreResponse):
            if value.trajectory_id != trajectory_id:
                raise InvalidScore(f"{trajectory_id}: got the score of {value.trajectory_id}")
            return value
        if isinstance(value, Mapping):
            return ScoreResponse(trajectory_id, value.get("score"), value.get("parts") or {})  # type: ignore[arg-type]
        return ScoreResponse(trajectory_id, value)  # type: ignore[arg-type]
    except InvalidScore as error:
        return ScoreFailure.of(trajectory_id, error)


def load_function(spec: str) -> Callable[[list[ScoreRequest]], Any]:
    """`module:function` -> the function; also from the current directory. Raises ValueError."""
    module_name, _, name = spec.partition(":")
    if "" not in sys.path and os.getcwd() not in sys.path:
        # After all else: a file there may have the name of a library's module.
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ValueError(
            f"scorer function {spec!r}: cannot import {module_name} ({one_line(error)}); "
            "start in the folder that holds it, or correct the name"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        what = "has no" if function is None else "has a non-callable"
        raise ValueError(
            f"scorer function {spec!r}: {module.__file__} {what} {name}; define or correct it"
        )
    return function


async def _in_daemon_thread(function: Callable[[Any], Any], argument: Any) -> Any:
    """function(argument) off the event loop. Unlike asyncio.to_thread, a call that never returns
    neither occupies the shared executor nor keeps the process from ending."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[tuple[Any, BaseException | None]] = loop.create_future()

    def settle(value: Any, error: BaseException | None) -> None:
        if not done.done():  # the waiter may have been cancelled
            done.set_result((value, error))

    def work() -> None:
        value, error = None, None
        try:
            value = function(argument)
        except BaseException as raised:  # sys.exit in a reward function is a failure like others
            error = raised
        with suppress(RuntimeError):  # the loop has closed: nobody waits any more
            loop.call_soon_threadsafe(settle, value, error)

    threading.Thread(target=work, name="reward-function", daemon=True).start()
    value, error = await done
    if error is None:
        return value
    raise error if isinstance(error, Exception) else ScorerRaised(one_line(error))
