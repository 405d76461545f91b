"""The lines of dropped.jsonl: what is not trained, and why."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from actors.scored import Dropped
from actors.trajectory import Key


def rolled_out(dropped: Dropped, samples: int) -> list[dict[str, Any]]:
    """A prompt given up after its rollout began: one line a sample."""
    return [_line(dropped.prompt_id, dropped.epoch, i, dropped.reason) for i in range(samples)]


def refused(keys: Iterable[Key], samples: int, reason: str) -> list[dict[str, Any]]:
    """The batch of a step that was refused: one line a sample."""
    return [_line(*key, sample, reason) for key in keys for sample in range(samples)]


def too_long(prompt_id: str) -> dict[str, Any]:
    """A prompt that fits into no context: it is in no epoch."""
    return _line(prompt_id, None, None, "longer than the context, prompts.on_too_long is drop")


def _line(prompt_id: str, epoch: int | None, sample: int | None, reason: str) -> dict[str, Any]:
    return {
        "prompt_id": prompt_id,
        "epoch": epoch,
        "sample_index": sample,
        "reason": reason,
        "time": time.time(),
    }
