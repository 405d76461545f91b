"""Tiny models, batches and process groups for the learner's tests."""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.forkserver
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
)

from actors.trajectory import Trajectory, to_table, trajectory_id
from actors.weight_update import Probe
from learner.config import KLConfig, LearnerConfig, OptimizerConfig, PPOConfig
from learner.learner_spec import LearnerSpec, Rendezvous, Samples
from learner.learner_worker import LearnerWorker
from learner.process_group import join

PAD, EOS = 0, 1
CHARACTERS = [chr(code) for code in range(32, 127)]
VOCABULARY = 2 + len(CHARACTERS)  # 97: two ranks get shards of unequal size
TEMPERATURE = 0.7
CHAT = (
    "{% for m in messages %}<{{ m['role'][0] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "bos_token_id": None,
    "dtype": "float32",
}


@cache
def mesh() -> DeviceMesh:
    """A group of one, in the process of the tests."""
    torch.set_num_threads(1)
    folder = TemporaryDirectory(prefix="raylign-test-")
    _kept.append(folder)
    return join(Rendezvous(1, file=f"{folder.name}/rendezvous"), 0, 60.0)


_kept: list[TemporaryDirectory[str]] = []


def run_ranks(function: Callable[..., Any], *args: Any, world_size: int = 2) -> list[Any]:
    """function(rank, rendezvous, *args) in a process each; their results, by rank.

    A result travels through a file. A rank that raises fails the test with its own traceback.
    """
    context = _forkserver()
    with TemporaryDirectory(prefix="raylign-test-") as folder:
        meeting = Rendezvous(world_size, file=f"{folder}/rendezvous")
        outs = [f"{folder}/{rank}.pt" for rank in range(world_size)]
        ranks = [
            context.Process(target=_rank, args=(function, rank, meeting, outs[rank], args))
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(120)
            if process.is_alive():
                process.kill()
        results = [
            torch.load(out, weights_only=False) if Path(out).exists() else "died or hung"
            for out in outs
        ]
    failed = [f"rank {rank}: {one}" for rank, one in enumerate(results) if isinstance(one, str)]
    assert not failed, "\n".join(failed)
    return results


def _rank(
    function: Callable[..., Any], rank: int, meeting: Rendezvous, out: str, args: tuple[Any, ...]
) -> None:
    import traceback

    torch.set_num_threads(1)
    try:
        result = function(rank, meeting, *args)
    except BaseException:
        result = traceback.format_exc()
    torch.save(result, out)
    os._exit(0)  # destroying the group would wait for a peer that may be gone


@cache
def _forkserver() -> Any:
    """Ranks are forked from a process that has imported torch and transformers already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with pytest.MonkeyPatch.context() as environment:  # the server itself does not get sys.path
        environment.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
        environment.setenv("OMP_NUM_THREADS", "1")
        multiprocessing.forkserver.ensure_running()
    return context


def model_config(**changes: Any) -> Qwen2Config:
    return Qwen2Config(**{**SHAPE, "tie_word_embeddings": True, **changes})


def write_qwen2(folder: Path, seed: int = 0, **changes: Any) -> str:
    torch.manual_seed(seed)
    return _write(Qwen2ForCausalLM(model_config(**changes)), folder)


def write_llama(folder: Path, seed: int = 0) -> str:
    """Its lm_head is a matrix of its own, with head_dim given apart from the hidden size."""
    torch.manual_seed(seed)
    config = LlamaConfig(**SHAPE, tie_word_embeddings=False, head_dim=32)
    return _write(LlamaForCausalLM(config), folder)


def write_reward_model(folder: Path, seed: int = 0) -> str:
    torch.manual_seed(seed)
    config = model_config(num_labels=1)
    config.score_mean, config.score_sd = 0.8, 2.5
    return _write(Qwen2ForSequenceClassification(config), folder)


def write_near(folder: Path, near: str, noise: float) -> str:
    """A folder whose weights differ a little: a reference that the policy has left."""
    torch.manual_seed(99)
    model = Qwen2ForCausalLM.from_pretrained(near, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += noise * torch.randn_like(parameter)
    return _write(model, folder)


def _write(model: PreTrainedModel, folder: Path) -> str:
    with torch.no_grad():  # norms of 1 and biases of 0 would hide a mistake
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)
            elif name.endswith("score.weight"):
                parameter *= 3
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return str(folder)


def write_tokenizer(folder: Path) -> None:
    """A token for each printable character."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<pad>", "<eos>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "eos_token": "<eos>",
        "chat_template": CHAT,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def trajectories(
    *, size: int = 8, samples: int = 2, seed: int = 0, temperature: float = TEMPERATURE
) -> list[Trajectory]:
    """`size` rows of prompts sampled `samples` times, of many lengths; behavior logprobs to be set
    by `fresh`. Completions hold pad and end-of-sequence ids in their middle too."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(size):
        prompt_id, sample = f"p{i // samples}", i % samples
        prompt_rng = np.random.default_rng([seed, i // samples])
        prompt = prompt_rng.integers(2, VOCABULARY, prompt_rng.integers(1, 9)).tolist()
        completion = rng.integers(0, VOCABULARY, rng.integers(1, 14)).tolist()
        if i == 0:
            completion = [5, PAD, EOS, PAD, 7, 9]
        if i == 1:
            completion = [EOS]
        rows.append(_trajectory(prompt_id, sample, prompt, completion, rng, temperature))
    return rows


def _trajectory(
    prompt_id: str,
    sample: int,
    prompt: Sequence[int],
    completion: Sequence[int],
    rng: np.random.Generator,
    temperature: float,
) -> Trajectory:
    return Trajectory(
        trajectory_id=trajectory_id(prompt_id, 0, sample),
        prompt_id=prompt_id,
        sample_index=sample,
        epoch=0,
        prompt_ids=tuple(prompt),
        completion_ids=tuple(completion),
        behavior_logprobs=tuple(-rng.random(len(completion)) - 0.5),
        policy_version=3,
        policy_version_max=3,
        version_spans=((3, 0),),
        prompt="p",
        completion="c",
        finish_reason="stop",
        score=float(rng.normal()),
        score_parts={},
        temperature=temperature,
        generator_id="g0",
        generated_at=0.0,
        generate_s=0.1,
        score_s=0.1,
    )


def with_column(table: pa.Table, name: str, values: Sequence[Any]) -> pa.Table:
    place = table.schema.get_field_index(name)
    return table.set_column(place, table.field(name), pa.array(values, table.field(name).type))


def fresh(worker: LearnerWorker, table: pa.Table, shift: float = 0.0) -> pa.Table:
    """The table as this very policy would have sampled it (`shift`: almost), a collective."""
    lists = {
        name: tuple(np.array(ids) for ids in table[name].to_pylist())
        for name in ("prompt_ids", "completion_ids")
    }
    samples = Samples(**lists, temperature=table["temperature"][0].as_py())
    logprobs = worker.policy_logprobs(samples)
    noise = np.random.default_rng(5)
    return with_column(
        table, "behavior_logprobs", [row + shift * noise.normal(size=len(row)) for row in logprobs]
    )


def batch_table(*, seed: int = 0, size: int = 8, samples: int = 2) -> pa.Table:
    return to_table(trajectories(seed=seed, size=size, samples=samples))


def ppo_config(**changes: Any) -> PPOConfig:
    """A step of 2 x 2 minibatches that moves the weights enough to be clipped."""
    fast = OptimizerConfig(lr=3e-4, warmup_steps=2, weight_decay=0.01)
    values = {"policy": fast, "value": fast, "kl": KLConfig(coef=0.1), "value_clip_range": 0.1}
    return PPOConfig.model_validate({**values, **changes})


@dataclass
class Case:
    """A learner to be built, at any number of ranks."""

    policy: str
    reference: str
    ppo: PPOConfig = field(default_factory=ppo_config)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    push_dtype: str = "float32"
    num_steps: int = 10
    sgd: bool = False  # weights then move by the gradient itself, which Adam would normalise away

    def start(self, rank: int = 0, meeting: Rendezvous | None = None) -> LearnerWorker:
        if meeting is None:
            mesh()  # join() then takes the group that is there
            meeting = Rendezvous(1)
        probe = Probe.of(VOCABULARY, {0, 1})
        ranked = self.learner.model_copy(update={"ranks": meeting.world_size, "timeout_s": 60.0})
        spec = LearnerSpec(
            self.policy, self.reference, self.ppo, ranked, 0, self.num_steps, self.push_dtype, probe
        )
        worker = LearnerWorker(spec, rank)
        worker.start(meeting)
        if self.sgd:
            update = worker._update
            for optimizer in filter(None, (update.policy_optimizer, update.value_optimizer)):
                optimizer.adamw = torch.optim.SGD(optimizer.parameters)  # type: ignore[assignment]
        return worker


def weights_of(worker: LearnerWorker) -> dict[str, Tensor]:
    """Copies of all trained weights, whole, on every rank (a collective)."""
    models = {"policy": worker._update.models.policy, "value": worker._update.models.value}
    return {
        f"{kind}.{name}": whole(parameter)
        for kind, model in models.items()
        if model is not None
        for name, parameter in model.named_parameters()
    }


def write_checkpoint(worker: LearnerWorker, folder: str | Path) -> None:
    """Save, and wait until it is written."""
    worker.save(str(folder))
    deadline = time.monotonic() + 60
    while not worker.saved():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def everything(worker: LearnerWorker) -> dict[str, Tensor]:
    """Weights, optimizer state, KL coefficient and random state: all that decides the next step."""
    update = worker._update
    found = weights_of(worker)
    for kind, optimizer in (("policy", update.policy_optimizer), ("value", update.value_optimizer)):
        if optimizer is None:
            continue
        for i, parameter in enumerate(optimizer.parameters):
            for name, tensor in optimizer.adamw.state.get(parameter, {}).items():
                found[f"{kind}.adam.{i}.{name}"] = whole(tensor)
    found["kl_coef"] = torch.tensor(update.kl_coef, dtype=torch.float64)
    found["rng"] = torch.get_rng_state()
    return found


def whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[name].double() - b[name].double()).abs().max().item() for name in a)


def same_bytes(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def hf_logprobs(
    model: nn.Module, prompt: Sequence[int], completion: Sequence[int], temperature: float
) -> Tensor:
    """Of one completion, by transformers alone: no packing, no chunks, whole logits."""
    ids = torch.tensor([[*prompt, *completion]])
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    picked = torch.log_softmax(logits / temperature, -1)
    return picked.gather(1, torch.tensor(list(completion))[:, None])[:, 0]


@dataclass(frozen=True)
class Folders:
    """Model folders that no test changes."""

    policy: str  # Qwen2, tied embeddings
    reference: str  # close to it
    llama: str  # untied
    reward_model: str


@cache
def folders() -> Folders:
    root = TemporaryDirectory(prefix="raylign-test-models-")
    _kept.append(root)
    path = Path(root.name)
    policy = write_qwen2(path / "policy")
    return Folders(
        policy,
        write_near(path / "reference", policy, 0.02),
        write_llama(path / "llama"),
        write_reward_model(path / "reward_model"),
    )


def case(ppo: PPOConfig | None = None, **changes: Any) -> Case:
    made = folders()
    return Case(made.policy, made.reference, ppo or ppo_config(), **changes)
