"""Warnings a person should act on while a run goes on."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.config import WarnConfig

WINDOW = 4  # steps over which a trend is read


def kl_warning(history: Sequence[dict[str, float]], config: WarnConfig) -> str | None:
    """Reward hacking's signature: the score rises while the policy leaves the reference.

    Said when the KL crosses its bound upwards, so once and not at every step.
    """
    if len(history) < 2:
        return None
    kl = [step["learner/kl_to_ref"] for step in history]
    scores = [step["reward/score_mean"] for step in history]
    crossed = kl[-1] > config.kl_to_ref >= kl[-2]
    rising = scores[-1] > scores[max(0, len(scores) - 1 - WINDOW)]
    if not (crossed and rising):
        return None
    return (
        f"the score rises ({scores[-1]:+.2f}) while the KL to the reference is {kl[-1]:.1f} nats a "
        f"completion, beyond {config.kl_to_ref:g}: the policy may be exploiting the reward; raise "
        "ppo.kl.coef or stop earlier, and trust the held-out evaluation, not the score"
    )
