"""A worker of the fork server is what Python would have started, but has imported already."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.fork_server import ForkServer

# Small modules in place of torch and vLLM.
IMPORTS = {"trunk": ("numpy",), "engine": ("zipapp",), "learner": ("pydoc",)}
# With a locale, or Python would choose one.
ENVIRONMENT = {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", "ONLY": "this"}
TELL = """
import json, os, random, sys
told = {
    "pid": os.getpid(), "group": os.getpgid(0), "arguments": sys.argv[1:], "name": __name__,
    "folder": os.getcwd(), "environment": dict(os.environ), "first_path": sys.path[0],
    "modules": [m for m in ("numpy", "zipapp", "pydoc", "ray") if m in sys.modules],
    "drawn": random.random(), "input": sys.stdin.read(),
}
print(json.dumps(told), flush=True)
if "fail" in sys.argv: sys.exit(7)
if "wait" in sys.argv:
    import time
    time.sleep(60)
"""


class RolloutRole:
    """By its name, a worker with an engine."""


class LearnerRole:
    pass


class Other:
    pass


@pytest.fixture
def server() -> Iterator[ForkServer]:
    server = ForkServer(os.pathsep.join([os.getcwd(), *sys.path[1:]]), IMPORTS)
    yield server
    server.close()


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "tell.py"
    path.write_text(TELL)
    return path


def started(server: ForkServer, kind: type, script: Path, *words: str) -> subprocess.Popen[str]:
    """As Ray starts a worker: Python, the script and its arguments."""
    return subprocess.Popen(
        [*server.python_for(kind), str(script), *words],
        cwd=script.parent,
        env=ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def told(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("given")
    process.stdin.close()
    return json.loads(process.stdout.readline())


def gone(pid: int, within: float = 10.0) -> bool:
    deadline = time.monotonic() + within
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def test_a_worker_has_the_files_folder_environment_and_arguments_of_its_client(
    server: ForkServer, script: Path
) -> None:
    process = started(server, Other, script, "one", "two words")
    it = told(process)
    assert process.wait(10) == 0
    assert it["arguments"] == ["one", "two words"]
    assert it["name"] == "__main__"
    assert it["folder"] == it["first_path"] == str(script.parent)
    assert it["environment"] == ENVIRONMENT
    assert it["input"] == "given"
    assert it["group"] == it["pid"] != process.pid


@pytest.mark.parametrize(
    ("kind", "modules"),
    [(Other, ["numpy"]), (RolloutRole, ["numpy", "zipapp"]), (LearnerRole, ["numpy", "pydoc"])],
)
def test_each_branch_has_imported_what_its_workers_need_but_never_ray(
    server: ForkServer, script: Path, kind: type, modules: list[str]
) -> None:
    assert told(started(server, kind, script))["modules"] == modules


def test_brothers_draw_different_numbers(server: ForkServer, script: Path) -> None:
    assert (
        told(started(server, Other, script))["drawn"]
        != told(started(server, Other, script))["drawn"]
    )


def test_the_client_ends_as_its_worker_does(server: ForkServer, script: Path) -> None:
    process = started(server, Other, script, "fail")
    told(process)
    assert process.wait(10) == 7


@pytest.mark.parametrize("killed", ["client", "worker"])
def test_of_client_and_worker_neither_is_left_alone(
    server: ForkServer, script: Path, killed: str
) -> None:
    process = started(server, RolloutRole, script, "wait")
    worker = told(process)["pid"]
    os.kill(worker if killed == "worker" else process.pid, signal.SIGKILL)
    assert process.wait(10) != 0
    assert gone(worker)
    assert told(started(server, RolloutRole, script))["pid"]  # and others can be started


def test_without_a_server_the_client_becomes_the_worker(server: ForkServer, script: Path) -> None:
    server.close()
    process = started(server, Other, script)
    it = told(process)
    assert process.wait(10) == 0
    assert it["pid"] == process.pid
    assert it["modules"] == []


def test_the_server_ends_with_the_process_that_started_it(script: Path) -> None:
    starts = (
        "import sys; from cluster.fork_server import ForkServer;"
        f"server = ForkServer({os.getcwd()!r}, {IMPORTS!r});"
        "print(server._process.pid, flush=True); sys.stdin.read()"
    )
    driver = subprocess.Popen(
        [sys.executable, "-c", starts], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert driver.stdout is not None
    trunk = psutil.Process(int(driver.stdout.readline()))
    while len(trunk.children()) < 2:
        time.sleep(0.02)
    branches = trunk.children()
    driver.kill()
    driver.wait(10)
    assert all(gone(one.pid) for one in (trunk, *branches))


def test_a_long_name_of_the_temporary_folder_does_not_hinder_it(
    tmp_path: Path, script: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name of a socket has a limit."""
    folder = tmp_path / ("x" * 110)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    ForkServer(os.pathsep.join([os.getcwd(), *sys.path[1:]]), {"trunk": ()}).close()


KILLED = """
import os, signal, sys
from cluster.fork_server import ForkServer
server = ForkServer(os.getcwd(), {"trunk": ()})
print(server._folder.path, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_driver_left_is_removed_by_the_next_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = Path(tempfile.mkdtemp(prefix="f", dir="/tmp"))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    environment = {**os.environ, "TMPDIR": str(folder)}
    words = [sys.executable, "-c", KILLED]
    told = subprocess.run(words, env=environment, capture_output=True, text=True)
    left = Path(told.stdout.strip())
    assert left.is_dir()
    alive = ForkServer(os.getcwd(), {"trunk": ()})
    assert not left.exists()
    another = ForkServer(os.getcwd(), {"trunk": ()})
    assert len(list(folder.iterdir())) == 2
    alive.close()
    another.close()
    assert list(folder.iterdir()) == []
    folder.rmdir()
