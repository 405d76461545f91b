"""The lines of dropped.jsonl: what is not trained, and why; and what a person is told of them."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from actors.scored import Dropped
from actors.trajectory import Key

SHOWN = 10  # reasons
LONGEST = 200  # of one


def rolled_out(dropped: Dropped, samples: int) -> list[dict[str, Any]]:
    """A prompt given up after its rollout began: one line a sample."""
    return [_line(dropped.prompt_id, dropped.epoch, i, dropped.reason) for i in range(samples)]


def refused(keys: Iterable[Key], samples: int, reason: str) -> list[dict[str, Any]]:
    """The batch of a step that was refused: one line a sample."""
    return [_line(*key, sample, reason) for key in keys for sample in range(samples)]


def too_long(prompt_id: str) -> dict[str, Any]:
    """A prompt that fits into no context: it is in no epoch."""
    return _line(prompt_id, None, None, "longer than the context, prompts.on_too_long is drop")


def in_words(drops: Iterable[Mapping[str, Any]]) -> str:
    """How many were dropped for which reason; "" without any."""
    kinds = Counter(kind_of(drop) for drop in drops)
    shown = [f"{n} {kind}" for kind, n in kinds.most_common(SHOWN)]
    others = kinds.total() - sum(n for _, n in kinds.most_common(SHOWN))
    return ", ".join([*shown, *([f"and {others} for other reasons"] if others else [])])


def kind_of(drop: Mapping[str, Any]) -> str:
    """Its reason, the same for every sample that it befell: without the sample's own name, cut short."""
    own = rf"(?<!\w){re.escape(str(drop.get('prompt_id')))}-e\d+-\d+(: )?"
    kind = re.sub(own, "", str(drop.get("reason", "unknown")))
    return kind if len(kind) <= LONGEST else f"{kind[:LONGEST]}..."


def _line(prompt_id: str, epoch: int | None, sample: int | None, reason: str) -> dict[str, Any]:
    return {
        "prompt_id": prompt_id,
        "epoch": epoch,
        "sample_index": sample,
        "reason": reason,
        "time": time.time(),
    }
