"""Bad input ends with exit code 2 and one line that says what, where and the fix; nothing is begun.

The commands run through `cluster.cli.main` in this process, without a Ray: starting one fails the
test. A few run in a process of their own, to see all that a terminal would show.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster import cli, launch, stages
from tests import tiny

ROOT = Path(__file__).parents[1]
PREFIX = "raylign: bad input: "
FUNCTION = {"kind": "function", "function": "examples.arithmetic.rewards:exact_answer"}


@dataclass(frozen=True)
class World:
    """What a case finds: a folder with prompts and pairs, the policy, and a model of another
    vocabulary. `train` runs from `folder`."""

    folder: Path
    policy: Path
    stranger: Path

    def tree(self, changes: dict[str, Any]) -> dict[str, Any]:
        return tiny.changed(tiny.run_tree(self.folder, self.policy), changes)


@dataclass(frozen=True)
class Outcome:
    code: int
    stdout: str
    stderr: str
    seconds: float


class NoRay:
    """Stands in for RayHost: nothing that is bad input comes so far."""

    def __init__(self, *given: Any) -> None:
        raise AssertionError("Ray was started")


@pytest.fixture
def world(tmp_path: Path, policy: Path, stranger: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch, "RayHost", NoRay)
    monkeypatch.setattr(stages, "RayHost", NoRay)
    return World(tmp_path, policy, stranger)


@pytest.fixture
def raylign(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    def run(*words: str) -> Outcome:
        capsys.readouterr()
        started = time.monotonic()
        with pytest.raises(SystemExit) as ended:
            cli.main(list(words))
        seconds = time.monotonic() - started
        said = capsys.readouterr()
        return Outcome(int(ended.value.code or 0), said.out, said.err, seconds)

    return run


def assert_refused(outcome: Outcome, *named: str) -> None:
    assert outcome.code == 2, outcome
    lines = outcome.stderr.splitlines()
    assert len(lines) == 1, outcome.stderr
    assert lines[0].startswith(PREFIX)
    for part in named:
        assert part in lines[0]
    assert outcome.stdout == ""
    assert outcome.seconds < 10


# ---- one run's config: what is changed, what the line names


@dataclass(frozen=True)
class Case:
    changes: Callable[[World], dict[str, Any]]
    named: tuple[str, ...]
    words: tuple[str, ...] = field(default=())


def changes(given: dict[str, Any], *named: str, words: tuple[str, ...] = ()) -> Case:
    return Case(lambda _: given, named, words)


def rows(world: World, *rows: dict[str, Any]) -> dict[str, Any]:
    return {"prompts.path": tiny.write_jsonl(world.folder / "bad.jsonl", rows)}


def text(world: World, name: str, content: str) -> dict[str, Any]:
    (world.folder / name).write_text(content)
    return {"prompts.path": str(world.folder / name)}


def parquet(world: World, table: pa.Table) -> dict[str, Any]:
    pq.write_table(table, world.folder / "bad.parquet")
    return {"prompts.path": str(world.folder / "bad.parquet")}


def module(world: World, name: str, source: str) -> dict[str, Any]:
    (world.folder / f"{name}.py").write_text(source)
    return {"reward.scorer.function": f"{name}:score"}


def model_folder(world: World, *files: str) -> str:
    folder = world.folder / "half"
    folder.mkdir()
    for name in files:
        (folder / name).write_bytes((world.policy / name).read_bytes())
    return str(folder)


def dropping(world: World) -> str:
    folder = Path(model_folder(world, "model.safetensors", "tokenizer.json"))
    settings = json.loads((world.policy / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"attention_dropout": 0.1}))
    return str(folder)


CASES: dict[str, Case] = {
    "an unknown key": changes({"bach_size": 8}, "run.yaml", "bach_size", "did you mean batch_size?"),
    "an unknown key further in": changes({"ppo.kl.coeff": 1}, "ppo.kl.coeff", "did you mean coef?"),
    "a missing key": changes({"num_steps": None}, "num_steps", "required"),
    "another type": changes({"num_steps": "many"}, "num_steps", "many"),
    "a name with a slash": changes({"name": "a/b"}, "name", "a/b"),
    "a name that goes up": changes({"name": ".."}, "name", ".."),
    "a seed that is negative": changes({"seed": -1}, "seed", "-1"),
    "NaN": changes({"ppo.kl.coef": float("nan")}, "ppo.kl.coef", "finite"),
    "remote code": changes({"trust_remote_code": True}, "trust_remote_code"),
    "another stage's config": changes({"stage": "sft"}, "stage"),
    "batch and samples": changes(
        {"batch_size": 9}, "batch_size: 9", "samples_per_prompt 2", "nearest: 8"
    ),
    "batch and minibatches": changes(
        {"ppo.minibatches": 3}, "batch_size: 8", "minibatches 3", "nearest: 6"
    ),
    "minibatch and ranks": changes({"learner.ranks": 5}, "learner.ranks 5", "fewer minibatches"),
    "room for a prompt": changes(
        {"sampling.max_tokens": 32}, "sampling.max_tokens: 32", "max_model_len 32", "raise"
    ),
    "grpo of one sample": changes(
        {"ppo.advantage": "grpo", "sampling.samples_per_prompt": 1}, "samples_per_prompt", "2 or more"
    ),
    "shared weights on a GPU": changes(
        {"generators.weight_memory": "shared", "device": "cuda"}, "weight_memory: shared", "leave it out"
    ),
    "offloading without a GPU": changes(
        {"learner.cpu_offload": True}, "learner.cpu_offload", "leave it out"
    ),
    "no cache size on CPU": changes(
        {"generators.kv_cache_bytes": None}, "generators.kv_cache_bytes", "try 67108864"
    ),
    "a context beyond the model's": changes(
        {"generators.max_model_len": 512}, "max_model_len: 512", "max_position_embeddings 256"
    ),
    "a bad override": changes({}, "'seed'", "key.path=value", words=("seed",)),
    "an override of an unknown key": changes(
        {}, "ppo.epoch;", "did you mean epochs?", words=("ppo.epoch=2",)
    ),
    "an override that is no YAML": changes({}, "'seed=[1'", "YAML", words=("seed=[1",)),
    "an override of a value's inside": changes(
        {}, "num_steps is a value", words=("num_steps.deep=1",)
    ),
    "no data file": changes({"prompts.path": "absent.parquet"}, "absent.parquet", "no such file"),
    "data of unknown ending": Case(
        lambda w: text(w, "prompts.csv", "prompt\na\n"), ("prompts.csv", "'.csv'", ".parquet or .jsonl")
    ),
    "an empty Parquet": Case(
        lambda w: parquet(w, pa.table({"prompt": pa.array([], pa.string())})),
        ("bad.parquet", "has no rows"),
    ),
    "an empty JSONL": Case(lambda w: text(w, "bad.jsonl", "\n"), ("bad.jsonl", "has no rows")),
    "a broken Parquet": Case(
        lambda w: text(w, "bad.parquet", "PAR1, or so it says"), ("bad.parquet", "not a readable")
    ),
    "a broken JSONL": Case(
        lambda w: text(w, "bad.jsonl", '{"prompt": "a"}\n{"prompt"\n'), ("bad.jsonl", "line 2", "fix")
    ),
    "a missing column": Case(
        lambda w: rows(w, {"question": "a"}), ("bad.jsonl", "'prompt' or 'messages'", "question")
    ),
    "an empty prompt": Case(
        lambda w: rows(w, {"prompt": "a"}, {"prompt": ""}), ("row 1", "empty", "remove the row")
    ),
    "a prompt_id twice": Case(
        lambda w: rows(w, *[{"prompt": c, "prompt_id": "x7"} for c in "ab"]),
        ("x7", "stands twice", "unique"),
    ),
    "a prompt beyond the context": Case(
        lambda w: rows(w, {"prompt": "a"}, {"prompt": "1" * 25}),
        ("1 of 2 prompts", "24 tokens", "p1 with 25", "on_too_long: drop"),
    ),
    "metadata that is no object": Case(
        lambda w: rows(w, {"prompt": "a", "metadata": "{"}), ("row 0", "metadata is not JSON")
    ),
    "messages of another form": Case(
        lambda w: rows(w, {"messages": "hello"}), ("row 0", "messages is no list")
    ),
    "no policy": changes({"policy": "nowhere"}, "policy: nowhere", "no config.json", "stage before"),
    "a policy without safetensors": Case(
        lambda w: {"policy": model_folder(w, "config.json", "tokenizer.json")},
        ("policy: ", "no .safetensors", "no other weights"),
    ),
    "a policy without a tokenizer": Case(
        lambda w: {"policy": model_folder(w, "config.json", "model.safetensors")},
        ("half", "no tokenizer.json"),
    ),
    "a policy with dropout": Case(
        lambda w: {"policy": dropping(w)}, ("policy: ", "attention_dropout is 0.1", "set it to 0")
    ),
    "a reference of another vocabulary": Case(
        lambda w: {"reference": str(w.stranger)},
        ("reference: ", "stranger", "not the policy's", "entries differ"),
    ),
    "a critic of another vocabulary": Case(
        lambda w: {"ppo.value_init": str(w.stranger)}, ("ppo.value_init: ", "not the policy's")
    ),
    "a reward model of another vocabulary": Case(
        lambda w: {"reward.scorer": {"kind": "reward_model", "path": str(w.stranger)}},
        ("reward.scorer: ", "not the policy's", "give a model with the tokenizer of"),
    ),
    "no reward model": changes(
        {"reward.scorer": {"kind": "reward_model", "path": "nowhere"}}, "reward.scorer: nowhere"
    ),
    "a reward function that does not import": changes(
        {"reward.scorer.function": "no_such_module:score"},
        "reward.scorer: ", "'no_such_module:score'", "cannot import", "correct the name",
    ),
    "a reward module that raises": Case(
        lambda w: module(w, "raising_rewards", "1 / 0\n"),
        ("raising_rewards", "ZeroDivisionError", "reward.scorer: "),
    ),
    "a reward module without the function": Case(
        lambda w: module(w, "empty_rewards", "other = 1\n"), ("empty_rewards", "has no score", "define")
    ),
    "a reward function that is none": Case(
        lambda w: module(w, "number_rewards", "score = 3\n"), ("non-callable score",)
    ),
    "a reward address without https": changes(
        {"reward.scorer": {"kind": "http", "url": "http://example.org/score"}},
        "reward.scorer: ", "https", "example.org",
    ),
    "a reward token that is not set": changes(
        {"reward.scorer": {"kind": "http", "url": "https://example.org", "token_env": "NO_SUCH"}},
        "reward.scorer: ", "NO_SUCH",
    ),
    "a judge that does not import": changes(
        {"evaluation": {"prompts": {"path": "prompts.jsonl"}, "scorer": FUNCTION | {"function": "no:f"}}},
        "evaluation.scorer: ", "cannot import no",
    ),
    "no held-out prompts": changes(
        {"evaluation": {"prompts": {"path": "absent.jsonl"}, "scorer": FUNCTION}}, "absent.jsonl"
    ),
    "no pretraining text": changes(
        {"ppo.ptx": {"path": "absent.jsonl", "coef": 0.1, "batch_size": 4}}, "ppo.ptx.path", "absent.jsonl"
    ),
    "resuming what is not there": changes({}, "no run to resume", words=("--resume",)),
    "resuming and overwriting": changes({}, "--resume", words=("--resume", "--overwrite")),
    "a Ray that is not there": changes({"ray_address": "127.0.0.1:1"}, "ray_address"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_run_that_cannot_be_is_refused_before_anything_begins(
    world: World, raylign: Callable[..., Outcome], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]
    if name == "a Ray that is not there":  # here the real one is asked, and refuses before ray.init
        from cluster import placement

        monkeypatch.setattr(launch, "RayHost", placement.RayHost)
    path = tiny.write_yaml(world.folder / "run.yaml", world.tree(case.changes(world)))
    assert_refused(raylign("train", str(path), *case.words), *case.named)
    assert not (world.folder / "runs").exists()


DOCTOR_SKIPS = {"resuming what is not there", "resuming and overwriting", "a Ray that is not there"}


@pytest.mark.parametrize("name", sorted(CASES.keys() - DOCTOR_SKIPS))
def test_the_doctor_says_the_same(world: World, raylign: Callable[..., Outcome], name: str) -> None:
    case = CASES[name]
    path = tiny.write_yaml(world.folder / "run.yaml", world.tree(case.changes(world)))
    assert_refused(raylign("doctor", str(path), *case.words), *case.named)


def test_what_the_cases_change_is_fine_unchanged(
    world: World, raylign: Callable[..., Outcome]
) -> None:
    path = tiny.write_yaml(world.folder / "run.yaml", world.tree({}))
    outcome = raylign("doctor", str(path))
    assert (outcome.code, outcome.stderr) == (0, "")
    assert "nothing stands in the way" in outcome.stdout


def test_a_run_that_is_there_is_left_as_it_is(
    world: World, raylign: Callable[..., Outcome]
) -> None:
    folder = world.folder / "runs/tiny"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("mine")
    path = tiny.write_yaml(world.folder / "run.yaml", world.tree({}))
    named = ("runs/tiny", "--resume", "--overwrite", "name=")
    assert_refused(raylign("train", str(path)), *named)
    assert [(p.name, p.read_text()) for p in folder.iterdir()] == [("config.yaml", "mine")]


class FewGpus:
    """A cluster with one GPU."""

    def __init__(self, *given: Any) -> None:
        self.closed = False

    def num_gpus(self) -> float:
        return 1.0

    def close(self) -> None:
        self.closed = True


def test_more_gpus_than_there_are_is_bad_input_and_leaves_no_folder(
    world: World, raylign: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one refusal that needs a cluster to ask: here it is a fake one."""
    monkeypatch.setattr(launch, "RayHost", FewGpus)
    tree = world.tree({"device": "cuda", "generators.count": 4})
    outcome = raylign("train", str(tiny.write_yaml(world.folder / "run.yaml", tree)))
    assert_refused(outcome, "5 GPUs", "4 for generators", "the cluster has 1", "lower the counts")
    assert not (world.folder / "runs").exists()


# ---- files that are no config, words that are no command


@pytest.mark.parametrize("command", ["train", "sft", "reward-model", "submit", "doctor"])
@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, ("no such config file", "give")),
        ("a: [1", ("not YAML", "fix the file")),
        ("just words", ("not a mapping", "see examples/")),
        ("", ("not a mapping",)),
        ("stage: nonsense\nname: x", ("stage",)),
    ],
)
def test_every_command_refuses_a_file_that_is_no_config(
    world: World,
    raylign: Callable[..., Outcome],
    command: str,
    content: str | None,
    named: tuple[str, ...],
) -> None:
    path = world.folder / "given.yaml"
    if content is not None:
        path.write_text(content)
    assert_refused(raylign(command, str(path)), "given.yaml", *named)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["train"], ("config", "raylign train --help")),
        (["train", "--nope", "x.yaml"], ("--nope", "raylign train --help")),
        (["trian"], ("trian", "raylign --help")),
        (["--nope"], ("--nope", "raylign --help")),
        (["status"], ("run", "raylign status --help")),
        (["export", "a", "b", "--step", "soon"], ("--step", "raylign export --help")),
        (["status", "a", "b"], ("b", "raylign status --help")),
    ],
)
def test_what_is_no_command_is_said_in_one_line_too(
    world: World, raylign: Callable[..., Outcome], words: list[str], named: tuple[str, ...]
) -> None:
    assert_refused(raylign(*words), *named)


@pytest.mark.parametrize("words", [[], ["--help"], ["train", "--help"]])
def test_help_is_no_error(raylign: Callable[..., Outcome], words: list[str]) -> None:
    outcome = raylign(*words)
    assert (outcome.code, outcome.stderr) == (0, "")
    assert "Usage: raylign" in outcome.stdout


# ---- runs that are not there


@pytest.mark.parametrize("command", ["status", "audit", "report"])
def test_a_run_that_is_not_there_is_named(
    world: World, raylign: Callable[..., Outcome], command: str
) -> None:
    assert_refused(raylign(command, "nobody"), "nobody", "runs", "--runs-dir")
    (world.folder / "runs/half").mkdir(parents=True)
    assert_refused(raylign(command, "half"), "half")


def begun_run(world: World, tree: dict[str, Any] | None = None) -> None:
    """A run folder that has not come to a checkpoint."""
    (world.folder / "runs/tiny").mkdir(parents=True)
    tiny.write_yaml(world.folder / "runs/tiny/config.yaml", tree or world.tree({}))


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["export", "nobody", "out"], ("nobody",)),
        (["export", "tiny", "out"], ("no intact checkpoint",)),
        (["export", "tiny", "out", "--step", "7"], ("step-000007", "raylign status")),
        (["export", "tiny", "out", "--dtype", "int8"], ("int8", "float32 or bfloat16")),
        (["export", "tiny", "full"], ("full", "no empty folder")),
        (["export", "tiny", "file"], ("file", "no empty folder")),
    ],
)
def test_what_cannot_be_exported_is_named_and_nothing_written(
    world: World, raylign: Callable[..., Outcome], words: list[str], named: tuple[str, ...]
) -> None:
    begun_run(world)
    (world.folder / "full").mkdir()
    (world.folder / "full/mine.txt").write_text("mine")
    (world.folder / "file").write_text("mine")
    assert_refused(raylign(*words), *named)
    assert not (world.folder / "out").exists()


def test_a_stage_without_checkpoints_of_its_own_cannot_be_exported(
    world: World, raylign: Callable[..., Outcome]
) -> None:
    begun_run(world, {"stage": "sft", "name": "tiny"})
    assert_refused(raylign("export", "tiny", "out"), "tiny")


# ---- the stages before PPO


def sft_tree(world: World, given: dict[str, Any]) -> dict[str, Any]:
    data = tiny.write_jsonl(world.folder / "sft.jsonl", [{"prompt": "1+1=", "completion": "2"}])
    sft = {"data": data, "batch_size": 2, "max_tokens": 16, "optimizer": {"lr": 1.0e-3}}
    base = {"stage": "sft", "name": "tiny-sft", "runs_dir": str(world.folder / "runs")}
    return tiny.changed(base | {"num_steps": 2, "model": str(world.policy), "sft": sft}, given)


@pytest.mark.parametrize(
    ("given", "row", "named"),
    [
        ({"model": "nowhere"}, {}, ("model: nowhere", "no config.json")),
        ({"sft.data": "absent.parquet"}, {}, ("absent.parquet", "no such file")),
        ({"sft.data": "bad.jsonl"}, {"text": "a"}, ("bad.jsonl", "'completion'")),
        ({"sft.data": "bad.jsonl"}, {"prompt": "a", "completion": ""}, ("row 0", "empty")),
        (
            {"sft.data": "bad.jsonl"},
            {"prompt": "a", "completion": "1" * 20},
            ("row 0", "max_tokens"),
        ),
        ({"sft.optimizer.lr": -1}, {}, ("sft.optimizer.lr",)),
        ({"sft.optimiser": 1}, {}, ("sft.optimiser", "did you mean optimizer?")),
        ({"name": "a/b"}, {}, ("name",)),
    ],
)
def test_supervised_fine_tuning_that_cannot_be_is_refused(
    world: World,
    raylign: Callable[..., Outcome],
    given: dict[str, Any],
    row: dict[str, Any],
    named: tuple[str, ...],
) -> None:
    tiny.write_jsonl(world.folder / "bad.jsonl", [row])
    path = tiny.write_yaml(world.folder / "sft.yaml", sft_tree(world, given))
    assert_refused(raylign("sft", str(path)), *named)
    assert not (world.folder / "runs").exists()


PAIR = {"prompt": "1+1=", "chosen": "2", "rejected": "3"}


@pytest.mark.parametrize(
    ("given", "row", "named"),
    [
        ({"model": "nowhere"}, PAIR, ("model: nowhere", "no config.json")),
        ({"training.pairs": "absent.parquet"}, PAIR, ("absent.parquet", "no such file")),
        ({}, {"prompt": "a", "chosen": "b"}, ("pairs.jsonl", "'rejected'")),
        ({}, PAIR | {"chosen": 3}, ("pairs.jsonl", "row 1", "chosen")),
        ({}, PAIR | {"chosen": "1" * 20}, ("pairs.jsonl", "row 1", "max_tokens 16")),
        ({"training.held_out_pairs": "absent.jsonl"}, PAIR, ("absent.jsonl", "no such file")),
        ({"training.normalise_on": "absent.jsonl"}, PAIR, ("absent.jsonl", "no such file")),
        ({"training.epoch": 1}, PAIR, ("training.epoch", "did you mean epochs?")),
    ],
)
def test_a_reward_model_that_cannot_be_trained_is_refused(
    world: World,
    raylign: Callable[..., Outcome],
    given: dict[str, Any],
    row: dict[str, Any],
    named: tuple[str, ...],
) -> None:
    pairs = tiny.write_jsonl(world.folder / "pairs.jsonl", [row])
    base = {
        "stage": "reward_model",
        "name": "tiny-rm",
        "runs_dir": str(world.folder / "runs"),
        "model": str(world.policy),
        "training": {"pairs": pairs, "max_tokens": 16},
    }
    path = tiny.write_yaml(world.folder / "rm.yaml", tiny.changed(base, given))
    assert_refused(raylign("reward-model", str(path)), *named)
    assert not (world.folder / "runs").exists()


# ---- in a process of its own


SEEN = """
import sys
from cluster.cli import main
try:
    main(sys.argv[1:])
finally:
    print([name for name in ("torch", "vllm", "ray") if name in sys.modules])
"""


def in_a_process(folder: Path, *words: str) -> Outcome:
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", SEEN, *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return Outcome(done.returncode, done.stdout, done.stderr, time.monotonic() - started)


@pytest.mark.parametrize(
    "name", ["an unknown key", "a missing column", "a reference of another vocabulary"]
)
def test_a_terminal_shows_the_one_line_and_neither_engine_nor_learner_was_imported(
    world: World, name: str
) -> None:
    case = CASES[name]
    path = tiny.write_yaml(world.folder / "run.yaml", world.tree(case.changes(world)))
    outcome = in_a_process(world.folder, "doctor", str(path))
    assert json.loads(outcome.stdout.replace("'", '"')) == []
    assert_refused(Outcome(outcome.code, "", outcome.stderr, outcome.seconds), *case.named)
