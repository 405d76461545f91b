"""A folder that no other user can enter, and that goes with its driver.

The driver holds a lock in it for as long as it lives, and by that the next one knows a folder whose driver
was killed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

from actors.owner_lock import held, taken_over

PREFIX = "raylign-"
LOCK = "driver"  # as long as it is locked, the driver lives


class DriverFolder:
    """Made anew; gone with `remove`. Those of this user's drivers that are gone are removed first."""

    def __init__(self, base: str) -> None:
        _sweep(base)
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
        # A number, not a file object, which would let go of it when it is collected.
        self._lock: int | None = held(self.path / LOCK)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _sweep(base: str) -> None:
    for folder in Path(base).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            if folder.is_symlink() or folder.stat().st_uid != os.geteuid():
                continue
            with taken_over(folder / LOCK):
                shutil.rmtree(folder, ignore_errors=True)
