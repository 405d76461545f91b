"""What the folder of a run says: as a record for the report, as text for `raylign status`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from cluster import dropped, json_lines
from cluster.checkpoints import step_of
from cluster.config import BadInput
from cluster.heartbeat import GOING_ON, STATUS, goes_on
from cluster.live_view import duration, figures
from cluster.redaction import printable
from cluster.replace_file import read_object

Evaluation = tuple[str, list[dict[str, Any]]]  # label, rows of the Parquet file
LAST_EVENTS = 8
ROUTINE = {"weights_published"}  # one each step: they would hide the others


@dataclass(frozen=True)
class RunRecord:
    """The small files of a run; a run that has not come so far has empty ones."""

    run_dir: Path
    status: dict[str, Any]  # state, step, num_steps, stage, pid, updated_at, error
    summary: dict[str, Any]
    metrics: list[dict[str, Any]]
    events: list[dict[str, Any]]
    dropped: list[dict[str, Any]]
    checkpoints: list[int]
    config_text: str

    @cached_property  # from another machine it may take a while
    def state(self) -> str:
        """What the run wrote last, or "died" if it claims to go on and its process is gone."""
        state = self.status.get("state", "unknown")
        return (
            "died"
            if state in GOING_ON and not goes_on(self.status, self.run_dir / STATUS)
            else state
        )


def read_run(run_dir: Path) -> RunRecord:
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise BadInput(f"{run_dir}: no such run; give the folder of a run, e.g. runs/NAME")
    config = run_dir / "config.yaml"
    if not config.is_file() and not (run_dir / STATUS).is_file():
        raise BadInput(f"{run_dir}: not a run (no config.yaml); give a folder such as runs/NAME")
    return RunRecord(
        run_dir=run_dir,
        status=read_object(run_dir / STATUS),
        summary=read_object(run_dir / "summary.json"),
        metrics=json_lines.read(run_dir / "metrics.jsonl"),
        events=json_lines.read(run_dir / "events.jsonl"),
        dropped=json_lines.read(run_dir / "dropped.jsonl"),
        checkpoints=_checkpoint_steps(run_dir),
        config_text=config.read_text(encoding="utf-8") if config.is_file() else "",
    )


def read_evaluations(run_dir: Path) -> list[Evaluation]:
    """The first and the last evaluation of the run, as far as there are any."""
    files = sorted(Path(run_dir).glob("evaluation/step-[0-9]*[0-9].parquet"))
    return [
        (f"{label}, step {step_of(file)}", pq.read_table(file).to_pylist())
        for label, file in zip(["before", "after"], files[:1] + files[1:][-1:], strict=False)
    ]


def status(run_dir: Path) -> str:
    run = read_run(run_dir)
    lines = [
        _headline(run),
        *_row("error", printable(str(run.status.get("error") or ""))),
        *_row("last step", _last_step(run)),
        *_row("generators", str(run.status.get("generators", ""))),
        *_row("checkpoints", ", ".join(f"step {step}" for step in run.checkpoints) or "none"),
        *_row("dropped", printable(dropped.in_words(run.dropped)) or "none"),
    ]
    events = [event for event in run.events if event.get("event") not in ROUTINE][-LAST_EVENTS:]
    lines += [
        f"{'events' if i == 0 else '':<12} {event_text(event)}" for i, event in enumerate(events)
    ]
    return "\n".join(lines)


def event_text(event: dict[str, Any]) -> str:
    """One event as "12:30:05 checkpoint_saved step=10"."""
    known = {"time", "event"}
    details = " ".join(f"{key}={value}" for key, value in event.items() if key not in known)
    clock = time.strftime("%H:%M:%S", time.localtime(event.get("time", 0)))
    return printable(f"{clock} {event.get('event', '?')} {details}".rstrip())


def _headline(run: RunRecord) -> str:
    given = run.status
    parts = [run.state]
    if "step" in given:
        stage = f" ({given['stage']})" if given.get("stage") else ""
        parts.append(f"step {given['step']}/{given.get('num_steps', '?')}{stage}")
    if "pid" in given and run.state in (*GOING_ON, "died"):
        whose = f"process {given['pid']} on {given.get('host', 'an unknown machine')}"
        parts.append(f"{whose} {'gone' if run.state == 'died' else 'alive'}")
    if "updated_at" in given:
        parts.append(f"updated {duration(max(0, time.time() - given['updated_at']))} ago")
    return f"{run.run_dir.name}: {', '.join(parts)}"


def _last_step(run: RunRecord) -> str:
    if not run.metrics:
        return ""
    pairs = [f"{label} {value}" for label, value in figures(run.metrics[-1])]
    return " | ".join([str(run.metrics[-1]["step"]), *pairs])


def _row(label: str, text: str) -> list[str]:
    return [f"{label:<12} {text}"] if text else []


def _checkpoint_steps(run_dir: Path) -> list[int]:
    """Only complete ones: the manifest is written last."""
    manifests = run_dir.glob("checkpoints/step-*/manifest.json")
    folders = [path.parent for path in manifests if path.parent.suffix != ".partial"]
    return sorted(step_of(folder) for folder in folders)
