"""JSONL files of a run: one object a line, each there whole or not at all, though a disk be full."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cluster.replace_file import replace_text

BLOCK = 1 << 16


def append(path: Path, row: Mapping[str, Any]) -> None:
    """By the one process that writes there. OSError leaves the file as it was."""
    rest = memoryview((json.dumps(row) + "\n").encode())
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        size = _cut_unfinished(file)
        try:
            while rest:
                # A disk that fills up takes a part of a line, and says so with the next one.
                rest = rest[os.write(file, rest) :]
        except BaseException:
            os.ftruncate(file, size)
            raise
    finally:
        os.close(file)


def read(path: Path) -> list[dict[str, Any]]:
    """The objects of a file, none when it is missing. A last line without its end was being written
    when the reader came or the writer died: it is left out."""
    return [row for _, row in _lines(path)]


def count(path: Path) -> int:
    """How many there are, without reading what they say."""
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def keep(path: Path, wanted: Callable[[int, dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """Remove the lines that are not `wanted`, asked with the line's place and object. What is left:
    all old lines are in the file or only these, never less."""
    kept = [(line, row) for place, (line, row) in enumerate(_lines(path)) if wanted(place, row)]
    if path.is_file():
        replace_text(path, "".join(f"{line}\n" for line, _ in kept))
    return [row for _, row in kept]


def _lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Those that have an end, with their objects; or ValueError that names the line."""
    if not path.is_file():
        return []
    lines = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            lines.append((line.decode(), json.loads(line)))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
    return lines


def _cut_unfinished(file: int) -> int:
    """Remove a last line without an end, which a writer that died has left. The size then."""
    size = end = os.fstat(file).st_size
    while end:
        start = max(0, end - BLOCK)
        found = os.pread(file, end - start, start).rfind(b"\n")
        if found >= 0:
            end = start + found + 1
            break
        end = start
    if end < size:
        os.ftruncate(file, end)
    return end
