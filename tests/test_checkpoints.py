"""A checkpoint is used only if every byte is as it was written; else the one before it, by name."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster import checkpoints
from cluster.checkpoints import MANIFEST, Checkpoint, newest_intact

FILES = ("driver.json", "buffer.parquet", "learner/__0_0.distcp", "learner/.metadata")


def write(run: Path, step: int, keep: int = 9) -> Checkpoint:
    """A checkpoint whose files hold bytes of their own."""
    aside = checkpoints.begin(run, step)
    for name in FILES:
        (aside / name).parent.mkdir(exist_ok=True)
        (aside / name).write_bytes(random.Random(f"{name}{step}").randbytes(997))
    (aside / "driver.json").write_text(json.dumps({"cursor": step}))
    return checkpoints.commit(aside, step, keep)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with checkpoints of the steps 3, 6 and 9."""
    for step in (3, 6, 9):
        write(tmp_path, step)
    return tmp_path


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_the_newest_is_used_and_what_it_holds_is_what_was_written(run: Path) -> None:
    found, problems = newest_intact(run)
    assert found is not None
    assert (found.step, problems) == (9, [])
    assert found.driver_state() == {"cursor": 9}
    assert found.learner == found.path / "learner"
    assert found.buffer.is_file()


def test_a_run_without_checkpoints_has_none(tmp_path: Path) -> None:
    assert newest_intact(tmp_path) == (None, [])


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (8, 9, 10, 11):
        write(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step-000010", "step-000011"]


def test_newest_is_by_number_even_beyond_six_digits(tmp_path: Path) -> None:
    for step in (999_999, 1_000_000):
        write(tmp_path, step, keep=1)
    assert names(tmp_path) == ["step-1000000"]


def test_a_checkpoint_written_again_replaces_the_earlier_one(run: Path) -> None:
    (run / "checkpoints/step-000009/driver.json").write_text("{")
    write(run, 9)
    found, problems = newest_intact(run)
    assert found is not None
    assert (found.step, problems) == (9, [])


def test_what_was_not_committed_is_ignored_and_swept_by_the_next_attempt(run: Path) -> None:
    (checkpoints.begin(run, 12) / "learner").mkdir()
    found, problems = newest_intact(run)
    assert found is not None
    assert (found.step, problems) == (9, [])
    assert list(checkpoints.begin(run, 12).iterdir()) == []


def test_what_is_no_checkpoint_is_left_alone(run: Path) -> None:
    (run / "checkpoints/step-000009.bak").mkdir()
    (run / "checkpoints/notes.txt").write_text("mine")
    write(run, 12, keep=1)
    assert {"step-000009.bak", "notes.txt"} <= set(names(run))
    assert newest_intact(run)[0] == Checkpoint(run / "checkpoints/step-000012", 12)


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def truncate(path: Path, num_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:num_bytes])


DAMAGES: dict[str, Callable[[Path], None]] = {
    **{f"bit of {name}": lambda c, n=name: flip(c / n, 3) for name in FILES},
    "last byte": lambda c: flip(c / FILES[1], -1),
    "a file cut short": lambda c: truncate(c / FILES[2], 500),
    "a file empty": lambda c: truncate(c / FILES[2], 0),
    "a file longer": lambda c: (c / FILES[1]).write_bytes((c / FILES[1]).read_bytes() + b"x"),
    "a file missing": lambda c: (c / FILES[3]).unlink(),
    "the learner missing": lambda c: shutil.rmtree(c / "learner"),
    "two files exchanged": lambda c: shutil.copy(c / FILES[1], c / FILES[2]) and None,
    "no manifest": lambda c: (c / MANIFEST).unlink(),
    "an empty manifest": lambda c: (c / MANIFEST).write_text(""),
    "a manifest cut short": lambda c: truncate(c / MANIFEST, 40),
    "a manifest of another form": lambda c: (c / MANIFEST).write_text("[1, 2]"),
    "a manifest of nothing": lambda c: (c / MANIFEST).write_text('{"step": 9, "files": {}}'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_named_and_the_one_before_it_used(run: Path, damage: str) -> None:
    newest = run / "checkpoints/step-000009"
    DAMAGES[damage](newest)
    found, problems = newest_intact(run)
    assert found is not None
    assert found.step == 6
    assert len(problems) == 1
    assert str(newest) in problems[0]
    assert "\n" not in problems[0]


def test_every_damaged_one_is_named_and_none_is_used_when_none_is_intact(run: Path) -> None:
    for step in (3, 6, 9):
        flip(run / f"checkpoints/step-{step:06d}/driver.json", 0)
    found, problems = newest_intact(run)
    assert found is None
    assert [
        f"step-{step:06d}" in problem for step, problem in zip((9, 6, 3), problems, strict=True)
    ]
    assert all("driver.json is not as it was written" in problem for problem in problems)


def test_any_flipped_bit_of_any_file_is_found(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, 1)
    random_ = random.Random(0)
    for _ in range(200):
        path = checkpoint.path / random_.choice(FILES)
        place = random_.randrange(path.stat().st_size)
        flip(path, place)
        problem = checkpoints.damage(checkpoint.path)
        assert problem is not None
        assert path.name in problem
        flip(path, place)
    assert checkpoints.damage(checkpoint.path) is None
