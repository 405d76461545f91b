"""A file that is written anew: whoever reads it finds the old one or the new one, whole."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """The path to write to; it gets its name at the block's end, or is removed if that fails.
    `durable`: on the disk before it has the name, or a machine that fails may leave an empty file."""
    aside = path.with_name(path.name + ".partial")
    try:
        yield aside
        if durable:
            with aside.open("rb") as file:
                os.fsync(file.fileno())
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def replace_text(path: Path, text: str, *, durable: bool = True) -> None:
    with replacing(path, durable=durable) as aside:
        aside.write_text(text, encoding="utf-8")


def read_object(path: Path) -> dict[str, Any]:
    """What a JSON file holds; {} without one, or of one that a machine's failure left unreadable."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
