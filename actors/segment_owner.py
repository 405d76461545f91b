"""Whose segments lie in shared memory, and which of them nobody will remove any more.

The process that creates segments holds a lock beside them (owner_lock.py): containers may share /dev/shm.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from actors.owner_lock import held, taken_over

SEGMENTS = ("0", "1")  # two take turns
OWNER = "owner"
PREFIX = "raylign-"


class SegmentOwner:
    """Of the segments `stem`-0 and `stem`-1, which are to be created after it."""

    def __init__(self, stem: str) -> None:
        self._path = Path(f"{stem}-{OWNER}")
        _sweep(self._path.parent)
        self._lock = held(self._path)

    def close(self) -> None:
        """When the segments have been removed."""
        self._path.unlink(missing_ok=True)
        os.close(self._lock)


def segments_of(stem: str) -> list[str]:
    return [f"{stem}-{turn}" for turn in SEGMENTS]


def _sweep(folder: Path) -> None:
    """Remove what this user's processes left that were killed."""
    for owner in folder.glob(f"{PREFIX}*-{OWNER}"):
        with contextlib.suppress(OSError), taken_over(owner):
            _remove(str(owner).removesuffix(f"-{OWNER}"))


def _remove(stem: str) -> None:
    for path in (*segments_of(stem), f"{stem}-{OWNER}"):
        Path(path).unlink(missing_ok=True)
