"""Whether a run's driver lives: told by its process on its own machine, by its heartbeat from another.

Clocks of two machines may differ. A heartbeat that does not look new is watched: if another follows it,
the run lives. One that is gone may look alive for LAST_S, and for as much longer as its clock was ahead.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from cluster.replace_file import read_object

BEAT_S = 5.0
GOING_ON = ("starting", "running")  # states
LAST_S = 4 * BEAT_S  # a heartbeat within it is new
WATCH_S = 3 * BEAT_S
LOOK_S = 0.5
STATUS = "status.json"


def here() -> dict[str, Any]:
    """What a driver says of itself in status.json."""
    return {"pid": os.getpid(), "host": socket.gethostname()}


def goes_on(status: Mapping[str, Any], path: Path) -> bool:
    """It says so, and lives. `path`: the file that `status` was read from."""
    return status.get("state") in GOING_ON and alive(status, path)


def alive(status: Mapping[str, Any], path: Path) -> bool:
    if "pid" not in status:
        return False
    if status.get("host") != socket.gethostname():
        return _beats(status.get("heartbeat_at"), path)
    try:
        process = psutil.Process(status["pid"])
        # A process younger than the run's last word has merely got the same number.
        same = process.create_time() <= status["updated_at"] + 1
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _beats(beat: float | None, path: Path) -> bool:
    if beat is None:
        return False
    if abs(time.time() - beat) < LAST_S:
        return True
    deadline = time.monotonic() + WATCH_S
    while time.monotonic() < deadline:
        time.sleep(LOOK_S)
        if read_object(path).get("heartbeat_at", beat) != beat:
            return True
    return False
