"""What a refused step leaves: all that `raylign replay` needs to take it again, in one folder.

runs/<name>/replay/step-000012-1/{learner/, batch.parquet, refusal.json, config.yaml, manifest.json}, the
learner as it was before the step. Written aside, digested and renamed as checkpoints are.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import yaml

from cluster import checkpoints
from cluster.config import BadInput, RunConfig
from cluster.disk import refusal_of
from cluster.learner_group import LearnerGroup
from cluster.placement import RoleFailed
from learner.learner_spec import StepRefused
from learner.trajectory_buffer import Batch

FOLDER = "replay"
LEARNER = checkpoints.LEARNER
BATCH = "batch.parquet"
REFUSAL = "refusal.json"
CONFIG = "config.yaml"
NEEDED = (f"{LEARNER}/.metadata", BATCH, REFUSAL, CONFIG)


async def leave(
    config: RunConfig, learner: LearnerGroup, batch: Batch, refused: StepRefused, version: int
) -> str:
    """`write` it; returns what replays it, or that the disk refused it, which must not end the run."""
    try:
        return f"raylign replay {await write(config, learner, batch, refused, version)}"
    except (OSError, RoleFailed) as error:
        if (refusal := refusal_of(error)) is None:
            raise
        unfinished = _next(config.run_dir / FOLDER, refused.step).with_suffix(".partial")
        shutil.rmtree(unfinished, ignore_errors=True)
        return f"no replay bundle: {refusal}"


async def write(
    config: RunConfig, learner: LearnerGroup, batch: Batch, refused: StepRefused, version: int
) -> Path:
    """The bundle of a step that the learner has just refused, at `version`. Returns its folder.

    A learner's state is large: as many bundles are kept as can be refused in a row."""
    folder = config.run_dir / FOLDER
    aside = checkpoints.set_aside(_next(folder, refused.step))
    await learner.save_trajectories(batch, aside / BATCH)
    await learner.save(aside / LEARNER)
    await learner.wait_saved()
    (aside / REFUSAL).write_text(json.dumps(_recorded(refused, version), indent=1))
    (aside / CONFIG).write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    bundle = checkpoints.seal(aside, refused.step)
    for old in _oldest_first(folder)[: -config.ppo.refuse.max_in_a_row]:
        shutil.rmtree(old)
    return bundle


def read(bundle: Path) -> tuple[StepRefused, int]:
    """(what was refused, at which version) of a bundle whose every byte is as written; or BadInput."""
    if not bundle.is_dir():
        raise BadInput(f"{bundle}: no such bundle; give a folder such as runs/NAME/{FOLDER}/step-*")
    if problem := checkpoints.damage(bundle, NEEDED):
        raise BadInput(f"{problem}; only an intact bundle can be replayed")
    recorded = json.loads((bundle / REFUSAL).read_text())
    metrics = {name: float(value) for name, value in recorded["metrics"].items()}
    return StepRefused(recorded["step"], recorded["reason"], metrics), recorded["version"]


def _recorded(refused: StepRefused, version: int) -> dict[str, object]:
    """As JSON, which knows neither NaN nor infinity: these are written as text."""
    metrics = {
        name: value if math.isfinite(value) else str(value)
        for name, value in refused.metrics.items()
    }
    return {
        "step": refused.step,
        "version": version,
        "reason": refused.reason,
        "metrics": metrics,
    }


def _next(folder: Path, step: int) -> Path:
    """A name that no bundle has: what was refused before stays as evidence."""
    name = checkpoints.step_name(step)
    taken = [int(path.name.rpartition("-")[2]) for path in folder.glob(f"{name}-*[0-9]")]
    return folder / f"{name}-{max(taken, default=0) + 1}"


def _oldest_first(folder: Path) -> list[Path]:
    """By time, not by name: a resumed run may refuse an earlier step later."""
    return sorted(folder.glob("step-*[0-9]"), key=lambda path: path.stat().st_mtime_ns)
