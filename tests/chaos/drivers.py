"""kill -9 of the driver at random moments, the run restarting itself; then compared, bit by bit, with
the same run undisturbed."""

from __future__ import annotations

import random
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil

from tests.chaos.faults import Fault, Hang
from tests.integration.runs import Workshop, read_lines

RUN_S = 1500.0
STEPS = 100  # many more than there are kills, or it would end before the last


SYNCHRONOUS: dict[str, Any] = {}
SMALL = {"max_model_len": 64, "max_num_seqs": 8, "kv_cache_bytes": 1 << 25}
ASYNCHRONOUS = {
    "max_staleness": 1,
    "deterministic": True,
    "generators": {"count": 1, **SMALL},
    "learner": {"ranks": 1, "timeout_s": 120},
}


def run(
    shop: Workshop, rng: random.Random, mode: str, changes: dict[str, Any], count: int
) -> list[Fault]:
    """`changes` to the config make the mode."""
    done = shop.command("train", str(_config(shop, f"chaos-{mode}-straight", changes)))
    if done.returncode:
        raise Hang(done.stdout + done.stderr)
    faults = _killed(shop, rng, mode, changes, count)
    for part in ("policy", "learner", "ledger"):
        if _state(shop, f"chaos-{mode}-straight", part) != _state(shop, killed(mode), part):
            raise AssertionError(f"{mode}: {part} of the run that was killed is another")
    return faults


def killed(mode: str) -> str:
    """The name of the run that is killed."""
    return f"chaos-{mode}-killed"


def _config(shop: Workshop, name: str, changes: dict[str, Any]) -> Path:
    scorer = {"kind": "function", "function": "examples.support_replies.judge:score"}
    given = {
        "name": name,
        "num_steps": STEPS,
        "reward": {"scorer": scorer},
        "evaluation": None,
        "checkpoint": {"every": 1, "keep": 2},
    }
    return shop.config(**(given | changes))


def _killed(
    shop: Workshop, rng: random.Random, mode: str, changes: dict[str, Any], count: int
) -> list[Fault]:
    config, run_dir = _config(shop, killed(mode), changes), shop.runs / killed(mode)
    log = shop.folder / f"{killed(mode)}.log"
    process = shop.start("train", str(config), "--max-restarts", str(count), log=log)
    faults: list[Fault] = []
    deadline = time.monotonic() + RUN_S
    try:
        while len(faults) < count and process.poll() is None:
            driver = _driver(process, deadline)
            _wait_for_moment(driver, run_dir, rng)
            if process.poll() is not None:
                break
            struck = time.time()
            driver.kill()
            _driver(process, deadline, other_than=driver.pid)
            noticed = time.time()
            back = _moved(run_dir, struck, process, deadline)
            faults.append(Fault(f"driver killed, {mode}", noticed - struck, back - struck))
        if len(faults) < count:
            raise Hang(f"it ended after {len(faults)} kills of {count}")
        if process.wait(max(1.0, deadline - time.monotonic())) != 0:
            raise Hang(f"the run ended with {process.returncode}")
    except subprocess.TimeoutExpired:
        raise Hang("the run did not end") from None
    except Hang as hang:
        raise Hang(f"{hang}\n{log.read_text()[-3000:]}") from None
    finally:
        process.kill()
    return faults


def _driver(process: subprocess.Popen[str], deadline: float, other_than: int = 0) -> psutil.Process:
    while time.monotonic() < deadline:
        for child in psutil.Process(process.pid).children():
            if child.pid != other_than and child.status() != psutil.STATUS_ZOMBIE:
                return child
        time.sleep(0.05)
    raise Hang("no driver was started")


def _wait_for_moment(driver: psutil.Process, run_dir: Path, rng: random.Random) -> None:
    """One in four falls into the start; the others some steps later, anywhere in a step."""
    if rng.random() < 0.25:
        time.sleep(rng.uniform(0.5, 8.0))
        return
    start, more = driver.create_time(), rng.randint(1, 2)
    while driver.is_running() and len(_steps(run_dir, start)) < more:
        time.sleep(0.02)
    time.sleep(rng.uniform(0.0, 0.6))


def _moved(run_dir: Path, since: float, process: subprocess.Popen[str], deadline: float) -> float:
    """When the first weights were published again."""
    while time.monotonic() < deadline and process.poll() is None:
        for event in read_lines(run_dir / "events.jsonl"):
            if event["event"] == "weights_published" and event["time"] > since:
                return event["time"]
        time.sleep(0.05)
    raise Hang("nothing was published again")


def _steps(run_dir: Path, since: float) -> list[float]:
    path = run_dir / "metrics.jsonl"
    return [row["time"] for row in read_lines(path) if row["time"] > since]


def _state(shop: Workshop, name: str, part: str) -> object:
    """What decides everything that would follow, of the last checkpoint."""
    import json

    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

    folder = max((shop.runs / name / "checkpoints").glob("step-*[0-9]"))
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
