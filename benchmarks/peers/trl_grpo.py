"""One run of TRL's GRPOTrainer with vLLM in its process: a JSON line for every step. run.py starts it.

The configuration is what a careful user of TRL would choose on a machine without a GPU:

- vLLM inside the trainer's process (vllm_mode="colocate"), all 64 completions decoding together, no
  sleep mode: it frees memory that nobody else needs.
- 8 prompts of 8 samples; 4 optimizer steps of 16 trajectories a generation, one pass over each.
- float32 and no gradient checkpointing, as raylign here. (TRL's defaults are bfloat16 autocast and
  checkpointing.)
- beta > 0 and the k3 estimate of the KL in the loss, as raylign's ppo.kl.where=loss with the same
  coefficient. TRL's default of 0 needs no reference and does one forward pass less. The policy's own
  forward pass before the first optimizer step (vllm_importance_sampling_correction, TRL's default) is
  kept: raylign's ppo.anchor=learner does the same.
- no evaluation, checkpoints, progress bar, reports to services or data loader workers.
- one process of 1 or 2 threads, or two data-parallel processes of 1 thread, each with its own vLLM,
  as `accelerate launch` would start them: whichever run.py finds fastest. TORCHDYNAMO_DISABLE=1 spares
  vLLM the compilation of one small function at the start.
- TRL neither packs nor sorts by length: all 64 rows are padded to the longest.

Three things TRL has no option for. vLLM's constructor is given eager mode and a cache of the same
size as raylign's (else it compiles first and takes a third of the memory), and float32 (else
it makes bfloat16 of a float32 checkpoint). And vLLM's linear layers do without oneDNN: with it they
keep a packed copy of the weights and drop the originals, so TRL's load_weights fails. It costs vLLM
about a third of its speed at this size.

TRL 1.16 says that it supports vLLM up to 0.31 and warns about 0.32, which is raylign's. What it needs
works: `checks` compares vLLM's weights and logprobs with the policy's.
"""

from __future__ import annotations

import argparse
import functools
import time
from typing import Any

import torch
import trl.generation.vllm_generation as vllm_generation
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from vllm import _custom_ops

from benchmarks.peers.report import (
    arguments,
    change,
    difference,
    leave,
    line,
    snapshot,
    spread,
    total,
    versions,
)
from benchmarks.work import LR, prompts, reward

SAMPLES, OPTIMIZER_STEPS = 8, 4


class Rewards:
    """The reward as TRL's function, the tokens scored since the last line, and every mean."""

    __name__ = "reward"

    def __init__(self) -> None:
        self.tokens = 0
        self.means: list[float] = []

    def __call__(self, completions: list[str], completion_ids: Any, **_: Any) -> list[float]:
        values = [reward(text) for text in completions]
        self.tokens += sum(len(ids) for ids in completion_ids)
        self.means.append(total(sum(values)) / total(len(values)))
        return values


class Lines(TrainerCallback):
    """A line once the last optimizer step of a generation is done."""

    def __init__(self, rewards: Rewards) -> None:
        self.rewards = rewards

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % OPTIMIZER_STEPS == 0:
            line(ended=time.time(), tokens=total(self.rewards.tokens))
            self.rewards.tokens = 0


def main() -> None:
    options = arguments()
    configure_vllm()
    rewards = Rewards()
    trainer = make_trainer(options, rewards)
    before, served_before = snapshot(trainer.model), served(trainer)
    trainer.train()
    trainer.vllm_generation.sync_weights()
    checks(trainer, rewards, before, served_before)


def configure_vllm() -> None:
    """What TRL has no option for; see above."""
    _custom_ops._supports_onednn = False
    vllm_generation.LLM = functools.partial(
        vllm_generation.LLM, dtype="float32", enforce_eager=True, kv_cache_memory_bytes=1 << 27
    )


def make_trainer(options: argparse.Namespace, rewards: Rewards) -> GRPOTrainer:
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(options.model),
        reward_funcs=rewards,
        args=config(options),
        train_dataset=Dataset.from_dict({"prompt": prompts(512)}),
        callbacks=[Lines(rewards)],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def config(options: argparse.Namespace) -> GRPOConfig:
    return GRPOConfig(
        output_dir=str(options.folder),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        use_vllm=True,
        vllm_mode="colocate",
        vllm_max_model_length=160,
        max_completion_length=128,
        temperature=1.0,
        num_generations=SAMPLES,
        per_device_train_batch_size=16 // options.processes,
        gradient_accumulation_steps=1,
        steps_per_generation=OPTIMIZER_STEPS,
        num_iterations=1,
        max_steps=options.steps * OPTIMIZER_STEPS,
        learning_rate=LR,
        lr_scheduler_type="constant",
        beta=options.beta,
        ddp_find_unused_parameters=False,
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_steps=OPTIMIZER_STEPS,
        seed=0,
    )


def served(trainer: GRPOTrainer) -> dict[str, torch.Tensor]:
    """A copy of the weights that vLLM samples from."""
    executor = trainer.vllm_generation.llm.llm_engine.model_executor
    return snapshot(executor.driver_worker.model_runner.model)


def checks(trainer: GRPOTrainer, rewards: Rewards, before: dict, served_before: dict) -> None:
    """That the policy was trained, and that vLLM has its weights: here and, step by step, by the
    difference of the logprobs that vLLM sampled with and those that the policy gives."""
    policy, now = snapshot(trainer.model), served(trainer)
    history = [row for row in trainer.state.log_history if "reward" in row]
    layer = "model.layers.0.self_attn."
    joined = torch.cat([policy[f"{layer}{part}_proj.weight"] for part in "qkv"])
    embedding = policy["model.embed_tokens.weight"]
    same = torch.equal(now[f"{layer}qkv_proj.weight"], joined) and torch.equal(
        now["model.embed_tokens.weight"][: len(embedding)], embedding
    )
    line(
        parameters_changed=change(before, policy),
        ranks_differ=spread(trainer.model),
        served_changed=change(served_before, now),
        served_equal=same,
        logprob_difference=max(row["sampling/sampling_logp_difference/max"] for row in history),
        reward_error=difference(rewards.means, [row["reward"] for row in history]),
        rewards=rewards.means,
        losses=[row["loss"] for row in history],
        kl=[row["kl"] for row in history],
        versions=versions("trl", "transformers", "torch", "vllm"),
    )


if __name__ == "__main__":
    main()
    leave()
