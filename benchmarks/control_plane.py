"""What the driver costs: 1 to 512 generators that are stand-ins, everything else real.

    python -m benchmarks.control_plane [--quick] [--samples 1000000]
    python -m benchmarks.control_plane --record RUN      take new latencies from a run's trajectories

The loop, supervisor, ledger, buffer, metrics and Ray calls are raylign's own. A stand-in has 64 seats
and "samples" completions that a real run recorded (recorded_rollouts.parquet), in the time that they
took there, stretched so that each stand-in makes 16 a second; they are spread over two Ray actors,
since 512 processes would not fit here. The learner is a stand-in too: it reads every trajectory and
trains nothing. The driver is bound to one core. One prompt is one sample, the dearest case. The bound on
staleness is 3: with 2 it is the bound that lets seats wait for the longest completions of a batch, however
little the driver costs. The first steps are not counted: they fill the seats and what waits behind them.

samples_per_s: the largest rate reached; linear_until: the largest rate that is within 10 % of the
count times the rate of one stand-in.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from actors.prompts import PromptStream
from actors.rollout_worker import Rollouts
from actors.trajectory import Key, Prompt, packed, select
from actors.weight_update import Probe, ProbeAnswer, WeightLayout, WeightUpdate
from benchmarks import work
from cluster.config import RunConfig
from cluster.config_file import load_config
from cluster.learner_group import LearnerGroup
from cluster.ledger import Ledger
from cluster.live_view import LiveView
from cluster.metrics_writer import MetricsWriter
from cluster.placement import Member
from cluster.ray_host import RayHost
from cluster.run import Run
from cluster.run_files import RunFiles
from cluster.supervisor import Supervisor
from cluster.train import train
from learner.rollout_metrics import rollout_metrics

RECORDED = Path(__file__).with_name("recorded_rollouts.parquet")
COUNTS = (1, 8, 64, 256, 384, 512)
SEATS, SAMPLES_PER_S, STALENESS, PROMPT_TOKENS = 64, 16.0, 3, 64
WARM_UP, MEASURED = 2 * (STALENESS + 1), 12  # steps
LAYOUT = WeightLayout.of([("w", (16,))], "float32")


class StandIn:
    """One generator with its rollout worker, by their outside."""

    def __init__(self, recorded: pa.Table, seed: int) -> None:
        self._recorded = recorded
        latencies = recorded["generate_s"].to_numpy().astype(float)
        self._latencies = (latencies / latencies.mean() * SEATS / SAMPLES_PER_S).tolist()
        # Each in turn, in an order of its own: the mean of a short run is that of a long one.
        rows = list(range(len(self._latencies)))
        random.Random(seed).shuffle(rows)
        self._rows = itertools.cycle(rows)
        self._seats = [0.0] * SEATS  # until when each is taken
        self._out: list[tuple[float, str, int, int]] = []  # finished at, prompt, epoch, row
        self._version = 0
        self._more = asyncio.Event()

    def submit(self, prompts: list[Prompt]) -> None:
        now = time.time()
        for prompt in prompts:
            row = next(self._rows)
            ends = max(now, self._seats[0]) + self._latencies[row]
            heapq.heapreplace(self._seats, ends)
            heapq.heappush(self._out, (ends, prompt.prompt_id, prompt.epoch, row))
        self._more.set()

    async def take(self, timeout_s: float, linger_s: float) -> tuple[Rollouts, pa.Buffer | None]:
        deadline = time.time() + timeout_s
        while not self._out or self._out[0][0] > time.time():
            left = deadline - time.time()
            if left <= 0:
                return Rollouts(), None
            self._more.clear()
            until = min(left, self._out[0][0] - time.time()) if self._out else left
            try:
                await asyncio.wait_for(self._more.wait(), max(until, 0.0))
            except TimeoutError:
                continue
        await asyncio.sleep(linger_s)
        now, done = time.time(), []
        while self._out and self._out[0][0] <= now:
            done.append(heapq.heappop(self._out))
        keys = [(name, epoch) for _, name, epoch, _ in done]
        return Rollouts(keys), self._chunk([row for *_, row in done], keys)

    def _chunk(self, rows: list[int], keys: list[Key]) -> pa.Buffer:
        table = self._recorded.take(rows)
        version = np.full(len(rows), self._version)
        for name, values in (
            ("prompt_id", [name for name, _ in keys]),
            ("epoch", [epoch for _, epoch in keys]),
            ("policy_version", version),
            ("policy_version_max", version),
        ):
            place = table.schema.get_field_index(name)
            spec = table.schema.field(place)
            table = table.set_column(place, spec, pa.array(values, spec.type))
        return packed(table)

    def receive_weights(self, update: WeightUpdate) -> dict[str, float]:
        self._version = update.version
        return {"push_s": 0.0, "probe_difference": 0.0}

    def receive_answer(self, answer: ProbeAnswer) -> None:
        return

    def status(self) -> dict[str, Any]:
        return {"running": SEATS, "waiting": len(self._out), "busy_s": 0.0, "weights_s": 0.0,
                "completion_tokens": 0, "scoring": 0}  # fmt: skip


class StandIns:
    """Many of them in one actor."""

    def __init__(self, recorded: pa.Table, places: list[int]) -> None:
        self._recorded = recorded
        self._them = {place: StandIn(recorded, place) for place in places}

    async def submit(self, place: int, prompts: list[Prompt]) -> None:
        self._them[place].submit(prompts)

    async def take(self, place: int, timeout_s: float, linger_s: float) -> Any:
        return await self._them[place].take(timeout_s, linger_s)

    async def receive_weights(self, place: int, update: WeightUpdate) -> dict[str, float]:
        return self._them[place].receive_weights(update)

    async def receive_answer(self, place: int, answer: ProbeAnswer) -> None:
        return self._them[place].receive_answer(answer)

    async def status(self, place: int) -> dict[str, Any]:
        return self._them[place].status()

    async def agree_layout(self, place: int, layout: WeightLayout) -> str:
        """The start of a run: what the last one left behind is forgotten."""
        self._them[place] = StandIn(self._recorded, place)
        return layout.id


CALLS = ("submit", "take", "receive_weights", "receive_answer", "status", "agree_layout")


class Handle:
    """One of the stand-ins, reached as if it were an actor of its own."""

    def __init__(self, actor: Any, place: int) -> None:
        for name in CALLS:
            setattr(self, name, Method(getattr(actor, name), place))
        self.__ray_call__ = actor.__ray_call__  # by which the host learns where it runs


class Method:
    def __init__(self, method: Any, place: int) -> None:
        self._method, self._place = method, place
        self._method_name = getattr(method, "_method_name", "call")

    def remote(self, *args: Any) -> Any:
        return self._method.remote(self._place, *args)

    def options(self, **options: Any) -> Method:
        return Method(self._method.options(**options), self._place)


class StandInLearner:
    """Reads the batch, as a rank would; a version is a number."""

    def update(
        self, step: int, version: int, folder: str, keys: list[Key], *chunks: pa.Buffer
    ) -> dict[str, float]:
        return rollout_metrics(select(chunks, keys), version) | {"learner/kl_to_ref": 0.0}

    def stats(self) -> dict[str, float]:
        return {"reward/busy_s": 0.0}

    def publish(self, version: int) -> WeightUpdate:
        return WeightUpdate(version, LAYOUT.id, ("",), Probe((1, 2), (3, 4)))

    def answer_probe(self, version: int) -> ProbeAnswer:
        return ProbeAnswer(version, ("",), (-0.5,))

    def save_trajectories(self, path: str, keys: list[Key], *chunks: pa.Buffer) -> None:
        pq.write_table(select(chunks, keys), path)

    def save(self, folder: str) -> None:
        Path(folder).mkdir()

    def saved(self) -> bool:
        return True


class Bench:
    """One Ray, two actors of stand-ins, one stand-in learner; a run for each count."""

    def __init__(self, folder: Path, most: int) -> None:
        self._folder = folder
        self._host = RayHost(None, "control-plane")
        recorded = self._host.share(pq.read_table(RECORDED))
        self._actors = [
            self._host.start(f"stand-ins-{i}", StandIns, recorded, [*range(i, most, 2)], env={})
            for i in range(2)
        ]
        self._learner = self._host.start("learner-0", StandInLearner, env={})
        self._prompts = [
            Prompt(f"p{i}", 0, text, tuple(range(PROMPT_TOKENS)))
            for i, text in enumerate(work.prompts(20000, PROMPT_TOKENS))
        ]
        _bind_to_one_core()

    def run(self, count: int, steps: int) -> dict[str, float]:
        """Rates over all steps but the first WARM_UP."""
        size = count * SEATS
        marks: list[tuple[float, float, float]] = []
        run = self._made(count, size, steps, marks)
        asyncio.run(_train(run))
        (start, cpu, _), (end, cpu_end, _) = marks[WARM_UP - 1], marks[-1]
        samples = size * (len(marks) - WARM_UP)
        memory = [rss for *_, rss in marks]
        return {
            "samples_per_s": samples / (end - start),
            "driver_us": (cpu_end - cpu) / samples * 1e6,
            "driver_cores": (cpu_end - cpu) / (end - start),
            # Of the last tenth over the first tenth after a warm-up: does it grow?
            "memory_growth": _mean(memory[-len(memory) // 10 :])
            / _mean(memory[len(memory) // 10 :][: max(1, len(memory) // 10)]),
            "memory": memory[-1],
        }

    def _made(self, count: int, size: int, steps: int, marks: list[Any]) -> Run:
        changes = {
            "num_steps": steps,
            "batch_size": size,
            "max_staleness": STALENESS,
            "generators.count": count,
        }
        path = self._folder / "config.yaml"
        tree = work.config(self._folder, f"control-plane-{count}", Path("policy"), **changes)
        path.write_text(yaml.safe_dump(tree))
        config = load_config(path, [], RunConfig)
        files = RunFiles(config)
        files.create(overwrite=True)
        members = [
            Member(f"generator-{i}", Handle(self._actors[i % 2].handle, i)) for i in range(count)
        ]
        for member in members:
            self._host.locate(member)
        supervisor = Supervisor(
            members,
            self._host,
            PromptStream(self._prompts, seed=0, shuffle=True),
            Ledger(prompts_per_step=size, max_staleness=STALENESS),
            rollout_timeout_s=60.0,
            on_drop=lambda dropped: None,
        )
        return Run(
            config=config,
            host=self._host,
            files=files,
            metrics=Marking(files.folder, marks),
            view=LiveView(config.name, steps),
            supervisor=supervisor,
            learner=LearnerGroup([self._learner], self._host, timeout_s=60.0),
            rewards=self._learner,
            evaluation=None,
            prompts=self._prompts,
            started=time.time(),
        )

    def close(self) -> None:
        self._host.close()


class Marking(MetricsWriter):
    """Notes time, CPU and memory of the driver whenever a step is logged."""

    def __init__(self, folder: Path, marks: list[tuple[float, float, float]]) -> None:
        super().__init__(folder)
        self._marks = marks

    def write(self, step: int, metrics: Any) -> Any:
        process = psutil.Process()
        self._marks.append((time.time(), sum(process.cpu_times()[:2]), process.memory_info().rss))
        return super().write(step, metrics)


async def _train(run: Run) -> None:
    await run.supervisor.group.agree_layout(LAYOUT)
    await run.publish(0)
    await run.wait_push()
    await train(run)
    await run.supervisor.close()
    run.metrics.close()


def _bind_to_one_core() -> None:
    """Every thread of this process, Ray's too; what it started before keeps all cores."""
    core = min(os.sched_getaffinity(0))
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), {core})


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def record(run: Path) -> None:
    """128 trajectories of a real run, evenly from its last steps."""
    files = sorted((run / "trajectories").glob("*.parquet"))[-4:]
    table = pa.concat_tables([pq.read_table(file) for file in files])
    names = pq.read_schema(files[0]).names[: pq.read_schema(files[0]).names.index("score_s") + 1]
    chosen = table.select(names).take(np.linspace(0, len(table) - 1, 128).astype(int))
    pq.write_table(chosen.combine_chunks(), RECORDED, compression="zstd")


def main() -> None:
    parser = work.parser(__doc__)
    parser.add_argument("--samples", type=int, default=1_000_000, help="of the memory's run")
    parser.add_argument("--record", type=Path, help="a run's folder")
    options = parser.parse_args()
    if options.record:
        sys.exit(record(options.record))
    folder = options.folder / "control_plane"
    folder.mkdir(parents=True, exist_ok=True)
    counts = (1, 64, 512) if options.quick else COUNTS
    work.header()
    bench = Bench(folder, max(counts))
    steps = WARM_UP + (4 if options.quick else MEASURED)
    found = {count: bench.run(count, steps) for count in counts}
    samples = 50_000 if options.quick else options.samples
    long = bench.run(256, max(steps, samples // (256 * SEATS)))
    bench.close()
    rate = found[counts[0]]["samples_per_s"]
    work.table(
        ["stand-ins", "samples/s", "of linear", "driver us/sample", "driver cores"],
        [
            [
                str(n),
                f["samples_per_s"],
                f["samples_per_s"] / rate / n,
                f["driver_us"],
                f["driver_cores"],
            ]
            for n, f in found.items()
        ],
    )
    print(
        f"{samples:,} samples on 256: driver's memory x{long['memory_growth']:.3f}, now "
        f"{long['memory'] / 1e6:.0f} MB"
    )
    linear = [f["samples_per_s"] for n, f in found.items() if f["samples_per_s"] >= 0.9 * rate * n]
    work.result(
        samples_per_s=max(f["samples_per_s"] for f in found.values()),
        linear_until=max(linear),
        driver_us_per_sample=found[counts[-1]]["driver_us"],
        memory_growth=long["memory_growth"],
    )


if __name__ == "__main__":
    main()
