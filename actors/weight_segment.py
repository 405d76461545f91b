"""Shared-memory segments that weights are pushed through: one writes, any number read.

A segment is never written while anybody may read it. The driver's order sees to that (version v+1 is
published, into the other of two segments, when all have proved v); the kernel enforces it: a reader
holds a shared lock from before it verifies until it has let go of the bytes, the writer needs the
exclusive one. So what was verified is what is loaded, and what an engine computes on does not change
under it; a lock goes with its process, so the dead hold none.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import time
from collections.abc import Iterator

import numpy as np

WRITE_WAIT_S = 10.0


class SegmentInUse(Exception):
    """A segment was to be written that some receiver still reads."""


class WrittenSegment:
    """The writer's side, in every process that writes a share; one of them creates and locks it.
    FileExistsError if there is one of that name."""

    def __init__(self, path: str, num_bytes: int, *, create: bool) -> None:
        if create:
            # A file that is there is somebody else's: what reads it must not find other bytes.
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            # Not ftruncate: where shared memory is too small, that succeeds and a write kills us.
            os.posix_fallocate(self._file, 0, num_bytes)
        else:
            self._file = os.open(path, os.O_RDWR)
        self.path = path
        self.data = _mapped(self._file, num_bytes, mmap.PROT_READ | mmap.PROT_WRITE)

    @contextlib.contextmanager
    def locked(self, wait_s: float | None = None) -> Iterator[None]:
        """Around every write. Raises SegmentInUse if readers do not let go in time (default:
        WRITE_WAIT_S)."""
        deadline = time.monotonic() + (WRITE_WAIT_S if wait_s is None else wait_s)
        while not _try_lock(self._file, fcntl.LOCK_EX):
            if time.monotonic() > deadline:
                raise SegmentInUse(
                    f"{self.path}: a receiver still reads the version it holds; every receiver must "
                    "prove a version before the next one but one is published"
                )
            time.sleep(0.001)
        try:
            yield
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    def close(self) -> None:
        os.close(self._file)

    def remove(self) -> None:
        """Unlink it; those who have mapped it keep what they have."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)


class SegmentReader:
    """The segments that one receiver reads: each is mapped once, read-only, and held while in use."""

    def __init__(self) -> None:
        self._mapped: dict[str, tuple[tuple[int, int], int, np.ndarray]] = {}

    def hold(self, path: str) -> np.ndarray:
        """The bytes, which do not change until `release`. A stray write to them is a crash, not a
        quiet change. Raises SegmentInUse while it is being written."""
        found = os.stat(path)
        made = (found.st_ino, found.st_size)
        if path in self._mapped and self._mapped[path][0] != made:  # another file of that name
            os.close(self._mapped.pop(path)[1])
        if path not in self._mapped:
            file = os.open(path, os.O_RDONLY)
            self._mapped[path] = made, file, _mapped(file, found.st_size, mmap.PROT_READ)
        _, file, data = self._mapped[path]
        if not _try_lock(file, fcntl.LOCK_SH):
            raise SegmentInUse(f"{path}: it is being written")
        return data

    def release(self, path: str) -> None:
        if path in self._mapped:
            fcntl.flock(self._mapped[path][1], fcntl.LOCK_UN)


def _mapped(file: int, num_bytes: int, protection: int) -> np.ndarray:
    # Populated at once: page by page, the first pass over it would take several times as long.
    flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
    return np.frombuffer(mmap.mmap(file, num_bytes, flags=flags, prot=protection), np.uint8)


def _try_lock(file: int, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
