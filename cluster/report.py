"""`raylign report RUN`: one HTML page about a run, without a single outside resource.

It shows what the run has: a stage without evaluation or a run that is still going on has fewer
sections. All text from the run is escaped and without secrets, completions above all: a model
wrote them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from cluster import dropped
from cluster import report_charts as charts
from cluster.held_out import changed_samples
from cluster.live_view import duration
from cluster.metrics import METRICS, metric
from cluster.redaction import escaped
from cluster.replace_file import replace_text
from cluster.report_charts import Series, number
from cluster.report_layout import BANDS, SECTIONS, STYLE, TILES, Tile
from cluster.run_status import (
    ROUTINE,
    Evaluation,
    RunRecord,
    event_text,
    read_evaluations,
    read_run,
)

MAX_ROWS = 200  # of a table; the files have the rest
MAX_SAMPLES = 8
FEW_SAMPLES = 4  # of a run without a summary


def write_report(run_dir: Path) -> Path:
    """Writes report.html into the folder of the run, whole or not at all; returns its path."""
    run = read_run(run_dir)
    path = run.run_dir / "report.html"
    replace_text(path, _page(run))
    return path


def _page(run: RunRecord) -> str:
    evaluations = read_evaluations(run.run_dir)
    versions = [f"{name} {version}" for name, version in run.summary.get("versions", {}).items()]
    sections = [
        _header(run),
        _tiles(run),
        *_curves(run),
        _held_out(evaluations),
        _samples(run, evaluations),
        _timing(run),
        _happened(run),
        _details("Configuration", run.config_text),
        _details("Versions", "\n".join(versions)),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escaped(_name(run))} - raylign</title><style>{STYLE}{charts.STYLE}</style></head>"
        f"<body><main>{''.join(sections)}</main></body></html>\n"
    )


def _name(run: RunRecord) -> str:
    return str(run.summary.get("name") or run.run_dir.resolve().name)


def _header(run: RunRecord) -> str:
    about = []
    if stage := run.summary.get("stage"):
        about.append(f"stage {stage}")
    if "seed" in run.summary:
        about.append(f"seed {run.summary['seed']}")
    if "updated_at" in run.status:
        about.append(time.strftime("%Y-%m-%d %H:%M", time.localtime(run.status["updated_at"])))
    error = run.status.get("error")
    return (
        f'<header><h1>{escaped(_name(run))}</h1><span class="state {escaped(run.state)}">'
        f"{escaped(run.state)}</span><p>{escaped(', '.join(about))}</p></header>"
        + (f'<p class="error">{escaped(str(error))}</p>' if error else "")
    )


def _tiles(run: RunRecord) -> str:
    tiles = [_change(run, tile) for tile in TILES]
    tiles.append(_tile("Steps", _steps(run)))
    wall_s = run.summary.get("wall_s")
    tiles.append(_tile("Wall time", _elapsed(run) if wall_s is None else duration(wall_s)))
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _change(run: RunRecord, tile: Tile) -> str:
    """From the summary; of a run without one (it goes on, or failed) from its metrics."""
    values = [row[tile.metric] for row in run.metrics if tile.metric in row]
    before, after = run.summary.get(tile.before), run.summary.get(tile.after)
    if after is None and values:
        after = values[-1]
        before = values[0] if len(values) > 1 and tile.before else None
    if after is None:
        return ""
    start = f"<em>{tile.format.format(before)} → </em>" if before is not None else ""
    return _tile(tile.label, start + tile.format.format(after), tile.note)


def _tile(label: str, value: str, note: str = "") -> str:
    """`value` is HTML."""
    return f'<div class="tile"><span>{label}</span><b>{value}</b><small>{note}</small></div>'


def _steps(run: RunRecord) -> str:
    done = run.summary.get("steps", run.metrics[-1]["step"] if run.metrics else 0)
    planned = run.status.get("num_steps")
    more = f"<em> / {escaped(str(planned))}</em>" if planned else ""
    return escaped(str(done)) + more


def _elapsed(run: RunRecord) -> str:
    times = [row["time"] for row in [*run.events, *run.metrics] if "time" in row]
    return duration(max(times) - min(times)) if times else "-"


def _curves(run: RunRecord) -> Iterator[str]:
    shown = {"step", "time", *BANDS.values()}
    for section, wanted in SECTIONS.items():
        figures = "".join(_figure(run, title, names) for title, names in wanted.items())
        shown.update(name for names in wanted.values() for name in names)
        if figures:
            yield f'<h2>{section}</h2><div class="charts">{figures}</div>'
    others = dict.fromkeys(name for row in run.metrics for name in row if name not in shown)
    if figures := "".join(_figure(run, name, (name,)) for name in others):
        yield (
            '<details class="card"><summary>Other metrics</summary>'
            f'<div class="charts pad">{figures}</div></details>'
        )


def _figure(run: RunRecord, title: str, names: tuple[str, ...]) -> str:
    series = [Series(name, points) for name in names if (points := _points(run, name))]
    if not series:
        return ""
    note = "; ".join(_description(one.label) for one in series)
    return charts.line_chart(title, note, series)


def _points(run: RunRecord, name: str) -> list[charts.Point]:
    columns = [name, BANDS[name]] if name in BANDS else [name]
    if name.startswith("evaluation/"):  # the first one comes before any step: it is an event only
        figure = name.removeprefix("evaluation/")
        found = [e for e in run.events if e.get("event") == "evaluation" and figure in e]
        if found:
            return [(event["step"], event[figure]) for event in found]
    return [
        (row["step"], *(row[column] for column in columns))
        for row in run.metrics
        if all(column in row for column in columns)
    ]


def _description(name: str) -> str:
    try:
        return metric(name).description
    except ValueError:
        return "written by another version of raylign"


def _held_out(evaluations: list[Evaluation]) -> str:
    groups = [
        (label, scores)
        for label, rows in evaluations
        if (scores := [row["judge_score"] for row in rows if row["judge_score"] is not None])
    ]
    if not groups:
        return ""
    note = f"share of completions by judge score, {len(groups[0][1])} held-out samples"
    picture = charts.histogram("Judge score", note, groups)
    table = _table(
        ("", "samples", "judge", "reward score", "KL to reference", "finished"),
        [(label, len(rows), *_averages(rows)) for label, rows in evaluations],
    )
    sides = f'{picture}<div class="card scroll">{table}</div>'
    return f'<h2>Held-out comparison</h2><div class="two">{sides}</div>'


def _averages(rows: list[dict[str, Any]]) -> Iterator[str]:
    for column in ("judge_score", "reward_score", "kl_to_ref"):
        values = [row[column] for row in rows if row[column] is not None]
        yield number(math.fsum(values) / len(values)) if values else "-"
    yield f"{sum(row['finish_reason'] == 'stop' for row in rows) / len(rows):.0%}"


def _samples(run: RunRecord, evaluations: list[Evaluation]) -> str:
    samples = run.summary.get("samples")
    if not samples and len(evaluations) == 2:
        (_, before), (_, after) = evaluations
        samples = changed_samples(before, after, FEW_SAMPLES)
    cards = "".join(_sample(i, sample) for i, sample in enumerate((samples or [])[:MAX_SAMPLES], 1))
    return f"<h2>Completions before and after</h2>{cards}" if cards else ""


def _sample(index: int, sample: Mapping[str, Any]) -> str:
    sides = []
    for side in ("before", "after"):
        judge = sample.get(f"judge_{side}")
        score = f"<b>judge {number(judge)}</b>" if judge is not None else ""
        text = escaped(str(sample.get(side, ""))) or '<span class="none">(empty)</span>'
        sides.append(f'<div><h4>{side}{score}</h4><div class="text">{text}</div></div>')
    prompt = escaped(str(sample.get("prompt", "")))
    return (
        f'<article class="card sample"><h3>Prompt {index}</h3>'
        f'<div class="prompt text">{prompt}</div><div class="pair">{"".join(sides)}</div></article>'
    )


def _timing(run: RunRecord) -> str:
    """Seconds by role, from the summary; without it the parts of the steps so far."""
    timing = run.summary.get("timing") or {
        name.removeprefix("time/").removesuffix("_s").replace("_", " "): math.fsum(values)
        for name in METRICS
        if name.startswith("time/") and name != "time/step_s"
        if (values := [row[name] for row in run.metrics if name in row])
    }
    bars = {"the command": timing, **run.summary.get("roles", {})}
    colors = {name: i for i, name in enumerate(dict.fromkeys(chain(*bars.values())))}
    drawn = [
        f"<h3>{escaped(title)}</h3>{charts.stacked_bar(parts, colors)}"
        for title, seconds in bars.items()
        if (parts := [(name, spent) for name, spent in seconds.items() if spent > 0])
    ]
    if not drawn:
        return ""
    note = (
        "The command's bar: what its loop was at. Each role's bar: from the first prompt to the end, what "
        "it did and what it waited for."
    )
    return f'<h2>Time</h2><div class="card pad">{"".join(drawn)}<p class="none">{note}</p></div>'


def _happened(run: RunRecord) -> str:
    if not run.events and not run.dropped:
        return ""
    told = [event for event in run.events if event.get("event") not in ROUTINE][-MAX_ROWS:]
    pushes = len([event for event in run.events if event.get("event") in ROUTINE])
    rows = [(event_text(event) + "  ").split(" ", 2) for event in told]
    events = _table(("time", "event", "details"), rows, [row[1] for row in rows])
    drops = [
        (d.get("reason"), d.get("prompt_id"), d.get("epoch"), d.get("sample_index"))
        for d in run.dropped[:MAX_ROWS]
    ]
    reasons = dropped.in_words(run.dropped) or "none"
    table = _table(("reason", "prompt", "epoch", "sample"), drops) if drops else ""
    return (
        f'<h2>Events</h2><div class="two"><div class="card scroll">{events}'
        f'<p class="pad none">and {pushes} weight sets published</p></div>'
        f'<div class="card scroll"><p class="pad"><b>Dropped samples:</b> {escaped(reasons)}</p>'
        f"{table}</div></div>"
    )


def _table(
    head: Iterable[str], rows: Iterable[Iterable[Any]], styles: list[str] | None = None
) -> str:
    titles = "".join(f"<th>{escaped(title)}</th>" for title in head)
    body = ""
    for i, row in enumerate(rows):
        style = f' class="{escaped(styles[i])}"' if styles else ""
        cells = "".join(f"<td>{escaped('-' if x is None else str(x))}</td>" for x in row)
        body += f"<tr{style}>{cells}</tr>"
    return f"<table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table>"


def _details(title: str, text: str) -> str:
    if not text:
        return ""
    return f'<details class="card"><summary>{title}</summary><pre>{escaped(text)}</pre></details>'
