"""Metrics: the names, how each is reduced over ranks, and the only writer.

components (dicts of name -> number) -> reduce_ranks -> MetricsWriter -> metrics.jsonl, TensorBoard,
other sinks
"""

from __future__ import annotations

import difflib
import math
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, Self

from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[attr-defined]
from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[attr-defined]
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from cluster import json_lines
from cluster.config import BadInput


class Metric(NamedTuple):
    reduction: Literal["mean", "sum", "max", "last"]  # over ranks, or over the parts of a window
    description: str


METRICS: dict[str, Metric] = {
    "time/step_s": Metric("max", "one step, everything included"),
    "time/rollout_wait_s": Metric("max", "waiting for enough trajectories"),
    "time/update_s": Metric("max", "the PPO update of the learner"),
    "time/publish_s": Metric("max", "publishing the weights, until generators have proved them"),
    "time/evaluate_s": Metric("max", "held-out evaluation"),
    "rollout/completion_tokens": Metric("sum", "completion tokens in the batch"),
    "rollout/completion_tokens_mean": Metric("mean", "tokens a completion"),
    "rollout/tokens_per_s": Metric("sum", "completion tokens generated a second, all generators"),
    "rollout/samples_per_s": Metric("sum", "completions generated a second, all generators"),
    "rollout/truncated_fraction": Metric("mean", "share of completions cut at max_tokens"),
    "rollout/generators": Metric("last", "generators that answer at the end of the step"),
    "rollout/generator_busy_share": Metric("mean", "share of time in which generators decode"),
    "reward/score_mean": Metric("mean", "mean score of the batch"),
    "reward/score_sd": Metric("mean", "standard deviation of the scores of the batch"),
    "reward/score_s_mean": Metric("mean", "seconds to score one completion"),
    "reward/dropped": Metric("last", "prompts dropped so far, reasons in dropped.jsonl"),
    "staleness/mean": Metric("mean", "learner version less policy_version, at consumption"),
    "staleness/max": Metric("max", "largest staleness in the batch"),
    "learner/policy_loss": Metric("mean", "clipped surrogate loss"),
    "learner/value_loss": Metric("mean", "clipped squared error of the value function"),
    "learner/value_clip_fraction": Metric("mean", "share of values whose clipped branch is active"),
    "learner/ptx_loss": Metric("mean", "loss of the pretraining term (PPO-ptx)"),
    "learner/entropy_bonus": Metric("mean", "exact entropy, where the loss rewards it"),
    "learner/minibatches": Metric("last", "optimizer steps in the step"),
    "learner/entropy": Metric("mean", "entropy of the policy, nats a token"),
    "learner/clip_fraction": Metric("mean", "share of tokens whose clipped branch is active"),
    "learner/approx_kl": Metric("mean", "k3 estimate, old against current policy, nats a token"),
    "learner/first_clip_fraction": Metric("mean", "clip_fraction of the first minibatch"),
    "learner/first_ratio_error": Metric("max", "distance of the ratio from 1, first minibatch"),
    "learner/kl_to_ref": Metric("mean", "k1 of policy against reference, nats a completion"),
    "learner/kl_coef": Metric("last", "weight of the KL penalty in the rewards"),
    "learner/explained_variance": Metric("mean", "share of the returns' variance explained"),
    "learner/grad_norm_policy": Metric("mean", "gradient norm of the policy before clipping"),
    "learner/grad_norm_value": Metric("mean", "gradient norm of the critic before clipping"),
    "learner/lr_policy": Metric("last", "learning rate of the policy"),
    "learner/lr_value": Metric("last", "learning rate of the value function"),
    "learner/behavior_difference_mean": Metric("mean", "mean distance to generator logprobs"),
    "learner/behavior_difference_max": Metric("max", "largest distance to generator logprobs"),
    "learner/tokens_per_s": Metric("mean", "tokens a second of the update, ranks together"),
    "learner/peak_memory_bytes": Metric("max", "peak memory of one rank"),
    "weights/push_s": Metric("max", "moving the weights to the generators"),
    "weights/bytes": Metric("sum", "bytes of weights published"),
    "weights/probe_difference_max": Metric("max", "the same on the probe, after a push"),
    "evaluation/win_rate": Metric("mean", "held-out wins over the starting policy, a tie is half"),
    "evaluation/judge_mean": Metric("mean", "held-out mean of the judge's score"),
    "evaluation/reward_mean": Metric("mean", "held-out mean of the reward score"),
    "evaluation/kl_to_ref": Metric("mean", "held-out KL to the reference, nats a completion"),
    "sft/loss": Metric("mean", "cross-entropy of the completions, nats a token"),
    "sft/tokens_per_s": Metric("sum", "tokens trained on a second, all ranks"),
    "sft/lr": Metric("last", "learning rate"),
    "sft/grad_norm": Metric("mean", "gradient norm before clipping"),
    "reward_model/loss": Metric("mean", "pairwise loss, -log sigmoid(chosen - rejected)"),
    "reward_model/accuracy": Metric("mean", "share of pairs whose chosen completion scores higher"),
    "reward_model/margin": Metric("mean", "mean score of chosen less rejected"),
    "reward_model/lr": Metric("last", "learning rate"),
    "reward_model/grad_norm": Metric("mean", "gradient norm before clipping"),
}  # fmt: skip

FAMILIES: dict[str, Metric] = {"reward/part/": Metric("mean", "mean of one part of the score")}

_REDUCE: dict[str, Callable[[list[float]], float]] = {
    "mean": lambda values: math.fsum(values) / len(values),
    "sum": sum,
    "max": max,
    "last": lambda values: values[-1],
}


def metric(name: str) -> Metric:
    """The table's entry; a name that is not in it is an error, so that none is misspelt."""
    if name in METRICS:
        return METRICS[name]
    for prefix, family in FAMILIES.items():
        if name.startswith(prefix) and name != prefix:
            return family
    near = difflib.get_close_matches(name, METRICS, 1, 0.5)
    hint = f"did you mean {near[0]}?" if near else "add it to METRICS in cluster/metrics.py"
    raise ValueError(f"unknown metric {name}; {hint}")


def reduce_ranks(ranks: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """One dict a rank (or a part of a window) -> one; each metric over those that report it."""
    names = dict.fromkeys(name for rank in ranks for name in rank)
    return {
        name: _REDUCE[metric(name).reduction]([rank[name] for rank in ranks if name in rank])
        for name in names
    }


def markdown_table() -> str:
    """The table for README."""
    rows = [*METRICS.items(), *((f"{prefix}<name>", entry) for prefix, entry in FAMILIES.items())]
    lines = [f"| `{name}` | {entry.reduction} | {entry.description} |" for name, entry in rows]
    return "\n".join(["| metric | over ranks | what it is |", "|---|---|---|", *lines])


class MetricsSink(Protocol):
    def write(self, step: int, metrics: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


class TensorBoardSink:
    """Event files, without torch. A resumed run hides what was logged after `resume_step`."""

    def __init__(self, folder: Path, resume_step: int | None) -> None:
        self._events = EventFileWriter(str(folder))
        if resume_step is not None:
            start = SessionLog(status=SessionLog.START)
            self._add(Event(step=resume_step + 1, session_log=start))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        values = [Summary.Value(tag=name, simple_value=x) for name, x in metrics.items()]
        self._add(Event(step=step, summary=Summary(value=values)))

    def _add(self, event: Event) -> None:
        event.wall_time = time.time()
        self._events.add_event(event)
        self._events.flush()

    def close(self) -> None:
        self._events.close()


def gauge_name(name: str) -> str:
    """As Ray is told; Ray exports it with "ray_" before it."""
    return "raylign_" + re.sub(r"\W", "_", name, flags=re.ASCII)


class RayMetricsSink:
    """Gauges on Ray's metrics endpoint, e.g. raylign_learner_policy_loss{run="..."}. Gauges only:
    Ray drops them when the process ends, while it goes on to export the last value of a counter."""

    def __init__(self, run: str) -> None:
        from ray.util.metrics import Gauge

        self._gauge, self._run = Gauge, run
        self._gauges: dict[str, Any] = {}

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            if name not in self._gauges:
                described = metric(name).description
                self._gauges[name] = self._gauge(gauge_name(name), described, ("run",))
            self._gauges[name].set(value, tags={"run": self._run})

    def close(self) -> None:
        self._gauges.clear()


class MetricsWriter:
    """Called by the driver once a step. `resume_step`: the step of the checkpoint that the run
    continues from (lines after it are removed), -1 if it starts over, None for a new run."""

    def __init__(
        self, run_dir: Path, *, resume_step: int | None = None, sinks: Iterable[MetricsSink] = ()
    ) -> None:
        path = Path(run_dir) / "metrics.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        if resume_step is None and path.exists() and path.stat().st_size:
            raise BadInput(f"{path}: belongs to an earlier run; add --resume or change `name`")
        self._path = path
        self._others = list(sinks)
        self._open(resume_step)

    def rewind(self, step: int) -> None:
        """Withdraw what was written of later steps, and go on from there."""
        self._tensorboard.close()
        self._open(step)

    def _open(self, resume_step: int | None) -> None:
        kept = json_lines.keep(self._path, lambda _, row: row["step"] <= (resume_step or 0))
        self._last_step = kept[-1]["step"] if kept else -1
        self._tensorboard = TensorBoardSink(self._path.parent / "tensorboard", resume_step)
        self._sinks: list[MetricsSink] = [self._tensorboard, *self._others]

    def write(self, step: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Checks and writes one step; returns the line written, for LiveView.step."""
        if step <= self._last_step:
            raise ValueError(f"metrics of step {step} come after those of step {self._last_step}")
        checked = {name: _checked(name, value) for name, value in metrics.items()}
        row = {"step": step, "time": round(time.time(), 3), **checked}
        json_lines.append(self._path, row)
        self._last_step = step
        for sink in self._sinks:
            sink.write(step, checked)
        return row

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _checked(name: str, value: Any) -> int | float:
    metric(name)
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"metric {name} is not a number: {value!r:.60}")
    number = int(value) if isinstance(value, Integral) else float(value)
    if not math.isfinite(number):
        raise ValueError(f"metric {name} is {number}")
    return number
