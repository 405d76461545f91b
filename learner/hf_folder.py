"""Writes Hugging Face folders that transformers and vLLM load: after SFT, and `raylign export`."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from learner.policy import PolicyModel
from learner.weight_publisher import PREFIX

# What of a model's folder belongs to another one's weights. Not its old weights of any kind, no code, and
# not what happens to lie there.
COPIED = (
    "config.json", "generation_config.json", "tokenizer*.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "*.model", "chat_template.json",
    "chat_template.jinja", "LICENSE", "LICENSE.*", "NOTICE", "NOTICE.*",
)  # fmt: skip
NAMES_CODE = "auto_map"  # a key that tells loaders of Python files in the folder


def gather_weights(policy: PolicyModel) -> dict[str, Tensor]:
    """A collective: the full weights by checkpoint name on rank 0, copied; {} on the others."""
    weights = {}
    for name, parameter in policy.named_parameters():
        if not name.startswith(PREFIX):
            continue
        tensor = parameter.detach()
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if dist.get_rank() == 0:
            weights[name.removeprefix(PREFIX)] = full.to("cpu", copy=True)
    return weights


def write_folder(weights: Mapping[str, Tensor], source: str, out: Path) -> None:
    """`weights` with config, tokenizer and licence of the folder `source`; appears whole or not at all."""
    aside = out.with_name(out.name + f".{os.getpid()}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    for path in sorted(Path(source).iterdir()):
        if path.is_file() and any(fnmatchcase(path.name, pattern) for pattern in COPIED):
            shutil.copy2(path, aside / path.name)
    for path in aside.glob("*.json"):
        _leave_out_code(path)
    _name_dtype(
        aside / "config.json", {str(t.dtype).removeprefix("torch.") for t in weights.values()}
    )
    contiguous = {name: tensor.contiguous() for name, tensor in weights.items()}
    save_file(contiguous, str(aside / "model.safetensors"), metadata={"format": "pt"})
    shutil.rmtree(out, ignore_errors=True)
    aside.rename(out)


def _leave_out_code(path: Path) -> None:
    tree = json.loads(path.read_text())
    if isinstance(tree, dict) and tree.pop(NAMES_CODE, None) is not None:
        path.write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n")


def _name_dtype(path: Path, dtypes: set[str]) -> None:
    """Loaders believe config.json, so it names the dtype of the tensors beside it."""
    assert len(dtypes) == 1, f"weights of mixed dtypes {sorted(dtypes)}"
    config = json.loads(path.read_text())
    config["dtype"] = dtypes.pop()
    if "torch_dtype" in config:  # its name before transformers 4.56
        config["torch_dtype"] = config["dtype"]
    path.write_text(json.dumps(config, indent=2) + "\n")


def export_checkpoint(checkpoint: Path, source: str, out: Path, dtype: str) -> None:
    """The policy of a (verified) distributed checkpoint -> a Hugging Face folder, in one process."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import FileSystemReader

    prefix = f"policy.model.{PREFIX}"
    metadata = FileSystemReader(str(checkpoint)).read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.items()
        if name.startswith(prefix) and hasattr(entry, "size")
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one process is what is meant
        dcp.load(state, checkpoint_id=str(checkpoint), no_dist=True)
    weights = {n.removeprefix(prefix): t.to(getattr(torch, dtype)) for n, t in state.items()}
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    if config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)  # stored under both names; the file needs one
    write_folder(weights, source, out)
