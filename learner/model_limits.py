"""What the learner does not compute, told from a model's config.json alone. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

# What chance does in training: the same weights must answer the same twice, or no ratio starts at 1.
RANDOM = ("drop", "jitter")
CAPPED = ("attn_logit_softcapping", "final_logit_softcapping")
OTHERWISE = {
    "doge": "its attention makes a mask of its own",
    "phimoe": "its router draws random numbers in training",
}
LONG_ROPE = ("longrope", "su")


def refuse_inexact(where: str, settings: Mapping[str, Any]) -> None:
    """ValueError if the learner's numbers would not be the model's. `settings`: config.json."""
    if (kind := settings.get("model_type")) in OTHERWISE:
        raise ValueError(
            f"{where}: {OTHERWISE[kind]}, which the learner does not compute; give another model than "
            f"a {kind}"
        )
    for name, value in settings.items():
        if _is_random(name) and isinstance(value, float) and value > 0:
            what = "dropout" if "drop" in name else "noise"
            raise ValueError(
                f"{where}: {name} is {value} in config.json; {what} would move every ratio away "
                "from 1, set it to 0"
            )
        if name in CAPPED and value:
            raise ValueError(
                f"{where}: {name} is {value} in config.json, which the learner does not compute; give "
                "a model without it"
            )


def check_rope(where: str, settings: Mapping[str, Any], key: str, longest: int) -> None:
    """ValueError if a sequence of `longest` tokens, which `key` allows, would turn a packed row's others
    by its own factors, as transformers does with longrope."""
    most = longest_exact(settings)
    if most is not None and longest > most:
        raise ValueError(
            f"{where}: its longrope changes beyond {most} tokens (original_max_position_embeddings), "
            f"{key} allows {longest}; set that to {most} or less"
        )


def longest_exact(settings: Mapping[str, Any]) -> int | None:
    """Tokens up to which a sequence leaves the others of its row alone; None: any number."""
    name = "original_max_position_embeddings"
    for rope in _ropes(settings):
        if (rope.get("rope_type") or rope.get("type")) in LONG_ROPE:
            given = settings.get(name) or rope.get(name) or settings.get("max_position_embeddings")
            return int(given) if given else None
    return None


def _ropes(settings: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Of the whole model, or of each kind of layer, under the key's old name and its new one."""
    for name in ("rope_scaling", "rope_parameters"):
        given = settings.get(name)
        if isinstance(given, Mapping):
            yield given
            yield from (one for one in given.values() if isinstance(one, Mapping))


def _is_random(name: str) -> bool:
    """Of the trunk: heads that are not used are no reason."""
    of_a_head = name.startswith(("classifier", "summary"))
    return not of_a_head and any(part in name for part in RANDOM)
