"""One PPO step on one rank: epochs x minibatches x microbatches over a PPOBatch.

    prepare (sweep.py) -> for each minibatch: losses of my microbatches, summed gradients, one
    optimizer step for the policy and one for the critic.

A number that is not finite or beyond its bound (refusal.py) undoes the whole step (undo.py).
A minibatch is the same set of trajectories for any number of ranks and microbatches, and its losses
are normalised by its own token count over all ranks: neither cut changes the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from learner.batch import PPOBatch, TrajectoryBatch
from learner.config import PPOConfig
from learner.logprobs import kl_estimate
from learner.optimizer import Optimizer
from learner.packing import unpack
from learner.ppo_loss import policy_loss, token_mean, value_loss
from learner.process_group import max_over_ranks, sum_over_ranks
from learner.refusal import BadStep, check_minibatch
from learner.step_metrics import step_metrics
from learner.supervised import supervised_loss
from learner.supervised_rows import SupervisedBatch
from learner.sweep import Models, Share, prepare
from learner.undo import Undo

Metrics = dict[str, float]


class PPOUpdate:
    """Owns the optimizers and the KL coefficient; `update` is called once a step on every rank."""

    def __init__(
        self,
        models: Models,
        config: PPOConfig,
        share: Share,
        *,
        seed: int,
        num_steps: int,
        ptx_batches: Callable[[int], SupervisedBatch] | None = None,
    ) -> None:
        self.models = models
        self.policy_optimizer = Optimizer(models.policy.parameters(), config.policy)
        self.value_optimizer = (
            Optimizer(models.value.parameters(), config.value) if models.value else None
        )
        self.kl_coef = config.kl.coef
        self._config = config
        self._share = share
        self._seed = seed
        self._num_steps = num_steps
        self._ptx_batches = ptx_batches
        self._undo = Undo([one for one in (self.policy_optimizer, self.value_optimizer) if one])

    def update(self, batch: TrajectoryBatch, step: int) -> tuple[PPOBatch, Metrics]:
        """Train on one batch; `step` counts from 1. BadStep leaves everything as it was before."""
        self._undo.begin()
        try:
            return self._learn(batch, step)
        except BadStep:
            self._undo.restore()
            raise

    def _learn(self, batch: TrajectoryBatch, step: int) -> tuple[PPOBatch, Metrics]:
        rates = {"learner/lr_policy": self.policy_optimizer.set_step(step - 1, self._num_steps)}
        if self.value_optimizer is not None:
            rates["learner/lr_value"] = self.value_optimizer.set_step(step - 1, self._num_steps)
        ppo = prepare(batch, self.models, self._config, self._share, self.kl_coef)
        history: list[Metrics] = []
        for indices in self._minibatches(len(batch), step):
            history.append(self._minibatch(ppo, indices, step, len(history)))
            if history[-1]["approx_kl"] > (self._config.max_approx_kl or float("inf")):
                break
        metrics = step_metrics(ppo, history)
        metrics |= rates | {"learner/kl_coef": self.kl_coef}
        self._adapt_kl(metrics["learner/kl_to_ref"], len(batch))
        return ppo, metrics

    def _minibatches(self, size: int, step: int) -> Iterator[np.ndarray]:
        for epoch in range(self._config.epochs):
            order = np.random.default_rng([self._seed, step, epoch]).permutation(size)
            yield from (np.sort(part) for part in np.split(order, self._config.minibatches))

    @property
    def _num_minibatches(self) -> int:
        return self._config.epochs * self._config.minibatches

    def _minibatch(self, ppo: PPOBatch, indices: np.ndarray, step: int, done: int) -> Metrics:
        batch = ppo.trajectories
        counts = (int(batch.loss_mask[indices].sum()), int(ppo.value_mask[indices].sum()))
        microbatches = self._share.of(batch, indices.tolist())
        sums: dict[str, Tensor] = {}
        for position, chosen in enumerate(microbatches):
            last = position == len(microbatches) - 1
            _sync_gradients(self.models.value, last)
            _sync_gradients(self.models.policy, last and self._ptx_batches is None)
            for name, value in self._backward(_Rows(ppo, chosen, self._share), counts).items():
                is_max = name.endswith("_max")
                old = sums.get(name, torch.zeros_like(value))
                sums[name] = torch.maximum(old, value) if is_max else old + value
        if self._ptx_batches is not None:
            sums["ptx_loss"] = self._ptx((step - 1) * self._num_minibatches + done)
        return self._step(_over_ranks(sums), done + 1)

    def _step(self, metrics: Metrics, number: int) -> Metrics:
        """Both optimizers, or BadStep; `number`: the minibatch within its step, from 1."""
        optimizers = {"grad_norm_policy": self.policy_optimizer}
        if self.value_optimizer is not None:
            optimizers["grad_norm_value"] = self.value_optimizer
        metrics |= {name: optimizer.clip() for name, optimizer in optimizers.items()}
        check_minibatch(metrics, self._config.refuse, number)
        if self._num_minibatches > 1:  # behind a step's only optimizer step nothing is judged
            self._undo.keep()
        for optimizer in optimizers.values():
            optimizer.step()
        return metrics

    def _backward(self, rows: _Rows, counts: tuple[int, int]) -> dict[str, Tensor]:
        """Adds the gradients of one microbatch; returns its share of the minibatch's metrics."""
        config, separate = self._config, self.models.value
        temperature = rows.ppo.trajectories.temperature
        logprobs, entropy, values = self.models.policy(
            rows.packed, temperature, config.entropy_coef > 0
        )
        loss, metrics = self._policy_loss(rows, logprobs, entropy, counts[0])
        metrics["value_loss"] = torch.zeros_like(loss)
        if separate is not None:
            loss.backward()  # frees the policy's activations before the critic makes its own
            values = separate(rows.packed)
        if config.uses_critic:
            critic_loss, critic_metrics = value_loss(
                rows.of(values),
                rows.given(rows.ppo.values),
                rows.given(rows.ppo.returns),
                rows.given(rows.ppo.value_mask),
                value_clip_range=config.value_clip_range,
                num_loss_tokens=counts[1],
            )
            metrics |= {**critic_metrics, "value_loss": critic_loss}
            scaled = config.value_coef * critic_loss
            loss = scaled if separate is not None else loss + scaled
        loss.backward()
        return {name: value.detach() for name, value in metrics.items()}

    def _policy_loss(
        self, rows: _Rows, flat_logprobs: Tensor, flat_entropy: Tensor, count: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The clipped loss with its entropy and KL terms; both arguments [N] of the packed rows."""
        config, ppo = self._config, rows.ppo
        logprobs, mask = rows.of(flat_logprobs), rows.given(ppo.trajectories.loss_mask)
        old_logprobs, weights = rows.given(ppo.old_logprobs), None
        if config.behavior_ratio_cap is not None:
            ratio = (old_logprobs - rows.given(ppo.trajectories.behavior_logprobs)).exp()
            weights = ratio.clamp(max=config.behavior_ratio_cap)
        loss, metrics = policy_loss(
            logprobs,
            old_logprobs,
            rows.given(ppo.advantages),
            mask,
            clip_range=config.clip_range,
            clip_range_high=config.clip_range_high,
            dual_clip=config.dual_clip,
            ratio=config.ratio,
            behavior_weights=weights,
            num_loss_tokens=count,
        )
        metrics = {**metrics, "policy_loss": loss}
        if config.entropy_coef > 0:
            metrics["entropy_bonus"] = token_mean(rows.of(flat_entropy), mask, count)
            loss = loss - config.entropy_coef * metrics["entropy_bonus"]
        if config.kl.where == "loss":
            k3 = kl_estimate(logprobs, rows.given(ppo.ref_logprobs), kind="k3")
            loss = loss + self.kl_coef * token_mean(k3, mask, count)
        return loss, metrics

    def _ptx(self, number: int) -> Tensor:
        """Gradients of the pretraining term (PPO-ptx); returns this rank's share of its loss."""
        assert self._ptx_batches is not None
        assert self._config.ptx is not None
        batch = self._ptx_batches(number)
        total = torch.zeros((), device=self._share.device)
        microbatches = self._share.of(batch, range(len(batch)))
        for position, chosen in enumerate(microbatches):
            _sync_gradients(self.models.policy, position == len(microbatches) - 1)
            loss = supervised_loss(self.models.policy, batch, chosen, self._share)
            (self._config.ptx.coef * loss).backward()
            total += loss.detach()
        return total

    def go_on_with(self, kl_coef: float) -> None:
        """The coefficient of a run that is resumed; without a target it is the config's."""
        if self._config.kl.target is not None:
            self.kl_coef = kl_coef

    def _adapt_kl(self, kl_to_ref: float, num_trajectories: int) -> None:
        """The proportional controller of Ziegler et al. 2019 (section 2.2), if a target is set."""
        kl = self._config.kl
        if kl.target is not None:
            error = float(np.clip(kl_to_ref / kl.target - 1.0, -0.2, 0.2))
            self.kl_coef *= 1.0 + error * num_trajectories / kl.horizon


class _Rows:
    """One microbatch: its rows of the batch, packed for the models. No indices: one token, no loss."""

    def __init__(self, ppo: PPOBatch, indices: list[int], share: Share) -> None:
        self.ppo = ppo
        self.packed = share.pack(ppo.trajectories, indices)
        self._indices, self._device = indices, share.device

    def given(self, whole: Tensor) -> Tensor:
        """The microbatch's rows [b, C] of a tensor [B, C] of the batch."""
        return whole[self._indices].to(self._device)

    def of(self, flat: Tensor) -> Tensor:
        """[N] that a model answered -> [b, C]."""
        width = self.ppo.trajectories.loss_mask.shape[1]
        return unpack(flat, self.packed.completion_lengths, width)


def _sync_gradients(model: nn.Module | None, last: bool) -> None:
    """Sum gradients over ranks only behind the last microbatch that `model` has a part in: what is
    never summed is never seen by its optimizer."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)


def _over_ranks(sums: dict[str, Tensor]) -> Metrics:
    names = sorted(sums)
    maxima = [name for name in names if name.endswith("_max")]
    others = [name for name in names if not name.endswith("_max")]
    result: Metrics = {}
    for group, reduce in ((maxima, max_over_ranks), (others, sum_over_ranks)):
        if group:
            values = reduce(torch.stack([sums[name].float() for name in group]))
            result |= dict(zip(group, values.tolist(), strict=True))
    return result
