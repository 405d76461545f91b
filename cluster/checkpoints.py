"""Checkpoint folders: written aside, digested, committed by a rename; opened only when intact.

runs/<name>/checkpoints/step-000010/{learner/, driver.json, buffer.parquet, manifest.json}. The manifest
is written last and holds the digest of every other file.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
LEARNER = "learner"
DRIVER = "driver.json"
BUFFER = "buffer.parquet"


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    step: int

    @property
    def learner(self) -> Path:
        return self.path / LEARNER

    @property
    def buffer(self) -> Path:
        return self.path / BUFFER

    def driver_state(self) -> dict[str, Any]:
        return json.loads((self.path / DRIVER).read_text())


def begin(run_dir: Path, step: int) -> Path:
    """A new, empty folder to write into; `commit` makes a checkpoint of it."""
    aside = run_dir / "checkpoints" / f"step-{step:06d}.partial"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    return aside


def commit(aside: Path, step: int, keep: int) -> Checkpoint:
    """Digest every file, write the manifest, rename; then remove all but the newest `keep`."""
    digests = {str(path.relative_to(aside)): _digest(path) for path in _files(aside)}
    (aside / MANIFEST).write_text(json.dumps({"step": step, "files": digests}, indent=1))
    for path in (*_files(aside), aside / MANIFEST, aside):
        _make_durable(path)
    final = aside.with_suffix("")
    shutil.rmtree(final, ignore_errors=True)
    aside.rename(final)
    _make_durable(final.parent)
    for old in _folders(final.parent)[:-keep]:
        shutil.rmtree(old)
    return Checkpoint(final, step)


def newest_intact(run_dir: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint whose every byte is as written, and what is wrong with newer ones."""
    problems: list[str] = []
    for path in reversed(_folders(run_dir / "checkpoints")):
        problem = damage(path)
        if problem is None:
            return Checkpoint(path, _step(path)), problems
        problems.append(problem)
    return None, problems


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, in one line, or None."""
    try:
        digests = json.loads((path / MANIFEST).read_text())["files"]
        missing = sorted({DRIVER, *digests} - {str(f.relative_to(path)) for f in _files(path)})
        if missing:
            return f"{path}: {missing[0]} is missing"
        names = [DRIVER, *digests]
        changed = [name for name in names if _digest(path / name) != digests.get(name)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{path}: no readable manifest ({type(error).__name__})"
    return f"{path}: {changed[0]} is not as it was written" if changed else None


def _folders(checkpoints: Path) -> list[Path]:
    return sorted(checkpoints.glob("step-*[0-9]"), key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _make_durable(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
