"""What the learner would compute otherwise than the model is refused from its config alone."""

from __future__ import annotations

from typing import Any

import pytest

from learner.model_limits import check_rope, longest_exact, refuse_inexact


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model_type": "phimoe"}, "router draws random numbers in training"),
        ({"model_type": "doge"}, "its attention makes a mask of its own"),
        ({"router_jitter_noise": 0.01}, "router_jitter_noise is 0.01.*noise would.*set it to 0"),
        ({"moe_jitter_eps": 0.1}, "moe_jitter_eps is 0.1"),
        ({"attn_pdrop": 0.1}, "dropout would"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
    ],
)
def test_it_is_refused_in_one_line(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"^policy: here: .*{said}") as refused:
        refuse_inexact("policy: here", settings)
    assert "\n" not in str(refused.value)


def test_what_is_off_is_no_reason() -> None:
    off = {"router_jitter_noise": 0.0, "moe_jitter_eps": None, "attn_logit_softcapping": None}
    refuse_inexact("policy: here", {"model_type": "mixtral", "classifier_dropout": 0.1, **off})


@pytest.mark.parametrize(
    "settings",
    [
        {"rope_scaling": {"type": "su"}, "original_max_position_embeddings": 4096},
        {"rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 4096}},
        {"rope_parameters": {"full_attention": {"rope_type": "longrope"}}, "max_position_embeddings": 4096},
    ],
)  # fmt: skip
def test_longrope_is_exact_up_to_its_original_length(settings: dict[str, Any]) -> None:
    assert longest_exact(settings) == 4096
    check_rope("policy: here", settings, "sft.max_tokens", 4096)
    with pytest.raises(ValueError, match=r"sft\.max_tokens allows 4097; set that to 4096 or less$"):
        check_rope("policy: here", settings, "sft.max_tokens", 4097)


@pytest.mark.parametrize(
    "settings", [{}, {"rope_scaling": None}, {"rope_parameters": {"rope_type": "yarn"}}]
)
def test_other_ropes_are_exact_at_any_length(settings: dict[str, Any]) -> None:
    assert longest_exact(settings | {"original_max_position_embeddings": 16}) is None
