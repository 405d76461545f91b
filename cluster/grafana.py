"""Grafana's dashboard: the report's charts over time, of every run that Prometheus knows.

`python -m cluster.grafana` writes it to deploy/grafana.json, which people import.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cluster.metrics import METRICS, gauge_name
from cluster.report_layout import SECTIONS

FILE = Path(__file__).with_name("deploy") / "grafana.json"
COLUMNS, WIDTH, HEIGHT = 3, 8, 7  # of Grafana's 24 columns
OF_A_RUN = ("time", "rollout", "reward", "staleness", "learner", "weights", "evaluation")
SOURCE = {"type": "prometheus", "uid": "${source}"}


def dashboard() -> dict[str, Any]:
    panels: list[dict[str, Any]] = []
    bottom = 0
    for section, charts in SECTIONS.items():
        drawn = {title: [*filter(_is_of_a_run, metrics)] for title, metrics in charts.items()}
        drawn = {title: metrics for title, metrics in drawn.items() if metrics}
        panels.append(_at(0, bottom, 24, 1, type="row", title=section, collapsed=False, panels=[]))
        for number, (title, metrics) in enumerate(drawn.items()):
            row, column = divmod(number, COLUMNS)
            panels.append(
                _at(
                    column * WIDTH, bottom + 1 + row * HEIGHT, WIDTH, HEIGHT,
                    type="timeseries",
                    title=title,
                    description="; ".join(METRICS[name].description for name in metrics),
                    datasource=SOURCE,
                    targets=[*map(_target, metrics, "ABC")],
                    fieldConfig={"defaults": {"custom": {"spanNulls": True}}, "overrides": []},
                )
            )  # fmt: skip
        bottom += 1 + HEIGHT * -(-len(drawn) // COLUMNS)
    for number, panel in enumerate(panels, 1):
        panel["id"] = number
    return {
        "title": "raylign",
        "uid": "raylign",
        "schemaVersion": 39,
        "refresh": "10s",
        "time": {"from": "now-3h", "to": "now"},
        "templating": {"list": [_source(), _runs()]},
        "panels": panels,
    }


def _is_of_a_run(name: str) -> bool:
    """The stages before PPO export nothing."""
    return name.split("/")[0] in OF_A_RUN


def _target(name: str, letter: str) -> dict[str, Any]:
    return {
        "refId": letter,
        "datasource": SOURCE,
        "expr": f'ray_{gauge_name(name)}{{run=~"$run"}}',
        "legendFormat": f"{{{{run}}}} {name}",
    }


def _at(x: int, y: int, width: int, height: int, **panel: Any) -> dict[str, Any]:
    return {"gridPos": {"x": x, "y": y, "w": width, "h": height}, **panel}


def _source() -> dict[str, Any]:
    return {"name": "source", "label": "Prometheus", "type": "datasource", "query": "prometheus"}


def _runs() -> dict[str, Any]:
    """The names of the runs, all of them at first."""
    query = f"label_values(ray_{gauge_name('time/step_s')}, run)"
    return {
        "name": "run", "label": "run", "type": "query", "datasource": SOURCE,
        "query": {"query": query, "refId": "runs"}, "definition": query,
        "refresh": 2, "multi": True, "includeAll": True,
        "current": {"text": ["All"], "value": ["$__all"]},
    }  # fmt: skip


def main() -> None:
    FILE.write_text(json.dumps(dashboard(), indent=1) + "\n")


if __name__ == "__main__":
    main()
