"""The end of a run: summary.json, the report, and what is printed before and after side by side."""

from __future__ import annotations

import time
from typing import Any

from cluster import json_lines
from cluster.held_out import changed_samples
from cluster.report import write_report
from cluster.run import Run
from cluster.versions import versions


async def finish(run: Run) -> None:
    """Write summary and report, print the comparison."""
    status = "finished" if run.step == run.config.num_steps else "stopped"
    statuses = (await run.supervisor.statuses()).values()
    first_tokens = [s["first_token_at"] for s in statuses if s["first_token_at"]]
    summary = {
        "name": run.config.name,
        "stage": "train",
        "status": status,
        "seed": run.config.seed,
        "steps": run.step,
        "wall_s": round(time.time() - run.started, 1),
        "first_token_s": round(min(first_tokens) - run.started, 1) if first_tokens else None,
        "timing": {role: round(seconds, 2) for role, seconds in run.meter.seconds.items()},
        "roles": await run.meter.times(),
        "versions": versions(),
        **_held_out(run),
    }
    run.files.summary(summary)
    run.files.event("run_finished", status=status, step=run.step)
    run.files.status(status, step=run.step, num_steps=run.config.num_steps)
    report = write_report(run.files.folder)
    for line in comparison_lines(summary):
        run.view.note(line)
    run.view.note(f"{status} after {run.step} steps in {summary['wall_s']} s; report: {report}")


def _held_out(run: Run) -> dict[str, Any]:
    """The last held-out evaluation beside the first; empty without one."""
    if run.evaluation is None or not run.evaluations:
        return {}
    figures = {event["step"]: event for event in _evaluation_events(run)}
    first, last = figures[min(figures)], figures[max(figures)]
    before, after = run.evaluation.read(first["step"]), run.evaluation.read(last["step"])
    return {
        "win_rate_before": first["win_rate"],
        "win_rate": last["win_rate"],
        "judge_before": first["judge_mean"],
        "judge_after": last["judge_mean"],
        "score_before": first["reward_mean"],
        "score_after": last["reward_mean"],
        "kl_to_ref": last.get("kl_to_ref"),
        "kl_to_ref_before": first.get("kl_to_ref"),
        "samples": changed_samples(
            before.to_pylist(),
            after.to_pylist(),
            run.config.evaluation.show if run.config.evaluation else 0,
        ),
    }


def _evaluation_events(run: Run) -> list[dict[str, Any]]:
    events = json_lines.read(run.files.folder / "events.jsonl")
    return [event for event in events if event["event"] == "evaluation"]


def comparison_lines(summary: dict[str, Any]) -> list[str]:
    """The held-out comparison for the terminal; none without an evaluation."""
    if "win_rate" not in summary:
        return []
    rows = [
        ("win-rate against the start", summary["win_rate_before"], summary["win_rate"]),
        ("judge's mean score", summary["judge_before"], summary["judge_after"]),
        ("reward score", summary["score_before"], summary["score_after"]),
        ("KL to the reference, nats", summary["kl_to_ref_before"], summary["kl_to_ref"]),
    ]
    lines = ["", f"{'held-out prompts':30}{'before':>10}{'after':>10}"]
    for label, before, after in rows:
        if before is not None:
            lines.append(f"{label:30}{before:>10.3f}{after:>10.3f}")
    for sample in summary["samples"]:
        lines += [
            "",
            f"  prompt  {_one_line(sample['prompt'])}",
            f"  before  {_one_line(sample['before'])}   [judge {sample['judge_before']:g}]",
            f"  after   {_one_line(sample['after'])}   [judge {sample['judge_after']:g}]",
        ]
    return [*lines, ""]


def _one_line(text: str) -> str:
    return " ".join(text.split())
