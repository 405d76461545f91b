"""What is left of a run's speed when one of its two generators is killed every 30 seconds."""

from __future__ import annotations

import random
import signal
import time

from tests.chaos import roles
from tests.chaos.faults import KILL, Hang, actors, strike
from tests.integration.runs import Workshop, wait_until

EVERY_S, QUIET_S, KILLS = 30.0, 60.0, 5


def run(shop: Workshop, rng: random.Random) -> dict[str, float]:
    """Samples a second, undisturbed and with the kills, in one run."""
    name = "chaos-throughput"
    # Enough tokens that generating is work: else the kills would cost nothing but start-up.
    config = roles.config(shop, name, batch_size=32, sampling={"max_tokens": 40})
    log = shop.folder / f"{name}.log"
    process = shop.start("train", str(config), log=log)
    try:
        wait_until(lambda: len(shop.metrics(name)) >= 5 or process.poll() is not None, "steps")
        begin = time.time()
        time.sleep(QUIET_S)
        middle = time.time()
        for _ in range(KILLS):
            if process.poll() is not None:
                raise Hang(log.read_text()[-3000:])
            strike(rng.choice(actors(process, "RolloutRole")), KILL)
            time.sleep(EVERY_S)
        end = time.time()
        process.send_signal(signal.SIGTERM)
        process.wait(roles.BACK_S)
    finally:
        process.kill()
    times = [row["time"] for row in shop.metrics(name)]
    quiet, killed = (
        sum(start <= at < stop for at in times) / (stop - start)
        for start, stop in ((begin, middle), (middle, end))
    )
    print(f"steps a second: {quiet:.2f} undisturbed, {killed:.2f} with a kill every {EVERY_S:g} s")
    return {"throughput_kept": round(killed / quiet, 3)}
