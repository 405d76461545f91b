"""Tiny things made in code, for the tests: a model's folder, prompts, trajectories, a run's config."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from actors.trajectory import Prompt, Trajectory, trajectory_id
from examples import tiny_model

TEXTS = tuple(f"{a}+{b}=" for a in range(10, 40) for b in range(10))
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def write_policy(folder: Path, texts: Iterable[str] = TEXTS, *, chat: bool = False) -> Path:
    """A Hugging Face folder that transformers and vLLM load; its tokenizer depends on `texts`."""
    tiny_model.write_model(folder, tiny_model.train_tokenizer(texts), seed=0)
    if chat:
        (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_yaml(path: Path, tree: Mapping[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(dict(tree), sort_keys=False))
    return path


def run_tree(folder: Path, policy: Path | str = "policy") -> dict[str, Any]:
    """The config of a PPO run that passes the doctor, as YAML holds it; its prompts are written."""
    prompts = write_jsonl(
        folder / "prompts.jsonl", ({"prompt": text, "answer": "1"} for text in TEXTS[:8])
    )
    return {
        "stage": "train",
        "name": "tiny",
        "runs_dir": str(folder / "runs"),
        "num_steps": 4,
        "batch_size": 8,
        "policy": str(policy),
        "prompts": {"path": prompts},
        "sampling": {"max_tokens": 8, "samples_per_prompt": 2},
        "generators": {"max_model_len": 32, "kv_cache_bytes": 1 << 24},
        "reward": {
            "scorer": {"kind": "function", "function": "examples.arithmetic.rewards:exact_answer"}
        },
        "ppo": {"minibatches": 2},
    }


def changed(tree: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `tree` with "key.path": value put in; None takes the key out."""
    copy = json.loads(json.dumps(tree))
    for path, value in changes.items():
        *parents, last = path.split(".")
        section = copy
        for key in parents:
            section = section.setdefault(key, {})
        section[last] = value
        if value is None:
            del section[last]
    return copy


def prompt(number: int = 0, epoch: int = 0, **changes: Any) -> Prompt:
    given: dict[str, Any] = {
        "prompt_id": f"p{number}",
        "epoch": epoch,
        "text": f"{number}+1=",
        "ids": (2, 3 + number % 50),
        "answer": str(number + 1),
    }
    return Prompt(**given | changes)


def trajectory(number: int = 0, epoch: int = 0, sample: int = 0, **changes: Any) -> Trajectory:
    """A trajectory of prompt `number` that holds in every respect, but for `changes`."""
    given: dict[str, Any] = {
        "trajectory_id": trajectory_id(f"p{number}", epoch, sample),
        "prompt_id": f"p{number}",
        "sample_index": sample,
        "epoch": epoch,
        "prompt_ids": (2, 3),
        "completion_ids": (5, 6, 1),
        "behavior_logprobs": (-0.5, -1.25, -0.0),
        "policy_version": 0,
        "policy_version_max": 0,
        "version_spans": ((0, 0),),
        "prompt": f"{number}+1=",
        "completion": "42",
        "finish_reason": "stop",
        "score": 1.0,
        "score_parts": {"rule": 1.0},
        "temperature": 1.0,
        "generator_id": "generator-0",
        "generated_at": 1.5,
        "generate_s": 0.25,
        "score_s": 0.125,
    }
    return Trajectory(**given | changes)


def as_reward_model(source: Path, folder: Path) -> Path:
    """A copy of a model's folder whose config says that it is one; its weights are as they were."""
    shutil.copytree(source, folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    kind = {"architectures": ["Qwen2ForSequenceClassification"], "id2label": {"0": "LABEL_0"}}
    path.write_text(json.dumps(config | kind))
    return folder
