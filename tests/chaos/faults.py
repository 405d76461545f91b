"""One fault injected, and what became of it."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.integration.runs import read_lines


@dataclass(frozen=True)
class Fault:
    """`noticed_s`, `back_s`: from the injection until the run said so, and until it was mended. `lost`:
    samples that were neither trained nor dropped with a reason."""

    kind: str
    noticed_s: float
    back_s: float
    lost: int = 0


class Hang(Exception):
    """Something did not come in the time that it may take."""


class Events:
    """A run's events.jsonl. By time, not by line: going back to a checkpoint withdraws lines."""

    def __init__(self, run: Path) -> None:
        self._path = run / "events.jsonl"

    def wait(
        self, name: str, since: float, within_s: float, alive: Callable[[], bool]
    ) -> dict[str, Any]:
        """The first event of that name since a moment."""
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline:
            if not alive():
                raise Hang(f"the run ended while {name} was awaited")
            for event in read_lines(self._path):
                if event["event"] == name and event["time"] >= since:
                    return event
            time.sleep(0.05)
        raise Hang(f"no {name} within {within_s:g} s")

    def wait_for_all(
        self,
        pairs: list[tuple[str, str]],
        since: float,
        within_s: float,
        alive: Callable[[], bool],
    ) -> tuple[float, float]:
        """Of pairs of events, all of which must come: when the first came, and when the last. In rounds:
        a run that goes back to a checkpoint may withdraw one before another has come."""
        left, times = {name for pair in pairs for name in pair}, []
        deadline = time.monotonic() + within_s
        while left:
            if not alive() or time.monotonic() > deadline:
                raise Hang(f"no {sorted(left)} within {within_s:g} s, or the run ended")
            for event in read_lines(self._path):
                if event["event"] in left and event["time"] >= since:
                    left.remove(event["event"])
                    times.append(event["time"])
            time.sleep(0.05)
        return min(times), max(times)


def actors(process: subprocess.Popen[Any], kind: str) -> list[psutil.Process]:
    """The processes of a run's actors of a class, by the title that Ray gives them."""
    found = []
    for child in _below(process):
        try:
            if child.name().startswith(f"ray::{kind}"[:15]) and child.cmdline()[0].startswith(
                f"ray::{kind}"
            ):
                found.append(child)
        except (psutil.Error, IndexError):
            continue
    return sorted(found, key=lambda child: child.pid)


def _below(process: subprocess.Popen[Any]) -> Iterable[psutil.Process]:
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.Error:
        return []


def strike(victim: psutil.Process, how: int) -> float:
    """Send a signal; the moment."""
    now = time.time()
    os.kill(victim.pid, how)
    return now


def end(process: subprocess.Popen[Any]) -> None:
    """kill -9 of what is left of a run: its processes, and theirs."""
    for left in _below(process):
        with contextlib.suppress(psutil.Error):
            left.kill()
    process.kill()
    process.wait()


@contextlib.contextmanager
def ended_by_sigterm(process: subprocess.Popen[Any], log: Path, within_s: float) -> Iterator[None]:
    """What is done to a run; then it must end well when it is asked to. Hang, with the end of its log, if
    it does not."""
    try:
        yield
        process.send_signal(signal.SIGTERM)
        code = process.wait(within_s)
    except subprocess.TimeoutExpired:
        raise Hang("the run did not end after SIGTERM") from None
    except Hang as hang:
        raise Hang(f"{hang}\n{log.read_text()[-3000:]}") from None
    finally:
        end(process)
    if code != 128 + signal.SIGTERM:
        raise Hang(f"the run ended with {code}\n{log.read_text()[-3000:]}")


def pause(rng: random.Random, low: float, high: float) -> None:
    time.sleep(rng.uniform(low, high))


KILL, STOP = signal.SIGKILL, signal.SIGSTOP
