"""A folder for the files of a Ray of our own, that no other user can enter.

Ray lets everybody write to its folders, sockets included, whatever the umask: who replaces a socket is
talked to as Ray. So they lie below a folder of mode 0700. The driver holds a lock in it for as long as it
lives, and by that others know a folder whose driver was killed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

from actors.owner_lock import held, taken_over
from cluster.config import BadInput

PREFIX = "raylign-"
LOCK = "driver"  # as long as it is locked, the driver lives
# The path of a Unix socket may have 107 characters; below the base Ray's longest one takes these.
MAX_BASE = 107 - len(
    f"/{PREFIX}12345678/r/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
)


class RayFolder:
    """Made anew; gone with `remove`, once. Those of this user's drivers that are gone are removed first."""

    def __init__(self) -> None:
        base = _base()
        _sweep(base)
        self._folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
        self._lock = held(self._folder / LOCK)
        self.path = str(self._folder / "r")  # Ray opens what it is given to everybody

    def remove(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        os.close(self._lock)


def _base() -> str:
    given = (os.environ.get("RAY_TMPDIR"), "/tmp", tempfile.gettempdir())
    for base in (os.path.abspath(folder) for folder in given if folder):
        if _is_fit(base):
            return base
    raise BadInput(
        f"RAY_TMPDIR: Ray's sockets need a folder that can be written to, with a path of {MAX_BASE} "
        "characters at most, and /tmp is none; set it to one"
    )


def _is_fit(base: str) -> bool:
    return len(base) <= MAX_BASE and os.access(base, os.W_OK | os.X_OK)


def _sweep(base: str) -> None:
    for folder in Path(base).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            if folder.is_symlink() or folder.stat().st_uid != os.geteuid():
                continue
            with taken_over(folder / LOCK):
                shutil.rmtree(folder, ignore_errors=True)
