"""One driver at a run: from before it looks at the run's folder until it has left it.

The lock is a file beside the folder, which --overwrite removes. Where it cannot be had, as on a file
system without locks, the heartbeat in status.json is what tells of another driver (heartbeat.py).
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cluster.config import BadInput
from cluster.heartbeat import here


@contextmanager
def one_driver(run_dir: Path) -> Iterator[None]:
    """BadInput if another driver is at the run, whatever name the folder goes by."""
    path = _path(run_dir)
    is_new = not path.parent.exists()
    file = _locked(path, run_dir)
    try:
        yield
    finally:
        if file is not None:
            with suppress(OSError):
                path.unlink()
                if is_new:
                    path.parent.rmdir()  # if nothing was begun there
            os.close(file)


def _path(run_dir: Path) -> Path:
    folder = run_dir.resolve()
    return folder.with_name(f".{folder.name}.lock")


def _locked(path: Path, run_dir: Path) -> int | None:
    """The open file, or None where there can be none: then others say what is wrong there."""
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError:
            return None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            who = _who(file)
            os.close(file)
            raise BadInput(f"{run_dir}: {who}, or name=... makes another") from None
        except OSError:
            os.close(file)
            return None
        if _is_at(path, file):
            with suppress(OSError):
                os.ftruncate(file, 0)
                os.pwrite(file, json.dumps(here()).encode(), 0)
            return file
        os.close(file)  # whoever had it has just removed it


def _is_at(path: Path, file: int) -> bool:
    with suppress(OSError):
        return os.path.samestat(os.stat(path), os.fstat(file))
    return False


def _who(file: int) -> str:
    """From what the other driver has written; it may not have come so far."""
    with suppress(ValueError, KeyError, TypeError):
        told = json.loads(os.pread(file, 4096, 0))
        return at_this_run(told["pid"], told["host"])
    return "another process is at this run; stop it first"


def at_this_run(pid: int, host: str) -> str:
    return f"process {pid} on {host} is at this run; stop it first (kill {pid}, or stop its job)"
