"""PPO steps on given trajectories: by the real LearnerWorker, and bare. Each is made by
(job, rank, rendezvous), and does step `number` when called with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from actors.weight_update import Probe
from benchmarks import work
from learner.learner_spec import LearnerSpec, Rendezvous

MINIBATCH = 16  # trajectories
Lengths = list[tuple[int, int]]  # tokens of prompt and completion
Step = Callable[[int], None]  # does PPO step `number`


@dataclass(frozen=True)
class Job:
    """What a contender's processes are told."""

    model: str
    vocabulary: int
    lengths: Lengths
    dtype: str = "float32"
    folder: str = ""

    def sequences(self) -> list[list[int]]:
        rng = np.random.default_rng(2)
        return [rng.integers(2, self.vocabulary, p + c).tolist() for p, c in self.lengths]

    @property
    def num_tokens(self) -> int:
        return sum(p + c for p, c in self.lengths)

    @property
    def minibatches(self) -> int:
        return len(self.lengths) // MINIBATCH


def raylign(job: Job, rank: int, meeting: Rendezvous) -> Step:
    from learner.config import LearnerConfig, OptimizerConfig, PPOConfig
    from learner.learner_worker import LearnerWorker

    adamw = OptimizerConfig(lr=work.LR)
    ppo = PPOConfig(epochs=1, minibatches=job.minibatches, policy=adamw, value=adamw)
    learner = LearnerConfig(ranks=meeting.world_size, dtype=job.dtype)  # type: ignore[arg-type]
    spec = LearnerSpec(
        job.model, job.model, ppo, learner, 0, 1000, "float32", Probe((2, 3), (4, 5))
    )
    worker = LearnerWorker(spec, rank)
    worker.start(meeting)
    table = trajectories(job)
    return lambda number: worker.update(table, number, 0, job.folder) and None


def trajectories(job: Job) -> Any:
    """The Table that generators would have sent, four completions a prompt, random scores."""
    from actors.trajectory import Trajectory, to_table, trajectory_id

    rng = np.random.default_rng(3)
    rows = []
    for i, (ids, (prompt, completion)) in enumerate(zip(job.sequences(), job.lengths, strict=True)):
        prompt_id, sample = f"p{i // 4}", i % 4
        row = Trajectory(
            trajectory_id=trajectory_id(prompt_id, 0, sample),
            prompt_id=prompt_id,
            sample_index=sample,
            epoch=0,
            prompt_ids=tuple(ids[:prompt]),
            completion_ids=tuple(ids[prompt:]),
            behavior_logprobs=tuple((-rng.random(completion) - np.log(job.vocabulary)).tolist()),
            policy_version=0,
            policy_version_max=0,
            version_spans=((0, 0),),
            prompt="p" * prompt,
            completion="c" * completion,
            finish_reason="stop",
            score=float(rng.normal()),
            score_parts={},
            temperature=1.0,
            generator_id="g0",
            generated_at=0.0,
            generate_s=0.1,
            score_s=0.1,
        )
        rows.append(row)
    return to_table(rows)


class BareLoop:
    """The computation of a step and nothing else, on tokens packed beforehand."""

    def __init__(self, job: Job) -> None:
        import torch
        from transformers import AutoModel, AutoModelForCausalLM

        from learner.config import LearnerConfig
        from learner.linear import row_multiple, use_fast_products
        from learner.packed_attention import use_packed_attention
        from learner.packing import PackedRows
        from learner.policy import PolicyModel, ValueModel

        chunk_rows = LearnerConfig().logprob_chunk_rows
        self.policy, self.reference = (
            PolicyModel(AutoModelForCausalLM.from_pretrained(job.model), chunk_rows=chunk_rows)
            for _ in range(2)
        )
        self.critic = ValueModel(AutoModel.from_pretrained(job.model))
        for hf_model in (self.policy.lm, self.reference.lm, self.critic.trunk):
            use_packed_attention(hf_model)
            use_fast_products(hf_model)
        sequences = job.sequences()

        def pack(indices: Any) -> PackedRows:
            return PackedRows.build(
                [sequences[i] for i in indices],
                [job.lengths[i][0] for i in indices],
                row_multiple(torch.device("cpu"), "float32"),
            )

        self._whole = pack(range(len(sequences)))
        self._parts = [pack(part) for part in minibatches(job)]
        self._learn = plain_update(self.policy, self.critic)

    def forwards(self) -> None:
        """Old logprobs, reference, values."""
        import torch

        with torch.no_grad():
            self.policy(self._whole), self.reference(self._whole), self.critic(self._whole)

    def update(self) -> None:
        """Forward and backward passes of policy and critic, clipping, AdamW."""
        for part in self._parts:
            self._learn(-self.policy(part)[0].mean(), (self.critic(part) - 1).square().mean())


def bare_loop(job: Job, rank: int, meeting: Rendezvous) -> Step:
    loop = BareLoop(job)

    def step(number: int) -> None:
        loop.forwards()
        loop.update()

    return step


def padded(job: Job, rank: int, meeting: Rendezvous) -> Step:
    import torch
    from transformers import AutoModel, AutoModelForCausalLM

    policy, reference = (AutoModelForCausalLM.from_pretrained(job.model) for _ in range(2))
    critic = AutoModel.from_pretrained(job.model)
    head = torch.nn.Linear(critic.config.hidden_size, 1)
    critic.add_module("value", head)
    sequences = job.sequences()

    def pad(indices: Any) -> dict[str, Any]:
        chosen = [sequences[i] for i in indices]
        width = max(map(len, chosen))
        ids = torch.tensor([[*row, *[work.PAD_ID] * (width - len(row))] for row in chosen])
        real = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in chosen])
        return {"input_ids": ids, "attention_mask": real}

    whole, parts = pad(range(len(sequences))), [pad(part) for part in minibatches(job)]

    def logprobs(model: Any, part: dict[str, Any]) -> Any:
        logits = model(**part, use_cache=False).logits[:, :-1]
        return logits.log_softmax(-1).gather(-1, part["input_ids"][:, 1:, None])[..., 0]

    def values(part: dict[str, Any]) -> Any:
        return head(critic(**part, use_cache=False).last_hidden_state)[:, :-1, 0]

    learn = plain_update(policy, critic)

    def step(number: int) -> None:
        with torch.no_grad():
            logprobs(policy, whole), logprobs(reference, whole), values(whole)
        for part in parts:
            mask = part["attention_mask"][:, 1:]
            policy_loss = -(logprobs(policy, part) * mask).sum() / mask.sum()
            learn(policy_loss, ((values(part) - 1).square() * mask).sum() / mask.sum())

    return step


def minibatches(job: Job) -> list[np.ndarray]:
    order = np.random.default_rng([0, 1, 0]).permutation(len(job.lengths))
    return [np.sort(part) for part in np.split(order, job.minibatches)]


def plain_update(policy: Any, critic: Any) -> Callable[[Any, Any], None]:
    """Backward pass, clipping and AdamW of both models, told the two losses."""
    import torch

    models = (policy, critic)
    adamw = [torch.optim.AdamW(model.parameters(), lr=work.LR, fused=True) for model in models]

    def learn(policy_loss: Any, value_loss: Any) -> None:
        (policy_loss + value_loss).backward()
        for model, optimizer in zip(models, adamw, strict=True):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return learn
