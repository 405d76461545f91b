"""Imports of heavy packages without the garbage collector, which would walk them again and again."""

from __future__ import annotations

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def fast_import() -> Iterator[None]:
    """Around imports of torch, transformers or vLLM: about a quarter of their time is saved."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()  # what was imported stays; later collections need not look at it
        atexit.register(gc.unfreeze)  # else extension modules complain of leaks at exit
        gc.enable()
