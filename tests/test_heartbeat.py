"""A driver's process is looked at on its own machine; from another its heartbeat is what there is."""

from __future__ import annotations

import subprocess
import sys
import time

import psutil

from cluster.heartbeat import LAST_S, alive, here


def test_this_process_lives() -> None:
    assert alive({**here(), "updated_at": time.time()})


def test_a_run_that_has_said_nothing_does_not() -> None:
    assert not alive({})


def test_one_that_is_gone_does_not_even_if_its_heart_has_just_beaten() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    status = {**here(), "pid": ended.pid, "updated_at": time.time(), "heartbeat_at": time.time()}
    deadline = time.monotonic() + 30
    while psutil.Process(ended.pid).status() != psutil.STATUS_ZOMBIE:  # nobody has waited for it
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert not alive(status)
    ended.wait()
    assert not alive(status)


def test_another_process_of_the_same_number_is_another() -> None:
    assert not alive({**here(), "updated_at": 1.0})


def test_on_another_machine_the_heartbeat_counts() -> None:
    status = {"pid": 1, "host": "another", "updated_at": time.time()}
    assert not alive(status)
    assert alive({**status, "heartbeat_at": time.time() - LAST_S + 5})
    assert not alive({**status, "heartbeat_at": time.time() - LAST_S - 1})
