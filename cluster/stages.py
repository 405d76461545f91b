"""The two stages before PPO: `raylign sft` and `raylign reward-model`."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from cluster.config import BadInput, RewardRunConfig, SFTRunConfig, StageConfig
from cluster.gpus import check_gpus, gpu_bytes
from cluster.hosting import hosting
from cluster.learner_group import meet, met_at
from cluster.live_view import LiveView
from cluster.metrics import reduce_ranks
from cluster.metrics_writer import MetricsWriter
from cluster.model_folder import check_longest, model_config, policy_config
from cluster.placement import Host, Member, ask
from cluster.report import write_report
from cluster.run_files import RunFiles
from cluster.run_lock import one_driver
from cluster.versions import versions
from learner.supervised_rows import load_supervised
from reward_service.fast_import import fast_import
from reward_service.pairs import read_pairs, read_reference
from reward_service.tokenizer import load_tokenizer


def run_sft(config: SFTRunConfig, *, in_process: bool, overwrite: bool) -> Path:
    """Train, write runs/<name>/model, report. Returns the model's folder."""
    with one_driver(config.run_dir), hosting(config, in_process=in_process) as open_host:
        files = RunFiles(config)
        files.check(resume=False, overwrite=overwrite)
        _check_sft(config, in_process=in_process)
        host = open_host()
        ranks = config.learner.ranks if config.device == "cuda" else 0
        check_gpus({"learner.ranks": ranks}, host.num_gpus)
        files.create(overwrite=overwrite)
        return asyncio.run(_sft(config, files, host))


def _check_sft(config: SFTRunConfig, *, in_process: bool) -> None:
    try:
        policy_config(config.model, "model")
        check_longest(config.model, "model", "sft.max_tokens", config.sft.max_tokens)
        tokenizer, sft = load_tokenizer(config.model), config.sft
        for path in filter(None, (sft.data, sft.held_out_data)):
            load_supervised(path, tokenizer, sft.max_tokens)
    except ValueError as error:
        raise BadInput(str(error)) from None
    if in_process and config.learner.ranks > 1:
        raise BadInput("learner.ranks: --in-process is one rank; set learner.ranks=1")


async def _sft(config: SFTRunConfig, files: RunFiles, host: Host) -> Path:
    from learner.learner_spec import LEARNER_ENV
    from learner.sft import SFTSpec, SFTWorker

    started = time.time()
    paths = {"data": config.sft.data, "held_out_data": config.sft.held_out_data}
    resolved = {key: str(Path(path).resolve()) for key, path in paths.items() if path is not None}
    spec = SFTSpec(
        str(Path(config.model).resolve()),
        config.sft.model_copy(update=resolved),
        config.learner,
        config.num_steps,
        config.seed,
    )
    gpus = 1 if config.device == "cuda" else 0
    ranks: list[Member] = []
    out = files.folder / "model"
    timeout = config.learner.timeout_s

    async def everyone(method: Any, *args: Any) -> list[Any]:
        return await asyncio.gather(
            *(ask(rank, method(rank.handle), *args, within=timeout) for rank in ranks)
        )

    metrics: dict[str, float] = {}
    with _Progress(config, files) as progress:
        try:
            for rank in range(config.learner.ranks):
                name = f"sft-{rank}"
                ranks.append(host.start(name, SFTWorker, spec, rank, env=LEARNER_ENV, gpus=gpus))
            rendezvous = await meet(ranks, host, files.folder, timeout)
            with met_at(rendezvous):
                await everyone(lambda it: it.start, rendezvous)
            for step in range(1, config.num_steps + 1):
                metrics = reduce_ranks(await everyone(lambda it: it.train, step))
                if config.sft.held_out_data is not None and _tells(step, config.num_steps, 10):
                    metrics |= reduce_ranks(await everyone(lambda it: it.held_out))
                progress.step(step, config.num_steps, metrics)
            await everyone(lambda it: it.write, str(out.resolve()))
        finally:
            await host.stop(ranks)
        held_out = metrics.get("sft/held_out_loss")
        figures = {"steps": config.num_steps, "loss": metrics["sft/loss"]}
        figures |= {"held_out_loss": held_out} if held_out is not None else {}
        progress.finish(figures, started, out)
    return out


def run_reward_model(config: RewardRunConfig, *, overwrite: bool) -> Path:
    """Train on preference pairs, write runs/<name>/model, report. Returns the model's folder."""
    with one_driver(config.run_dir):
        return _reward_model(config, overwrite=overwrite)


def _reward_model(config: RewardRunConfig, *, overwrite: bool) -> Path:
    files = RunFiles(config)
    files.check(resume=False, overwrite=overwrite)
    try:
        model_config(config.model, "model")
        _read_pairs(config)
    except ValueError as error:
        raise BadInput(str(error)) from None
    if config.device == "cuda" and not gpu_bytes():
        raise BadInput("device: cuda: torch sees no GPU on this machine; set device=cpu")
    files.create(overwrite=overwrite)
    started, out = time.time(), files.folder / "model"
    with fast_import():
        from reward_service.reward_training import train

    with _Progress(config, files) as progress:

        def on_step(step: int, num_steps: int, metrics: dict[str, float]) -> None:
            named = {f"reward_model/{name}": value for name, value in metrics.items()}
            progress.step(step, num_steps, named)

        try:
            figures = train(
                config.training,
                model=config.model,
                out=out,
                seed=config.seed,
                device=config.device,
                progress=on_step,
            )
        except ValueError as error:
            raise BadInput(str(error)) from None
        progress.finish(figures, started, out)
    return out


def _read_pairs(config: RewardRunConfig) -> None:
    """Read all that training will read, so that what it would refuse is refused now."""
    training, tokenizer = config.training, load_tokenizer(config.model)
    for path in filter(None, (training.pairs, training.held_out_pairs)):
        read_pairs(path, tokenizer, training.max_tokens)
    if training.normalise_on is not None:
        read_reference(training.normalise_on, tokenizer, training.max_tokens)


def _tells(step: int, num_steps: int, times: int) -> bool:
    """Whether it is one of about so many steps, the last among them."""
    return step % max(1, num_steps // times) == 0 or step == num_steps


class _Progress:
    """Live view, metrics, status and summary of a stage; the view opens with the first step."""

    def __init__(self, config: StageConfig, files: RunFiles) -> None:
        self._config = config
        self._files = files
        self._view: LiveView | None = None
        self._metrics = MetricsWriter(files.folder)
        self._step, self._num_steps = 0, 0
        self._open = ExitStack()
        self._stopped_by: signal.Signals | None = None

    def __enter__(self) -> _Progress:
        print(f"{self._config.name}: loading the model", flush=True)
        self._files.status("starting", step=0, num_steps=0)
        self._open.enter_context(self._files.beating())
        for number in (signal.SIGTERM, signal.SIGINT):
            # After ray.init, whose own would make the signal's number the exit code.
            self._open.callback(signal.signal, number, signal.signal(number, self._stop))
        return self

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._stopped_by = signal.Signals(number)
        raise SystemExit(128 + number)

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._open.close()
        if self._stopped_by is not None:  # `error` may be that of a task that it cancelled
            self._say("stopped")
            print(
                f"{self._config.name}: stopped by {self._stopped_by.name} after {self._step} steps",
                file=sys.stderr,
            )
        elif error is not None:
            self._say("failed", error=str(error) or type(error).__name__)
        self._metrics.close()
        if self._view is not None:
            self._view.close()

    def _say(self, state: str, **facts: Any) -> None:
        with suppress(OSError):  # or a full disk would hide what failed
            self._files.status(state, step=self._step, num_steps=self._num_steps, **facts)

    def step(self, step: int, num_steps: int, metrics: dict[str, float]) -> None:
        """Write every step, show about twenty of them."""
        self._step, self._num_steps = step, num_steps
        if self._view is None:
            self._view = LiveView(self._config.name, num_steps).__enter__()
            self._view.stage("training")
        row = self._metrics.write(step, metrics)
        if _tells(step, num_steps, 20):
            self._view.step(row)
            self._files.status("running", step=step, num_steps=num_steps)

    def finish(self, figures: dict[str, Any], started: float, out: Path) -> None:
        wall_s = round(time.time() - started, 1)
        base = {"name": self._config.name, "stage": self._config.stage, "status": "finished"}
        self._files.summary(
            {**base, "seed": self._config.seed, "wall_s": wall_s, "versions": versions(), **figures}
        )
        self._files.status("finished", step=self._num_steps, num_steps=self._num_steps)
        report = write_report(self._files.folder)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
        if self._view is not None:
            self._view.note(f"{shown}; {wall_s} s; model: {out}; report: {report}")
