"""Scores with a reward model r_theta(x, y): a Hugging Face sequence classifier with one label."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from reward_service.api import ScoreFailure, ScoreRequest, ScoreResult
from reward_service.chat import chat_prompt
from reward_service.config import RewardModelScorerConfig
from reward_service.rules import as_result
from reward_service.tokenizer import load_tokenizer, prompt_ids, reply_ids
from reward_service.weight_names import pretrained


class RewardModelScorer:
    """The score of a completion is the head's output at its last token, then
    (score - score_mean) / score_sd where the folder's config.json has both.

    `input: tokens` scores the ids as sampled. `input: text` encodes prompt and completion with the
    model's own tokenizer, as when it was trained, and adds its end-of-sequence token where the
    completion has stopped. `input: messages` does so with the prompt that its own chat template makes of
    the conversation. Raises ValueError for a folder that is no reward model.
    """

    def __init__(self, config: RewardModelScorerConfig) -> None:
        self._config = config
        self._model = load_reward_model(config.path, dtype=getattr(torch, config.dtype))
        self._mean, self._sd = _normalisation(config.path, self._model.config)
        self._tokenizer: Any = load_tokenizer(config.path) if config.input != "tokens" else None
        # One thread: forward passes share the cores (or the device), and do not gain from others.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="reward-model")

    async def score(self, requests: Sequence[ScoreRequest]) -> list[ScoreResult]:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._score, list(requests))

    async def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _score(self, requests: list[ScoreRequest]) -> list[ScoreResult]:
        """What the model cannot read fails alone."""
        read = [self._read(request) for request in requests]
        fit = [ids for ids, problem in read if problem is None]
        scores = score_sequences(self._model, fit, self._config.max_batch_tokens)
        values = iter(((scores.double() - self._mean) / self._sd).tolist())
        return [
            as_result(request.trajectory_id, next(values))
            if problem is None
            else ScoreFailure(request.trajectory_id, "invalid", f"{self._config.path}: {problem}")
            for request, (_, problem) in zip(requests, read, strict=True)
        ]

    def _read(self, request: ScoreRequest) -> tuple[list[int], str | None]:
        """What the model gets, and what is wrong with it."""
        try:
            ids = self._ids(request)
        except ValueError as error:  # of the chat template
            return [], str(error)
        return ids, unfit(ids, self._model)

    def _ids(self, request: ScoreRequest) -> list[int]:
        tokenizer = self._tokenizer
        if tokenizer is None:
            return [*request.prompt_ids, *request.completion_ids]
        reply, eos = reply_ids(request.completion, tokenizer), tokenizer.eos_token_id
        if eos is not None and request.finish_reason == "stop" and reply[-1:] != [eos]:
            reply = [*reply, eos]
        if self._config.input == "text":
            return [*prompt_ids(request.prompt, tokenizer), *reply]
        prompt = chat_prompt("messages", request.messages, tokenizer)
        return [*prompt_ids(prompt, tokenizer, chat=True), *reply]


def load_reward_model(path: str, *, dtype: torch.dtype) -> Any:
    """The classifier in `path`, in evaluation mode, on cuda where there is one. ValueError if the
    folder has not exactly one label, lacks weights (they would be random), or has no score head."""
    if not (Path(path) / "config.json").is_file():
        raise ValueError(f"{path}: no config.json; give the folder of a trained reward model")
    labels = AutoConfig.from_pretrained(path, trust_remote_code=False).num_labels
    if labels != 1:
        raise ValueError(
            f"{path}: has {labels} labels, a reward model has one; "
            "train one from this folder with `raylign reward-model`"
        )
    kind = AutoModelForSequenceClassification
    model = pretrained(kind, path, give="a trained reward model", dtype=dtype)
    _head(model)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def last_token_scores(model: Any, sequences: Sequence[Sequence[int]]) -> Tensor:
    """The head at the last token of each sequence -> scores [B] float32, with gradients if enabled.

    Backbone and head are called apart: Hugging Face's own forward looks for the last token by
    comparing with pad_token_id, so a pad id within a sequence, or none in the config, misleads it.
    """
    device = next(model.parameters()).device
    lengths = torch.tensor([len(ids) for ids in sequences])
    padded = nn.utils.rnn.pad_sequence(
        [torch.tensor(ids, dtype=torch.long) for ids in sequences], batch_first=True
    ).to(device)
    lengths = lengths.to(device)
    mask = torch.arange(padded.shape[1], device=device) < lengths[:, None]  # [B, T]
    hidden = model.base_model(input_ids=padded, attention_mask=mask.long(), use_cache=False)[0]
    last = hidden[torch.arange(len(sequences), device=device), lengths - 1]  # [B, hidden]
    return _head(model)(last)[:, 0].float()


@torch.no_grad()
def score_sequences(
    model: Any, sequences: Sequence[Sequence[int]], max_batch_tokens: int
) -> Tensor:
    """Scores [N] float32 on the CPU, in the order of `sequences`; equal lists, equal batches."""
    scores = torch.empty(len(sequences))
    for rows in length_batches([len(ids) for ids in sequences], max_batch_tokens):
        scores[rows] = last_token_scores(model, [sequences[row] for row in rows]).cpu()
    return scores


def length_batches(lengths: Sequence[int], max_batch_tokens: int) -> list[list[int]]:
    """Indices sorted by length and cut so that rows * longest <= max_batch_tokens; one longer than
    that stands alone."""
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):  # the last is the longest
        if batches and (len(batches[-1]) + 1) * lengths[row] <= max_batch_tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def unfit(ids: Sequence[int], model: Any) -> str | None:
    """Why the model cannot embed them; None if it can."""
    if not ids:
        return "has no tokens"
    vocabulary = model.get_input_embeddings().num_embeddings
    if min(ids) < 0 or max(ids) >= vocabulary:
        bad = next(token for token in ids if not 0 <= token < vocabulary)
        return (
            f"token id {bad} is outside this model's vocabulary of {vocabulary}; "
            "these are another tokenizer's ids (a scorer can set input to text)"
        )
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions and len(ids) > positions:
        return f"{len(ids)} tokens, the model has {positions} positions; shorten it"
    return None


def _head(model: Any) -> nn.Module:
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Module) or model.base_model is model:
        raise ValueError(
            f"{type(model).__name__}: has no backbone with a `score` head that is read at the last "
            "token; use a decoder model's sequence classifier, e.g. Qwen2ForSequenceClassification"
        )
    return head


def _normalisation(path: str, config: Any) -> tuple[float, float]:
    """(mean, sd) of the raw scores on the reference set, (0, 1) where the folder names none."""
    mean, sd = getattr(config, "score_mean", None), getattr(config, "score_sd", None)
    if mean is None and sd is None:
        return 0.0, 1.0
    numbers = (isinstance(x, (int, float)) and math.isfinite(x) for x in (mean, sd))
    if mean is None or sd is None or not all(numbers) or sd <= 0:
        raise ValueError(
            f"{path}: score_mean {mean} and score_sd {sd} in config.json do not normalise; "
            "both must be numbers and score_sd above 0"
        )
    return float(mean), float(sd)
