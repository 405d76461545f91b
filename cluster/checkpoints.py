"""Checkpoint folders: written aside, digested, committed by a rename; opened only when intact.

runs/<name>/checkpoints/step-000010/{learner/, driver.json, buffer.parquet, manifest.json}. The manifest
is written last; it holds the digest of every other file and names the run, as the file run_id in the
run's folder does. The learner's part holds a pickle, which is torch's format: one from elsewhere could
run code, so it is opened only if it is this run's own, or its user says so. The bundle of a refused
step (replay_bundle.py) is written the same way.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.config import BadInput
from cluster.disk import free_bytes, gib, size_of

MANIFEST = "manifest.json"
LEARNER = "learner"
DRIVER = "driver.json"
BUFFER = "buffer.parquet"
RUN_ID = "run_id"


def step_name(step: int) -> str:
    """Of what a run has one of for a step: a checkpoint, a file of trajectories or of an evaluation."""
    return f"step-{step:06d}"


def step_of(path: Path) -> int:
    """Of a path whose name is `step_name`, whatever its suffix."""
    return int(path.stem.removeprefix("step-"))


class CheckpointFailed(Exception):
    """The disk refused a run's last checkpoint. The message is one line."""


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


def run_id(run_dir: Path) -> str:
    """The run's name and a random number; "" in a folder that has none."""
    path = run_dir / RUN_ID
    return path.read_text().strip() if path.is_file() else ""


def check_origin(folder: Path) -> None:
    """BadInput if what was sealed there is another run's, or does not say whose."""
    own = run_id(folder.parents[1])
    written_by = json.loads((folder / MANIFEST).read_text()).get(RUN_ID)
    if not own or written_by != own:
        by = f"by the run {written_by!r:.80}" if written_by else "without a run's id"
        raise BadInput(
            f"{folder}: written {by}, not by this run ({own or 'it has no id'}); torch's format holds a "
            "pickle, which can run code: if you trust where it is from, give --trust-checkpoint"
        )


def expected_bytes(run_dir: Path, estimate: int) -> int:
    """What the next checkpoint will take: as much as the last one, or the estimate without one."""
    written = _folders(run_dir / "checkpoints")
    return size_of(written[-1]) if written else estimate


def begin(run_dir: Path, step: int, needed_bytes: int = 0) -> Path:
    """A new, empty folder to write into; `commit` makes a checkpoint of it. OSError if it cannot be, or
    there is less room than `needed_bytes`."""
    aside = set_aside(folder_of(run_dir, step))
    if free_bytes(aside) < needed_bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(aside))
    return aside


def commit(aside: Path, step: int, keep: int) -> Checkpoint:
    """Seal it, then remove all but the newest `keep`. Checkpoints of later steps are removed, too: a
    resume went back behind them."""
    final = seal(aside, step)
    written = _folders(final.parent)
    withdrawn = [folder for folder in written if step_of(folder) > step]
    earlier = written[: written.index(final)]
    for old in [*withdrawn, *earlier[: max(0, len(earlier) + 1 - keep)]]:
        with contextlib.suppress(OSError):
            shutil.rmtree(_out_of_the_way(old))
    return Checkpoint(final, step)


@dataclass(frozen=True)
class GivenUp:
    """A checkpoint that the disk refused."""

    path: str
    reason: str
    needed_bytes: int
    free_bytes: int

    def __str__(self) -> str:
        return (
            f"{self.path}: checkpoint not saved ({self.reason}); it takes about "
            f"{gib(self.needed_bytes)}, {gib(self.free_bytes)} are free: make room"
        )


def give_up(run_dir: Path, step: int, refusal: OSError, needed_bytes: int) -> GivenUp:
    """Remove what was begun, if the disk lets that be done."""
    free, final = free_bytes(run_dir), folder_of(run_dir, step)
    shutil.rmtree(_aside(final), ignore_errors=True)
    return GivenUp(str(final), refusal.strerror or str(refusal), needed_bytes, free)


def set_aside(final: Path) -> Path:
    """A new, empty folder to write into; `seal` gives it the name `final`. What earlier attempts left is
    removed."""
    for left in final.parent.glob("step-*.partial"):
        shutil.rmtree(left, ignore_errors=True)
    _aside(final).mkdir(parents=True)
    return _aside(final)


def seal(aside: Path, step: int) -> Path:
    """Digest every file, write the manifest, rename. Returns the folder under its name."""
    digests = {str(path.relative_to(aside)): _digest(path) for path in _files(aside)}
    manifest = {"step": step, RUN_ID: run_id(aside.parents[1]), "files": digests}
    (aside / MANIFEST).write_text(json.dumps(manifest, indent=1))
    for path in (*_files(aside), aside / MANIFEST, aside):
        _make_durable(path)
    final = _put_in_place(aside)
    _make_durable(final.parent)
    return final


def newest_intact(run_dir: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint whose every byte is as written, and what is wrong with newer ones."""
    problems: list[str] = []
    for path in reversed(_folders(run_dir / "checkpoints")):
        problem = damage(path)
        if problem is None:
            return Checkpoint(path, step_of(path)), problems
        problems.append(problem)
    return None, problems


def damage(path: Path, needed: Iterable[str] = (DRIVER,)) -> str | None:
    """What is wrong with a folder that was sealed with the files `needed` in it, in one line, or None."""
    try:
        digests = json.loads((path / MANIFEST).read_text())["files"]
        names, there = {*needed, *digests}, {str(f.relative_to(path)) for f in _files(path)}
        if names != there:
            odd = min(names ^ there)
            return (
                f"{path}: {_shown(odd)} {'is missing' if odd in names else 'does not belong there'}"
            )
        changed = [name for name in sorted(names) if _digest(path / name) != digests.get(name)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{path}: no readable manifest ({type(error).__name__})"
    return f"{path}: {changed[0]} is not as it was written" if changed else None


def _shown(name: str) -> str:
    return name if name.isprintable() else ascii(name)


def folder_of(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / step_name(step)


def _aside(final: Path) -> Path:
    return final.with_name(f"{final.name}.partial")


def _put_in_place(aside: Path) -> Path:
    """Give it its final name; an older one of that name is removed only after that."""
    final = aside.with_suffix("")
    old = _out_of_the_way(final) if final.exists() else None
    try:
        aside.rename(final)
    except OSError:
        if old is not None:
            old.rename(final)
        raise
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)
    return final


def _out_of_the_way(folder: Path) -> Path:
    """Renamed before it is removed: what is half removed is no checkpoint, nor a damaged one."""
    return folder.rename(folder.with_name(f"{folder.name}.old.partial"))


def _folders(checkpoints: Path) -> list[Path]:
    return sorted(checkpoints.glob("step-*[0-9]"), key=step_of)


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
