"""The PPO update of the real LearnerWorker against the same computation without it.

    python -m benchmarks.learner [--quick] [--rounds 7] [--folder DIR]

Each contender has processes of its own, one thread a process, and does whole PPO steps (old logprobs,
reference, values; then, minibatch by minibatch, forward and backward passes of policy and critic,
clipping, AdamW; float32, 1 epoch, minibatches of 16 trajectories) on the same trajectories. One
contender works at a time; a round gives each one step; the first round warms up. Ratios are medians
over rounds of the ratio within a round. Tokens are those of prompts and completions; padding does not
count.

Where each side has one process, the figures compare CPU-seconds, which on an idle machine are the wall
time and on a shared one are disturbed less; both are printed. 1 against 2 ranks is wall time.

  bare loop   plain torch modules on the same packed tokens, packed beforehand, with the learner's
              attention and head function: no FSDP, no collectives, no advantages, no PPO loss,
              no metrics, no Parquet file
  padded      transformers as it comes: right-padded rows with an attention mask, logits of every
              position; each minibatch is padded to its own longest row only

Memory: growth of a process's peak resident set (VmHWM, reset before) over forward and backward of the
logprobs of MEMORY_ROWS tokens. Inputs and weights are there before; their gradients are counted.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks import work
from learner.learner_spec import LEARNER_ENV, LearnerSpec, Rendezvous

MINIBATCH = 16  # trajectories
MEMORY_ROWS, MEMORY_HIDDEN = 2048, 512
VOCABULARIES = {"32k": 32_000, "150k": 150_000}
Lengths = list[tuple[int, int]]  # tokens of prompt and completion
Step = Callable[[int], None]  # does PPO step `number`


def geometric(count: int) -> Lengths:
    """Prompts of 16 tokens; completions of mean 65 before the cut at 128."""
    rng = np.random.default_rng(0)
    return [(work.PROMPT_TOKENS, int(min(128, n))) for n in rng.geometric(1 / 65, count)]


def lognormal(count: int) -> Lengths:
    """Prompts of 32 to 96 tokens; completions of median 120, at most 590."""
    rng = np.random.default_rng(1)
    completions = np.clip(rng.lognormal(np.log(120), 0.7, count), 1, 590).astype(int)
    return list(zip(rng.integers(32, 97, count).tolist(), completions.tolist(), strict=True))


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


# ---- contenders: (job, rank, rendezvous) -> a function that does one step


def raylign(job: Job, rank: int, meeting: Rendezvous) -> Step:
    from learner.config import LearnerConfig, OptimizerConfig, PPOConfig
    from learner.learner_worker import LearnerWorker

    adamw = OptimizerConfig(lr=1e-6)
    ppo = PPOConfig(epochs=1, minibatches=job.minibatches, policy=adamw, value=adamw)
    learner = LearnerConfig(ranks=meeting.world_size, dtype=job.dtype)  # type: ignore[arg-type]
    spec = LearnerSpec(job.model, job.model, ppo, learner, 0, 1000, "float32", (2, 3, 4))
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


def bare_loop(job: Job, rank: int, meeting: Rendezvous) -> Step:
    import torch
    from transformers import AutoModel, AutoModelForCausalLM

    from learner.config import LearnerConfig
    from learner.packed_attention import use_packed_attention
    from learner.packing import PackedRows
    from learner.policy import PolicyModel, ValueModel

    chunk_rows = LearnerConfig().logprob_chunk_rows
    policy, reference = (
        PolicyModel(AutoModelForCausalLM.from_pretrained(job.model), chunk_rows=chunk_rows)
        for _ in range(2)
    )
    critic = ValueModel(AutoModel.from_pretrained(job.model))
    for hf_model in (policy.lm, reference.lm, critic.trunk):
        use_packed_attention(hf_model)
    sequences = job.sequences()

    def pack(indices: Any) -> PackedRows:
        return PackedRows.build(
            [sequences[i] for i in indices], [job.lengths[i][0] for i in indices]
        )

    whole, parts = pack(range(len(sequences))), [pack(part) for part in minibatches(job)]

    def forwards() -> None:
        with torch.no_grad():
            policy(whole), reference(whole), critic(whole)

    def losses(part: PackedRows) -> tuple[Any, Any]:
        return -policy(part)[0].mean(), (critic(part) - 1).square().mean()

    return plain_step(policy, critic, forwards, [lambda part=part: losses(part) for part in parts])


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

    def forwards() -> None:
        with torch.no_grad():
            logprobs(policy, whole), logprobs(reference, whole), values(whole)

    def losses(part: dict[str, Any]) -> tuple[Any, Any]:
        mask = part["attention_mask"][:, 1:]
        policy_loss = -(logprobs(policy, part) * mask).sum() / mask.sum()
        return policy_loss, ((values(part) - 1).square() * mask).sum() / mask.sum()

    return plain_step(policy, critic, forwards, [lambda part=part: losses(part) for part in parts])


def minibatches(job: Job) -> list[np.ndarray]:
    order = np.random.default_rng([0, 1, 0]).permutation(len(job.lengths))
    return [np.sort(part) for part in np.split(order, job.minibatches)]


def plain_step(policy: Any, critic: Any, forwards: Any, parts: list[Any]) -> Step:
    """Forwards, then for each part a backward pass, clipping and AdamW of both models."""
    import torch

    models = (policy, critic)
    adamw = [torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True) for model in models]

    def step(number: int) -> None:
        forwards()
        for losses in parts:
            policy_loss, value_loss = losses()
            (policy_loss + value_loss).backward()
            for model, optimizer in zip(models, adamw, strict=True):
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()

    return step


# ---- processes


class Contender:
    """Processes that each do a step when told; a context manager."""

    def __init__(self, make: Any, job: Job, ranks: int = 1) -> None:
        self._folder = TemporaryDirectory(prefix="raylign-benchmark-")
        job = replace(job, folder=self._folder.name)
        meeting = Rendezvous(ranks, file=f"{self._folder.name}/rendezvous")
        context = multiprocessing.get_context("spawn")
        self._pipes, self._processes = [], []
        for rank in range(ranks):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, make, job, rank, meeting))
            process.start()
            theirs.close()
            self._pipes.append(mine)
            self._processes.append(process)
        self.num_tokens = job.num_tokens
        self.wall_s: list[float] = []
        self.cpu_s: list[float] = []  # of all ranks together
        for pipe in self._pipes:
            pipe.recv()  # ready

    def step(self, number: int) -> None:
        for pipe in self._pipes:
            pipe.send(number)
        took = [pipe.recv() for pipe in self._pipes]
        self.wall_s.append(max(wall for wall, _ in took))
        self.cpu_s.append(sum(cpu for _, cpu in took))

    def close(self) -> None:
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            pipe.send(None)
            process.join(30)
            process.kill()
        self._folder.cleanup()


def _serve(pipe: Any, make: Any, job: Job, rank: int, meeting: Rendezvous) -> None:
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()

    torch.set_num_threads(1)
    torch.manual_seed(0)
    step = make(job, rank, meeting)
    pipe.send("ready")
    while (number := pipe.recv()) is not None:
        wall, cpu = time.perf_counter(), time.process_time()
        step(number)
        pipe.send((time.perf_counter() - wall, time.process_time() - cpu))
    os._exit(0)  # leaving the group would wait for ranks that are gone


@dataclass(frozen=True)
class Speed:
    """Multiples of the first contender's: by wall time, and by CPU-seconds of all ranks."""

    wall: float
    cpu: float


def compete(title: str, rounds: int, contenders: dict[str, Contender]) -> dict[str, Speed]:
    """Prints a table and ends the contenders."""
    for number in range(1, rounds + 2):
        for contender in contenders.values():
            contender.step(number)
    first = next(iter(contenders.values()))
    speeds, rows = {}, []
    for name, one in contenders.items():
        one.close()
        wall, cpu = np.array(one.wall_s[1:]), np.array(one.cpu_s[1:])
        by_wall, by_cpu = np.array(first.wall_s[1:]) / wall, np.array(first.cpu_s[1:]) / cpu
        speeds[name] = Speed(float(np.median(by_wall)), float(np.median(by_cpu)))
        speed, cost = one.num_tokens / np.median(wall), 1e6 * np.median(cpu) / one.num_tokens
        rows.append((name, float(speed), float(cost), speeds[name].wall, speeds[name].cpu))
    print(f"\n{title}: {first.num_tokens} tokens a step, {rounds} rounds")
    columns = ("", "tokens/s", "CPU us a token", "speed by wall time", "by CPU-seconds")
    work.table(columns, rows)
    return speeds


# ---- memory


def logits_memory(vocabulary: int, chunk_rows: int) -> int:
    """Bytes by which a process grows over the logprobs' forward and backward; 0 rows: full logits."""
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    process = context.Process(target=_logits_memory, args=(theirs, vocabulary, chunk_rows))
    process.start()
    theirs.close()
    grown: int = mine.recv()
    process.join()
    return grown


def _logits_memory(pipe: Any, vocabulary: int, chunk_rows: int) -> None:
    import torch

    from learner.logprobs import token_logprobs

    torch.set_num_threads(1)
    targets = torch.randint(vocabulary, (MEMORY_ROWS,))

    def run(rows: int) -> None:
        hidden, head = (
            torch.full((n, MEMORY_HIDDEN), 0.01, requires_grad=True) for n in (rows, vocabulary)
        )
        Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident
        before = _peak_memory()
        if chunk_rows:
            logprobs, _ = token_logprobs(
                hidden, head, targets[:rows], chunk_rows=chunk_rows, with_entropy=False
            )
        else:
            logp = (hidden @ head.T).log_softmax(-1)
            logprobs = logp.gather(1, targets[:rows, None])[:, 0]
        logprobs.sum().backward()
        if rows == MEMORY_ROWS:
            pipe.send(_peak_memory() - before)

    run(1)  # libraries take their own memory at the first call
    run(MEMORY_ROWS)


def _peak_memory() -> int:
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def against_bare_loop(title: str, job: Job, rounds: int) -> dict[str, float]:
    half = replace(job, dtype="bfloat16")
    speeds = compete(
        title,
        rounds,
        {
            "bare loop": Contender(bare_loop, job),
            "raylign, 1 rank": Contender(raylign, job),
            "raylign, 2 ranks": Contender(raylign, job, ranks=2),
            "raylign, 1 rank, bfloat16": Contender(raylign, half),
        },
    )
    one, two = speeds["raylign, 1 rank"], speeds["raylign, 2 ranks"]
    return {
        "share_of_bare_loop": one.cpu,
        "share_of_bare_loop_wall": one.wall,
        "speed_2_ranks": two.wall / one.wall,
        "cpu_2_ranks": one.cpu / two.cpu,
        "speed_bfloat16": speeds["raylign, 1 rank, bfloat16"].cpu / one.cpu,
    }


def against_padding(title: str, job: Job, rounds: int) -> dict[str, float]:
    speeds = compete(
        title,
        rounds,
        {"padded": Contender(padded, job), "raylign, 1 rank": Contender(raylign, job)},
    )
    packed = speeds["raylign, 1 rank"]
    return {"times_padded": packed.cpu, "times_padded_wall": packed.wall}


def against_full_logits() -> dict[str, float]:
    from learner.config import LearnerConfig

    chunk_rows = LearnerConfig().logprob_chunk_rows
    figures, rows = {}, []
    for name, vocabulary in VOCABULARIES.items():
        full, chunked = (logits_memory(vocabulary, n) for n in (0, chunk_rows))
        figures[f"logits_memory_ratio_{name}"] = full / chunked
        gradient = vocabulary * MEMORY_HIDDEN * 4  # of the head, part of both
        rows.append((f"vocabulary {name}", *(n / 2**20 for n in (full, chunked, gradient))))
    print(
        f"\nPeak memory of the logprobs of {MEMORY_ROWS} tokens, chunks of {chunk_rows} rows, MiB"
    )
    work.table(("", "full logits", "chunked", "of both: head's gradient"), rows)
    return figures


def main() -> None:
    parser = work.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    rounds = 2 if arguments.quick else arguments.rounds
    os.environ.update(LEARNER_ENV)  # for the processes that are spawned from here
    work.header("transformers")
    tiny = str(work.write_model(arguments.folder / "tiny", work.TINY))
    title = "2.66M parameters, 64 trajectories of geometric lengths"
    figures = against_bare_loop(title, Job(tiny, work.TINY.vocabulary, geometric(64)), rounds)
    title = "2.66M parameters, 64 trajectories of lognormal lengths"
    figures |= against_padding(title, Job(tiny, work.TINY.vocabulary, lognormal(64)), rounds)
    if not arguments.quick:
        small = str(work.write_model(arguments.folder / "small", work.SMALL))
        title = "40M parameters, vocabulary 32,000, 32 trajectories of geometric lengths"
        job = Job(small, work.SMALL.vocabulary, geometric(32))
        large = against_bare_loop(title, job, rounds)
        figures |= {f"{name}_40m": value for name, value in large.items()}
    work.result(**figures, **against_full_logits())


if __name__ == "__main__":
    main()
