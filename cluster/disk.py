"""Whether the disk takes what is to be written, and how to tell when it did not."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from cluster.config import BadInput

REFUSALS = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM,
    errno.EEXIST, errno.ENOTDIR, errno.EISDIR,
}  # fmt: skip


def refusal_of(error: BaseException | None) -> OSError | None:
    """The disk's refusal among the causes of `error`, in whichever process it was raised; or None."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in REFUSALS:
            return error
        error = getattr(error, "cause", None) or error.__cause__
    return None


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def free_bytes(path: Path) -> int:
    return shutil.disk_usage(existing_parent(path)).free


def existing_parent(path: Path) -> Path:
    path = path.resolve()
    while not path.exists():
        path = path.parent
    return path


def check_disk(run_dir: Path, checkpoint_bytes: int, keep: int) -> None:
    """BadInput if the run cannot write there, or if there is no room for the checkpoints it keeps and one
    more: an old one is removed only when the new one is whole."""
    parent, free = existing_parent(run_dir), free_bytes(run_dir)
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise BadInput(f"runs_dir: {parent} is no folder that can be written to; set runs_dir")
    if free < (keep + 1) * checkpoint_bytes:
        raise BadInput(
            f"runs_dir: {parent} has {gib(free)} free, checkpoints take about "
            f"{gib((keep + 1) * checkpoint_bytes)} (checkpoint.keep {keep}, and the one that is written); "
            "make room, keep fewer, or set runs_dir"
        )


def gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.3f} GiB"
