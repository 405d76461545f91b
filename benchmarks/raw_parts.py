"""The parts of a PPO step, each alone and bare: what the machine needs for the work, and no more.

    python -m benchmarks.raw_parts generation MODEL    raw vllm.LLM.generate on 64 prompts
    python -m benchmarks.raw_parts learning MODEL      bare forward passes (old logprobs, reference,
        values) and forward and backward passes of policy and critic with AdamW, on packed tokens of
        the same lengths; plain torch: no FSDP, no Ray

One thread, float32. Prints one JSON object: core-seconds a step, the median of five steps.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from actors.vllm_engine import CPU_ENGINE_ENV
from benchmarks import work

os.environ.update(CPU_ENGINE_ENV)  # before torch is imported

BATCH, MINIBATCHES, WARM_UP, STEPS = 64, 4, 2, 5


def generation(model: Path, max_tokens: int = 128) -> dict[str, Any]:
    import vllm

    llm = vllm.LLM(
        model=str(model),
        dtype="float32",
        max_model_len=work.PROMPT_TOKENS + max_tokens + 16,
        max_num_seqs=BATCH,
        enforce_eager=True,
        kv_cache_memory_bytes=1 << 27,
    )
    tokenizer = llm.get_tokenizer()
    parameters = vllm.SamplingParams(max_tokens=max_tokens, temperature=1.0, logprobs=0)
    seconds, lengths = [], []
    texts = work.prompts(512)
    for step in range(WARM_UP + STEPS):
        chosen = texts[step * BATCH :][:BATCH]
        prompts = [{"prompt_token_ids": tokenizer.encode(text)} for text in chosen]
        started = time.process_time()
        outputs = llm.generate(prompts, parameters, use_tqdm=False)
        seconds.append(time.process_time() - started)
        lengths.append([len(output.outputs[0].token_ids) for output in outputs])
    tokens = [sum(step) for step in lengths]
    per_token = work.median(s / t for s, t in zip(seconds[WARM_UP:], tokens[WARM_UP:], strict=True))
    return {
        "generation": per_token * sum(tokens[WARM_UP:]) / STEPS,
        "tokens": sum(tokens[WARM_UP:]) / STEPS,
        "lengths": lengths[-1],
    }


def learning(model: Path, lengths: list[int]) -> dict[str, Any]:
    """`lengths`: of the completions of one step."""
    import torch

    from learner.packing import PackedRows

    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = [torch.randint(2, 128, (work.PROMPT_TOKENS + n,)).tolist() for n in lengths]

    def pack(chosen: list[list[int]]) -> PackedRows:
        return PackedRows.build(chosen, [work.PROMPT_TOKENS] * len(chosen))

    policy, reference, critic = (_load(model) for _ in range(3))
    head = torch.nn.Linear(policy.config.hidden_size, 1)
    parameters = [[*policy.parameters()], [*critic.model.parameters(), *head.parameters()]]
    optimizers = [torch.optim.AdamW(group, lr=1e-6, fused=True) for group in parameters]
    size = len(rows) // MINIBATCHES

    def forwards() -> None:
        with torch.no_grad():
            packed = pack(rows)
            _logprobs(policy, packed)
            _logprobs(reference, packed)
            head(_hidden(critic, packed))

    def update() -> None:
        for start in range(0, len(rows), size):
            packed = pack(rows[start : start + size])
            logprobs = _logprobs(policy, packed)
            ratio = (logprobs - logprobs.detach()).exp()
            loss = -torch.minimum(ratio, ratio.clamp(0.8, 1.2)).mean()
            (loss + 0.5 * head(_hidden(critic, packed)).square().mean()).backward()
            for group, optimizer in zip(parameters, optimizers, strict=True):
                torch.nn.utils.clip_grad_norm_(group, 1.0)
                optimizer.step()
                optimizer.zero_grad()

    return {"forwards": _core_seconds(forwards), "update": _core_seconds(update)}


def _core_seconds(work_once: Callable[[], None]) -> float:
    seconds = []
    for _ in range(WARM_UP + STEPS):
        started = time.process_time()
        work_once()
        seconds.append(time.process_time() - started)
    return work.median(seconds[WARM_UP:])


def _load(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    from learner.packed_attention import use_packed_attention

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    use_packed_attention(model)
    return model


def _hidden(model: Any, packed: Any) -> Any:
    """[N, d] at the positions whose next token is a completion's."""
    hidden = model.model(
        packed.input_ids, position_ids=packed.position_ids, cu_seqlens=packed.cu_seqlens
    ).last_hidden_state
    return hidden[0, packed.rows]


def _logprobs(model: Any, packed: Any) -> Any:
    from learner.logprobs import token_logprobs

    hidden = _hidden(model, packed)
    weight = model.lm_head.weight
    return token_logprobs(hidden, weight, packed.targets, with_entropy=False)[0]


if __name__ == "__main__":
    part, folder, *rest = sys.argv[1:]
    found = (
        generation(Path(folder))
        if part == "generation"
        else learning(Path(folder), json.loads(rest[0]))
    )
    print(json.dumps(found))
