"""What a batch of trajectories shows of generation and scoring."""

from __future__ import annotations

import numpy as np
import pyarrow as pa


def rollout_metrics(table: pa.Table, version: int) -> dict[str, float]:
    """Metrics of the roles before the learner, which is at `version`."""
    scores = table["score"].to_numpy()
    lengths = table["completion_ids"].combine_chunks().value_lengths().to_numpy()
    staleness = version - table["policy_version"].to_numpy()
    cut = np.array(table["finish_reason"].to_pylist()) == "length"
    metrics = {
        "rollout/completion_tokens": float(lengths.sum()),
        "rollout/completion_tokens_mean": float(lengths.mean()),
        "rollout/truncated_fraction": float(cut.mean()),
        "reward/score_mean": float(scores.mean()),
        "reward/score_sd": float(scores.std()),
        "reward/score_s_mean": float(table["score_s"].to_numpy().mean()),
        "staleness/mean": float(staleness.mean()),
        "staleness/max": float(staleness.max()),
    }
    return metrics | _part_means(table)


def _part_means(table: pa.Table) -> dict[str, float]:
    rows = [dict(parts) for parts in table["score_parts"].to_pylist()]
    names = sorted({name for row in rows for name in row})
    return {
        f"reward/part/{name}": float(np.mean([row[name] for row in rows if name in row]))
        for name in names
    }
