"""Trains the reward model r_theta(x, y) on preference pairs.

    loss = -mean log sigmoid(r(x, y_chosen) - r(x, y_rejected))

The backbone of a causal language model gets a scalar head, zero at first, that is read at the last
token; there are no logits over the vocabulary.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from reward_service.config import RewardTrainingConfig
from reward_service.pairs import Pair, read_pairs, read_reference
from reward_service.reward_model import (
    last_token_scores,
    length_batches,
    score_sequences,
    unfit,
)
from reward_service.tokenizer import load_tokenizer
from reward_service.weight_names import pretrained

Progress = Callable[[int, int, dict[str, float]], None]  # step (from 1), num_steps, metrics


def pairwise_loss(
    chosen_scores: Tensor, rejected_scores: Tensor
) -> tuple[Tensor, dict[str, float]]:
    """loss = -mean log sigmoid(chosen - rejected); both [B] -> (loss scalar, metrics).

    accuracy: share of pairs with chosen above rejected, a tie counts half; margin: mean difference.
    """
    difference = chosen_scores - rejected_scores
    loss = -F.logsigmoid(difference).mean()
    right = (difference > 0).double() + 0.5 * (difference == 0).double()
    return loss, {
        "loss": loss.item(),
        "accuracy": right.mean().item(),
        "margin": difference.mean().item(),
    }


def train(
    config: RewardTrainingConfig,
    *,
    model: str,
    out: Path,
    seed: int,
    device: str,
    progress: Progress,
) -> dict[str, float]:
    """Trains on the backbone in the folder `model`, whose tokenizer it uses, and writes a Hugging
    Face sequence-classification folder `out`, which appears when it is complete.

    Returns the last step's loss, accuracy and margin, held_out_accuracy and score_mean, score_sd
    where their files are given, and seconds. Raises ValueError for wrong input, all of the data's
    before the model is loaded, and FloatingPointError when loss or gradient stops being finite.
    """
    started = time.monotonic()
    if out.exists():
        raise ValueError(f"{out}: exists already; remove it, or choose another name")
    if not (Path(model) / "config.json").is_file():
        raise ValueError(f"{model}: no config.json; give the folder of a causal language model")
    tokenizer = load_tokenizer(model)
    longest = config.max_tokens
    pairs = read_pairs(config.pairs, tokenizer, longest)
    held_out, reference = list[Pair](), list[list[int]]()
    if config.held_out_pairs is not None:
        held_out = read_pairs(config.held_out_pairs, tokenizer, longest)
    if config.normalise_on is not None:
        reference = read_reference(config.normalise_on, tokenizer, longest)
    torch.manual_seed(seed)  # dropout
    reward_model = _with_zero_head(model, tokenizer).to(device)
    _check_rows(reward_model, config.pairs, pairs)
    _check_rows(reward_model, config.held_out_pairs, held_out)
    _check_rows(reward_model, config.normalise_on, [[ids] for ids in reference])
    metrics = _optimise(reward_model.train(), pairs, config, seed, progress)
    reward_model.eval()
    if held_out:
        metrics["held_out_accuracy"] = _accuracy(reward_model, held_out, config.max_batch_tokens)
    if reference:
        metrics |= _normalise(reward_model, reference, config)
    _save(reward_model, tokenizer, out)
    return metrics | {"seconds": time.monotonic() - started}


def _check_rows(model: Any, path: str | None, rows: Sequence[Sequence[list[int]]]) -> None:
    for number, row in enumerate(rows, 1):
        for ids in row:
            if (problem := unfit(ids, model)) is not None:
                raise ValueError(f"{path}: row {number}: {problem}")


def lr_factor(step: int, num_steps: int, warmup_steps: int, min_lr_ratio: float) -> float:
    """Share of the full learning rate at `step` (from 0): linear warm-up, then a cosine that ends
    at min_lr_ratio with the last step."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, num_steps - 1 - warmup_steps)
    return min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * done))


def _with_zero_head(path: str, tokenizer: Any) -> nn.Module:
    model: Any = pretrained(
        AutoModelForSequenceClassification,
        path,
        give="a causal language model",
        new=["score.weight"],
        num_labels=1,
        dtype=torch.float32,
    )
    nn.init.zeros_(model.score.weight)
    if model.config.pad_token_id is None:  # other people's code needs it to find the last token
        model.config.pad_token_id = tokenizer.pad_token_id
    return model


def _optimise(
    model: nn.Module,
    pairs: Sequence[Pair],
    config: RewardTrainingConfig,
    seed: int,
    progress: Progress,
) -> dict[str, float]:
    """All epochs; every pair is used once in each. Returns the last step's metrics."""
    optimizer = torch.optim.AdamW(
        model.parameters(), config.lr, config.betas, weight_decay=config.weight_decay, fused=True
    )
    shuffling = torch.Generator().manual_seed(seed)
    size, batches = config.batch_size, list[list[int]]()
    num_steps = config.epochs * math.ceil(len(pairs) / size)
    metrics: dict[str, float] = {}
    for step in range(num_steps):
        if not batches:
            order = torch.randperm(len(pairs), generator=shuffling).tolist()
            batches = [order[i : i + size] for i in range(0, len(order), size)]
        batch = [pairs[row] for row in batches.pop(0)]
        lr = config.lr * lr_factor(step, num_steps, config.warmup_steps, config.min_lr_ratio)
        for group in optimizer.param_groups:
            group["lr"] = lr
        metrics = backward(model, batch, config.max_batch_tokens)
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm).item()
        if not math.isfinite(metrics["loss"] + norm):
            raise FloatingPointError(
                f"step {step + 1}: loss {metrics['loss']}, gradient norm {norm}; lower lr"
            )
        optimizer.step()
        optimizer.zero_grad()
        progress(step + 1, num_steps, metrics | {"grad_norm": norm, "lr": lr})
    return metrics


def backward(model: nn.Module, batch: Sequence[Pair], max_batch_tokens: int) -> dict[str, float]:
    """Adds the gradient of the batch's mean loss; the metrics are of the batch too.

    Pairs of like length share a forward pass, as padding costs what tokens cost; how the batch is
    cut changes neither gradient nor metrics beyond rounding.
    """
    metrics: defaultdict[str, float] = defaultdict(float)
    lengths = [2 * max(len(pair.chosen), len(pair.rejected)) for pair in batch]
    for rows in length_batches(lengths, max_batch_tokens):
        chosen, rejected = zip(*(batch[row] for row in rows), strict=True)
        scores = last_token_scores(model, [*chosen, *rejected])
        loss, part = pairwise_loss(*scores.split(len(rows)))
        share = len(rows) / len(batch)
        (loss * share).backward()
        for name, value in part.items():
            metrics[name] += value * share
    return dict(metrics)


def _accuracy(model: nn.Module, pairs: Sequence[Pair], max_batch_tokens: int) -> float:
    chosen = score_sequences(model, [pair.chosen for pair in pairs], max_batch_tokens)
    rejected = score_sequences(model, [pair.rejected for pair in pairs], max_batch_tokens)
    return pairwise_loss(chosen, rejected)[1]["accuracy"]


def _normalise(
    model: Any, reference: Sequence[list[int]], config: RewardTrainingConfig
) -> dict[str, float]:
    """Puts score_mean and score_sd of the reference set into the model's config."""
    scores = score_sequences(model, reference, config.max_batch_tokens).double()
    mean, sd = scores.mean().item(), scores.std(correction=0).item()
    if not sd > 0:
        raise ValueError(
            f"{config.normalise_on}: all scores are {mean:g}; give different completions"
        )
    model.config.score_mean, model.config.score_sd = mean, sd
    return {"score_mean": mean, "score_sd": sd}


def _save(model: Any, tokenizer: Any, out: Path) -> None:
    """Written aside and renamed, so that `out` is complete or not there."""
    aside = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        os.rename(aside, out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
