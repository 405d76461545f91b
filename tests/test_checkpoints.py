"""A checkpoint is used only if every byte is as it was written; else the one before it, by name."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster import checkpoints
from cluster.checkpoints import MANIFEST, RUN_ID, Checkpoint, newest_intact
from cluster.config import BadInput

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
    (tmp_path / RUN_ID).write_text("tiny-123\n")
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


def exchange_for_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, Callable[[Path], None]] = {
    **{f"bit of {name}": lambda c, n=name: flip(c / n, 3) for name in FILES},
    "last byte": lambda c: flip(c / FILES[1], -1),
    "a file cut short": lambda c: truncate(c / FILES[2], 500),
    "a file empty": lambda c: truncate(c / FILES[2], 0),
    "a file longer": lambda c: (c / FILES[1]).write_bytes((c / FILES[1]).read_bytes() + b"x"),
    "a file missing": lambda c: (c / FILES[3]).unlink(),
    "the learner missing": lambda c: shutil.rmtree(c / "learner"),
    "two files exchanged": lambda c: shutil.copy(c / FILES[1], c / FILES[2]) and None,
    "a file too many": lambda c: (c / "learner/__1_0.distcp").write_bytes(b"x"),
    "a file exchanged for a folder": lambda c: exchange_for_a_folder(c / FILES[2]),
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


# ---- a manifest that says anything


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3)
    ),
    max_leaves=8,
)
file_names = st.sampled_from([*FILES, "../manifest.json", "/etc/hostname", "a\nb", "\0", "\ud800"])
manifests = (
    st.binary(max_size=60)
    | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass"))
    | st.just(b"[" * 100_000)
    | st.just(b'{"a":' * 50_000)
    | st.just(b"9" * 5_000)
    | json_values.map(lambda value: json.dumps(value).encode())
    | st.dictionaries(
        st.sampled_from(["step", "files", RUN_ID]),
        json_values | st.dictionaries(file_names, json_values | st.text(max_size=64)),
    ).map(lambda value: json.dumps(value).encode())
)


@pytest.fixture(scope="module")
def shared_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    for step in (3, 6):
        write(folder, step)
    return folder


@given(manifests)
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_a_manifest_says_is_damage_in_one_line(shared_run: Path, content: bytes) -> None:
    newest = shared_run / "checkpoints/step-000006"
    whole = (newest / MANIFEST).read_bytes()
    (newest / MANIFEST).write_bytes(content)
    try:
        found, problems = newest_intact(shared_run)
        assert found is not None
        assert (found.step, len(problems)) == (3, 1)
        assert problems[0].isprintable(), problems
    finally:
        (newest / MANIFEST).write_bytes(whole)
    assert newest_intact(shared_run)[0] == Checkpoint(newest, 6)


def test_a_manifest_cut_short_at_any_byte_is_damage(run: Path) -> None:
    newest = run / "checkpoints/step-000009"
    whole = (newest / MANIFEST).read_bytes()
    for length in range(len(whole)):
        (newest / MANIFEST).write_bytes(whole[:length])
        assert checkpoints.damage(newest) is not None, length
    (newest / MANIFEST).write_bytes(whole)
    assert checkpoints.damage(newest) is None


# ---- whose it is


def test_a_runs_own_checkpoint_is_taken_as_its_own(run: Path) -> None:
    checkpoints.check_origin(run / "checkpoints/step-000009")


def another_runs(run: Path, newest: Path) -> None:
    (run / RUN_ID).write_text("tiny-456\n")


def older(run: Path, newest: Path) -> None:
    manifest = json.loads((newest / MANIFEST).read_text())
    del manifest[RUN_ID]
    (newest / MANIFEST).write_text(json.dumps(manifest))


def in_a_run_without_id(run: Path, newest: Path) -> None:
    (run / RUN_ID).unlink()


def with_an_odd_id(run: Path, newest: Path) -> None:
    manifest = json.loads((newest / MANIFEST).read_text())
    (newest / MANIFEST).write_text(json.dumps(manifest | {RUN_ID: ["\n" * 999]}))


@pytest.mark.parametrize("change", [another_runs, older, in_a_run_without_id, with_an_odd_id])
def test_one_of_elsewhere_is_refused_by_a_line_that_names_the_danger_and_the_flag(
    run: Path, change: Any
) -> None:
    newest = run / "checkpoints/step-000009"
    change(run, newest)
    assert checkpoints.damage(newest) is None
    with pytest.raises(BadInput) as refused:
        checkpoints.check_origin(newest)
    line = str(refused.value)
    assert "step-000009" in line
    assert "pickle" in line
    assert "--trust-checkpoint" in line
    assert line.isprintable()
    assert len(line) < 500


def test_a_run_that_was_moved_or_copied_keeps_its_checkpoints(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path.with_name("elsewhere"))
    checkpoints.check_origin(copy / "checkpoints/step-000009")


# ---- the old one goes when the new one has come


@pytest.mark.parametrize(("keep", "kept"), [(1, [6]), (2, [3, 6]), (3, [0, 3, 6]), (4, [0, 3, 6])])
def test_those_of_later_steps_go_since_a_resume_passed_them_over(
    tmp_path: Path, keep: int, kept: list[int]
) -> None:
    for step in (0, 3, 9, 12):
        write(tmp_path, step)
    write(tmp_path, 6, keep=keep)
    left = sorted((tmp_path / "checkpoints").glob("step-*"))
    assert [int(folder.name.removeprefix("step-")) for folder in left] == kept


def test_one_of_the_same_step_stays_if_the_new_one_cannot_take_its_name(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    aside = checkpoints.begin(run, 9)
    (aside / "driver.json").write_text("{}")
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if path == aside:
            raise OSError(28, "No space left on device")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.commit(aside, 9, keep=1)
    found, problems = newest_intact(run)
    assert found is not None
    assert (found.step, problems, found.driver_state()) == (9, [], {"cursor": 9})
    assert len(names(run)) == 4  # nothing old was removed


def test_what_is_half_removed_is_neither_a_checkpoint_nor_a_damaged_one(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, **_: Any) -> None:
        (path / "driver.json").unlink()
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(shutil, "rmtree", refuse)
    aside = run / "checkpoints/step-000012.partial"
    aside.mkdir()
    (aside / "driver.json").write_text("{}")
    checkpoints.commit(aside, 12, keep=1)
    found, problems = newest_intact(run)
    assert found is not None
    assert (found.step, problems) == (12, [])
    assert [n for n in names(run) if not n.endswith(".partial")] == ["step-000012"]
