"""The command line: `raylign ...`, the same as `python -m cluster.cli ...`.

Exit codes: 0 done; 1 an audit found a violation, or a replay another outcome; 2 bad input, said in one
line before any model is loaded; 3 the run failed; 130 or 143 stopped by SIGINT or SIGTERM after a
checkpoint.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.config import BadInput, RewardRunConfig, RunConfig, SFTRunConfig
from cluster.config_file import Stage, load_config

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="PPO alignment of language models on Ray: SFT, a reward model, PPO.",
)

PROGRAM = "raylign"
UsageError: type[Exception] = typer.BadParameter.__mro__[1]  # typer exports only its children

Config = Annotated[Path, typer.Argument(help="YAML file, e.g. examples/support_replies/ppo.yaml")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="key.path=value ..., over the file's values")
]
InProcess = Annotated[
    bool, typer.Option("--in-process", help="Everything in this process: for a debugger.")
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Delete an earlier run of the same name.")
]
Trust = Annotated[
    bool,
    typer.Option("--trust-checkpoint", help="Open a checkpoint of another run; it could run code."),
]
MaxRestarts = Annotated[
    int,
    typer.Option(
        "--max-restarts", min=0, help="If the run fails or is killed, go on from its checkpoint."
    ),
]
RunName = Annotated[str, typer.Argument(help="A run's name, or its folder.")]
RunsDir = Annotated[str, typer.Option("--runs-dir", help="Where runs are.")]


@app.command()
def train(
    config: Config,
    overrides: Overrides = None,
    in_process: InProcess = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint.")
    ] = False,
    overwrite: Overwrite = False,
    trust_checkpoint: Trust = False,
    max_restarts: MaxRestarts = 0,
) -> None:
    """PPO: generate, score, update, publish. Starts a Ray of its own, or joins the job's."""
    loaded = _load(config, overrides, RunConfig)
    if max_restarts:
        from cluster.restarts import heartbeat_deadline_s, run_again

        flags = _flags(
            in_process=in_process,
            resume=resume,
            overwrite=overwrite,
            trust_checkpoint=trust_checkpoint,
        )
        words = [str(config), *(overrides or []), *flags]
        heartbeat_s = heartbeat_deadline_s(loaded.ping_timeout_s)
        sys.exit(
            run_again(words, loaded.run_dir, max_restarts=max_restarts, heartbeat_s=heartbeat_s)
        )
    if in_process:
        _one_process(loaded)
    from cluster.ppo import run_ppo

    sys.exit(
        run_ppo(
            loaded,
            in_process=in_process,
            resume=resume,
            overwrite=overwrite,
            trust_checkpoint=trust_checkpoint,
        )
    )


@app.command()
def sft(
    config: Config,
    overrides: Overrides = None,
    in_process: InProcess = False,
    overwrite: Overwrite = False,
) -> None:
    """Supervised fine-tuning; writes a Hugging Face folder runs/<name>/model."""
    loaded = _load(config, overrides, SFTRunConfig)
    if in_process:
        _one_process(loaded)
    from cluster.stages import run_sft

    run_sft(loaded, in_process=in_process, overwrite=overwrite)


@app.command("reward-model")
def reward_model(config: Config, overrides: Overrides = None, overwrite: Overwrite = False) -> None:
    """Train a reward model on preference pairs; writes runs/<name>/model."""
    loaded = _load(config, overrides, RewardRunConfig)
    from cluster.stages import run_reward_model

    run_reward_model(loaded, overwrite=overwrite)


@app.command()
def submit(
    config: Config,
    overrides: Overrides = None,
    address: Annotated[str, typer.Option(help="The head's dashboard.")] = "http://127.0.0.1:8265",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint.")
    ] = False,
    overwrite: Overwrite = False,
    max_restarts: MaxRestarts = 0,
    trust_checkpoint: Trust = False,
    follow: Annotated[bool, typer.Option(help="Follow the job's log.")] = True,
) -> None:
    """`train` as a Ray job on a cluster, from this working directory."""
    loaded = _load(config, overrides, RunConfig)
    from cluster.submit import submit_job

    flags = _flags(resume=resume, overwrite=overwrite, trust_checkpoint=trust_checkpoint)
    flags += ["--max-restarts", str(max_restarts)] if max_restarts else []
    sys.exit(submit_job(loaded, config, overrides or [], flags, address, follow=follow))


@app.command()
def doctor(config: Config, overrides: Overrides = None) -> None:
    """Check a PPO config, its data, tokenizers and resources without starting anything; print the plan."""
    loaded = _load(config, overrides, RunConfig)
    from cluster.doctor import check_inputs
    from cluster.plan import WARNING, plan, resources, show

    rows = [*plan(loaded, check_inputs(loaded)), resources(loaded)]
    show(rows)
    warned = any(WARNING in text for _, text in rows)
    typer.echo(f"doctor: {'but for the warnings ' if warned else ''}nothing stands in the way")


@app.command()
def status(run: RunName, runs_dir: RunsDir = "runs") -> None:
    """How far a run is, and whether it is alive."""
    from cluster.run_status import status as status_of

    typer.echo(status_of(_run_dir(run, runs_dir)))


@app.command()
def scale(
    run: RunName,
    generators: Annotated[
        int, typer.Option("--generators", min=1, help="How many there shall be.")
    ],
    runs_dir: RunsDir = "runs",
) -> None:
    """Change the number of generators of a run while it goes on."""
    from cluster.scale import ask_to_scale

    typer.echo(ask_to_scale(_run_dir(run, runs_dir), generators))


@app.command()
def audit(run: RunName, runs_dir: RunsDir = "runs") -> None:
    """Prove from the files that every prompt was trained exactly as often as configured."""
    from cluster.audit import audit as audit_of

    result = audit_of(_run_dir(run, runs_dir))
    typer.echo(str(result))
    sys.exit(1 if result.violation else 0)


@app.command()
def replay(
    bundle: Annotated[Path, typer.Argument(help="A refused step: runs/NAME/replay/step-*")],
    trust_checkpoint: Trust = False,
) -> None:
    """Take a refused step again, in this process: for a debugger."""
    from cluster.replay import replay as replay_of

    outcome, code = replay_of(bundle, trust_checkpoint=trust_checkpoint)
    typer.echo(outcome)
    sys.exit(code)


@app.command()
def report(run: RunName, runs_dir: RunsDir = "runs") -> None:
    """Write runs/<name>/report.html, one self-contained page."""
    from cluster.report import write_report

    typer.echo(str(write_report(_run_dir(run, runs_dir))))


@app.command()
def export(
    run: RunName,
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    step: Annotated[
        int | None, typer.Option(help="A checkpoint's step; default: the newest.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
    runs_dir: RunsDir = "runs",
    trust_checkpoint: Trust = False,
) -> None:
    """Write a Hugging Face folder that transformers and vLLM load."""
    from cluster.export import export_run

    export_run(_run_dir(run, runs_dir), out, step, dtype, trust_checkpoint=trust_checkpoint)
    typer.echo(str(out))


def _flags(**given: bool) -> list[str]:
    """Those that are set, as words of a command line."""
    return [f"--{name.replace('_', '-')}" for name, on in given.items() if on]


def _load(config: Path, overrides: list[str] | None, kind: type[Stage]) -> Stage:
    return load_config(config, overrides or [], kind)


def _run_dir(run: str, runs_dir: str) -> Path:
    for folder in (Path(run), Path(runs_dir) / run):
        if (folder / "config.yaml").is_file():
            return folder
    raise BadInput(
        f"{run}: no run of that name in {runs_dir}; see the folders there, or give --runs-dir"
    )


def _one_process(config: Any) -> None:
    """The environment of engine and learner, set before torch is imported."""
    from actors.vllm_engine import CPU_ENGINE_ENV, ENGINE_ENV

    cuda = config.device == "cuda"
    os.environ.update(ENGINE_ENV if cuda else {**CPU_ENGINE_ENV, "CUDA_VISIBLE_DEVICES": ""})


def main(arguments: list[str] | None = None) -> None:
    """Run a command; failures become one line and an exit code."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # progress is ours to show
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    _current_folder_last()
    home = os.environ.get("RAYLIGN_HOME", "")  # a job's code is elsewhere than its data and runs
    if os.path.isdir(home):
        os.chdir(home)
    words = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    sys.exit(_guarded(lambda: app(words, prog_name=PROGRAM, standalone_mode=False)))


def _current_folder_last() -> None:
    """`python -m` looks for every module in the current folder first, whatever lies there. A reward function
    may lie there, too: it is found as the last."""
    here = os.getcwd()
    if sys.path[0] in ("", here) and here != str(Path(__file__).resolve().parents[1]):
        sys.path.append(sys.path.pop(0))


def _guarded(command: Callable[[], Any]) -> int:
    try:
        return int(command() or 0)
    except BadInput as error:
        return _say("bad input", error, 2)
    except UsageError as error:
        return _say("bad input", _usage(error), 2)
    except KeyboardInterrupt:
        return _say("stopped", "by the keyboard", 130)
    except SystemExit as done:
        return int(done.code or 0)
    except Exception as error:
        if os.environ.get("RAYLIGN_TRACEBACK"):
            raise
        return _say("failed", f"{error} (RAYLIGN_TRACEBACK=1 shows where)", 3)


def _usage(error: Any) -> str:
    """What typer would say in four lines."""
    path = error.ctx.command_path if error.ctx else PROGRAM
    return f"{error.format_message().rstrip('.')}; see {path} --help"


def _say(kind: str, message: object, code: int) -> int:
    from cluster.redaction import printable

    print(f"raylign: {kind}: {' '.join(printable(str(message)).split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    from cluster.cli import main as imported_main  # so that nothing is known as __main__

    imported_main()
