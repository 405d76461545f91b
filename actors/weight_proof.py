"""Whether an engine computes on the weights that the learner has: both answer the probe, and alike.

begin --> engine_answers, learner_answers (in either order) --> proved, or WeightsRejected
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from actors.weight_update import ProbeAnswer, WeightsRejected, WeightUpdate, probe_difference

Deliver = Callable[[Any], None]
Delivery = tuple[Deliver, Deliver]  # resolve, reject


@dataclass
class _Pending:
    """An update that is applied and not proved."""

    update: WeightUpdate
    delivery: Delivery
    spent: dict[str, float]  # seconds, by part
    started: float
    probing: bool = True  # the engine is
    answered: list[float] | None = None  # by the engine


class WeightProof:
    def __init__(self, name: str, bound: float) -> None:
        """`name`: the generator's. `bound`: on |generator - learner|."""
        self._name = name
        self._bound = bound
        self._pending: _Pending | None = None
        self._answer: ProbeAnswer | None = None  # the learner's newest
        self.version: int | None = None  # that is proved

    @property
    def pending(self) -> bool:
        """Whether the engine has weights that are not proved: nothing that it samples may leave."""
        return self._pending is not None

    @property
    def probing(self) -> bool:
        """Whether the engine has still to answer."""
        return self._pending is not None and self._pending.probing

    def begin(self, update: WeightUpdate, delivery: Delivery, spent: dict[str, float]) -> None:
        """An update was applied, in the seconds `spent`. `delivery` is told the proof: these seconds, those
        of the probe, and the difference."""
        self.version = None
        self._pending = _Pending(update, delivery, spent, time.perf_counter())

    def engine_answers(self, logprobs: Any) -> None:
        """vLLM's own form, for the one token that it sampled: logprobs by token."""
        assert self._pending is not None
        following = self._pending.update.probe.next_ids
        self._pending.answered = [logprobs[token].logprob for token in following]
        self._pending.probing = False
        self._pending.spent["probe_s"] = time.perf_counter() - self._pending.started
        self._compare()

    def learner_answers(self, answer: ProbeAnswer) -> None:
        """The update that it is to may still be to come."""
        self._answer = answer
        self._compare()

    def give_up(self, error: Exception) -> None:
        """Whoever waits for the proof is told why there will be none; the weights stay unproved."""
        if self._pending is not None:
            self._pending.probing, self._pending.answered = False, None
            self._pending.delivery[1](error)

    def _compare(self) -> None:
        pending, answer = self._pending, self._answer
        if pending is None or pending.answered is None or answer is None:
            return
        if not answer.is_to(pending.update):
            return
        difference = probe_difference(answer.logprobs, pending.answered)
        if difference > self._bound:
            raise WeightsRejected(
                f"{self._name}: after version {answer.version} was applied, the probe's logprobs differ "
                f"by {difference:.2g} from the learner's (bound {self._bound:g}, self_check.probe)"
            )
        self._pending, self.version = None, answer.version
        pending.delivery[0]({**pending.spent, "probe_difference": difference})
