"""Held-out samples side by side: each with its own, those that changed, from all over the file."""

from __future__ import annotations

from typing import Any

from cluster.held_out import changed_samples


def rows(*samples: tuple[str, str]) -> list[dict[str, Any]]:
    return [
        {
            "prompt_id": prompt_id,
            "prompt": prompt_id.upper(),
            "completion": text,
            "judge_score": 1.0,
        }
        for prompt_id, text in samples
    ]


def shown(before: list[dict[str, Any]], after: list[dict[str, Any]], count: int = 9) -> list[str]:
    found = changed_samples(before, after, count)
    return [f"{s['prompt']}: {s['before']} -> {s['after']}" for s in found]


def test_the_samples_of_one_prompt_are_paired_in_order() -> None:
    before = rows(("a", "1"), ("b", "2"), ("a", "3"))
    after = rows(("a", "4"), ("b", "5"), ("a", "6"))
    assert shown(before, after) == ["A: 1 -> 4", "B: 2 -> 5", "A: 3 -> 6"]


def test_evaluations_of_other_prompts_are_paired_as_far_as_they_go() -> None:
    before, after = rows(("a", "1"), ("b", "2")), rows(("b", "3"), ("c", "4"))
    assert shown(before, after) == ["B: 2 -> 3"]


def test_what_changed_is_shown_spread_over_the_file() -> None:
    before = rows(*((f"p{i}", "old") for i in range(12)))
    after = rows(*((f"p{i}", "old" if i % 3 == 0 else "new") for i in range(12)))
    assert shown(before, after, 4) == [f"P{i}: old -> new" for i in (1, 4, 7, 10)]
    assert shown(before, before) == []
    assert shown(before, after, 0) == []
