"""Fixtures that several tests share. What they are made of is in tiny.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

from tests import tiny

# No deadline: the machine is shared. The same examples in every run: a failure can be repeated.
settings.register_profile("raylign", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("raylign")


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny model whose tokenizer knows a chat template."""
    return tiny.write_policy(tmp_path_factory.mktemp("models") / "policy", chat=True)


@pytest.fixture(scope="session")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny model with a vocabulary of its own."""
    texts = [f"{word} are words." for word in ("cats", "dogs", "hens")] * 4
    return tiny.write_policy(tmp_path_factory.mktemp("models") / "stranger", texts)
