"""Bad input ends with exit code 2 and one line that says what, where and the fix; nothing is begun.

The commands run through `cluster.cli.main` in this process, without a Ray: starting one fails the
test. A few run in a process of their own, to see all that a terminal would show.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster import submit
from tests import bad_input_table, tiny
from tests.bad_configs import CASES, World
from tests.bad_inputs import FILES, KINDS, PREFIX, Outcome, of_file, prepare, raylign, without_ray

ROOT = Path(__file__).parents[1]


@pytest.fixture
def world(tmp_path: Path, policy: Path, stranger: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.chdir(tmp_path)
    without_ray(monkeypatch)
    monkeypatch.setattr("cluster.fit.available_bytes", lambda: 1 << 40)
    return World(tmp_path, policy, stranger)


def assert_refused(outcome: Outcome, *named: str) -> None:
    assert outcome.code == 2, outcome
    lines = outcome.stderr.splitlines()
    assert len(lines) == 1, outcome.stderr
    assert lines[0].startswith(PREFIX)
    for part in named:
        assert part in lines[0]
    assert outcome.stdout == ""
    assert outcome.seconds < 10


def tree_of(folder: Path) -> dict[str, bytes]:
    files = [
        path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    ]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("name", KINDS)
def test_what_cannot_be_is_refused_in_one_line_and_nothing_is_changed(
    world: World, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = KINDS[name]
    words = prepare(kind, world, monkeypatch)
    before = tree_of(world.folder)
    assert_refused(raylign(*words), *kind.named)
    assert tree_of(world.folder) == before


def test_the_table_of_bad_inputs_is_current(tmp_path: Path, policy: Path, stranger: Path) -> None:
    table = bad_input_table.table(tmp_path, policy, stranger)
    assert table == bad_input_table.PATH.read_text(), "run: python -m tests.bad_input_table"
    assert len(KINDS) >= 60
    assert str(tmp_path.parent) not in table


OF_A_RUN = {"resuming what is not there", "resuming and overwriting", "a Ray that is not there"}


@pytest.mark.parametrize("name", sorted(CASES.keys() - OF_A_RUN))
def test_the_doctor_says_the_same(world: World, name: str) -> None:
    case = CASES[name]
    path = tiny.write_yaml(world.folder / "run.yaml", world.tree(case.changes(world)))
    assert_refused(raylign("doctor", str(path), *case.words), *case.named)


@pytest.mark.parametrize("command", ["sft", "reward-model", "submit", "doctor"])
@pytest.mark.parametrize("name", FILES)
def test_every_command_refuses_a_file_that_is_no_config(
    world: World, command: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, named = FILES[name]
    words = of_file(content, command)(world, monkeypatch)
    assert_refused(raylign(*words), "given.yaml", *named)


def test_a_checkpoint_of_elsewhere_is_opened_when_it_is_trusted(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the flag the run comes as far as starting Ray."""
    words = prepare(KINDS["resuming from another run's checkpoint"], world, monkeypatch)
    outcome = raylign(*words, "--trust-checkpoint")
    assert outcome.code == 3
    assert "Ray was started" in outcome.stderr


def test_with_token_authentication_on_ray_itself_answers_a_cluster_that_wants_a_token(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = prepare(KINDS["submit: a cluster that wants a token"], world, monkeypatch)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    submit._probe(words[-1])


def test_what_the_cases_change_is_fine_unchanged(world: World) -> None:
    path = tiny.write_yaml(world.folder / "run.yaml", world.tree({}))
    outcome = raylign("doctor", str(path))
    assert (outcome.code, outcome.stderr) == (0, "")
    assert "nothing stands in the way" in outcome.stdout


def test_a_run_that_is_there_is_left_as_it_is(world: World) -> None:
    folder = world.folder / "runs/tiny"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("mine")
    path = tiny.write_yaml(world.folder / "run.yaml", world.tree({}))
    named = ("runs/tiny", "--resume", "--overwrite", "name=")
    assert_refused(raylign("train", str(path)), *named)
    assert [(p.name, p.read_text()) for p in folder.iterdir()] == [("config.yaml", "mine")]


@pytest.mark.parametrize("words", [[], ["--help"], ["train", "--help"]])
def test_help_is_no_error(words: list[str]) -> None:
    outcome = raylign(*words)
    assert (outcome.code, outcome.stderr) == (0, "")
    assert "Usage: raylign" in outcome.stdout


# ---- in a process of its own


SEEN = """
import sys
from cluster.cli import main
try:
    main(sys.argv[1:])
finally:
    print([name for name in ("torch", "vllm", "ray") if name in sys.modules])
"""


def in_a_process(folder: Path, *words: str) -> Outcome:
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", SEEN, *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return Outcome(done.returncode, done.stdout, done.stderr, time.monotonic() - started)


@pytest.mark.parametrize(
    "name", ["an unknown key", "a missing column", "a reference of another vocabulary"]
)
def test_a_terminal_shows_the_one_line_and_neither_engine_nor_learner_was_imported(
    world: World, name: str
) -> None:
    case = CASES[name]
    path = tiny.write_yaml(world.folder / "run.yaml", world.tree(case.changes(world)))
    outcome = in_a_process(world.folder, "doctor", str(path))
    assert json.loads(outcome.stdout.replace("'", '"')) == []
    assert_refused(Outcome(outcome.code, "", outcome.stderr, outcome.seconds), *case.named)
