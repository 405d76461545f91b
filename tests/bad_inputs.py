"""Every kind of bad input to the command line: how it comes about, and what its line names.

tests/BAD_INPUTS.md lists them with the lines that are printed: `python -m tests.bad_input_table`.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from actors.prompts import digest_of
from cluster import (
    checkpoints,
    cli,
    hosting,
    own_ray,
    ray_auth,
    ray_folder,
    ray_host,
    versions,
)
from tests import tiny
from tests.bad_configs import CASES, Case, World, configured

PREFIX = "raylign: bad input: "
Prepare = Callable[[World, pytest.MonkeyPatch], list[str]]  # -> the words of the command


@dataclass(frozen=True)
class Kind:
    prepare: Prepare
    named: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    code: int
    stdout: str
    stderr: str
    seconds: float


def raylign(*words: str) -> Outcome:
    """A command, in this process. What it adds to the places of modules would be in the next one's way."""
    places = [*sys.path]
    out, err, started, code = io.StringIO(), io.StringIO(), time.monotonic(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main(list(words))
        except SystemExit as ended:
            code = int(ended.code or 0)
        finally:
            sys.path[:] = places
    return Outcome(code, out.getvalue(), err.getvalue(), time.monotonic() - started)


class NoRay:
    """Stands in for RayHost: nothing that is bad input comes so far."""

    def __init__(self, *given: Any, **named: Any) -> None:
        raise AssertionError("Ray was started")


def without_ray(patch: pytest.MonkeyPatch) -> None:
    """Nor a fork server: it would import beside the checks, and after them beside the next test's."""
    patch.setattr(hosting, "RayHost", NoRay)
    patch.setattr(hosting, "fork_server", lambda *_, **__: contextlib.nullcontext())


class FewGpus:
    """A cluster with one GPU."""

    def __init__(self, *given: Any, **named: Any) -> None:
        return

    def num_gpus(self) -> float:
        return 1.0

    def close(self) -> None:
        return


def prepare(kind: Kind, world: World, patch: pytest.MonkeyPatch) -> list[str]:
    patch.chdir(world.folder)
    without_ray(patch)
    for module in ("fit", "stages"):  # as if this were any machine
        patch.setattr(f"cluster.{module}.gpu_bytes", lambda: ())
    patch.setattr("cluster.fit.available_bytes", lambda: 1 << 40)
    patch.delenv("RAY_ADDRESS", raising=False)
    return kind.prepare(world, patch)


def run_config(world: World, changes: dict[str, Any]) -> str:
    return str(tiny.write_yaml(world.folder / "run.yaml", world.tree(changes)))


# ---- PPO: configs, and runs that are there or not


def of_case(case: Case) -> Kind:
    return Kind(
        lambda world, _: ["train", run_config(world, case.changes(world)), *case.words], case.named
    )


def with_the_real_ray(world: World, patch: pytest.MonkeyPatch) -> list[str]:
    """It is asked, and refuses before ray.init."""
    patch.setattr(hosting, "RayHost", ray_host.RayHost)
    return ["train", run_config(world, {"ray_address": "127.0.0.1:1"})]


def with_a_ray_that_wants_a_token(world: World, patch: pytest.MonkeyPatch) -> list[str]:
    """As the one that is not there, but something answers, and refuses all it is sent."""
    patch.setenv(ray_auth.MODE, "disabled")
    patch.setattr(ray_host, "_probe", lambda address: None)
    patch.setattr(ray_auth, "_refuses", lambda address, token: True)
    return with_the_real_ray(world, patch)


def with_no_folder_for_sockets(world: World, patch: pytest.MonkeyPatch) -> list[str]:
    """It refuses before ray.init, too."""
    patch.setattr(hosting, "RayHost", ray_host.RayHost)
    patch.setattr(own_ray, "prepare", lambda: None)
    patch.setattr(ray_folder, "_is_fit", lambda base: False)
    return ["train", run_config(world, {})]


def with_few_gpus(world: World, patch: pytest.MonkeyPatch) -> list[str]:
    """The one refusal that needs a cluster to ask: here it is a fake one."""
    patch.setattr(hosting, "RayHost", FewGpus)
    return ["train", run_config(world, {"device": "cuda", "generators.count": 4})]


def with_little_room(world: World, patch: pytest.MonkeyPatch) -> list[str]:
    patch.setattr("cluster.disk.free_bytes", lambda path: 1 << 20)
    return ["train", run_config(world, {})]


def with_memory(gib: float, given: dict[str, Any]) -> Prepare:
    def prepare(world: World, patch: pytest.MonkeyPatch) -> list[str]:
        patch.setattr("cluster.fit.available_bytes", lambda: int(gib * 2**30))
        return ["train", run_config(world, given)]

    return prepare


def with_small_gpus(world: World, patch: pytest.MonkeyPatch) -> list[str]:
    patch.setattr("cluster.fit.gpu_bytes", lambda: (1 << 29, 1 << 29))
    return ["train", run_config(world, {"device": "cuda"})]


def with_little_shared_memory(world: World, patch: pytest.MonkeyPatch) -> list[str]:
    patch.setattr("cluster.fit.free_bytes", lambda path: 1 << 20)
    return ["train", run_config(world, {})]


def with_an_old_torch(world: World, patch: pytest.MonkeyPatch) -> list[str]:
    found = {**versions.versions(), "torch": "2.11.0"}
    patch.setattr(versions, "versions", lambda: found)
    return ["train", run_config(world, {})]


def without_an_engine(world: World, patch: pytest.MonkeyPatch) -> list[str]:
    patch.setattr(versions, "ENGINES", {"none"})
    return ["train", run_config(world, {})]


def with_a_file_for_runs(world: World, _: pytest.MonkeyPatch) -> list[str]:
    (world.folder / "runs").write_text("a file")
    return ["train", run_config(world, {})]


def begun_run(world: World, tree: dict[str, Any] | None = None) -> Path:
    """A run folder that has not come to a checkpoint."""
    folder = world.folder / "runs/tiny"
    folder.mkdir(parents=True)
    tiny.write_yaml(folder / "config.yaml", tree or world.tree({}))
    (folder / checkpoints.RUN_ID).write_text("tiny-1234\n")
    return folder


def write_checkpoint(run: Path, config: dict[str, Any], **state: Any) -> Path:
    aside = checkpoints.begin(run, 2)
    (aside / checkpoints.DRIVER).write_text(json.dumps({"config": config, **state}))
    return checkpoints.commit(aside, 2, keep=1).path


def over_a_run(world: World, _: pytest.MonkeyPatch) -> list[str]:
    begun_run(world)
    return ["train", run_config(world, {})]


def over_a_link(world: World, _: pytest.MonkeyPatch) -> list[str]:
    folder = begun_run(world)
    folder.rename(world.folder / "elsewhere")
    folder.symlink_to(world.folder / "elsewhere")
    return ["train", run_config(world, {}), "--overwrite"]


def while_it_goes_on(*given: str) -> Prepare:
    def begin(world: World, _: pytest.MonkeyPatch) -> list[str]:
        said = {"state": "running", "pid": 7, "host": "another", "heartbeat_at": time.time()}
        (begun_run(world) / "status.json").write_text(json.dumps(said))
        return ["train", run_config(world, {}), *given]

    return begin


def resuming(break_it: Callable[[Path, Path], Any], *words: str, **state: Any) -> Prepare:
    """`break_it` is given the run's folder and the checkpoint's, which holds `state`."""

    def resume(world: World, _: pytest.MonkeyPatch) -> list[str]:
        run = begun_run(world)
        from cluster.config import RunConfig
        from cluster.config_file import load_config

        config = load_config(run / "config.yaml", [], RunConfig).model_dump(mode="json")
        break_it(run, write_checkpoint(run, config, **state))
        return ["train", run_config(world, {}), "--resume", *words]

    return resume


def resuming_with_an_evaluation(world: World, patch: pytest.MonkeyPatch) -> list[str]:
    tree = world.tree({})
    scorer = tree["reward"]["scorer"]
    added = {"prompts.path": tree["prompts"]["path"]} | {
        f"scorer.{key}": value for key, value in scorer.items()
    }
    words = [f"evaluation.{key}={value}" for key, value in added.items()]
    return [*resuming(nothing)(world, patch), *words]


def torn(_: Path, checkpoint: Path) -> None:
    (checkpoint / checkpoints.DRIVER).write_text("{")


def foreign(run: Path, _: Path) -> None:
    (run / checkpoints.RUN_ID).write_text("tiny-5678\n")


def without_id(_: Path, checkpoint: Path) -> None:
    manifest = json.loads((checkpoint / checkpoints.MANIFEST).read_text())
    del manifest[checkpoints.RUN_ID]
    (checkpoint / checkpoints.MANIFEST).write_text(json.dumps(manifest))


def nothing(_: Path, __: Path) -> None:
    return


TRAIN = {name: of_case(case) for name, case in CASES.items()} | {
    "a Ray that is not there": Kind(with_the_real_ray, ("ray_address", "nothing answers")),
    "a Ray that wants a token": Kind(
        with_a_ray_that_wants_a_token, ("ray_address", "wants a token", "RAY_AUTH_TOKEN_PATH")
    ),
    "no folder for the sockets of a Ray of our own": Kind(
        with_no_folder_for_sockets, ("RAY_TMPDIR", "characters at most", "set it to one")
    ),
    "more GPUs than there are": Kind(
        with_few_gpus, ("5 GPUs", "4 for generators", "the cluster has 1", "lower the counts")
    ),
    "a disk without room for its checkpoints": Kind(
        with_little_room, ("runs_dir", "free", "make room")
    ),
    "more generators than memory": Kind(
        with_memory(8, {"generators.count": 64}),
        ("memory: generators: 64 x ", "8.000 GiB are available", "generators.count=", "would fit"),
    ),
    "microbatches beyond the memory": Kind(
        with_memory(2.3, {"batch_size": 8192, "ppo.minibatches": 1, "learner.ranks": 2}),
        ("memory: learner: 2 x ", "2.300 GiB", "max_tokens_per_microbatch=", "would fit"),
    ),
    "a machine without memory": Kind(
        with_memory(1, {}), ("memory: ", "1.000 GiB", "take a smaller model or a larger machine")
    ),
    "GPUs without memory": Kind(
        with_small_gpus, ("memory: generators: ", "of a GPU", "0.500 GiB", "a larger machine")
    ),
    "shared memory without room": Kind(
        with_little_shared_memory, ("/dev/shm", "--shm-size", "generators.weight_push=delta")
    ),
    "a version that is too old": Kind(with_an_old_torch, ("torch: 2.11.0 is installed", ">=2.13")),
    "no engine": Kind(without_an_engine, ("vllm: not installed", "raylign[cpu]")),
    "a file where runs should be": Kind(
        with_a_file_for_runs, ("runs_dir", "no folder that can be written to")
    ),
    "a name that has a run": Kind(over_a_run, ("runs/tiny", "--resume", "--overwrite", "name=")),
    "overwriting a link": Kind(
        over_a_link, ("runs/tiny", "symbolic link, to", "elsewhere", "remove it", "name=")
    ),
    "resuming a run that goes on": Kind(
        while_it_goes_on("--resume"),
        ("runs/tiny", "process 7 on another", "stop it first", "name="),
    ),
    "overwriting a run that goes on": Kind(
        while_it_goes_on("--overwrite"), ("runs/tiny", "process 7 on another", "stop it first")
    ),
    "one process for two generators": Kind(
        lambda world, _: ["train", run_config(world, {"generators.count": 2}), "--in-process"],
        ("--in-process", "generators.count=1"),
    ),
    "resuming from a damaged checkpoint alone": Kind(
        resuming(torn), ("driver.json is not as it was written", "--overwrite")
    ),
    "resuming from another run's checkpoint": Kind(
        resuming(foreign),
        ("step-000002", "'tiny-1234'", "tiny-5678", "pickle", "--trust-checkpoint"),
    ),
    "resuming from a checkpoint without a run's id": Kind(
        resuming(without_id), ("without a run's id", "pickle", "--trust-checkpoint")
    ),
    "resuming with another seed": Kind(
        resuming(nothing, "seed=7"), ("seed: ", "made with 0", "says 7", "put it back")
    ),
    "resuming with an evaluation that was not there": Kind(
        resuming_with_an_evaluation,
        ("evaluation.prompts: ", "made with None", "put it back"),
    ),
    "resuming with other prompts": Kind(
        resuming(nothing, prompts_digest=digest_of([tiny.prompt(0)])),
        ("prompts: ", "prompts.jsonl", "now 8", "not those that the checkpoint", "put the file"),
    ),
    "resuming with another advantage": Kind(
        resuming(nothing, "ppo.advantage=sequence"), ("ppo.advantage: ", "'gae'", "'sequence'")
    ),
}

# ---- words that are no command, files that are no config


def words(*given: str) -> Prepare:
    return lambda world, _: list(given)


USAGE = {
    "no config given": Kind(words("train"), ("config", "raylign train --help")),
    "an option that is none": Kind(
        words("train", "--nope", "x.yaml"), ("--nope", "raylign train --help")
    ),
    "a command that is none": Kind(words("trian"), ("trian", "raylign --help")),
    "a general option that is none": Kind(words("--nope"), ("--nope", "raylign --help")),
    "no run given": Kind(words("status"), ("run", "raylign status --help")),
    "a step that is no number": Kind(
        words("export", "a", "b", "--step", "soon"), ("--step", "raylign export --help")
    ),
    "a word too many": Kind(words("status", "a", "b"), ("b", "raylign status --help")),
    "a value that is a date and none": Kind(
        lambda world, _: ["train", run_config(world, {}), "name=2024-99-99"],
        ("'name=2024-99-99'", "quote it"),
    ),
    "restarts below zero": Kind(
        words("train", "x.yaml", "--max-restarts", "-1"), ("--max-restarts", "--help")
    ),
}

FILES: dict[str, tuple[str | None, tuple[str, ...]]] = {
    "no config file": (None, ("no such config file", "give")),
    "a config that is no YAML": ("a: [1", ("not YAML", "fix the file")),
    "a config that is one text": ("just words", ("not a mapping", "see examples/")),
    "a config that is empty": ("", ("not a mapping",)),
    "a config of a stage that is none": ("stage: nonsense\nname: x", ("stage",)),
    "a config with a key that stands twice": (
        "stage: train\nname: x\nname: y",
        ("not YAML", "name stands twice", "line 3"),
    ),
    "a config with a date that is none": (
        "stage: train\nname: 2024-99-99",
        ("name: 2024-99-99", "looks like timestamp", "line 2", "quote it"),
    ),
    "a config with a number that is none": (
        "stage: train\nsampling: {stop: [0x_]}",
        ("sampling: {stop: [0x_]}", "0x_ looks like int", "line 2", "quote it"),
    ),
    "a config with too many digits": (
        f"stage: train\nseed: {'9' * 5000}",
        ("99 looks like int", "line 2"),
    ),
    "a config that is nested too deeply": (
        "name: " + "[" * 3000,
        ("not YAML", "nested too deeply", "fix the file"),
    ),
}


def of_file(content: str | None, command: str = "train") -> Prepare:
    def write(world: World, _: pytest.MonkeyPatch) -> list[str]:
        path = world.folder / "given.yaml"
        if content is not None:
            path.write_text(content)
        return [command, str(path)]

    return write


CONFIG_FILES = {
    name: Kind(of_file(content), ("given.yaml", *named)) for name, (content, named) in FILES.items()
} | {
    "a config of another stage": Kind(
        of_file("stage: sft\nname: x\nmodel: m"),
        ("given.yaml: stage: sft", "`raylign sft`", "stage: train is wanted"),
    )
}

# ---- other commands


def on_a_run(*given: str, break_it: Callable[[Path, Path], Any] | None = None) -> Prepare:
    def begin(world: World, _: pytest.MonkeyPatch) -> list[str]:
        run = begun_run(world)
        if break_it is not None:
            break_it(run, write_checkpoint(run, {}))
        (world.folder / "full").mkdir()
        (world.folder / "full/mine.txt").write_text("mine")
        (world.folder / "file").write_text("mine")
        return list(given)

    return begin


def on_half_a_run(*given: str) -> Prepare:
    def begin(world: World, _: pytest.MonkeyPatch) -> list[str]:
        (world.folder / "runs/half").mkdir(parents=True)
        return list(given)

    return begin


def of_another_stage(world: World, _: pytest.MonkeyPatch) -> list[str]:
    begun_run(world, {"stage": "sft", "name": "tiny"})
    return ["export", "tiny", "out"]


def scaling(status: dict[str, Any], **given: Any) -> Prepare:
    def begin(world: World, _: pytest.MonkeyPatch) -> list[str]:
        run = begun_run(world, world.tree({"max_staleness": 1, **given}))
        (run / "status.json").write_text(json.dumps(status))
        return ["scale", "tiny", "--generators", "3"]

    return begin


def audit_without_prompts(world: World, _: pytest.MonkeyPatch) -> list[str]:
    begun_run(world)
    (world.folder / "prompts.jsonl").unlink()
    return ["audit", "tiny"]


def with_a_bundle(break_it: Callable[[Path], Any]) -> Prepare:
    """A bundle of a refused step, with nothing in it but its form."""

    def write(world: World, _: pytest.MonkeyPatch) -> list[str]:
        run = begun_run(world)
        aside = checkpoints.set_aside(run / "replay/step-000003-1")
        (aside / "learner").mkdir()
        refusal = {"step": 3, "version": 2, "reason": "NaN", "metrics": {}}
        for name in ("learner/.metadata", "batch.parquet", "config.yaml"):
            (aside / name).write_text("")
        (aside / "refusal.json").write_text(json.dumps(refusal))
        bundle = checkpoints.seal(aside, 3)
        break_it(bundle)
        return ["replay", str(bundle)]

    return write


OTHERS = {
    "a run that is not there": Kind(words("status", "nobody"), ("nobody", "runs", "--runs-dir")),
    "a folder that is no run": Kind(on_half_a_run("report", "half"), ("half",)),
    "an audit without the prompts' file": Kind(
        audit_without_prompts, ("prompts.path", "no such file")
    ),
    "an export of no run": Kind(words("export", "nobody", "out"), ("nobody",)),
    "an export without a checkpoint": Kind(
        on_a_run("export", "tiny", "out"), ("no intact checkpoint",)
    ),
    "an export of a step that is not there": Kind(
        on_a_run("export", "tiny", "out", "--step", "7"), ("step-000007", "raylign status")
    ),
    "an export in another dtype": Kind(
        on_a_run("export", "tiny", "out", "--dtype", "int8"), ("int8", "float32 or bfloat16")
    ),
    "an export into a full folder": Kind(
        on_a_run("export", "tiny", "full"), ("full", "no empty folder")
    ),
    "an export into a file": Kind(on_a_run("export", "tiny", "file"), ("file", "no empty folder")),
    "an export of another run's checkpoint": Kind(
        on_a_run("export", "tiny", "out", break_it=foreign), ("pickle", "--trust-checkpoint")
    ),
    "an export of a damaged checkpoint": Kind(
        on_a_run("export", "tiny", "out", "--step", "2", break_it=torn),
        ("driver.json is not as it was written", "raylign status"),
    ),
    "an export of a stage without checkpoints": Kind(of_another_stage, ("tiny",)),
    "another number of generators for a run that is over": Kind(
        scaling({"state": "finished"}),
        ("runs/tiny: this run does not go on now (finished)", "--resume generators.count=3"),
    ),
    "another number of generators for a run that died": Kind(
        scaling({"state": "running", "pid": 1, "host": "another"}),
        ("runs/tiny: this run does not go on now (died)", "--resume generators.count=3"),
    ),
    "another number of generators for a run that repeats": Kind(
        scaling({"state": "running"}, deterministic=True),
        ("runs/tiny", "deterministic: true", "fixed"),
    ),
    "no generators": Kind(
        words("scale", "tiny", "--generators", "0"), ("--generators", "raylign scale --help")
    ),
    "a bundle that is not there": Kind(
        words("replay", "runs/tiny/replay/step-000003-1"), ("no such bundle", "runs/NAME/replay")
    ),
    "a damaged bundle": Kind(
        with_a_bundle(lambda bundle: (bundle / "batch.parquet").unlink()),
        ("batch.parquet is missing", "only an intact bundle"),
    ),
    "another run's bundle": Kind(
        with_a_bundle(lambda bundle: foreign(bundle.parents[1], bundle)),
        ("step-000003-1", "pickle", "--trust-checkpoint"),
    ),
}

# ---- the stages before PPO


def sft_tree(world: World, given: dict[str, Any]) -> dict[str, Any]:
    data = tiny.write_jsonl(world.folder / "sft.jsonl", [{"prompt": "1+1=", "completion": "2"}])
    sft = {"data": data, "batch_size": 2, "max_tokens": 16, "optimizer": {"lr": 1.0e-3}}
    base = {"stage": "sft", "name": "tiny-sft", "runs_dir": str(world.folder / "runs")}
    return tiny.changed(base | {"num_steps": 2, "model": str(world.policy), "sft": sft}, given)


def sft(given: dict[str, Any], *named: str, row: Any = None, words: tuple[str, ...] = ()) -> Kind:
    def write(world: World, _: pytest.MonkeyPatch) -> list[str]:
        tiny.write_jsonl(world.folder / "bad.jsonl", [row or {}])
        path = tiny.write_yaml(world.folder / "sft.yaml", sft_tree(world, given))
        return ["sft", str(path), *words]

    return Kind(write, named)


def with_a_long_rope(world: World, patch: pytest.MonkeyPatch) -> list[str]:
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 12}
    model = configured(world, rope_parameters=rope)
    return sft({"model": model}).prepare(world, patch)


SFT = {
    "SFT: no model": sft({"model": "nowhere"}, "model: nowhere", "no config.json"),
    "SFT: rows beyond where the rope changes": Kind(
        with_a_long_rope, ("model: ", "beyond 12 tokens", "sft.max_tokens allows 16", "12 or less")
    ),
    "SFT: no data file": sft({"sft.data": "absent.parquet"}, "absent.parquet", "no such file"),
    "SFT: no held-out file": sft({"sft.held_out_data": "absent.jsonl"}, "absent.jsonl", "no such file"),
    "SFT: a missing column": sft(
        {"sft.data": "bad.jsonl"}, "bad.jsonl", "'completion'", row={"text": "a"}
    ),
    "SFT: an empty completion": sft(
        {"sft.data": "bad.jsonl"}, "row 1", "empty", row={"prompt": "a", "completion": ""}
    ),
    "SFT: a prompt that is no text": sft(
        {"sft.data": "bad.jsonl"}, "row 1", "prompt is list, not text",
        row={"prompt": ["a", "b"], "completion": "c"},
    ),
    "SFT: a message without content": sft(
        {"sft.data": "bad.jsonl"}, "row 1", "messages is no list of role and content objects",
        row={"messages": [{"role": "user", "content": None}, {"role": "assistant", "content": "b"}]},
    ),
    "SFT: a row that is too long": sft(
        {"sft.data": "bad.jsonl"}, "row 1", "max_tokens",
        row={"prompt": "a", "completion": "1" * 20},
    ),
    "SFT: a value out of bounds": sft({"sft.optimizer.lr": -1}, "sft.optimizer.lr"),
    "SFT: an unknown key": sft({"sft.optimiser": 1}, "sft.optimiser", "did you mean optimizer?"),
    "SFT: a name with a slash": sft({"name": "a/b"}, "name"),
    "SFT: one process for two ranks": sft(
        {"learner.ranks": 2}, "--in-process", "learner.ranks=1", words=("--in-process",)
    ),
}  # fmt: skip

PAIR = {"prompt": "1+1=", "chosen": "2", "rejected": "3"}


def reward_model(given: dict[str, Any], row: dict[str, Any], *named: str) -> Kind:
    def write(world: World, _: pytest.MonkeyPatch) -> list[str]:
        pairs = tiny.write_jsonl(world.folder / "pairs.jsonl", [row])
        base = {
            "stage": "reward_model",
            "name": "tiny-rm",
            "runs_dir": str(world.folder / "runs"),
            "model": str(world.policy),
            "training": {"pairs": pairs, "max_tokens": 16},
        }
        path = tiny.write_yaml(world.folder / "rm.yaml", tiny.changed(base, given))
        return ["reward-model", str(path)]

    return Kind(write, named)


REWARD_MODEL = {
    "reward model: no model": reward_model(
        {"model": "nowhere"}, PAIR, "model: nowhere", "no config.json"
    ),
    "reward model: no pairs": reward_model(
        {"training.pairs": "absent.parquet"}, PAIR, "absent.parquet", "no such file"
    ),
    "reward model: a missing column": reward_model(
        {}, {"prompt": "a", "chosen": "b"}, "pairs.jsonl", "'rejected'"
    ),
    "reward model: a value of another type": reward_model(
        {}, PAIR | {"chosen": 3}, "pairs.jsonl", "row 1", "chosen"
    ),
    "reward model: a row that is too long": reward_model(
        {}, PAIR | {"chosen": "1" * 20}, "pairs.jsonl", "row 1", "max_tokens 16"
    ),
    "reward model: no held-out pairs": reward_model(
        {"training.held_out_pairs": "absent.jsonl"}, PAIR, "absent.jsonl", "no such file"
    ),
    "reward model: nothing to normalise on": reward_model(
        {"training.normalise_on": "absent.jsonl"}, PAIR, "absent.jsonl", "no such file"
    ),
    "reward model: a GPU that is not there": reward_model(
        {"device": "cuda"}, PAIR, "device: cuda", "no GPU", "set device=cpu"
    ),
    "reward model: a Ray, of which it has none": reward_model(
        {"ray_address": "auto"}, PAIR, "unknown key ray_address"
    ),
    "reward model: an unknown key": reward_model(
        {"training.epoch": 1}, PAIR, "training.epoch", "did you mean epochs?"
    ),
}

# ---- submitting to a cluster


def answering(status: int) -> Prepare:
    """Where a dashboard should be, something answers with `status`, once."""

    class Refusing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(status)

        def log_message(self, format: str, *args: Any) -> None:
            return

    def serve(world: World, patch: pytest.MonkeyPatch) -> list[str]:
        patch.delenv("RAY_AUTH_MODE", raising=False)
        server = HTTPServer(("127.0.0.1", 0), Refusing)
        Thread(target=server.handle_request, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        return ["submit", run_config(world, {}), "--address", address]

    return serve


def to(address: str) -> Prepare:
    return lambda world, _: ["submit", run_config(world, {}), "--address", address]


SUBMIT = {
    "submit: nobody answers": Kind(
        to("http://127.0.0.1:1"), ("--address", "no Ray dashboard answers", "ray start --head")
    ),
    "submit: an address that is none": Kind(to("here"), ("--address", "here")),
    "submit: a cluster that wants a token": Kind(
        answering(401), ("wants a token", "RAY_AUTH_MODE=token", "RAY_AUTH_TOKEN_PATH")
    ),
    "submit: something else answers": Kind(answering(404), ("is no Ray dashboard", "status 404")),
}

KINDS: dict[str, Kind] = {
    **TRAIN, **CONFIG_FILES, **USAGE, **OTHERS, **SFT, **REWARD_MODEL, **SUBMIT
}  # fmt: skip
