"""A randomly initialised Qwen2 of half a million parameters and a tokenizer made for one task.

Small enough to learn an example in about a minute of one CPU core, and yet the folder is what vLLM
and transformers load for a model of any size. It is written without either, because importing
them takes longer than everything else the generators do.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

PAD, EOS = "<pad>", "<eos>"
PAD_ID, EOS_ID = 0, 1  # special tokens come first in a vocabulary
HIDDEN, LAYERS, HEADS, KV_HEADS, MLP = 128, 2, 2, 1, 384  # heads of 64: a size every backend takes
CONTEXT = 256

# Qwen2's own, which makes every digit a word: transformers ignores the pipeline in tokenizer.json
# and puts this one in its place because the model is a Qwen2.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Not transformers' 0.02: at this width the arithmetic example then learns one sum in ten
# from data of which this one learns 96 %.
INITIALIZER_RANGE = 0.06


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Byte-level BPE: words of `texts` become one token each, digits never merge.

    The alphabet is all 256 bytes, so that any other text still encodes, in more tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=768,  # an upper bound: training stops when no pair occurs twice
        min_frequency=2,
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def write_model(folder: Path, tokenizer: Tokenizer, seed: int) -> None:
    """Writes a Hugging Face folder: configuration, weights drawn from `seed`, tokenizer."""
    folder.mkdir(parents=True)
    vocabulary = tokenizer.get_vocab_size()
    _write_json(folder / "config.json", _model_config(vocabulary))
    _write_json(folder / "generation_config.json", {"eos_token_id": EOS_ID, "pad_token_id": PAD_ID})
    _write_json(folder / "tokenizer_config.json", _tokenizer_config())
    tokenizer.save(str(folder / "tokenizer.json"))
    weights = _initial_weights(vocabulary, seed)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _initial_weights(vocabulary: int, seed: int) -> dict[str, np.ndarray]:
    """Normal matrices, norms of one, biases of zero: as transformers initialises Qwen2."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in _shapes(vocabulary).items():
        if len(shape) == 1:
            weights[name] = np.full(shape, 0.0 if name.endswith("bias") else 1.0, np.float32)
        else:
            weights[name] = rng.standard_normal(shape, np.float32) * np.float32(INITIALIZER_RANGE)
    weights["model.embed_tokens.weight"][PAD_ID] = 0.0
    return weights


def _shapes(vocabulary: int) -> dict[str, tuple[int, ...]]:
    """Parameter name -> shape; there is no lm_head, it is tied to the embedding."""
    head_dim = HIDDEN // HEADS
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, HIDDEN)}
    for layer in range(LAYERS):
        block = f"model.layers.{layer}"
        for name, heads in (("q_proj", HEADS), ("k_proj", KV_HEADS), ("v_proj", KV_HEADS)):
            shapes[f"{block}.self_attn.{name}.weight"] = (heads * head_dim, HIDDEN)
            shapes[f"{block}.self_attn.{name}.bias"] = (heads * head_dim,)
        shapes[f"{block}.self_attn.o_proj.weight"] = (HIDDEN, HIDDEN)
        shapes[f"{block}.mlp.gate_proj.weight"] = (MLP, HIDDEN)
        shapes[f"{block}.mlp.up_proj.weight"] = (MLP, HIDDEN)
        shapes[f"{block}.mlp.down_proj.weight"] = (HIDDEN, MLP)
        shapes[f"{block}.input_layernorm.weight"] = (HIDDEN,)
        shapes[f"{block}.post_attention_layernorm.weight"] = (HIDDEN,)
    return shapes | {"model.norm.weight": (HIDDEN,)}


def _model_config(vocabulary: int) -> dict[str, object]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "dtype": "float32",
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "intermediate_size": MLP,
        "hidden_act": "silu",
        "vocab_size": vocabulary,
        "max_position_embeddings": CONTEXT,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "rms_norm_eps": 1e-6,
        "attention_dropout": 0.0,
        "initializer_range": INITIALIZER_RANGE,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "bos_token_id": None,
        "pad_token_id": PAD_ID,
        "eos_token_id": EOS_ID,
    }


def _tokenizer_config() -> dict[str, object]:
    return {
        "tokenizer_class": "Qwen2Tokenizer",
        "pad_token": PAD,
        "eos_token": EOS,
        "unk_token": None,  # left out, it becomes a token beyond the embedding's last row
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT,
    }


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
