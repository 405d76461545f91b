"""`--max-restarts`: a run that failed or died goes on with --resume; anything else is passed on."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster import restarts
from cluster.heartbeat import BEAT_S

# A run that writes down how it was called, and ends as the next line of `plan` says.
CHILD = """
import json, os, signal, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
calls = folder / "calls.jsonl"
number = len(calls.read_text().splitlines()) if calls.exists() else 0
with calls.open("a") as file:
    file.write(json.dumps(sys.argv[2:]) + "\\n")
act = json.loads((folder / "plan.json").read_text())[number]
(folder / "config.yaml").write_text("")
if act == "never up":
    time.sleep(20)
def beat(at):
    aside = folder / "aside.json"
    aside.write_text(json.dumps({"pid": os.getpid(), "heartbeat_at": at}))
    aside.replace(folder / "status.json")
if str(act).startswith("stuck"):
    beat(time.time() + (3600 if act == "stuck, ahead" else 0))
    time.sleep(20)
if act == "beats, the clock set back":
    for n in range(30):
        beat(time.time() - 3600 * (n > 0))
        time.sleep(0.1)
    sys.exit(0)
if str(act).startswith("until a signal"):
    handlers = {", then 3": lambda *_: sys.exit(3), ", without a handler": signal.SIG_DFL}
    handler = handlers.get(act.removeprefix("until a signal"), lambda *_: sys.exit(143))
    signal.signal(signal.SIGTERM, handler)
    (folder / "ready").write_text("")
    time.sleep(20)
if act == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(act)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    child = tmp_path / "child.py"
    child.write_text(CHILD)
    monkeypatch.setattr(restarts, "TRAIN", (sys.executable, str(child), str(tmp_path)))
    monkeypatch.setattr(restarts, "CHECK_S", 0.05)
    return tmp_path


def ended(
    folder: Path,
    *plan: object,
    max_restarts: int = 3,
    heartbeat_s: float = 60.0,
    start_s: float = 60.0,
) -> int:
    (folder / "plan.json").write_text(json.dumps(plan))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        return restarts.run_again(
            ["ppo.yaml", "--overwrite"],
            folder,
            max_restarts=max_restarts,
            heartbeat_s=heartbeat_s,
            start_s=start_s,
        )
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def calls(folder: Path) -> list[list[str]]:
    return [json.loads(line) for line in (folder / "calls.jsonl").read_text().splitlines()]


FIRST, AGAIN = ["ppo.yaml", "--overwrite"], ["ppo.yaml", "--resume"]


@pytest.mark.parametrize("how", [3, 1, "killed"])
def test_what_failed_or_was_killed_goes_on_from_its_checkpoint(folder: Path, how: object) -> None:
    assert ended(folder, how, how, 0) == 0
    assert calls(folder) == [FIRST, AGAIN, AGAIN]


@pytest.mark.parametrize("code", [0, 2, 130, 143])
def test_an_end_bad_input_and_a_stop_are_passed_on(folder: Path, code: int) -> None:
    assert ended(folder, code) == code
    assert calls(folder) == [FIRST]


def test_after_so_many_restarts_it_has_failed(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert ended(folder, "killed", 3, "killed", max_restarts=2) == 3
    assert len(calls(folder)) == 3
    assert "restarted 2 times; given up" in capfd.readouterr().err


@pytest.mark.parametrize("how", ["stuck", "stuck, ahead"])
def test_a_driver_that_stopped_beating_is_ended_and_its_stack_shown(
    folder: Path, capfd: pytest.CaptureFixture[str], how: str
) -> None:
    """Also one whose last beat was before a clock was set back."""
    assert ended(folder, how, 0, heartbeat_s=0.5) == 0
    said = capfd.readouterr().err
    assert "has not moved" in said
    assert "Thread" in said
    assert calls(folder) == [FIRST, AGAIN]


def test_a_driver_that_never_came_to_beat_is_ended_too(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert ended(folder, "never up", 0, start_s=2.0) == 0
    assert "has not moved" in capfd.readouterr().err
    assert calls(folder) == [FIRST, AGAIN]


def test_a_clock_that_is_set_ends_no_driver_that_beats(folder: Path) -> None:
    assert ended(folder, "beats, the clock set back", heartbeat_s=1.5, start_s=1.5) == 0
    assert calls(folder) == [FIRST]


def test_what_an_earlier_process_has_written_is_no_beat_of_this_one(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    status = {"pid": 1, "heartbeat_at": time.time() + 3600}
    (folder / "status.json").write_text(json.dumps(status))
    assert ended(folder, "never up", 0, start_s=2.0) == 0
    assert "has not moved" in capfd.readouterr().err
    assert calls(folder) == [FIRST, AGAIN]


def test_the_deadline_for_a_heartbeat_follows_the_one_for_an_answer() -> None:
    assert restarts.heartbeat_deadline_s(30.0) == 60.0
    assert restarts.heartbeat_deadline_s(0.1) >= 2 * BEAT_S


@pytest.mark.parametrize(
    ("how", "code"), [("", 143), (", then 3", 3), (", without a handler", 128 + signal.SIGTERM)]
)
def test_a_stop_is_handed_to_the_run_which_is_not_started_again(
    folder: Path, how: str, code: int
) -> None:
    (folder / "plan.json").write_text(json.dumps([f"until a signal{how}", 0]))
    program = (
        "import sys; from pathlib import Path; from cluster import restarts; "
        f"restarts.TRAIN = {restarts.TRAIN!r}; folder = Path({str(folder)!r}); "
        "sys.exit(restarts.run_again(['ppo.yaml'], folder, max_restarts=3, heartbeat_s=60.0))"
    )
    process = subprocess.Popen([sys.executable, "-c", program])
    deadline = time.monotonic() + 30
    while not (folder / "ready").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == code
    assert len(calls(folder)) == 1
