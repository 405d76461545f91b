"""A file that is locked as long as the process lives that made it: by that others know what the dead left.

A process id would not do: containers that share a folder do not see each other's processes.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path


def held(path: Path) -> int:
    """Make it and hold it; the open file, which lets go of it when it is closed."""
    # Locked before it has its name, or another process could take it for one of the dead.
    draft = path.with_name(f"{path.name}.new")
    file = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    fcntl.flock(file, fcntl.LOCK_EX)
    draft.rename(path)
    return file


@contextlib.contextmanager
def taken_over(path: Path) -> Iterator[None]:
    """Hold one that this user's dead process made. OSError if that lives, or it is another user's."""
    file = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    try:
        if os.fstat(file).st_uid != os.geteuid():
            raise PermissionError(f"{path} is another user's")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(file)
