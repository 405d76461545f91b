"""Checkpoints that are cut, changed, half there or half written: the newest good one is found."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from cluster import checkpoints
from tests.chaos.faults import Fault


def run(run_dir: Path, scratch: Path, rng: random.Random, count: int) -> list[Fault]:
    """Faults in copies of a run's checkpoints (of which there are two)."""
    faults = []
    for number in range(count):
        kind, spoil = KINDS[number % len(KINDS)]
        copy = scratch / f"disk-{number}"
        shutil.copytree(run_dir / "checkpoints", copy / "checkpoints")
        *_, before, newest = sorted((copy / "checkpoints").glob("step-*[0-9]"))
        spoil(newest, rng)
        started = time.monotonic()
        found, problems = checkpoints.newest_intact(copy)
        seconds = time.monotonic() - started
        if found is None or found.path != before:
            raise AssertionError(f"{kind}: {found} was used, {before} is the newest good one")
        if newest.exists() and not any(newest.name in problem for problem in problems):
            raise AssertionError(f"{kind}: {newest.name} is not named in {problems}")
        faults.append(Fault(f"checkpoint: {kind}", seconds, seconds))
        shutil.rmtree(copy)
    return faults


def _file(folder: Path, rng: random.Random) -> Path:
    return rng.choice([path for path in sorted(folder.rglob("*")) if path.is_file()])


def _cut(folder: Path, rng: random.Random) -> None:
    path = _file(folder, rng)
    data = path.read_bytes()
    path.write_bytes(data[: rng.randrange(max(1, len(data)))])


def _flip(folder: Path, rng: random.Random) -> None:
    path = _file(folder, rng)
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def _lose(folder: Path, rng: random.Random) -> None:
    _file(folder, rng).unlink()


def _cut_manifest(folder: Path, rng: random.Random) -> None:
    path = folder / checkpoints.MANIFEST
    data = path.read_bytes()
    path.write_bytes(data[: rng.randrange(len(data) - 1)])


def _unfinished(folder: Path, rng: random.Random) -> None:
    (folder / checkpoints.MANIFEST).unlink()
    folder.rename(folder.with_name(folder.name + ".partial"))


KINDS: list[tuple[str, Callable[[Path, random.Random], None]]] = [
    ("file cut short", _cut),
    ("bit flipped", _flip),
    ("file lost", _lose),
    ("manifest cut short", _cut_manifest),
    ("killed while it was written", _unfinished),
]
