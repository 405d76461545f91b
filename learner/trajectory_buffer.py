"""Holds finished prompts' trajectories until a step takes them: references, never the tokens.

A generator's answer comes as one packed Table of several prompts (a chunk). The driver owns its
reference, and it lies on the driver's machine, so a chunk outlives the generator that made it and that
one's machine, and goes to the learner unopened. Which prompts are taken, and when, the ledger says.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from actors.trajectory import Key


@dataclass(frozen=True)
class Batch:
    """A step's prompts, oldest first, and the chunks that hold their trajectories (among others)."""

    keys: list[Key]
    chunks: list[Any]


class TrajectoryBuffer:
    def __init__(self) -> None:
        self._chunks: dict[Key, Any] = {}  # several keys share one

    def __len__(self) -> int:
        """Prompts in it."""
        return len(self._chunks)

    def add(self, keys: Iterable[Key], chunk: Any) -> None:
        """Keep a chunk that holds whole prompts: all samples of each."""
        for key in keys:
            assert key not in self._chunks, f"trajectories of {key} came twice"
            self._chunks[key] = chunk

    def take(self, keys: Sequence[Key]) -> Batch:
        """These prompts, which leave the buffer; a chunk does with the last of its prompts."""
        return _batch(keys, [self._chunks.pop(key) for key in keys])

    def contents(self) -> Batch:
        """Everything in it, which stays."""
        return _batch(list(self._chunks), list(self._chunks.values()))


def _batch(keys: Sequence[Key], chunks: Iterable[Any]) -> Batch:
    return Batch(list(keys), list({id(chunk): chunk for chunk in chunks}.values()))
