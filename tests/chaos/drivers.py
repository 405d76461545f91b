"""kill -9 and kill -STOP of the driver at random moments, the run restarting itself; then compared, bit by
bit, with the same run undisturbed. One generator and one rank, so that a restart takes seconds."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil

from cluster.restarts import heartbeat_deadline_s
from tests.chaos.faults import KILL, STOP, Fault, Hang, end, strike
from tests.chaos.roles import SOON_S
from tests.integration.runs import Workshop, read_lines, wait_until

LIMIT_S = 1500.0
STEPS = 10_000  # more than it ever comes to: it is stopped
PING_S = 8.0
STUCK = "has not moved"  # what is printed of a driver without heartbeats
MODES: dict[str, dict[str, Any]] = {
    "synchronous": {},
    "asynchronous": {"max_staleness": 1, "deterministic": True},
}


def run(
    shop: Workshop, rng: random.Random, mode: str, *, kills: int, stops: int = 0
) -> list[Fault]:
    config = _config(shop, killed(mode), mode, keep=2)
    log = shop.folder / f"{killed(mode)}.log"
    words = ("train", str(config), "--max-restarts", str(kills + stops))
    process = shop.start(*words, log=log)
    try:
        faults = _Disturbed(process, shop.runs / killed(mode), log, rng).all(mode, kills, stops)
    except (Hang, psutil.Error) as error:
        raise Hang(f"{error}\n{log.read_text()[-3000:]}") from None
    finally:
        end(process)
    step = _newest(shop.runs / killed(mode))
    straight = _straight(shop, mode, step)
    for part in ("policy", "learner", "ledger"):
        if _state(shop.runs / killed(mode), step, part) != _state(straight, step, part):
            raise AssertionError(f"{mode}: {part} of the run that was killed is another")
    print(f"{mode}: the same bits as undisturbed at step {step}, after {len(faults)} restarts")
    return faults


def killed(mode: str) -> str:
    """The name of the run that is killed."""
    return f"chaos-{mode}-killed"


def _config(shop: Workshop, name: str, mode: str, keep: int) -> Path:
    scorer = {"kind": "function", "function": "examples.support_replies.judge:score"}
    small = {"count": 1, "max_model_len": 64, "max_num_seqs": 8, "kv_cache_bytes": 1 << 25}
    return shop.config(
        name=name,
        num_steps=STEPS,
        batch_size=8,
        sampling={"max_tokens": 8},
        generators=small,
        learner={"ranks": 1, "timeout_s": 120},
        reward={"scorer": scorer},
        ping_timeout_s=PING_S,
        evaluation=None,
        checkpoint={"every": 1, "keep": keep},
        **MODES[mode],
    )


class _Disturbed:
    """The run whose driver is struck again and again."""

    def __init__(
        self, process: subprocess.Popen[str], run_dir: Path, log: Path, rng: random.Random
    ) -> None:
        self._process, self._run_dir, self._log, self._rng = process, run_dir, log, rng
        self._deadline = time.monotonic() + LIMIT_S
        self._struck: list[tuple[str, float, float]] = []  # kind, when, noticed when

    def all(self, mode: str, kills: int, stops: int) -> list[Fault]:
        todo = [KILL] * kills + [STOP] * stops
        self._rng.shuffle(todo)
        faults: list[Fault] = []
        for how in todo:
            driver = self._driver()
            if how == KILL and self._struck and self._rng.random() < 0.3:
                time.sleep(self._rng.uniform(0.5, 12.0))  # somewhere in its start
            else:
                faults += self._back()
                self._steps(driver, self._rng.randint(1, 2))
                time.sleep(self._rng.uniform(0.0, 0.6))  # anywhere in a step
            self._strike(driver, how, mode)
        faults += self._back()
        self._steps(self._driver(), 2)
        self._process.send_signal(signal.SIGTERM)
        if (code := self._process.wait(120)) != 128 + signal.SIGTERM:
            raise Hang(f"the run ended with {code}")
        return faults

    def _strike(self, driver: psutil.Process, how: int, mode: str) -> None:
        said = self._log.read_text().count(STUCK)
        at = strike(driver, how)
        if how == STOP:
            within = heartbeat_deadline_s(PING_S) + SOON_S
            wait_until(lambda: self._log.read_text().count(STUCK) > said, "its name", within)
            if "Thread" not in self._log.read_text().rpartition(STUCK)[2]:
                raise Hang("driver stopped: no stack was printed")
            self._struck.append((f"driver stopped, {mode}", at, time.time()))
        self._driver(other_than=driver.pid)
        if how == KILL:
            self._struck.append((f"driver killed, {mode}", at, time.time()))

    def _driver(self, other_than: int = 0) -> psutil.Process:
        while time.monotonic() < self._deadline and self._process.poll() is None:
            for child in psutil.Process(self._process.pid).children():
                if child.pid != other_than and child.status() != psutil.STATUS_ZOMBIE:
                    return child
            time.sleep(0.05)
        raise Hang("no driver was started")

    def _steps(self, driver: psutil.Process, more: int) -> None:
        """Until this driver has done so many."""
        start = driver.create_time()
        self._wait(lambda row: row["time"] > start, "metrics.jsonl", more)

    def _back(self) -> list[Fault]:
        """The faults so far, once weights are published again. A fault in a start is over with the
        first start that is not struck."""
        faults = []
        for kind, at, noticed in self._struck:
            published = self._wait(
                lambda row, at=at: row["event"] == "weights_published" and row["time"] > at,
                "events.jsonl",
            )
            faults.append(Fault(kind, noticed - at, published["time"] - at))
        self._struck.clear()
        return faults

    def _wait(self, wanted: Any, name: str, count: int = 1) -> dict[str, Any]:
        while time.monotonic() < self._deadline and self._process.poll() is None:
            found = [row for row in _lines(self._run_dir / name) if wanted(row)]
            if len(found) >= count:
                return found[0]
            time.sleep(0.05)
        raise Hang(f"nothing more came into {name}")


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        return read_lines(path)
    except ValueError:  # a kill cut the last one short
        return []


def _straight(shop: Workshop, mode: str, step: int) -> Path:
    """The folder of the same run undisturbed, with its checkpoint of `step`."""
    name = f"chaos-{mode}-straight"
    log, run_dir = shop.folder / f"{name}.log", shop.runs / name
    process = shop.start("train", str(_config(shop, name, mode, keep=10)), log=log)
    try:
        wait_until(
            lambda: _folder(run_dir, step).exists() or process.poll() is not None, name, LIMIT_S
        )
    finally:
        end(process)
    if not _folder(run_dir, step).exists():
        raise Hang(log.read_text()[-3000:])
    return run_dir


def _newest(run_dir: Path) -> int:
    return max(int(path.name[5:]) for path in (run_dir / "checkpoints").glob("step-*[0-9]"))


def _folder(run_dir: Path, step: int) -> Path:
    return run_dir / f"checkpoints/step-{step:06d}"


def _state(run_dir: Path, step: int, part: str) -> object:
    """What decides everything that would follow, of a checkpoint."""
    import json

    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

    folder = _folder(run_dir, step)
    if part == "ledger":
        state = json.loads((folder / "driver.json").read_text())
        for lease in state["ledger"]["leases"]:
            del lease["finished"]  # how far a prompt is that is out is a matter of timing
        return {key: state[key] for key in ("cursor", "ledger", "num_dropped")}
    keys = None if part == "learner" else {"policy"}
    reader = FileSystemReader(str(folder / "learner"))
    loaded = _load_state_dict_from_keys(keys, storage_reader=reader)
    return _bytes(loaded)


def _bytes(tree: object) -> object:
    import torch

    if isinstance(tree, dict):
        return {key: _bytes(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_bytes(value) for value in tree]
    if isinstance(tree, torch.Tensor):
        return (
            str(tree.dtype),
            tuple(tree.shape),
            tree.contiguous().view(-1).view(torch.uint8).numpy().tobytes(),
        )
    return tree
