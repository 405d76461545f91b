"""What is asked of a generator, and how it says that it cannot."""

from __future__ import annotations

from dataclasses import dataclass


class GeneratorFailed(Exception):
    """The engine died or refused a request. Plain text only: it must unpickle without vLLM."""


@dataclass(frozen=True)
class GenerateRequest:
    """One completion to be sampled. The seed makes it the same whenever it is asked for again."""

    request_id: str
    prompt_ids: tuple[int, ...]
    max_tokens: int
    temperature: float
    seed: int
    stop: tuple[str, ...] = ()
