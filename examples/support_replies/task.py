"""The help desk's vocabulary: tickets, their prompts, and every sentence an agent knows.

A ticket's prompt is `Customer: I am Ben. My camera is dirty.\\nAgent:`; the perfect completion is
` Hello Ben! I am sorry about your camera. We will clean it for free. Thank you for telling us.`
"""

from __future__ import annotations

import hashlib
import itertools
import re
from typing import NamedTuple

# fmt: off
NAMES = (
    "Anna", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Hugo", "Ivy", "Jack", "Kate",
    "Leo", "Mia", "Noah", "Olga", "Paul",
)
ITEMS = (
    "lamp", "kettle", "chair", "phone", "jacket", "clock", "radio", "bike", "mug", "tent",
    "camera", "table", "blanket", "mirror", "guitar", "helmet",
)
# fmt: on
REMEDIES = {  # problem -> what a good agent promises
    "broken": "send you a new one",
    "cracked": "send you a new one",
    "too small": "swap it for a bigger one",
    "too big": "swap it for a smaller one",
    "late": "refund the delivery fee",
    "missing": "refund the full price",
    "noisy": "repair it for free",
    "dirty": "clean it for free",
}

THANKS = ("Thank you for telling us.", "Thank you for your patience.")
RUDE_GREETING = "What do you want now?"
RUDE_EMPATHY = "That is your own fault."
RUDE_CLOSINGS = ("Stop asking us.", "Read the manual.")
REFUSAL = "We can not help you."
VAGUE = ("Maybe someone will look at it.", "We will see.")
FILLERS = (
    "Our shop has many nice things.",
    "The weather is lovely today.",
    "We sell many colors.",
    "Our team likes music.",
)

_PROMPT = re.compile(r"Customer: I am (\w+)\. My (\w+) is ([\w ]+)\.\nAgent:")


class Ticket(NamedTuple):
    name: str
    item: str
    problem: str

    @property
    def prompt(self) -> str:
        return f"Customer: I am {self.name}. My {self.item} is {self.problem}.\nAgent:"

    @property
    def prompt_id(self) -> str:
        return "-".join(self).replace(" ", "-").lower()

    @property
    def held_out(self) -> bool:
        """The split depends on the ticket alone, so that no seed moves a prompt across it."""
        digest = hashlib.md5(repr(tuple(self)).encode(), usedforsecurity=False)
        return int(digest.hexdigest(), 16) % 1000 < 150


def all_tickets() -> list[Ticket]:
    return [Ticket(*parts) for parts in itertools.product(NAMES, ITEMS, REMEDIES)]


def train_tickets() -> list[Ticket]:
    return [ticket for ticket in all_tickets() if not ticket.held_out]


def held_out_tickets() -> list[Ticket]:
    return [ticket for ticket in all_tickets() if ticket.held_out]


def ticket_of(prompt: str) -> Ticket:
    """The inverse of `Ticket.prompt`."""
    match = _PROMPT.fullmatch(prompt)
    if match is None:
        raise ValueError(f"prompt {prompt!r} is no help desk ticket")
    return Ticket(*match.groups())


def greeting(name: str) -> str:
    return f"Hello {name}!"


def empathy(item: str) -> str:
    return f"I am sorry about your {item}."


def remedy(promise: str) -> str:
    return f"We will {promise}."


def kinds_of_sentences() -> dict[str, tuple[str, str | None]]:
    """Sentence -> (kind, what it names: a name, an item, a promise or None)."""
    kinds: dict[str, tuple[str, str | None]] = {}
    kinds |= {greeting(name): ("greeting", name) for name in NAMES}
    kinds |= {empathy(item): ("empathy", item) for item in ITEMS}
    kinds |= {remedy(promise): ("remedy", promise) for promise in REMEDIES.values()}
    kinds |= dict.fromkeys(THANKS, ("thanks", None))
    kinds |= dict.fromkeys((RUDE_GREETING, RUDE_EMPATHY, *RUDE_CLOSINGS), ("rude", None))
    kinds |= dict.fromkeys(VAGUE, ("vague", None))
    kinds |= dict.fromkeys(FILLERS, ("filler", None))
    return kinds | {REFUSAL: ("refusal", None)}
