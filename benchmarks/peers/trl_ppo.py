"""One run of TRL's classic PPOTrainer (0.11, the last with step(queries, responses, scores)): a JSON
line for every step. run.py starts it.

The configuration is what a careful user of it would choose on a machine without a GPU:

- AutoModelForCausalLMWithValueHead: the critic is a head on the policy's trunk. That is half the
  learner work of a separate critic of the policy's size; raylign's like-for-like mode is
  ppo.value_model=shared, and both are measured.
- generation by transformers, all 64 prompts in one batch, pure sampling (top_k=0: the default of 50
  would sample from other probabilities than PPO trains on), stopping when the last row is done.
- 64 trajectories a step, one epoch, 4 minibatches of 16 with an optimizer step each.
- a reference model and the KL in the reward with a fixed coefficient, raylign's.
- AdamW with raylign's learning rate instead of the default Adam; gradients are clipped to 1.
- float32, no gradient checkpointing, no trackers.
- one process of 1 or 2 threads, or two data-parallel processes of 1 thread that share the 64
  trajectories, as `accelerate launch` would start them: whichever run.py finds fastest.
- it neither packs nor sorts by length: all rows are padded to the longest.

The user's loop around step() is `one_step`. It runs unpatched, with transformers 4.46, of its time.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

from benchmarks.peers.report import (
    arguments,
    change,
    leave,
    line,
    snapshot,
    spread,
    total,
    versions,
)
from benchmarks.work import EOS, LR, PAD, PAD_ID, prompts, reward

BATCH = 64


def main() -> None:
    options = arguments()
    trainer = make_trainer(options)
    queries = [torch.tensor(ids) for ids in trainer.tokenizer(prompts(512))["input_ids"]]
    before = snapshot(trainer.model)
    history = [one_step(trainer, queries, number) for number in range(options.steps)]
    line(
        parameters_changed=change(before, snapshot(trainer.model)),
        ranks_differ=spread(trainer.model),
        rewards=[row["reward"] for row in history],
        losses=[float(row["ppo/loss/total"]) for row in history],
        kl=[float(row["objective/kl"]) for row in history],
        versions=versions("trl", "transformers", "torch"),
    )


def make_trainer(options: argparse.Namespace) -> PPOTrainer:
    model, reference = (
        AutoModelForCausalLMWithValueHead.from_pretrained(options.model, torch_dtype=torch.float32)
        for _ in range(2)
    )
    # By file: the folder was written by a newer transformers, whose class names this one lacks.
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=f"{options.model}/tokenizer.json",
        pad_token=PAD,
        eos_token=EOS,
        padding_side="left",
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.0)
    return PPOTrainer(config(options), model, reference, tokenizer, optimizer=optimizer)


def config(options: argparse.Namespace) -> PPOConfig:
    return PPOConfig(
        batch_size=BATCH // options.processes,
        mini_batch_size=16 // options.processes,
        gradient_accumulation_steps=1,
        ppo_epochs=1,
        init_kl_coef=options.beta,
        adap_kl_ctrl=False,
        max_grad_norm=1.0,
        accelerator_kwargs={"cpu": True},
        seed=0,
    )


def one_step(trainer: PPOTrainer, prompts_: list[torch.Tensor], number: int) -> dict[str, Any]:
    """Sample 64 completions, score their text, train on them."""
    share = trainer.config.batch_size
    first = number * BATCH % len(prompts_) + share * trainer.accelerator.process_index
    queries = prompts_[first : first + share]
    responses = trainer.generate(
        queries,
        return_prompt=False,
        batch_size=share,
        max_new_tokens=128,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        pad_token_id=PAD_ID,
    )
    texts = trainer.tokenizer.batch_decode(responses, skip_special_tokens=True)
    rewards = [reward(text) for text in texts]
    statistics = trainer.step(queries, responses, [torch.tensor(value) for value in rewards])
    line(ended=time.time(), tokens=total(sum(len(response) for response in responses)))
    return {**statistics, "reward": total(sum(rewards)) / BATCH}


if __name__ == "__main__":
    main()
    leave()
