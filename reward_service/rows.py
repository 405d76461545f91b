"""Reads the rows of a user's Parquet or JSONL file, with refusals a person can act on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_rows(
    path: str | Path, *, columns: tuple[str, ...] = (), any_of: tuple[str, ...] = ()
) -> list[dict[str, Any]]:
    """All rows as dicts. ValueError (one line: what, where, the fix) on a missing or unreadable file,
    an unknown ending, no rows, or rows without `columns` or without at least one of `any_of`."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(
            f"{path}: no such file; check the path in the config, or make the data first"
        )
    if path.suffix == ".parquet":
        rows = _read_parquet(path)
    elif path.suffix in (".jsonl", ".json"):
        rows = _read_jsonl(path)
    else:
        raise ValueError(f"{path}: unknown ending {path.suffix!r}; give a .parquet or .jsonl file")
    if not rows:
        raise ValueError(f"{path}: has no rows; give a file with data")
    for name in columns:
        if name not in rows[0]:
            raise ValueError(
                f"{path}: no column {name!r} (it has {', '.join(rows[0])}); add or rename it"
            )
    if any_of and not any(name in rows[0] for name in any_of):
        wanted = " or ".join(repr(name) for name in any_of)
        raise ValueError(
            f"{path}: no column {wanted} (it has {', '.join(rows[0])}); add or rename one"
        )
    return rows


def text_of(where: str, row: Mapping[str, Any], name: str) -> str:
    """The text in column `name`; ValueError, beginning with `where`, for anything else."""
    text = row.get(name)
    if not isinstance(text, str):
        raise ValueError(f"{where}: {name} is {type(text).__name__}, not text; correct it")
    return text


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_table(path).to_pylist()
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        said = " ".join(str(error).split())
        raise ValueError(f"{path}: not a readable Parquet file ({said}); write it again") from None


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    rows = []
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8 text; write it again as UTF-8 JSONL") from None
    # Not splitlines(): JSON strings may hold its other line separators unescaped.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            said = getattr(error, "msg", str(error))
            raise ValueError(f"{path}: line {number} is not JSON ({said}); fix the line") from None
        if not isinstance(row, dict):
            raise ValueError(
                f"{path}: line {number} is not an object; write one JSON object a line"
            )
        if "\\ud" in line.lower() and not _is_text(row):
            raise ValueError(
                f"{path}: line {number} has half of a surrogate pair, which is no text; fix the line"
            )
        rows.append(row)
    return rows


def _is_text(row: Any) -> bool:
    """JSON can escape what UTF-8 cannot write, and no tokenizer takes."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True
