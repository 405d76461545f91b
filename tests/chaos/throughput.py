"""What is left of a run's speed when one of its two generators is killed every 30 seconds.

In a run that the generators limit: long completions, few seats, little to learn from them. The share of
time in which they decode is shown beside it. The time in which a new engine starts is in the measure.
"""

from __future__ import annotations

import random
import signal
import statistics
import time

import pyarrow.parquet as pq

from tests.chaos import roles
from tests.chaos.faults import KILL, Events, Fault, Hang, actors, end, strike
from tests.integration.runs import Workshop, wait_until

EVERY_S, QUIET_S, KILLS = 30.0, 45.0, 4
STALENESS = 2
GENERATORS = {
    "count": 2,
    "max_model_len": 224,
    "max_num_seqs": 4,
    "kv_cache_bytes": 1 << 25,
    "max_restarts": 1000,
    "rollout_timeout_s": 60.0,
}
LITTLE = {"anchor": "behavior", "advantage": "reinforce++", "epochs": 1, "minibatches": 1}


def run(shop: Workshop, rng: random.Random) -> tuple[list[Fault], dict[str, float]]:
    """Samples generated a second with the kills, as a share of those undisturbed, in one run."""
    name = "chaos-throughput"
    config = roles.config(
        shop,
        name,
        batch_size=16,
        sampling={"max_tokens": 192},
        generators=GENERATORS,
        learner={"ranks": 1, "timeout_s": 120},
        ppo=LITTLE,
        checkpoint={"every": 100, "keep": 1},
    )
    log = shop.folder / f"{name}.log"
    process = shop.start("train", str(config), log=log)
    events = Events(shop.runs / name)
    killed: list[float] = []
    try:
        wait_until(lambda: len(shop.metrics(name)) >= 5 or process.poll() is not None, "steps")
        begin = time.time()
        time.sleep(QUIET_S)
        middle = time.time()
        for _ in range(KILLS):
            if process.poll() is not None:
                raise Hang(log.read_text()[-3000:])
            killed.append(strike(rng.choice(actors(process, "RolloutRole")), KILL))
            time.sleep(EVERY_S)
        stop = time.time()
        # What was sampled until now is trained by then, and so in the files.
        at = len(shop.metrics(name)) + STALENESS + 2
        wait_until(lambda: len(shop.metrics(name)) >= at or process.poll() is not None, "steps")
        process.send_signal(signal.SIGTERM)
        process.wait(roles.BACK_S)
    finally:
        end(process)
    faults = [_fault(events, at) for at in killed]
    return faults, _figures(shop, name, (begin, middle), (middle, stop))


def _fault(events: Events, at: float) -> Fault:
    lost, back = (
        events.wait(name, at, 1.0, lambda: True)["time"]
        for name in ("generator_lost", "generator_replaced")
    )
    return Fault("generator killed, every 30 s", lost - at, back - at)


def _figures(
    shop: Workshop, name: str, quiet: tuple[float, float], killed: tuple[float, float]
) -> dict[str, float]:
    files = sorted((shop.runs / name / "trajectories").glob("step-*.parquet"))
    made = [at for file in files for at in pq.read_table(file)["generated_at"].to_pylist()]
    a_second = [
        sum(start <= at < stop for at in made) / (stop - start) for start, stop in (quiet, killed)
    ]
    busy = statistics.mean(
        row["rollout/generator_busy_share"]
        for row in shop.metrics(name)
        if quiet[0] <= row["time"] < quiet[1]
    )
    print(
        f"samples a second: {a_second[0]:.2f} undisturbed (generators decode {busy:.0%} of the time), "
        f"{a_second[1]:.2f} with a kill every {EVERY_S:g} s"
    )
    kept = a_second[1] / a_second[0]
    return {"throughput_kept": round(kept, 3), "undisturbed_busy_share": round(busy, 3)}
