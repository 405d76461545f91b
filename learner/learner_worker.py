"""One rank of the learner: models, PPO update, weight publishing, checkpoints. A plain class.

Unless it says otherwise, every method is a collective: all ranks call it, in the same order.
"""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from torch import Tensor

from actors.weight_update import ProbeAnswer, WeightLayout, WeightUpdate
from learner import checkpoint
from learner.batch import TrajectoryBatch
from learner.freed_memory import keep_freed_memory
from learner.learner_spec import LearnerSpec, Rendezvous, Samples, StepRefused
from learner.packing import PackedRows
from learner.policy import PolicyModel, even_length, load_policy, load_value_model
from learner.ppo_update import Metrics, PPOUpdate
from learner.process_group import free_port, group_for_saves, join
from learner.refusal import BadStep
from learner.rollout_metrics import rollout_metrics
from learner.sharding import unsharded
from learner.shared_memory import use_shared_memory
from learner.supervised_rows import SupervisedRows, load_supervised
from learner.sweep import Models, Share, sweep
from learner.weight_publisher import WeightPublisher


class LearnerWorker:
    """Holds its shards of policy, value model and reference."""

    def __init__(self, spec: LearnerSpec, rank: int) -> None:
        self._spec = spec
        self._rank = rank
        self._publisher: WeightPublisher | None = None
        self._published: int | None = None  # the version whose weights are here unchanged
        self._answer: ProbeAnswer | None = None
        self._save: checkpoint.Save | None = None
        self._copy = checkpoint.Copy()

    def port(self) -> int:
        """No collective."""
        return free_port()

    def start(self, rendezvous: Rendezvous) -> dict[str, Any]:
        """Join the group and load the models. Returns what the start report shows."""
        spec, ppo = self._spec, self._spec.ppo
        torch.manual_seed(spec.seed)
        mesh = join(rendezvous, self._rank, spec.learner.timeout_s)
        self._save_group = group_for_saves(spec.learner.timeout_s)
        models = Models(
            policy=load_policy(
                spec.policy,
                mesh,
                spec.learner,
                value_head=ppo.uses_critic and not ppo.separate_critic,
            ),
            reference=load_policy(spec.reference, mesh, spec.learner, frozen=True),
            value=load_value_model(ppo.value_init or spec.policy, mesh, spec.learner)
            if ppo.separate_critic
            else None,
        )
        if rendezvous.file and mesh.device_type == "cpu":  # the ranks share a machine
            use_shared_memory([models.policy, models.reference, models.value])
        if mesh.device_type == "cpu":
            keep_freed_memory()
        # Loading drew numbers on rank 0 alone; a checkpoint keeps one random state for all ranks.
        torch.manual_seed(spec.seed)
        self._share = Share(
            self._rank,
            rendezvous.world_size,
            spec.learner,
            torch.device(mesh.device_type),
            even_length(models.policy),
        )
        self._update = PPOUpdate(
            models,
            ppo,
            self._share,
            seed=spec.seed,
            num_steps=spec.num_steps,
            ptx_batches=self._ptx_batches(),
        )
        return {"pid": os.getpid(), "device": mesh.device_type, "parameters": _count(models.policy)}

    def prepare_publish(self, segment: str | None) -> WeightLayout:
        """`segment`: path stem in shared memory that generators can map, or None."""
        self._publisher = WeightPublisher(
            self._update.models.policy,
            dtype=self._spec.push_dtype,
            probe=self._spec.probe,
            segment=None if self._spec.push_delta else segment,
            delta=self._spec.push_delta,
        )
        return self._publisher.layout

    def publish(self, version: int) -> WeightUpdate | None:
        """Write the weights as `version`; the update on rank 0. `answer_probe` must be the next call."""
        assert self._publisher is not None, "prepare_publish comes first"
        update = self._publisher.publish(version)
        self._published = version
        return update

    def answer_probe(self, version: int) -> ProbeAnswer | None:
        """What the weights just published answer to the probe; on rank 0."""
        assert self._publisher is not None, "prepare_publish comes first"
        if self._published != version:
            raise RuntimeError(f"the weights here are no longer those of version {version}")
        started = time.perf_counter()
        logprobs = self._probe()
        if self._rank == 0:
            seconds = time.perf_counter() - started
            self._answer = ProbeAnswer(version, self._publisher.digests, logprobs, seconds)
        return self._answer

    def last_update(self, in_message: bool) -> tuple[WeightUpdate, ProbeAnswer]:
        """What was last published, in full, and the answer to its probe, for a generator that holds no
        version yet; of rank 0. `in_message`: it cannot map the segment. No collective, and whatever the
        weights have become since."""
        assert self._publisher is not None, "prepare_publish comes first"
        update, answer = self._publisher.last_update(in_message), self._answer
        if update is None or answer is None or not answer.is_to(update):
            raise RuntimeError("publish and answer_probe come first, one after the other")
        return update, answer

    def update(
        self, table: pa.Table, step: int, version: int, folder: str
    ) -> Metrics | StepRefused:
        """One PPO step on a batch of trajectories; rank 0 writes them, with what was made of them, to
        `folder`. Returns metrics, the same on every rank but for memory and time; on rank 0 also
        what the batch shows of generation and scoring. Or every rank refuses the step, and nothing
        is changed or written."""
        started = time.perf_counter()
        self._published = None
        batch = TrajectoryBatch.of(table)
        try:
            ppo, metrics = self._update.update(batch, step)
        except BadStep as bad:
            return StepRefused(step, bad.reason, bad.metrics)
        if self._rank == 0:
            _write_table(
                ppo.learned_columns(step, version), Path(folder) / f"step-{step:06d}.parquet"
            )
            metrics |= rollout_metrics(table, version)
        seconds = time.perf_counter() - started
        return metrics | {
            "learner/tokens_per_s": sum(batch.lengths) / seconds,
            "learner/peak_memory_bytes": float(_peak_memory()),
        }

    def policy_logprobs(self, samples: Samples) -> list[np.ndarray]:
        """The current policy's logprobs of each completion (for the self-check)."""
        return self._logprobs(samples, self._update.models.policy)

    def reference_logprobs(self, samples: Samples) -> list[np.ndarray]:
        """The reference's logprobs of each completion (for the evaluation's KL)."""
        return self._logprobs(samples, self._update.models.reference)

    def save(self, folder: str) -> None:
        """Begin to write the state as it is now into `folder`, beside whatever comes next."""
        self._save = checkpoint.Save(Path(folder), self._update, self._copy, self._save_group)

    def saved(self) -> bool:
        """Whether what `save` began is written; OSError if the disk refused it. No collective."""
        assert self._save is not None, "save comes first"
        return self._save.ended()

    def load(self, folder: str) -> None:
        self._published = None
        checkpoint.load(Path(folder), self._update)

    def close(self) -> None:
        if self._publisher is not None:
            self._publisher.close()

    def _logprobs(self, samples: Samples, model: PolicyModel) -> list[np.ndarray]:
        swept = sweep(samples, self._share, [lambda packed: model(packed, samples.temperature)[0]])
        return [
            row[: len(ids)].numpy()
            for row, ids in zip(swept[0], samples.completion_ids, strict=True)
        ]

    @torch.no_grad()
    def _probe(self) -> tuple[float, ...]:
        """The probe's logprobs under the weights as they are now: what a generator must answer."""
        probe = self._spec.probe
        packed = PackedRows.after(probe.prompt_ids, probe.next_ids).to(self._share.device)
        policy = self._update.models.policy
        learner = self._spec.learner
        if dist.get_world_size() == 1 and learner.dtype == "float32" and not learner.cpu_offload:
            policy = unsharded(policy)
        logprobs: Tensor = policy(packed)[0]
        return tuple(logprobs.tolist())

    def _ptx_batches(self) -> Any:
        ptx = self._spec.ppo.ptx
        if ptx is None:
            return None
        from reward_service.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(self._spec.policy)
        rows = load_supervised(ptx.path, tokenizer, self._spec.learner.max_tokens_per_microbatch)
        return SupervisedRows(rows, batch_size=ptx.batch_size, seed=self._spec.seed).batch


def _count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _peak_memory() -> int:
    """Bytes: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _write_table(table: pa.Table, path: Path) -> None:
    """Appears whole or not at all; a step that is done again after a resume replaces its file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".partial")
    pq.write_table(table, aside)
    os.replace(aside, path)
