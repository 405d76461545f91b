"""How many generators a run has, changed while it goes on.

    `raylign scale` -> runs/<name>/scale.json -> the driver, which looks for it every second -> events.jsonl

The number holds for the rest of the run, resumed or not, until another is asked for or the config gets
another generators.count.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.config import BadInput, RunConfig
from cluster.config_file import load_config
from cluster.disk import gib
from cluster.fit import available_bytes, own_ray, with_value
from cluster.heartbeat import GOING_ON
from cluster.learner_group import LearnerLost
from cluster.memory import generators_need
from cluster.placement import InProcessHost, RoleFailed
from cluster.replace_file import replace_text
from cluster.run_status import read_run
from cluster.shapes import read_shapes

if TYPE_CHECKING:
    from cluster.run import Run

REQUEST = "scale.json"
EVERY_S = 1.0


@dataclass(frozen=True)
class Request:
    generators: int
    configured: int  # generators.count of the run that was asked
    asked_at: float  # unix time


def ask_to_scale(run_dir: Path, generators: int) -> str:
    """The command: leave the request where the driver finds it. What to tell. BadInput if no run goes on
    there, or it may not."""
    config = load_config(run_dir / "config.yaml", [], RunConfig)
    if config.deterministic:
        raise BadInput(
            f"{run_dir}: with deterministic: true the number of generators is fixed, or the run would no "
            "longer repeat"
        )
    if (state := read_run(run_dir).state) not in GOING_ON:
        raise BadInput(
            f"{run_dir}: this run does not go on now ({state}); --resume generators.count={generators} "
            "goes on with as many"
        )
    _write(run_dir, Request(generators, config.generators.count, time.time()))
    return (
        f"{run_dir.name}: asked for generators.count={generators}; `raylign status {run_dir}` tells when "
        "they are there"
    )


def scaled(config: RunConfig, run_dir: Path) -> RunConfig:
    """The config of a run that is resumed: with the number that was asked for last, unless the config has
    been given another since."""
    request = _read(run_dir)
    if request is None:
        return config
    if request.configured != config.generators.count:
        (run_dir / REQUEST).unlink()
        return config
    return with_value(config, "generators.count", request.generators)


async def watch_scale(run: Run) -> None:
    """Never ends. A number that cannot be had is told, and the run goes on with what it has."""
    done: Request | None = None
    while True:
        await asyncio.sleep(EVERY_S)
        request = _read(run.files.folder)
        if request is None or request == done or not run.supervisor.collecting:
            continue
        try:
            if not await _scale(run, request.generators):
                continue
        except LearnerLost:  # others see to that; then it is tried again
            continue
        except RoleFailed as error:
            there = run.supervisor.num_generators()
            facts = {"asked": request.generators, "generators": there, "reason": str(error)}
            run.files.event("scale_failed", **facts)
            run.view.note(f"WARNING: {error}; going on with {there} generators")
            request = replace(request, generators=there)  # or a resume would fail of it
            _write(run.files.folder, request)
        done = request


async def _scale(run: Run, wanted: int) -> bool:
    """Whether there are as many now; False if it was interrupted."""
    before, started = run.supervisor.num_generators(), time.perf_counter()
    if wanted == before:
        return True
    if isinstance(run.host, InProcessHost):
        raise RoleFailed("--in-process: one process holds one generator")
    run.view.note(f"{before} -> {wanted} generators")
    _check_memory(run.config, wanted - before)
    if not await run.supervisor.scale(wanted):
        return False
    seconds = round(time.perf_counter() - started, 3)
    run.files.event("scaled", generators=wanted, instead_of=before, seconds=seconds)
    run.view.note(f"{wanted} generators are there after {seconds:.1f} s")
    return True


def _check_memory(config: RunConfig, added: int) -> None:
    """RoleFailed if this machine, where it is the one that counts, has no memory for so many more."""
    shapes = read_shapes(config)
    if added <= 0 or shapes is None or not own_ray(config) or config.too_little_memory == "warn":
        return
    each, available = generators_need(config, shapes.policy).host_bytes, available_bytes()
    if added * each > available:
        raise RoleFailed(
            f"memory: {added} more generators take about {added} x {gib(each)}, and {gib(available)} are "
            "available here"
        )


def _write(run_dir: Path, request: Request) -> None:
    replace_text(run_dir / REQUEST, json.dumps(asdict(request)))


def _read(run_dir: Path) -> Request | None:
    """What was asked for last; None where there is nothing, or what the command did not write."""
    try:
        return Request(**json.loads((run_dir / REQUEST).read_text()))
    except (OSError, ValueError, TypeError):
        return None
