"""A folder for the files of a Ray of our own, that no other user can enter.

Ray lets everybody write to its folders, sockets included, whatever the umask: who replaces a socket is
talked to as Ray. So they lie below a folder of mode 0700 (driver_folder.py).
"""

from __future__ import annotations

import os
import tempfile

from cluster.config import BadInput
from cluster.driver_folder import PREFIX, DriverFolder

# The path of a Unix socket may have 107 characters; below the base Ray's longest one takes these.
MAX_BASE = 107 - len(
    f"/{PREFIX}12345678/r/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
)


class RayFolder:
    """Made anew; gone with `remove`."""

    def __init__(self) -> None:
        self._folder = DriverFolder(_base())
        self.path = str(self._folder.path / "r")  # Ray opens what it is given to everybody

    def remove(self) -> None:
        self._folder.remove()


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
