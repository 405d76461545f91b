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
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks import work
from benchmarks.contenders import Job, Lengths, bare_loop, padded, raylign
from learner.learner_spec import LEARNER_ENV, Rendezvous

MEMORY_ROWS, MEMORY_HIDDEN = 2048, 512
VOCABULARIES = {"32k": 32_000, "150k": 150_000}


def geometric(count: int) -> Lengths:
    """Prompts of 16 tokens; completions of mean 65 before the cut at 128."""
    rng = np.random.default_rng(0)
    return [(work.PROMPT_TOKENS, int(min(128, n))) for n in rng.geometric(1 / 65, count)]


def lognormal(count: int) -> Lengths:
    """Prompts of 32 to 96 tokens; completions of median 120, at most 590."""
    rng = np.random.default_rng(1)
    completions = np.clip(rng.lognormal(np.log(120), 0.7, count), 1, 590).astype(int)
    return list(zip(rng.integers(32, 97, count).tolist(), completions.tolist(), strict=True))


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
    contenders = {
        "bare loop": Contender(bare_loop, job),
        "raylign, 1 rank": Contender(raylign, job),
        "raylign, 2 ranks": Contender(raylign, job, ranks=2),
    }
    if work.multiplies_bfloat16():
        half = replace(job, dtype="bfloat16")
        contenders["raylign, 1 rank, bfloat16"] = Contender(raylign, half)
    speeds = compete(title, rounds, contenders)
    one, two = speeds["raylign, 1 rank"], speeds["raylign, 2 ranks"]
    halved = speeds.get("raylign, 1 rank, bfloat16")
    return {
        "share_of_bare_loop": one.cpu,
        "share_of_bare_loop_wall": one.wall,
        "speed_2_ranks": two.wall / one.wall,
        "cpu_2_ranks": one.cpu / two.cpu,
        **({"speed_bfloat16": halved.cpu / one.cpu} if halved else {}),
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
