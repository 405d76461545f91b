"""A driver's process is looked at on its own machine; from another its heartbeat is what there is."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from threading import Timer

import psutil
import pytest

from cluster import heartbeat
from cluster.heartbeat import LAST_S, alive, here

NOWHERE = Path("/nowhere/status.json")


def test_this_process_lives() -> None:
    assert alive({**here(), "updated_at": time.time()}, NOWHERE)


def test_a_run_that_has_said_nothing_does_not() -> None:
    assert not alive({}, NOWHERE)


def test_one_that_is_gone_does_not_even_if_its_heart_has_just_beaten() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    status = {**here(), "pid": ended.pid, "updated_at": time.time(), "heartbeat_at": time.time()}
    deadline = time.monotonic() + 30
    while psutil.Process(ended.pid).status() != psutil.STATUS_ZOMBIE:  # nobody has waited for it
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert not alive(status, NOWHERE)
    ended.wait()
    assert not alive(status, NOWHERE)


def test_another_process_of_the_same_number_is_another() -> None:
    assert not alive({**here(), "updated_at": 1.0}, NOWHERE)


def elsewhere(beat: float) -> dict[str, object]:
    return {"pid": 1, "host": "another", "updated_at": beat, "heartbeat_at": beat}


def test_on_another_machine_a_heartbeat_that_is_new_counts() -> None:
    assert alive(elsewhere(time.time() - LAST_S + 5), NOWHERE)
    assert not alive({"pid": 1, "host": "another", "updated_at": time.time()}, NOWHERE)


@pytest.mark.parametrize("skew", [-3600.0, 3600.0])
@pytest.mark.parametrize("beats", [True, False])
def test_a_clock_that_differs_makes_no_run_that_lives_look_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, skew: float, beats: bool
) -> None:
    monkeypatch.setattr(heartbeat, "WATCH_S", 1.0)
    monkeypatch.setattr(heartbeat, "LOOK_S", 0.02)
    path, first = tmp_path / "status.json", elsewhere(time.time() + skew)
    path.write_text(json.dumps(first))
    again = json.dumps(elsewhere(time.time() + skew + heartbeat.BEAT_S))
    timer = Timer(0.1, path.write_text, [again] if beats else [path.read_text()])
    timer.start()
    assert alive(first, path) is beats
    timer.join()
