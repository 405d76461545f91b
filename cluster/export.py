"""`raylign export`: a run's checkpoint -> a Hugging Face folder."""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import yaml

from cluster import checkpoints
from cluster.config import BadInput


def export_run(
    run_dir: Path, out: Path, step: int | None, dtype: str, *, trust_checkpoint: bool = False
) -> None:
    """Raises BadInput if there is no such intact checkpoint of this run (or, if it is trusted, of
    another), or `out` holds something already."""
    if dtype not in ("float32", "bfloat16"):
        raise BadInput(f"--dtype: {dtype}; give float32 or bfloat16")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BadInput(f"{out}: is no empty folder; give a new one")
    checkpoint = _checkpoint(run_dir, step)
    if not trust_checkpoint:
        checkpoints.check_origin(checkpoint.path)
    source = yaml.safe_load((run_dir / "config.yaml").read_text())["policy"]
    from learner.hf_folder import export_checkpoint

    # "." has no name, and what a link leads to is the folder.
    _write(out.resolve(), lambda path: export_checkpoint(checkpoint.learner, source, path, dtype))


def _write(out: Path, write: Callable[[Path], None]) -> None:
    """Into a folder beside `out` first. Into one that is there its files are moved: it may be where
    somebody stands."""
    aside = out.with_name(f"{out.name}.{os.getpid()}.export")
    try:
        write(aside)
        if out.exists():
            for file in aside.iterdir():
                file.rename(out / file.name)
        else:
            aside.rename(out)
    finally:
        for left in out.parent.glob(f"{glob.escape(aside.name)}*"):
            shutil.rmtree(left, ignore_errors=True)


def _checkpoint(run_dir: Path, step: int | None) -> checkpoints.Checkpoint:
    if step is None:
        found, problems = checkpoints.newest_intact(run_dir)
        if found is None:
            why = "; ".join(problems) or "none yet"
            raise BadInput(f"{run_dir}: no intact checkpoint ({why}); go on with the run first")
        return found
    path = checkpoints.folder_of(run_dir, step)
    if problem := checkpoints.damage(path):
        raise BadInput(f"{problem}; see `raylign status` for the steps there are")
    return checkpoints.Checkpoint(path, step)
