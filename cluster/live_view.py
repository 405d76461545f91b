"""The terminal during a run: a live view, or one plain line a step where there is no terminal.

The same class serves every stage; it shows whichever of its figures a step has.
"""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from cluster.redaction import printable

MAX_ROLE_LINES = 12
RECENT_STEPS = 20  # the time left is judged by these


class Figure(NamedTuple):
    name: str
    label: str
    format: str
    unit: str = ""


FIGURES = (
    Figure("reward/score_mean", "score", ".3f"),
    Figure("learner/kl_to_ref", "kl to ref", ".2f"),
    Figure("evaluation/win_rate", "win rate", ".1%"),
    Figure("staleness/mean", "staleness", ".1f"),
    Figure("learner/clip_fraction", "clip", ".3f"),
    Figure("rollout/samples_per_s", "samples/s", ",.1f"),
    Figure("rollout/tokens_per_s", "gen tokens/s", ",.0f"),
    Figure("sft/loss", "loss", ".4f"),
    Figure("sft/tokens_per_s", "tokens/s", ",.0f"),
    Figure("reward_model/loss", "loss", ".4f"),
    Figure("reward_model/accuracy", "accuracy", ".1%"),
    Figure("time/step_s", "took", ".2f", " s"),
)


def figures(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The (label, value) pairs worth a glance among a step's metrics."""
    return [
        (figure.label, format(metrics[figure.name], figure.format) + figure.unit)
        for figure in FIGURES
        if figure.name in metrics
    ]  # fmt: skip


def _one_line(text: str) -> str:
    return " ".join(printable(text).split())


def duration(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


class LiveView:
    """A context manager; `step` takes a line of metrics.jsonl, as MetricsWriter.write returns."""

    def __init__(
        self,
        name: str,
        num_steps: int,
        *,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name, self._num_steps, self._clock = name, num_steps, clock
        self._console = console or Console(file=sys.stdout, highlight=False)
        self._live: Live | None = None
        self._stage = "starting"
        self._roles: dict[str, str] = {}
        self._metrics: dict[str, Any] = {}
        self._done = 0
        self._started = clock()
        self._ends: deque[tuple[int, float]] = deque(maxlen=RECENT_STEPS + 1)

    def __enter__(self) -> Self:
        # A job's output and a CI log are files in effect, whatever they claim to be.
        unattended = any(os.environ.get(name) for name in ("CI", "RAY_JOB_CONFIG_JSON_ENV_VAR"))
        if self._console.is_terminal and not unattended:
            self._live = Live(
                get_renderable=self._render, console=self._console, refresh_per_second=4
            )
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def stage(self, text: str) -> None:
        """What the run is doing now, e.g. "loading the policy"."""
        if text != self._stage and self._live is None:
            self._print(f"{self._name}: {text}")
        self._stage = _one_line(text)

    def roles(self, states: Mapping[str, str]) -> None:
        """What these roles are doing now, e.g. {"generator 0": "41 running"}; for the live view only."""
        self._roles.update(states)

    def step(self, metrics: Mapping[str, Any]) -> None:
        """A step is over; these are its metrics, "step" among them."""
        if self._ends and metrics["step"] <= self._ends[-1][0]:  # the run went back to a checkpoint
            self._ends.clear()
        if metrics["step"] > 0:  # from the first step's end on: what came before says no pace
            self._ends.append((metrics["step"], self._clock()))
        self._done = metrics["step"]
        self._metrics = {**self._metrics, **metrics}
        if self._live is None:
            parts = [f"{label} {value}" for label, value in figures(metrics)]
            self._print(" | ".join([self._progress(), *parts]))

    def note(self, text: str) -> None:
        """A line that stays, e.g. a warning or a checkpoint."""
        self._print(text)

    def _print(self, text: str) -> None:
        # No wrapping in plain output: a log's line is one line.
        self._console.print(Text(printable(text)), soft_wrap=True, highlight=False)

    def _progress(self) -> str:
        left = self._time_left()
        return f"step {self._done}/{self._num_steps}" + (f" | {left} left" if left else "")

    def _time_left(self) -> str:
        if len(self._ends) < 2 or self._done >= self._num_steps:
            return ""
        (first, start), (last, end) = self._ends[0], self._ends[-1]
        return duration((end - start) / (last - first) * (self._num_steps - last))

    def _render(self) -> RenderableType:
        width = self._console.width
        lines = [self._header(), self._bar(width), *self._figure_lines(width), *self._role_lines()]
        for line in lines:
            line.truncate(width, overflow="ellipsis")
            line.no_wrap = True
        return Group(*lines)

    def _header(self) -> Text:
        elapsed = duration(self._clock() - self._started)
        return Text.assemble((self._name, "bold"), "  ", (self._stage, "cyan"), "  ", elapsed)

    def _bar(self, width: int) -> Text:
        room = max(0, min(40, width - 30))
        full = round(room * min(1, self._done / max(1, self._num_steps)))
        bar = Text.assemble(
            ("━" * full, "green"), ("━" * (room - full), "bright_black"), " " * (room > 0)
        )
        return bar.append(self._progress().replace(" | ", "  "))  # fmt: skip

    def _figure_lines(self, width: int) -> Iterator[Text]:
        """As many figures side by side as fit; a narrow terminal gets more lines."""
        line = Text()
        for label, value in figures(self._metrics):
            cell = Text.assemble((label + " ", "dim"), (value, "bold"))
            if line and line.cell_len + 3 + cell.cell_len > width:
                yield line
                line = Text()
            line = line.append("   ").append(cell) if line else cell
        if line:
            yield line

    def _role_lines(self) -> Iterator[Text]:
        # Of many generators some are left out; the learner and the reward service never are.
        ordered = sorted(self._roles.copy().items(), key=lambda item: item[0][-1:].isdigit())
        shown = ordered[:MAX_ROLE_LINES]
        pad = max((len(role) for role, _ in shown), default=0)
        for role, state in shown:
            yield Text.assemble((f"  {role:<{pad}}  ", "dim"), _one_line(state))
        if more := len(self._roles) - len(shown):
            yield Text(f"  and {more} more", "dim")
