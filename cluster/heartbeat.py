"""Whether a run's driver lives: told by its process on its own machine, by its heartbeat from another."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from typing import Any

import psutil

BEAT_S = 5.0
GOING_ON = ("starting", "running")  # states
LAST_S = 4 * BEAT_S  # a heartbeat that is older is that of one that is gone


def here() -> dict[str, Any]:
    """What a driver says of itself in status.json."""
    return {"pid": os.getpid(), "host": socket.gethostname()}


def goes_on(status: Mapping[str, Any]) -> bool:
    """It says so, and lives."""
    return status.get("state") in GOING_ON and alive(status)


def alive(status: Mapping[str, Any]) -> bool:
    """`status`: what status.json holds; {} of a run that has none."""
    if "pid" not in status:
        return False
    if status.get("host") != socket.gethostname():
        return time.time() - status.get("heartbeat_at", 0.0) < LAST_S
    try:
        process = psutil.Process(status["pid"])
        # A process younger than the run's last word has merely got the same number.
        same = process.create_time() <= status["updated_at"] + 1
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
