"""The only writer of metrics.

components (dicts of name -> number) -> reduce_ranks -> MetricsWriter -> metrics.jsonl, TensorBoard,
other sinks
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Protocol, Self

from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[attr-defined]
from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[attr-defined]
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from cluster import json_lines
from cluster.config import BadInput
from cluster.metrics import gauge_name, metric


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
        self._path.touch()
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
