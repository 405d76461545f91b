"""Held-out samples of two evaluations side by side: for the terminal, the summary and the report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

Row = dict[str, Any]  # of an evaluation's file


def changed_samples(before: Iterable[Row], after: Iterable[Row], count: int) -> list[Row]:
    """`count` prompts whose completion changed, spread evenly over the file; not picked by score."""
    later = dict(_numbered(after))
    pairs = [(old, later[key]) for key, old in _numbered(before) if key in later]
    changed = [(old, new) for old, new in pairs if old["completion"] != new["completion"]]
    stride = max(1, len(changed) // max(1, count))
    return [
        {
            "prompt": old["prompt"],
            "before": old["completion"],
            "after": new["completion"],
            "judge_before": old["judge_score"],
            "judge_after": new["judge_score"],
        }
        for old, new in changed[::stride][:count]
    ]


def _numbered(rows: Iterable[Row]) -> Iterator[tuple[tuple[str, int], Row]]:
    """With the prompt, and which of its samples it is: there may be several."""
    seen: Counter[str] = Counter()
    for row in rows:
        prompt_id = row["prompt_id"]
        yield (prompt_id, seen[prompt_id]), row
        seen[prompt_id] += 1
