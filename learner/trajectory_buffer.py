"""Holds finished prompts' trajectories until a step takes them: by value, as Arrow Tables.

By value, so that they outlive the generator that made them. What is taken, and when, the ledger says.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from actors.trajectory import Trajectory, from_table, to_table

Key = tuple[str, int]  # prompt_id, epoch


class TrajectoryBuffer:
    def __init__(self) -> None:
        self._tables: dict[Key, pa.Table] = {}

    def __len__(self) -> int:
        return len(self._tables)

    def add(self, trajectories: Sequence[Trajectory]) -> list[Key]:
        """Keep whole prompts (all samples of each, together); returns their keys."""
        keys = []
        for key, group in groupby(trajectories, key=lambda t: (t.prompt_id, t.epoch)):
            assert key not in self._tables, f"trajectories of {key} came twice"
            self._tables[key] = to_table(sorted(group, key=lambda t: t.sample_index))
            keys.append(key)
        return keys

    def take(self, keys: Sequence[Key]) -> pa.Table:
        """One Table of these prompts' trajectories, in this order."""
        return pa.concat_tables([self._tables.pop(key) for key in keys]).combine_chunks()

    def save(self, path: Path) -> None:
        tables = list(self._tables.values()) or [to_table([])]
        pq.write_table(pa.concat_tables(tables), path)

    def restore(self, path: Path) -> None:
        self.add(from_table(pq.read_table(path)))
