"""Nothing that lies in the current folder is run, but the reward function that a config names."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.core_rate import core_rates
from cluster.fork_server import ForkServer
from cluster.ray_host import _python_path
from tests import tiny

# Of ours, of Python's, of what is always there, and of what is imported only if it is there.
TRAPS = ("pyarrow", "statistics", "torch", "numpy", "transformers", "ray", "tensorflow", "colorsys")
TRAP = "open({!r}, 'a').write(__name__ + '\\n')\nraise SystemExit('a trap')\n"
RAYLIGN = "import sys; from cluster.cli import main; main(sys.argv[1:])"


@pytest.fixture
def trapped(tmp_path: Path, policy: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: traps, a config and the function that it names."""
    for name in TRAPS:
        (tmp_path / f"{name}.py").write_text(TRAP.format(str(tmp_path / "sprung")))
    (tmp_path / "my_rewards.py").write_text(
        "def brevity(asked):\n    return [1.0 for _ in asked]\n"
    )
    scorer = {"kind": "function", "function": "my_rewards:brevity"}
    tree = tiny.changed(tiny.run_tree(tmp_path, policy), {"reward.scorer": scorer})
    tiny.write_yaml(tmp_path / "run.yaml", tree)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def assert_none_sprung(folder: Path, done: Any = "") -> None:
    sprung = folder / "sprung"
    assert not sprung.exists(), (sprung.read_text(), done)


def test_a_command_runs_none_of_it_and_finds_the_reward_function(trapped: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-c", RAYLIGN, "doctor", "run.yaml"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert_none_sprung(trapped, done.stderr)
    assert done.returncode == 0, done.stderr
    assert "nothing stands in the way" in done.stdout


def test_the_folder_that_python_puts_first_is_put_last(trapped: Path) -> None:
    code = "import sys; sys.argv[1:] = ['--help']; from cluster import cli\n"
    telling = (
        "sys.path.insert(0, sys.argv.pop())\ntry: cli.main()\nexcept SystemExit: print(sys.path)"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", f"{code}sys.argv.append({str(trapped)!r})\n{telling}"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.stdout.rstrip().endswith(f", {str(trapped)!r}]"), done.stderr


def test_neither_do_processes_that_it_starts(trapped: Path) -> None:
    assert str(trapped) not in _python_path().split(os.pathsep)
    assert core_rates(8, 8, [1])
    server = ForkServer(_python_path(), {"trunk": ("statistics",), "engine": (), "learner": ()})
    try:
        script = trapped / "there.py"
        script.write_text("import statistics\nprint(statistics.mean([3]))\n")
        command = [*server.python_for(object), str(script)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    finally:
        server.close()
    assert_none_sprung(trapped, done.stderr)
    assert done.stdout == "3\n", done.stderr
