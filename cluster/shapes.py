"""How large the networks of a run are, from their config.json alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from cluster.config import RunConfig
from reward_service.config import RewardModelScorerConfig, ScorerConfig, SumScorerConfig

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True)
class Shape:
    """Dense decoder layers with a gated MLP; norms and biases are not counted."""

    hidden: int
    layers: int
    mlp: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    tied: bool

    @classmethod
    def of(cls, model: Mapping[str, Any]) -> Self | None:
        """None for a model of another form."""
        try:
            heads, hidden = int(model["num_attention_heads"]), int(model["hidden_size"])
            sizes = (hidden, int(model["num_hidden_layers"]), int(model["intermediate_size"]))
        except (KeyError, TypeError):
            return None
        if any(model.get(name) for name in EXPERTS):
            return None
        return cls(
            *sizes,
            heads=heads,
            kv_heads=model.get("num_key_value_heads") or heads,
            head_size=model.get("head_dim") or hidden // heads,
            vocabulary=model["vocab_size"],
            tied=bool(model.get("tie_word_embeddings")),
        )

    @property
    def embedding(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def layer(self) -> int:
        attention = 2 * self.hidden * self.head_size * (self.heads + self.kv_heads)
        return attention + 3 * self.hidden * self.mlp

    @property
    def trunk(self) -> int:
        """Parameters without the language model's head: a critic, a reward model."""
        return self.embedding + self.layers * self.layer

    @property
    def parameters(self) -> int:
        return self.trunk + (0 if self.tied else self.embedding)

    def cache_bytes(self, tokens: int, item: int) -> int:
        """Keys and values of so many tokens, in numbers of `item` bytes."""
        return 2 * self.layers * self.kv_heads * self.head_size * tokens * item


@dataclass(frozen=True)
class Shapes:
    """Shapes of a run's networks; `rewards`: by the reward model's folder."""

    policy: Shape
    reference: Shape
    value: Shape  # of a critic of its own, if there is one
    rewards: dict[str, Shape]


def read_shapes(config: RunConfig) -> Shapes | None:
    """None if one of them is of a form that `Shape` does not know."""
    scorers = [config.reward.scorer] + ([config.evaluation.scorer] if config.evaluation else [])
    folders = {model.path for scorer in scorers for model in reward_models(scorer)}
    policy = _read(config.policy)
    reference = _read(config.reference or config.policy)
    value = _read(config.ppo.value_init or config.policy)
    rewards = {folder: shape for folder in folders if (shape := _read(folder)) is not None}
    if policy is None or reference is None or value is None or len(rewards) < len(folders):
        return None
    return Shapes(policy, reference, value, rewards)


def reward_models(scorer: ScorerConfig) -> Iterator[RewardModelScorerConfig]:
    """The reward models among a scorer and its parts."""
    if isinstance(scorer, RewardModelScorerConfig):
        yield scorer
    if isinstance(scorer, SumScorerConfig):
        for part in scorer.parts.values():
            yield from reward_models(part.scorer)


def _read(folder: str) -> Shape | None:
    return Shape.of(json.loads((Path(folder) / "config.json").read_text()))
