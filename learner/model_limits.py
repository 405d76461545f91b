"""What the learner does not compute, told from a model's config.json alone. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def refuse_dropout(folder: str, settings: Mapping[str, Any]) -> None:
    """ValueError if the trunk drops anything: the same weights must answer the same twice, or no ratio
    would start at 1. Dropout of heads that are not used is no reason."""
    for name, value in settings.items():
        of_trunk = "drop" in name and not name.startswith(("classifier", "summary"))
        if of_trunk and isinstance(value, float) and value > 0:
            raise ValueError(
                f"{folder}: {name} is {value} in config.json; dropout would move every ratio away "
                "from 1, set it to 0"
            )
