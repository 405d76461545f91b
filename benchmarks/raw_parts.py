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

BATCH, WARM_UP, STEPS = 64, 2, 5


def raw_engine(model: Path | str, max_tokens: int) -> Any:
    """A vllm.LLM for the work, as one would start it by hand."""
    import vllm

    return vllm.LLM(
        model=str(model),
        dtype="float32",
        max_model_len=work.PROMPT_TOKENS + max_tokens + 16,
        max_num_seqs=BATCH,
        enforce_eager=True,
        kv_cache_memory_bytes=1 << 27,
    )


def generation(model: Path, max_tokens: int = 128) -> dict[str, Any]:
    import vllm

    llm = raw_engine(model, max_tokens)
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


def learning(model: Path, lengths: list[int], *, fast_products: bool) -> dict[str, Any]:
    """`lengths`: of the completions of one step. `fast_products`: by the library that raylign takes."""
    import torch

    from learner import linear

    if not fast_products:
        linear.takes_onednn = lambda: False  # type: ignore[assignment]
    from benchmarks.contenders import BareLoop, Job

    torch.set_num_threads(1)
    torch.manual_seed(0)
    pairs = [(work.PROMPT_TOKENS, length) for length in lengths]
    loop = BareLoop(Job(str(model), work.TINY.vocabulary, pairs))
    return {"forwards": _core_seconds(loop.forwards), "update": _core_seconds(loop.update)}


def _core_seconds(work_once: Callable[[], None]) -> float:
    seconds = []
    for _ in range(WARM_UP + STEPS):
        started = time.process_time()
        work_once()
        seconds.append(time.process_time() - started)
    return work.median(seconds[WARM_UP:])


if __name__ == "__main__":
    # Before torch is imported. What malloc reads it has read when the process began.
    os.environ.update(CPU_ENGINE_ENV)
    part, folder, *rest = sys.argv[1:]
    found = (
        generation(Path(folder))
        if part == "generation"
        else learning(Path(folder), json.loads(rest[0]), fast_products=rest[1] == "tuned")
    )
    print(json.dumps(found))
