"""The systems that are compared, each as: start it, and read when its steps ended."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks import work
from benchmarks.measure import watch
from benchmarks.peers.environments import python_of, versions

KL = 0.05  # the coefficient, the same on both sides
LIMIT_S = 900
QUIET = {"PYTHONWARNINGS": "ignore", "TOKENIZERS_PARALLELISM": "false"}
PEERS = {
    **QUIET,
    "PYTHONPATH": str(work.ROOT),
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "TORCHDYNAMO_DISABLE": "1",
    # vLLM would bind the threads of every process to the same cores.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


@dataclass
class Run:
    """One run: tokens and seconds of its measured steps, the first step's end and the memory."""

    tokens: list[int]
    seconds: list[float]
    first_s: float
    peak_bytes: int

    @property
    def rate(self) -> float:
        return sum(self.tokens) / sum(self.seconds)


@dataclass(frozen=True)
class Raylign:
    """`raylign train` with these changes to benchmarks.work's config."""

    name: str
    critic: str
    changes: dict[str, Any]

    def run(self, place: Place, natural: bool, warm_up: int, steps: int) -> Run:
        name = self.name.replace(" ", "-") + ("-natural" if natural else "-fixed")
        changes = {**self.changes, "num_steps": warm_up + steps + 1, "ppo.kl.coef": KL}
        config = work.config(place.folder, name, place.model(natural), **changes)
        shutil.rmtree(place.folder / "runs" / name, ignore_errors=True)
        path = place.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config, sort_keys=False))
        raylign = str(Path(sys.executable).with_name("raylign"))
        watched = watch(
            [raylign, "train", str(path), *place.overrides],
            work.ROOT,
            place.folder / "logs" / f"{name}.log",
            LIMIT_S,
            QUIET,
        )
        # Without the last step: while it learns nothing more is generated, so it is faster.
        rows = work.read_metrics(place.folder / "runs" / name)[:-1]
        marks = [(row["time"], int(row["rollout/completion_tokens"])) for row in rows]
        return _run(marks, watched.started, watched.peak_bytes, warm_up)


@dataclass(frozen=True)
class Peer:
    """A peer's script in its own environment, as `processes` of `threads` threads."""

    name: str
    critic: str
    script: str
    processes: int = 1
    threads: int = 1

    def run(
        self, place: Place, natural: bool, warm_up: int, steps: int, limit_s: float = LIMIT_S
    ) -> Run:
        """TimeoutError after `limit_s`."""
        name = f"{self.script}-{'natural' if natural else 'fixed'}"
        options = {
            "model": place.model(natural),
            "steps": warm_up + steps,
            "processes": self.processes,
            "beta": KL,
            "folder": place.folder / "runs" / name,
        }
        watched = watch(
            [
                *self._launcher(str(self.python(place))),
                *("-m", f"benchmarks.peers.{self.script}"),
                *(str(word) for key, value in options.items() for word in (f"--{key}", value)),
            ],
            work.ROOT,
            place.folder / "logs" / f"{name}-{self.processes}x{self.threads}.log",
            limit_s,
            PEERS | {"OMP_NUM_THREADS": str(self.threads)},
        )
        rows = [json.loads(row) for row in watched.output.splitlines() if row.startswith("{")]
        _check(self.name, rows[-1])
        marks = [(row["ended"], int(row["tokens"])) for row in rows[:-1]]
        return _run(marks, watched.started, watched.peak_bytes, warm_up)

    def python(self, place: Place) -> Path:
        return python_of(place.folder, self.environment)

    @property
    def environment(self) -> str:
        return self.script.replace("_", "-")

    def _launcher(self, python: str) -> list[str]:
        if self.processes == 1:
            return [python]
        ranks = ["--standalone", "--nproc-per-node", str(self.processes)]
        return [python, "-m", "torch.distributed.run", *ranks]


@dataclass
class Place:
    """Where models, environments and runs are, and overrides for every raylign run."""

    folder: Path
    overrides: list[str]

    def prepare(self, peers: list[Peer], lengths: list[bool]) -> None:
        """Everything that is made once, so that no run waits for it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for natural in lengths:
            self.model(natural)
        for peer in peers:
            peer.python(self)
            print(f"{peer.name}: {versions(peer.environment)}", flush=True)

    def model(self, natural: bool) -> Path:
        kind = "natural" if natural else "fixed"
        return work.write_model(self.folder / "models" / kind, natural=natural)


def _run(marks: list[tuple[float, int]], started: float, peak_bytes: int, warm_up: int) -> Run:
    """A step lasts from the end of the one before to its own: nothing between them is left out."""
    ended = [end for end, _ in marks]
    return Run(
        tokens=[tokens for _, tokens in marks[warm_up:]],
        seconds=[b - a for a, b in zip(ended[warm_up - 1 :], ended[warm_up:], strict=False)],
        first_s=ended[0] - started,
        peak_bytes=peak_bytes,
    )


def _check(name: str, last: dict[str, Any]) -> None:
    """A peer that does not train, or whose vLLM samples from old weights, is no comparison."""
    assert last["parameters_changed"] > 0, f"{name}: no weight changed"
    assert last["ranks_differ"] == 0, f"{name}: its processes have different weights"
    assert last.get("reward_error", 0.0) < 1e-5, f"{name}: it trained on other rewards: {last}"
    assert last.get("served_equal", True), f"{name}: vLLM has other weights than the policy"
    assert last.get("served_changed", 1.0) > 0, f"{name}: vLLM's weights did not change"
    assert last.get("logprob_difference", 0.0) < 1e-3, f"{name}: vLLM's logprobs differ: {last}"
