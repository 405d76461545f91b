"""`raylign audit RUN`: proves from a run's files alone that every prompt was trained as often as
the config says, on data of known age, by weights that were published, and that the checkpoints are
whole.

trajectories/*.parquet + dropped.jsonl + events.jsonl + checkpoints/ + the prompts  ->  AuditResult
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from actors.config import PromptsConfig
from actors.prompts import prompt_id_of
from actors.trajectory import SCHEMA_VERSION
from cluster import checkpoints
from cluster.config import BadInput, RunConfig
from cluster.config_file import load_config
from cluster.run_status import RunRecord, read_run
from reward_service.rows import read_rows

COLUMNS = [
    "prompt_id", "sample_index", "epoch", "policy_version", "policy_version_max",
    "version_spans", "staleness", "step",
]  # fmt: skip


class Sample(NamedTuple):
    """What is to be trained once: a sample of a prompt, in an epoch."""

    prompt_id: str
    epoch: int
    sample_index: int

    def __str__(self) -> str:
        return f"prompt {self.prompt_id}, epoch {self.epoch}, sample {self.sample_index}"


@dataclass(frozen=True)
class AuditResult:
    """`checked` counts what was looked at, up to the violation if there is one."""

    checked: dict[str, int]
    violation: str | None

    def __str__(self) -> str:
        width = max((len(what) for what in self.checked), default=0)
        rows = [f"{what:<{width}}  {count:>9,}" for what, count in self.checked.items()]
        return "\n".join([*rows, self.verdict])

    @property
    def verdict(self) -> str:
        if self.violation is not None:
            return f"audit failed: {self.violation}"
        trained, steps = self.checked.get("samples trained", 0), self.checked.get("steps", 0)
        if not trained:
            return "audit passed: 0 samples, the run is still starting"
        return (
            f"audit passed: {trained:,} samples in {steps:,} steps, each trained at most once, "
            f"none missing, {self.checked.get('samples dropped', 0):,} dropped with a reason"
        )


class Violation(Exception):
    """The first thing found wrong; never leaves this module."""


def audit(run_dir: Path) -> AuditResult:
    """BadInput when there is nothing to audit; a damaged run is a violation, not an exception."""
    try:
        run = read_run(run_dir)
    except ValueError as error:
        return AuditResult({}, str(error))
    config = load_config(run.run_dir / "config.yaml", [], RunConfig)
    checked: dict[str, int] = {}
    try:
        _Audit(run, config, checked).all()
    except Violation as violation:
        return AuditResult(checked, str(violation))
    return AuditResult(checked, None)


class _Audit:
    """The proof, one method a claim; each raises Violation at the first thing that is not so."""

    def __init__(self, run: RunRecord, config: RunConfig, checked: dict[str, int]) -> None:
        self._run, self._config, self._checked = run, config, checked
        self._published = {
            event["version"] for event in run.events if isinstance(event.get("version"), int)
        }
        self._trained: dict[Sample, int] = {}  # -> step
        self._dropped: set[Sample] = set()
        self._never: set[str] = set()  # prompts dropped for good, e.g. as too long
        self._num_steps = 0

    def all(self) -> None:
        self._count("versions published", len(self._published))
        for step, file in self._step_files():
            self._step(step, file)
        self._drops()
        self._epochs()
        self._checkpoints()
        if not self._trained and self._run.state != "starting":
            raise Violation("0 samples: nothing was trained")

    def _count(self, what: str, number: int = 1) -> None:
        self._checked[what] = self._checked.get(what, 0) + number

    def _step_files(self) -> Iterator[tuple[int, Path]]:
        files = sorted((self._run.run_dir / "trajectories").glob("*.parquet"))
        for step, file in enumerate(files, 1):
            name = f"{checkpoints.step_name(step)}.parquet"
            if file.name != name:
                raise Violation(f"trajectories: no {name}, but {file.name}")
            if step > self._config.num_steps:
                raise Violation(f"{name}: num_steps is {self._config.num_steps}")
            yield step, file
            self._num_steps = step
            self._count("steps")

    def _step(self, step: int, file: Path) -> None:
        rows = _read_step(file)
        batch_size = self._config.batch_size
        if len(rows) != batch_size:
            raise Violation(f"{file.name}: {len(rows)} rows, batch_size is {batch_size}")
        for row in rows:
            sample = Sample(row["prompt_id"], row["epoch"], row["sample_index"])
            where = f"{file.name}: {sample}"
            if row["step"] != step:
                raise Violation(f"{where}: its step column says {row['step']}")
            if sample in self._trained:
                raise Violation(f"{where}: trained already in step {self._trained[sample]}")
            self._trained[sample] = step
            self._versions(row, step, where)
        self._count("samples trained", len(rows))

    def _versions(self, row: dict[str, Any], step: int, where: str) -> None:
        """Step k consumes at version k-1, the one the learner published last."""
        age = step - 1 - row["policy_version"]
        if row["staleness"] != age:
            raise Violation(f"{where}: staleness {row['staleness']}, of its policy_version {age}")
        if not 0 <= age <= self._config.max_staleness:
            raise Violation(
                f"{where}: staleness {age}, max_staleness is {self._config.max_staleness}"
            )
        versions = [span["version"] for span in row["version_spans"]]
        ends = [row["policy_version"], row["policy_version_max"]]
        if versions[:1] + versions[-1:] != ends or versions != sorted(set(versions)):
            raise Violation(f"{where}: version_spans {versions} contradict policy versions {ends}")
        if versions[-1] >= step:
            raise Violation(f"{where}: version {versions[-1]} is newer than the learner's")
        for version in versions:
            if version not in self._published:
                raise Violation(f"{where}: events.jsonl has no publication of version {version}")

    def _drops(self) -> None:
        for drop in self._run.dropped:
            if missing := {*Sample._fields} - drop.keys():
                raise Violation(f"dropped.jsonl: {drop}: no {min(missing)}")
            sample = Sample(*(drop[name] for name in Sample._fields))
            if not drop.get("reason"):
                raise Violation(f"dropped.jsonl: {sample}: no reason")
            if drop["epoch"] is None:  # in no epoch
                self._never.add(drop["prompt_id"])
                continue
            if sample in self._trained:
                raise Violation(f"dropped.jsonl: {sample}: trained in step {self._trained[sample]}")
            self._dropped.add(sample)
        self._count("samples dropped", len(self._dropped))

    def _epochs(self) -> None:
        prompts = _prompt_ids(self._config.prompts) - self._never
        self._count("prompts", len(prompts))
        done = {*self._trained, *self._dropped}
        self._no_strangers(done, prompts)
        completed, last = self._completed_epochs()
        for epoch in completed:
            self._complete(epoch, done, prompts)
            self._count("epochs completed")
        if self._num_steps == self._config.num_steps and self._config.max_staleness == 0:
            self._nothing_in_flight(last, Counter(s.prompt_id for s in done if s.epoch == last))

    def _no_strangers(self, done: set[Sample], prompts: set[str]) -> None:
        samples = self._config.sampling.samples_per_prompt
        for sample in done:
            if sample.prompt_id not in prompts:
                raise Violation(f"{sample}: not among the prompts of {self._config.prompts.path}")
            if not 0 <= sample.sample_index < samples:
                raise Violation(f"{sample}: samples_per_prompt is {samples}")

    def _completed_epochs(self) -> tuple[range, int]:
        """(the epochs that are over, the last one begun). A later prompt may overtake an earlier
        one by max_staleness steps at most: the ledger lets none wait for longer."""
        begun: dict[int, int] = {}  # epoch -> the first step that trained on it
        for sample, step in self._trained.items():
            begun[sample.epoch] = min(step, begun.get(sample.epoch, step))
        due = self._num_steps - self._config.max_staleness
        over = max((epoch for epoch, step in begun.items() if step <= due), default=0)
        return range(over), max(begun, default=0)

    def _complete(self, epoch: int, done: set[Sample], prompts: set[str]) -> None:
        for prompt_id in sorted(prompts):
            for index in range(self._config.sampling.samples_per_prompt):
                sample = Sample(prompt_id, epoch, index)
                if sample not in done:
                    raise Violation(f"{sample}: neither trained nor dropped, and its epoch is over")

    def _nothing_in_flight(self, epoch: int, counts: Counter[str]) -> None:
        """A synchronous run, finished, has trained or dropped every sample of what it began."""
        samples = self._config.sampling.samples_per_prompt
        for prompt_id, count in counts.items():
            if count != samples:
                raise Violation(
                    f"prompt {prompt_id}, epoch {epoch}: {count} of {samples} samples trained or "
                    "dropped, though the run is finished"
                )

    def _checkpoints(self) -> None:
        for folder in sorted((self._run.run_dir / "checkpoints").glob("step-*")):
            if folder.suffix == ".partial":
                self._count("checkpoints unfinished")  # nothing ever opens it
                continue
            if (problem := checkpoints.damage(folder)) is not None:
                raise Violation(problem)
            manifest = json.loads((folder / checkpoints.MANIFEST).read_text())
            step = manifest.get("step")
            if not isinstance(step, int) or folder.name != checkpoints.step_name(step):
                raise Violation(f"{folder}: its manifest is of step {step!r:.20}")
            if step > self._num_steps:
                raise Violation(f"{folder}: there are trajectories of {self._num_steps} steps only")
            self._count("checkpoints")
            self._count("checkpoint files", len(manifest["files"]))


def _read_step(file: Path) -> list[dict[str, Any]]:
    try:
        opened = pq.ParquetFile(file)
        version = (opened.schema_arrow.metadata or {}).get(b"schema_version", b"none").decode()
        if version != SCHEMA_VERSION:
            raise Violation(f"{file.name}: schema_version {version}, this is for {SCHEMA_VERSION}")
        missing = [name for name in COLUMNS if name not in opened.schema_arrow.names]
        if missing:
            raise Violation(f"{file.name}: no column {missing[0]}")
        return opened.read(COLUMNS).to_pylist()
    except (OSError, ValueError, pa.ArrowException) as error:
        raise Violation(f"{file.name}: not readable ({' '.join(str(error).split())})") from None


def _prompt_ids(config: PromptsConfig) -> set[str]:
    try:
        rows = islice(enumerate(read_rows(config.path)), config.limit)
    except ValueError as error:
        raise BadInput(f"prompts.path: {error}") from None
    return {prompt_id_of(row, i) for i, row in rows}
