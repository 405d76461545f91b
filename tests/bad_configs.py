"""What is wrong with a PPO run's config, its data, models and rewards: for test_bad_inputs.py.

A case changes what would be a good config; `named` stands in the line that refuses it.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import load_file, save_file

from tests import tiny

FUNCTION = {"kind": "function", "function": "examples.arithmetic.rewards:exact_answer"}

LONG_ROPE = {"type": "longrope", "original_max_position_embeddings": 16}


@dataclass(frozen=True)
class World:
    """What a case finds: a folder with prompts and pairs, the policy, and a model of another
    vocabulary. The command runs from `folder`."""

    folder: Path
    policy: Path
    stranger: Path

    def tree(self, changes: dict[str, Any]) -> dict[str, Any]:
        return tiny.changed(tiny.run_tree(self.folder, self.policy), changes)


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
    sys.modules.pop(name, None)
    (world.folder / f"{name}.py").write_text(source)
    return {"reward.scorer.function": f"{name}:score"}


def model_folder(world: World, *files: str) -> str:
    folder = world.folder / "half"
    folder.mkdir()
    for name in files:
        (folder / name).write_bytes((world.policy / name).read_bytes())
    return str(folder)


def configured(world: World, **settings: Any) -> str:
    """The policy under other settings of its config.json."""
    names = ("model.safetensors", "tokenizer.json", "tokenizer_config.json")
    folder = Path(model_folder(world, *names))
    given = json.loads((world.policy / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(given | settings))
    return str(folder)


def renamed(world: World, name: Callable[[str], str | None]) -> str:
    """The policy with its weights under other names; None takes a weight out."""
    folder = Path(shutil.copytree(world.policy, world.folder / "half"))
    path = folder / "model.safetensors"
    weights = {new: w for old, w in load_file(path).items() if (new := name(old))}
    save_file(weights, path, metadata={"format": "pt"})
    return str(folder)


def cut(world: World) -> str:
    folder = Path(shutil.copytree(world.policy, world.folder / "half"))
    (folder / "model.safetensors").write_bytes(b"")
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
    "minibatch and ranks": changes(
        {"learner.ranks": 5}, "learner.ranks 5", "set ppo.minibatches=1 or learner.ranks=4"
    ),
    "fewer trajectories than ranks": changes(
        {"learner.ranks": 9, "ppo.minibatches": 1}, "8 trajectories", "ranks 9", "set learner.ranks=8"
    ),
    "room for a prompt": changes(
        {"sampling.max_tokens": 32}, "sampling.max_tokens: 32", "max_model_len 32", "raise"
    ),
    "grpo of one sample": changes(
        {"ppo.advantage": "grpo", "sampling.samples_per_prompt": 1}, "samples_per_prompt", "2 or more"
    ),
    "grpo with the KL in the reward": changes(
        {"ppo.advantage": "grpo", "ppo.kl.where": "reward"}, "ppo: kl.where: reward", "set it to loss"
    ),
    "a KL target without a coefficient": changes(
        {"ppo.kl": {"coef": 0, "target": 5}}, "ppo.kl: coef: 0", "set coef above 0"
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
    "a cache that holds no sequence": changes(
        {"generators.kv_cache_bytes": 1000}, "kv_cache_bytes: 1000", "max_model_len 32", "or more"
    ),
    "heads that its GPUs cannot share": changes(
        {"generators.tensor_parallel_size": 3, "device": "cuda"},
        "tensor_parallel_size: 3", "2 attention heads", "nearest: 2",
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
        lambda w: rows(w, {"prompt": "a"}, {"prompt": ""}), ("row 2", "empty", "remove the row")
    ),
    "a prompt of blanks": Case(
        lambda w: rows(w, {"prompt": "a"}, {"prompt": " \n"}), ("row 2", "empty", "remove the row")
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
        lambda w: rows(w, {"prompt": "a", "metadata": "{"}), ("row 1", "metadata is not JSON")
    ),
    "metadata that is not finite": Case(
        lambda w: rows(w, {"prompt": "a", "metadata": {"weight": float("nan")}}),
        ("row 1", "metadata is not JSON", "NaN is no JSON number"),
    ),
    "an answer of several values": Case(
        lambda w: rows(w, {"prompt": "a", "answer": ["1", "2"]}), ("row 1", "answer is list", "metadata")
    ),
    "messages of another form": Case(
        lambda w: rows(w, {"messages": "hello"}), ("row 1", "messages is no list")
    ),
    "messages without a chat template": Case(
        lambda w: {**rows(w, {"messages": [{"role": "user", "content": "a"}]}), "policy": str(w.stranger)},
        ("row 1", "messages", "no chat template", "use texts"),
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
        lambda w: {"policy": configured(w, attention_dropout=0.1)},
        ("policy: ", "attention_dropout is 0.1", "set it to 0")
    ),
    "a policy whose router is noisy": Case(
        lambda w: {"policy": configured(w, router_jitter_noise=0.1)},
        ("policy: ", "router_jitter_noise is 0.1", "set it to 0"),
    ),
    "a policy that caps its logits": Case(
        lambda w: {"policy": configured(w, attn_logit_softcapping=50.0)},
        ("policy: ", "attn_logit_softcapping is 50.0", "give a model without it"),
    ),
    "a policy that masks by itself": Case(
        lambda w: {"policy": configured(w, model_type="doge")},
        ("policy: ", "a mask of its own", "another model than a doge"),
    ),
    "a policy whose rope changes on the way": Case(
        lambda w: {"policy": configured(w, rope_scaling=LONG_ROPE)},
        ("policy: ", "beyond 16 tokens", "generators.max_model_len allows 32", "16 or less"),
    ),
    "a policy that lacks a layer": Case(
        lambda w: {"policy": renamed(w, lambda name: None if "layers.0." in name else name)},
        ("policy: ", "lack layer 0 of", "would be random", "copy the model again"),
    ),
    "a policy as a wrapper saved it": Case(
        lambda w: {"policy": renamed(w, lambda name: f"module.{name}")},
        ("policy: ", "named module.model.", "take 'module.' off"),
    ),
    "a reference whose file is cut": Case(
        lambda w: {"reference": cut(w)},
        ("reference: ", "model.safetensors is no safetensors file", "copy the model again"),
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
    "a reward model that reads messages, and none there": Case(
        lambda w: {
            "reward.scorer": {
                "kind": "reward_model",
                "path": str(tiny.as_reward_model(w.stranger, w.folder / "reward")),
                "input": "messages",
            }
        },
        ("reward.scorer: ", "p0 has no messages", "a column messages, or set input: text"),
    ),
    "a judge of another vocabulary": Case(
        lambda w: {
            "evaluation": {
                "prompts": {"path": str(w.folder / "prompts.jsonl")},
                "scorer": {"kind": "reward_model", "path": str(w.stranger)},
            }
        },
        ("evaluation.scorer: ", "not the policy's"),
    ),
    "a reference with too few positions": Case(
        lambda w: {"reference": configured(w, max_position_embeddings=12)},
        ("reference: ", "max_position_embeddings is 12", "13 tokens", "by 1"),
    ),
    "no reward model": changes(
        {"reward.scorer": {"kind": "reward_model", "path": "nowhere"}}, "reward.scorer: nowhere"
    ),
    "a language model as the reward model": Case(
        lambda w: {"reward.scorer": {"kind": "reward_model", "path": str(w.policy)}},
        ("reward.scorer: ", "ForCausalLM is no reward model", "`raylign reward-model`"),
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
    "a reward address with a secret in it": changes(
        {"reward.scorer": {"kind": "http", "url": "https://example.org/?api_key=abc"}},
        "reward.scorer: ", "api_key", "token_env",
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
    "pretraining text that is none": Case(
        lambda w: {
            "ppo.ptx": {
                "path": tiny.write_jsonl(w.folder / "ptx.jsonl", [{"prompt": "a", "completion": ["b"]}]),
                "coef": 0.1,
                "batch_size": 4,
            }
        },
        ("ppo.ptx.path: ", "ptx.jsonl", "row 1", "completion is list, not text"),
    ),
    "half of a surrogate pair": Case(
        lambda w: rows(w, {"prompt": "a"}, {"prompt": "\ud83d"}), ("bad.jsonl", "line 2", "no text")
    ),
    "resuming what is not there": changes({}, "no run to resume", words=("--resume",)),
    "resuming and overwriting": changes({}, "--resume", words=("--resume", "--overwrite")),
    "a Ray that is not there": changes({"ray_address": "127.0.0.1:1"}, "ray_address"),
}  # fmt: skip
