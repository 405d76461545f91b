"""`raylign train --max-restarts N`: the run in a process of its own, started again with --resume when
it failed or was killed.

Only a run that failed (exit code 3) or whose process died is started again (of a driver whose own
machine's part of the cluster is gone, Ray makes exit code 1). Bad input, a stop that was asked for and
the end are passed on. A driver that does nothing any more is killed first: once it is up it writes its
heartbeat into status.json, whatever it waits for. How long it has been silent is measured here, from when
the heartbeat was seen to change: the clock it is written by may be set.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from cluster.heartbeat import STATUS
from cluster.processes import stack_of
from cluster.replace_file import read_object

CHECK_S = 1.0
LEAST_HEARTBEAT_S = 10.0  # two beats
START_S = 600.0  # until the first
FAILED = 3
ENDED_BY_RAY = 1
TRAIN = (sys.executable, "-m", "cluster.cli", "train")


def heartbeat_deadline_s(ping_timeout_s: float) -> float:
    """A driver that has not beaten for so long does nothing any more. It may wait for a role in vain for
    `ping_timeout_s`, which does not keep it from beating."""
    return max(LEAST_HEARTBEAT_S, 2 * ping_timeout_s)


def run_again(
    words: list[str],
    run_dir: Path,
    *,
    max_restarts: int,
    heartbeat_s: float,
    start_s: float = START_S,
) -> int:
    """`words`: of the train command. Returns its exit code, of the last attempt. `heartbeat_s`: within
    which a driver must beat; `start_s`: for the first time."""
    attempts = 0
    while True:
        attempt = _Attempt(words, run_dir, heartbeat_s, start_s)
        code = attempt.wait()
        if attempt.stopped_by is not None:  # however it has ended: it was asked to
            return code if code >= 0 else 128 + attempt.stopped_by
        if code not in (FAILED, ENDED_BY_RAY) and code >= 0:
            return code
        if attempts == max_restarts:
            print(
                f"raylign: it ended with {code}, restarted {attempts} times; given up",
                file=sys.stderr,
            )
            return FAILED
        attempts += 1
        print(
            f"raylign: it ended with {code}; restart {attempts} of {max_restarts}", file=sys.stderr
        )
        begun = (run_dir / "config.yaml").exists()
        words = [word for word in words if word not in ("--resume", "--overwrite")]
        words += ["--resume"] if begun else []


class _Attempt:
    """One child process. Signals that ask for a stop are passed on to it."""

    def __init__(self, words: list[str], run_dir: Path, heartbeat_s: float, start_s: float) -> None:
        self._status = run_dir / STATUS
        self._heartbeat_s, self._start_s = heartbeat_s, start_s
        self._beat: float | None = None  # the last one
        self._moved_at = time.monotonic()
        self.stopped_by: int | None = None  # the signal's number
        self._process = subprocess.Popen([*TRAIN, *words])
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._pass_on)

    def wait(self) -> int:
        while True:
            try:
                return self._process.wait(CHECK_S)
            except subprocess.TimeoutExpired:
                self._watch()

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.stopped_by = number
        self._process.send_signal(number)

    def _watch(self) -> None:
        """End it if it has been silent for too long."""
        now, beat = time.monotonic(), self._last_beat()
        if beat is not None and beat != self._beat:
            self._beat, self._moved_at = beat, now
        silent_s = now - self._moved_at
        if silent_s > (self._start_s if self._beat is None else self._heartbeat_s):
            self._end(silent_s)

    def _last_beat(self) -> float | None:
        """Of this attempt; None before the first."""
        status = read_object(self._status)
        return status.get("heartbeat_at") if status.get("pid") == self._process.pid else None

    def _end(self, silent_s: float) -> None:
        import asyncio

        print(
            f"raylign: the driver (process {self._process.pid}) has not moved for {silent_s:.0f} s; it "
            f"is ended\n{asyncio.run(stack_of(self._process.pid))}",
            file=sys.stderr,
        )
        self._process.kill()
