"""A disk that is full, or takes nothing any more, under a run through Ray, and is well again later.

The run's folder is a file system of its own, in memory. Where a checkpoint alone is refused the run goes
on; where nothing can be written it ends with one line, and goes on from its last checkpoint later.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.chaos import roles
from tests.chaos.faults import Fault, Hang, end, pause
from tests.integration.runs import Workshop, read_lines, wait_until

NAME = "chaos-full-disk"
SIZE = "160m"
LEFT = 1 << 20  # bytes: enough for a step's files and for events, and not for a checkpoint
FAILED = 3


@contextlib.contextmanager
def disk(shop: Workshop) -> Iterator[bool]:
    """The run's folder on a small disk; False where mounting is not permitted."""
    folder = shop.runs / NAME
    folder.mkdir(parents=True)
    mounted = _mount("-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder))
    if not mounted:
        print("full_disk: left out, since mount is not permitted here", flush=True)
    try:
        yield mounted
    finally:
        while os.path.ismount(folder):
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def run(shop: Workshop, rng: random.Random, count: int) -> list[Fault]:
    """`count` faults that cost checkpoints, and then one that ends the run, twice."""
    folder, log = shop.runs / NAME, shop.folder / f"{NAME}.log"
    small = {"count": 1, "max_model_len": 64, "max_num_seqs": 8, "kv_cache_bytes": 1 << 25}
    changes = {"generators": small, "learner": {"ranks": 1}, "checkpoint": {"every": 1, "keep": 2}}
    words = ("train", str(roles.config(shop, NAME, max_staleness=0, **changes)))
    faults: list[Fault] = []
    process = shop.start(*words, log=log)
    try:
        for ending in (_full(folder, 0), _read_only(folder)):
            for number in range(count):
                refusing = (_full(folder, LEFT), _read_only(folder / "checkpoints"))[number % 2]
                faults.append(_costs_checkpoints(refusing, folder, process, log, rng))
            struck, noticed = _ends_the_run(ending, folder, process, log, rng)
            process = shop.start(*words, "--resume", log=log)
            back = _awaited("weights_published", noticed, folder, process, log)
            faults.append(Fault(f"disk of a run: {ending.kind}", noticed - struck, back - struck))
        process.send_signal(signal.SIGTERM)
        if (code := process.wait(roles.BACK_S)) != 128 + signal.SIGTERM:
            raise Hang(f"the run ended with {code}\n{log.read_text()[-3000:]}")
    finally:
        end(process)
    return faults


class _Refusing:
    """A disk made to refuse, `again` and again as room comes back, until it is `mended`."""

    def __init__(self, kind: str, again: Callable[[], Any], mended: Callable[[], Any]) -> None:
        self.kind, self.again, self.mended = kind, again, mended


def _full(folder: Path, left: int) -> _Refusing:
    ballast = folder / "ballast"

    def fill() -> None:
        with ballast.open("ab") as file, contextlib.suppress(OSError):
            state = os.statvfs(folder)
            more = state.f_bavail * state.f_frsize - left
            if more > 0:
                os.posix_fallocate(file.fileno(), file.tell(), more)

    kind = "full" if left else "full to the last byte"
    return _Refusing(kind, fill, lambda: ballast.unlink(missing_ok=True))


def _read_only(folder: Path) -> _Refusing:
    """Through a second mount of its own: the first has files that are open."""

    def mount() -> None:
        if not os.access(folder, os.W_OK):
            return
        if not _mount("--bind", str(folder), str(folder)):
            raise Hang(f"{folder} could not be mounted once more")
        if not _mount("-o", "remount,bind,ro", str(folder)):
            unmount()  # a file was opened in between; the next call comes soon

    def unmount() -> None:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)

    kind = "checkpoints read-only" if folder.name == "checkpoints" else "read-only"
    return _Refusing(kind, mount, unmount)


def _costs_checkpoints(
    refusing: _Refusing,
    folder: Path,
    process: subprocess.Popen[str],
    log: Path,
    rng: random.Random,
) -> Fault:
    _awaited("checkpoint_saved", 0.0, folder, process, log)
    pause(rng, 0.0, 2.0)
    struck = time.time()
    noticed = _awaited("checkpoint_failed", struck, folder, process, log, refusing.again)
    refusing.mended()
    back = _awaited("checkpoint_saved", time.time(), folder, process, log)
    return Fault(f"disk of a run: {refusing.kind}", noticed - struck, back - struck)


def _ends_the_run(
    refusing: _Refusing, folder: Path, process: subprocess.Popen[str], log: Path, rng: random.Random
) -> tuple[float, float]:
    pause(rng, 0.0, 2.0)
    struck = time.time()

    def ended() -> bool:
        if process.poll() is None:
            refusing.again()
        return process.poll() is not None

    wait_until(ended, f"an end of the run, its disk being {refusing.kind}", roles.BACK_S)
    noticed, said = time.time(), log.read_text()
    refusing.mended()
    if process.returncode != FAILED or not said.splitlines()[-1].startswith("raylign: failed: "):
        raise Hang(f"{refusing.kind}: it ended with {process.returncode}\n{said[-3000:]}")
    return struck, noticed


def _awaited(
    name: str,
    since: float,
    folder: Path,
    process: subprocess.Popen[str],
    log: Path,
    meanwhile: Callable[[], Any] = lambda: None,
) -> float:
    """When the first event of that name since then was."""

    def found() -> list[float]:
        meanwhile()
        if process.poll() is not None:
            raise Hang(f"the run ended while {name} was awaited\n{log.read_text()[-3000:]}")
        events = read_lines(folder / "events.jsonl")
        return [row["time"] for row in events if row["event"] == name and row["time"] > since]

    wait_until(lambda: bool(found()), name)
    return found()[0]


def _mount(*words: str) -> bool:
    return subprocess.run(["mount", *words], capture_output=True).returncode == 0
