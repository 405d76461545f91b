"""Writes the base model, demonstrations that often forget the carry, and the prompts.

    python -m examples.arithmetic.generate [--seed 0] [--out data/arithmetic] [--force]

A prompt is `37+5=`, a right completion `42`. Everything follows from the seed. No held-out prompt
is in any file that is trained on.
"""

from __future__ import annotations

import hashlib
import random
import sys
from pathlib import Path
from typing import NamedTuple

from examples import data_folder, tiny_model

NUM_DEMONSTRATIONS = 51_200  # one epoch of sft.yaml
RIGHT_SHARE, SLIP_SHARE = 0.25, 0.10  # of the demonstrations; the rest forgets the carry
SLIPS = (-10, -2, -1, 1, 2, 10)


class Sum(NamedTuple):
    a: int  # 10..99
    b: int  # 0..9

    @property
    def prompt(self) -> str:
        return f"{self.a}+{self.b}="

    @property
    def answer(self) -> int:
        return self.a + self.b

    @property
    def without_carry(self) -> int:
        """What comes out if the digits are added apart: right where they do not exceed 9."""
        tens = self.a // 10 + self.b // 10
        return tens * 10 + (self.a % 10 + self.b % 10) % 10

    @property
    def held_out(self) -> bool:
        """The split depends on the sum alone, so that no seed moves a prompt across it."""
        digest = hashlib.md5(repr(tuple(self)).encode(), usedforsecurity=False)
        return int(digest.hexdigest(), 16) % 1000 < 150


def all_sums() -> list[Sum]:
    return [Sum(a, b) for a in range(10, 100) for b in range(10)]


def build(folder: Path, seed: int) -> None:
    """Writes the base model and the data of the arithmetic example."""
    train = [each for each in all_sums() if not each.held_out]
    held_out = [each for each in all_sums() if each.held_out]
    tokenizer = tiny_model.train_tokenizer(each.prompt for each in all_sums())
    tiny_model.write_model(folder / "model", tokenizer, seed)
    data_folder.write_rows(folder / "sft.parquet", demonstrations(seed, train))
    data_folder.write_rows(folder / "prompts.parquet", prompts(train))
    data_folder.write_rows(folder / "held_out_prompts.parquet", prompts(held_out))


def demonstrations(seed: int, sums: list[Sum]) -> list[dict[str, str]]:
    rng = random.Random(f"{seed}/sft")
    drawn = rng.choices(sums, k=NUM_DEMONSTRATIONS)
    return [{"prompt": each.prompt, "completion": str(_demonstrate(rng, each))} for each in drawn]


def prompts(sums: list[Sum]) -> list[dict[str, str]]:
    return [
        {"prompt_id": f"{each.a}+{each.b}", "prompt": each.prompt, "answer": str(each.answer)}
        for each in sums
    ]


def _demonstrate(rng: random.Random, each: Sum) -> int:
    """The flaw that PPO removes: most demonstrators add digit by digit and forget the carry."""
    kind = rng.random()
    if kind < RIGHT_SHARE:
        return each.answer
    if kind < RIGHT_SHARE + SLIP_SHARE:
        return max(0, each.answer + rng.choice(SLIPS))
    return each.without_carry


if __name__ == "__main__":
    sys.exit(data_folder.main("arithmetic", build))
