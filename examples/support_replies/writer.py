"""The human agents whose replies the base model learns from: of mixed care, often rude.

A reply fills six slots, each of which may stay empty but the remedy's. How well is chance: that is
the flaw that PPO removes afterwards.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

from examples.support_replies import task
from examples.support_replies.task import Ticket

SLOTS = ("greeting", "empathy", "filler", "remedy", "filler", "closing")
SLIP = 0.04  # a good sentence names the wrong name, item or remedy
FILLER_SHARE = 0.45
BAD = {  # slot -> (probability, one of these sentences), else the last
    "greeting": (0.55, (task.RUDE_GREETING,), ""),
    "empathy": (0.55, (task.RUDE_EMPATHY,), ""),
    "remedy": (0.70, (task.REFUSAL,), task.VAGUE[0]),
    "closing": (0.55, task.RUDE_CLOSINGS, ""),
}


def write_reply(rng: random.Random, ticket: Ticket) -> list[str]:
    """Six sentences, "" where a slot is empty; the writer's care is drawn once for all of them."""
    care = 0.1 + 0.5 * rng.random()
    return [_draw(rng, ticket, slot, care, SLIP) for slot in SLOTS]


def edit_reply(rng: random.Random, ticket: Ticket, reply: list[str]) -> list[str]:
    """A copy that differs in one slot, drawn again by a writer of more care and more slips."""
    while True:
        edited, at = list(reply), rng.randrange(len(SLOTS))
        edited[at] = _draw(rng, ticket, SLOTS[at], care=0.7, slip=0.3)
        if edited != reply:
            return edited


def completion_of(reply: Sequence[str]) -> str:
    """The text after the prompt. It starts with a space, so that no token spans the boundary."""
    return " " + " ".join(sentence for sentence in reply if sentence)


def _draw(rng: random.Random, ticket: Ticket, slot: str, care: float, slip: float) -> str:
    if slot == "filler":
        return rng.choice(task.FILLERS) if rng.random() < FILLER_SHARE else ""
    if rng.random() < care:
        return _good(rng, ticket, slot, slipped=rng.random() < slip)
    share, sentences, otherwise = BAD[slot]
    return rng.choice(sentences) if rng.random() < share else otherwise


def _good(rng: random.Random, ticket: Ticket, slot: str, *, slipped: bool) -> str:
    if slot == "closing":
        return rng.choice(task.THANKS)
    right, possible, sentence = {
        "greeting": (ticket.name, task.NAMES, task.greeting),
        "empathy": (ticket.item, task.ITEMS, task.empathy),
        "remedy": (task.REMEDIES[ticket.problem], task.REMEDIES.values(), task.remedy),
    }[slot]
    return sentence(_other(rng, possible, right) if slipped else right)


def _other(rng: random.Random, possible: Iterable[str], right: str) -> str:
    return rng.choice(sorted(set(possible) - {right}))
