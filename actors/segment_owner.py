"""Whose segments lie in shared memory, and which of them nobody will remove any more.

Containers may share /dev/shm and not see each other's processes. So a process id says nothing of who lives:
the process that creates segments holds a lock beside them, and a lock goes with its process.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

SEGMENTS = ("0", "1")  # two take turns
OWNER = "owner"
PREFIX = "raylign-"


class SegmentOwner:
    """Of the segments `stem`-0 and `stem`-1, which are to be created after it."""

    def __init__(self, stem: str) -> None:
        self._path = Path(f"{stem}-{OWNER}")
        _sweep(self._path.parent)
        # Locked before it has its name, or another process could take it for one of the dead.
        draft = self._path.with_name(f"{self._path.name}.new")
        self._lock = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        draft.rename(self._path)

    def close(self) -> None:
        """When the segments have been removed."""
        self._path.unlink(missing_ok=True)
        os.close(self._lock)


def segments_of(stem: str) -> list[str]:
    return [f"{stem}-{turn}" for turn in SEGMENTS]


def _sweep(folder: Path) -> None:
    """Remove what this user's processes left that were killed."""
    for owner in folder.glob(f"{PREFIX}*-{OWNER}"):
        with contextlib.suppress(OSError):
            lock = os.open(owner, os.O_RDWR | os.O_NOFOLLOW)
            try:
                if os.fstat(lock).st_uid == os.geteuid():
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    _remove(str(owner).removesuffix(f"-{OWNER}"))
            finally:
                os.close(lock)


def _remove(stem: str) -> None:
    for path in (*segments_of(stem), f"{stem}-{OWNER}"):
        Path(path).unlink(missing_ok=True)
