"""`raylign replay BUNDLE`: a refused step once more, in this process, where a breakpoint works.

    bundle -> digests -> a learner of one rank, in the state before the step -> the step -> the verdict

The run's folder is only read.
"""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow.parquet as pq

from cluster import checkpoints, replay_bundle
from cluster.config import BadInput, RunConfig
from cluster.config_file import load_config
from cluster.doctor import Inputs
from cluster.model_folder import policy_config
from cluster.specs import learner_spec
from learner.learner_spec import LEARNER_ENV, LearnerSpec, Rendezvous, StepRefused
from reward_service.fast_import import fast_import
from reward_service.tokenizer import load_tokenizer


def replay(bundle: Path, *, trust_checkpoint: bool = False) -> tuple[str, int]:
    """(one line on what came out, the exit code): 0 if the step is refused again for the same reason.
    The line's numbers may differ from the run's in their last digits: the run may have had more ranks."""
    recorded, version = replay_bundle.read(bundle)
    if not trust_checkpoint:
        checkpoints.check_origin(bundle.resolve())
    config = load_config(bundle / replay_bundle.CONFIG, ["learner.ranks=1"], RunConfig)
    again = _step_again(bundle, config, _spec(config), recorded.step, version)
    if not isinstance(again, StepRefused):
        figures = ", ".join(f"{name} {again[name]:.4g}" for name in sorted(_telling(again)))
        return f"not reproduced: the step went through ({figures}); {_was(recorded)}", 1
    if again.kind != recorded.kind:
        return f"not reproduced: refused because {again.reason}; {_was(recorded)}", 1
    return f"reproduced: {again.reason}", 0


def _was(recorded: StepRefused) -> str:
    return f"in the run it was refused because {recorded.reason}"


def _telling(metrics: dict[str, float]) -> set[str]:
    """The names, among a step's metrics, of what may be refused."""
    ends = ("approx_kl", "behavior_difference_mean")
    return {name for name in metrics if "grad_norm" in name or name.endswith(ends)}


def _spec(config: RunConfig) -> LearnerSpec:
    """What the learner needs of the inputs: the prompts and the reward play no part in its step."""
    try:
        model = policy_config(config.policy, "policy")
        if config.reference is not None:
            policy_config(config.reference, "reference")
    except ValueError as error:
        raise BadInput(f"{error}; start in the folder that the run was started in") from None
    tokenizer = load_tokenizer(config.policy)
    return learner_spec(config, Inputs(tokenizer, model["vocab_size"], [], [], [], 0))


def _step_again(
    bundle: Path, config: RunConfig, spec: LearnerSpec, step: int, version: int
) -> dict[str, float] | StepRefused:
    hidden = {} if config.device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
    os.environ.update(LEARNER_ENV | hidden)  # before torch is imported
    with fast_import():
        from learner.learner_worker import LearnerWorker
    table = pq.read_table(bundle / replay_bundle.BATCH)
    with TemporaryDirectory(prefix="raylign-replay-") as folder:
        worker = LearnerWorker(spec, rank=0)
        worker.start(Rendezvous(1, file=f"{folder}/rendezvous"))
        worker.load(str(bundle / replay_bundle.LEARNER))
        return worker.update(table, step, version, folder)
