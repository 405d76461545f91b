"""The work that the benchmarks do, the same for every system: a random Qwen2-style model, prompts of
exactly 16 tokens, a trivial reward; and how results are printed.

"natural": end-of-sequence is drawn with probability 1/80 at every token, so completions have
geometric lengths, cut at max_tokens. "fixed": end-of-sequence is never drawn. Both are properties of
the model's weights (the end token's row of the tied embedding), so no system needs to be told.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAD, EOS = "<pad>", "<eos>"
PAD_ID, EOS_ID = 0, 1
PROMPT_TOKENS = 16
END_PROBABILITY = 1 / 80
LR = 1e-8  # so small that lengths stay what they are: a random model is all edge


@dataclass(frozen=True)
class Shape:
    """A model's size. The default has 2.66 million parameters."""

    hidden: int = 256
    layers: int = 4
    heads: int = 4
    mlp: int = 512
    vocabulary: int = 128
    context: int = 2048
    tied: bool = True


TINY = Shape()
SMALL = Shape(hidden=512, layers=8, heads=8, mlp=1536, vocabulary=32000)  # about 40M
MEDIUM = Shape(hidden=768, layers=24, heads=12, mlp=2048, vocabulary=32000)  # about 190M


def write_model(folder: Path, shape: Shape = TINY, *, natural: bool = True, seed: int = 0) -> Path:
    """A Hugging Face folder with weights drawn from `seed`; where it is already, it is left alone."""
    if (folder / "tokenizer.json").is_file():
        return folder
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        intermediate_size=shape.mlp,
        vocab_size=shape.vocabulary,
        max_position_embeddings=shape.context,
        tie_word_embeddings=shape.tied,
        pad_token_id=PAD_ID,
        eos_token_id=EOS_ID,
        bos_token_id=None,
        attention_dropout=0.0,
        use_cache=True,
    )
    config.dtype = torch.float32
    model = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        _set_end_probability(model, END_PROBABILITY if natural else 1e-9)
    model.generation_config.update(eos_token_id=EOS_ID, pad_token_id=PAD_ID)
    model.save_pretrained(folder)
    _write_tokenizer(folder, shape)
    return folder


def _set_end_probability(model: Any, probability: float) -> None:
    """Give every row of the head a common part, seen alike in every context, and the end token's row
    as much more of it as makes its mean probability `probability`."""
    import torch

    head = model.get_output_embeddings().weight
    # Three times what a row has of its own: then every context lies along it.
    common = torch.full((head.shape[1],), 3 * model.config.initializer_range)
    for weight in {id(w): w for w in (head, model.get_input_embeddings().weight)}.values():
        weight += common
    head[EOS_ID] = common
    contexts = torch.randint(2, head.shape[0], (32, 32))
    hidden = model.model(contexts, use_cache=False).last_hidden_state.flatten(0, 1)
    others = (hidden @ head.T).index_fill(1, torch.tensor([EOS_ID]), -torch.inf).logsumexp(1)
    along = hidden @ common
    low, high = -200.0, 200.0
    for _ in range(60):
        factor = (low + high) / 2
        mean = torch.sigmoid(factor * along - others).mean().item()
        low, high = (factor, high) if mean < probability else (low, factor)
    head[EOS_ID] = factor * common


def _write_tokenizer(folder: Path, shape: Shape) -> None:
    """A byte-level BPE without merges: every printable character is one token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[: shape.vocabulary - 2]
    fill = [f"{alphabet[i % 90]}{i}" for i in range(shape.vocabulary - 2 - len(alphabet))]
    vocabulary = {token: i for i, token in enumerate([PAD, EOS, *alphabet, *fill])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([PAD, EOS])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, padding_side="left"
    ).save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    described = json.loads(path.read_text())
    # Left out, transformers adds one, beyond the embedding's last row.
    path.write_text(json.dumps({**described, "unk_token": None}))


def prompts(count: int, tokens: int = PROMPT_TOKENS, seed: int = 0) -> list[str]:
    """Texts of exactly `tokens` tokens: random letters and digits."""
    import random

    rng = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
    return ["".join(rng.choices(letters, k=tokens)) for _ in range(count)]


def reward(text: str) -> float:
    """The trivial reward: the share of vowels in a completion's text."""
    return sum(text.count(vowel) for vowel in "aeiou") / max(len(text), 1)


def score(requests: Sequence[Any]) -> list[float]:
    """`reward` as raylign's scorer function."""
    return [reward(request.completion) for request in requests]


def config(folder: Path, name: str, model: Path, **changes: Any) -> dict[str, Any]:
    """raylign's config for the work; `changes` ("generators.count") replace single values."""
    rows = [{"prompt_id": f"p{i}", "prompt": text} for i, text in enumerate(prompts(512))]
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree: dict[str, Any] = {
        "stage": "train",
        "name": name,
        "runs_dir": str(folder / "runs"),
        "num_steps": 7,
        "batch_size": 64,
        "policy": str(model),
        "prompts": {"path": str(path)},
        "sampling": {"max_tokens": 128},
        "generators": {"count": 2, "max_model_len": 160, "max_num_seqs": 64},
        "reward": {"scorer": {"kind": "function", "function": "benchmarks.work:score"}},
        "learner": {"ranks": 2},
        "ppo": {
            "epochs": 1,
            "minibatches": 4,
            "policy": {"lr": LR, "decay": "constant"},
            "value": {"lr": LR, "decay": "constant"},
        },
        "checkpoint": {"every": 1000000},
    }
    tree["generators"]["kv_cache_bytes"] = 1 << 27
    for key, value in changes.items():
        *parents, last = key.split(".")
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[last] = value
    return tree


def read_metrics(run: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def multiplies_bfloat16() -> bool:
    """Whether the processor does; one that does not is ten times slower than in float32."""
    flags = Path("/proc/cpuinfo").read_text().split()
    return "amx_bf16" in flags or "avx512_bf16" in flags


# ---- printing


def parser(description: str | None) -> argparse.ArgumentParser:
    """`--quick` (fewer repetitions, to see that it runs) and `--folder`, for models and runs."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--quick", action="store_true", help="fewer repetitions: not for quoting")
    made.add_argument("--folder", type=Path, default=ROOT / "runs" / "benchmarks")
    return made


def header(*packages: str) -> None:
    """The command, the machine and the versions: what a figure means nothing without."""
    versions = "  ".join(f"{name} {version(name)}" for name in ("torch", "ray", *packages))
    script = os.path.relpath(sys.argv[0], ROOT)
    print(f"command: {shlex.join(['python', script, *sys.argv[1:]])}")
    print(f"machine: {os.cpu_count()} cores, {processor()}")
    print(f"versions: Python {platform.python_version()}  {versions}", flush=True)


def processor() -> str:
    """Its name, and of its instructions those that the figures depend on most."""
    told = Path("/proc/cpuinfo").read_text()
    name = re.search(r"model name\s*:\s*(.+)", told)
    has = [one for one in ("avx2", "avx512f", "avx512_bf16", "amx_tile") if f" {one} " in told]
    return f"{name[1] if name else platform.machine()} ({', '.join(has)})"


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Columns aligned, numbers in three or four digits."""
    cells = [list(columns), *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    for row in cells:
        first, *rest = (
            text.ljust(w) if i == 0 else text.rjust(w)
            for i, (text, w) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join([first, *rest]))
    sys.stdout.flush()


def result(**figures: float) -> None:
    """The last line: one JSON object."""
    print(json.dumps({name: float(f"{value:.4g}") for name, value in figures.items()}), flush=True)


def median(values: Iterable[float]) -> float:
    return statistics.median(values)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)
