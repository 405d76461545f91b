"""Writes the base model and the data of the three stages: SFT, reward model, PPO.

    python -m examples.support_replies.generate [--seed 0] [--out data/support_replies] [--force]

Everything follows from the seed. No held-out prompt is in any file that is trained on.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Sequence
from pathlib import Path

from examples import data_folder, tiny_model
from examples.support_replies import task
from examples.support_replies.judge import judge
from examples.support_replies.task import Ticket
from examples.support_replies.writer import completion_of, edit_reply, write_reply

Rows = list[dict[str, object]]

NUM_DEMONSTRATIONS, NUM_PAIRS, NUM_HELD_OUT_PAIRS, NUM_REFERENCE = 8000, 4000, 512, 256
LABEL_TEMPERATURE = 0.7  # judge points: about one label in nine contradicts the judge


def build(folder: Path, seed: int) -> None:
    """Writes the base model and the data of the support replies example."""
    train, held_out = task.train_tickets(), task.held_out_tickets()
    tokenizer = tiny_model.train_tokenizer(tokenizer_texts())
    tiny_model.write_model(folder / "model", tokenizer, seed)
    files = {
        "sft": demonstrations(_rng(seed, "sft"), train, NUM_DEMONSTRATIONS),
        "pairs": pairs(_rng(seed, "pairs"), train, NUM_PAIRS),
        "held_out_pairs": pairs(_rng(seed, "held_out_pairs"), held_out, NUM_HELD_OUT_PAIRS),
        # Scores are normalised over what the policy writes at the start of PPO. That is not known
        # before SFT; but it imitates the writers, so their replies stand for its own.
        "reference": demonstrations(_rng(seed, "reference"), train, NUM_REFERENCE),
        "prompts": prompts(train),
        "held_out_prompts": prompts(held_out),
    }
    for name, rows in files.items():
        data_folder.write_rows(folder / f"{name}.parquet", rows)


def tokenizer_texts() -> list[str]:
    """All the writers' words, the same for every seed, so that one vocabulary fits all data."""
    sentences = [f" {sentence}" for sentence in task.kinds_of_sentences()]
    # Twice, since a pair of symbols merges only if it occurs twice.
    return [ticket.prompt for ticket in task.all_tickets()] + 2 * sentences


def demonstrations(rng: random.Random, tickets: Sequence[Ticket], count: int) -> Rows:
    drawn = rng.choices(tickets, k=count)
    return [
        {"prompt": ticket.prompt, "completion": completion_of(write_reply(rng, ticket))}
        for ticket in drawn
    ]


def pairs(rng: random.Random, tickets: Sequence[Ticket], count: int) -> Rows:
    """Up to `count` pairs: half of independent replies, half of a reply and an edit of it."""
    rows: Rows = []
    for number, ticket in enumerate(rng.choices(tickets, k=count)):
        reply = write_reply(rng, ticket)
        other = edit_reply(rng, ticket, reply) if number % 2 else write_reply(rng, ticket)
        a, b = completion_of(reply), completion_of(other)
        if a != b:  # two writers may agree, and a pair of equals teaches nothing
            chosen, rejected = (a, b) if _prefers_first(rng, ticket, a, b) else (b, a)
            rows.append({"prompt": ticket.prompt, "chosen": chosen, "rejected": rejected})
    return rows


def prompts(tickets: Sequence[Ticket]) -> Rows:
    return [
        {"prompt_id": ticket.prompt_id, "prompt": ticket.prompt, "metadata": ticket._asdict()}
        for ticket in tickets
    ]


def _prefers_first(rng: random.Random, ticket: Ticket, a: str, b: str) -> bool:
    """A labeller who sees the judge's difference through noise (Bradley-Terry)."""
    difference = judge(ticket, a) - judge(ticket, b)
    return rng.random() < 1 / (1 + math.exp(-difference / LABEL_TEMPERATURE))


def _rng(seed: int, purpose: str) -> random.Random:
    """A stream per file: drawing more of one leaves the others as they were."""
    return random.Random(f"{seed}/{purpose}")


if __name__ == "__main__":
    sys.exit(data_folder.main("support_replies", build))
