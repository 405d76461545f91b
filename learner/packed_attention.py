"""Attention over packed rows that never looks across a sequence's border.

Registered with transformers as 'raylign_packed'. transformers' own packing finds the borders in
position_ids, but only without an attention mask and without a cache, and attends across sequences
silently otherwise (config.use_cache is True by default). Here the borders are an argument:

    use_packed_attention(model)
    model(packed.input_ids, position_ids=packed.position_ids, cu_seqlens=packed.cu_seqlens)

What it cannot compute exactly it refuses.
"""

from __future__ import annotations

import copy
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from learner.model_limits import longest_exact

NAME = "raylign_packed"
# Extra arguments by which some models change the attention itself.
UNSUPPORTED = ("softcap", "s_aux", "position_bias")


def use_packed_attention(model: PreTrainedModel) -> None:
    """Switches `model` to packed attention and its cache off. Other models keep their config."""
    shared = model.config
    foreign = set(getattr(shared, "layer_types", None) or ()) - {
        "full_attention",
        "sliding_attention",
    }
    if foreign:
        raise ValueError(f"{type(model).__name__}: packed rows would leak through {foreign} layers")
    own = copy.deepcopy(shared)
    for module in model.modules():
        if getattr(module, "config", None) is shared:
            # Models built from one config object would share its settings.
            module.config = own  # type: ignore[assignment]
    model.set_attn_implementation(NAME)
    if own._attn_implementation != NAME:
        raise ValueError(f"{type(model).__name__} does not support another attention function")
    own.use_cache = False


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    cu_seqlens: tuple[int, ...] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention in each sequence: query [1,Hq,T,D], key and value [1,Hkv,T,D] -> [1,T,Hq,D].

    cu_seqlens: 0 and each sequence's end, on the host. A token sees itself and the sliding_window - 1
    before it. Called by transformers' layers.
    """
    if cu_seqlens is None:
        raise ValueError(f"{NAME} needs model(..., cu_seqlens=packed.cu_seqlens)")
    if query.shape[0] != 1 or cu_seqlens[-1] != query.shape[2] or key.shape[2] != query.shape[2]:
        raise ValueError(
            f"one packed row of {cu_seqlens[-1]} tokens without a cache, got query "
            f"{tuple(query.shape)}, key {tuple(key.shape)}"
        )
    longest = max(end - start for start, end in pairwise(cu_seqlens))
    if attention_mask is not None:
        raise ValueError(f"{type(module).__name__} makes a mask of its own, {NAME} computes none")
    config = getattr(module, "config", None)
    most = longest_exact(vars(config)) if config is not None else None
    if most is not None and longest > most:
        raise ValueError(
            f"{type(module).__name__}: its longrope changes beyond {most} tokens, which a sequence of "
            f"{longest} would do to its whole row; make sequences shorter"
        )
    if dropout != 0:
        raise ValueError(f"attention dropout {dropout}: set attention_dropout to 0 in the config")
    if not getattr(module, "is_causal", True):
        raise ValueError(f"{type(module).__name__} is not causal")
    if used := [name for name in UNSUPPORTED if kwargs.get(name) is not None]:
        raise ValueError(f"{type(module).__name__} needs {used}, which {NAME} does not compute")
    attend = _flash if _flash_can(query) else _loop
    window = min(sliding_window or _own_window(module) or longest, longest)
    return attend(query, key, value, cu_seqlens, longest, window, scaling), None


def _own_window(module: nn.Module) -> int | None:
    """Of a layer that slides by its config and does not say so: its model leaves that to the mask."""
    config = getattr(module, "config", None)
    kinds = getattr(config, "layer_types", None)
    if not kinds or kinds[module.layer_idx] != "sliding_attention":
        return None
    return int(config.sliding_window)  # type: ignore[union-attr]


def _flash_can(query: Tensor) -> bool:
    half = query.dtype in (torch.float16, torch.bfloat16)
    return query.is_cuda and half and query.shape[-1] % 8 == 0 and query.shape[-1] <= 256


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: tuple[int, ...],
    longest: int,
    window: int,
    scaling: float | None,
) -> Tensor:
    """One kernel for all sequences; CUDA, float16 and bfloat16."""
    borders = _on_device(cu_seqlens, query.device)
    attended = varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        borders,
        borders,
        longest,
        longest,
        scale=scaling,
        # Causal; must be a tuple, it is compared with ==. It counts what is seen beside the token.
        window_size=(-1 if window == longest else window - 1, 0),
        enable_gqa=True,
    )
    assert isinstance(attended, Tensor)
    return attended[None]


def _loop(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: tuple[int, ...],
    longest: int,
    window: int,
    scaling: float | None,
) -> Tensor:
    """Sequence by sequence: the same arithmetic as without packing, on any device."""
    lengths = [end - start for start, end in pairwise(cu_seqlens)]
    band = _band(longest, window, query.device) if longest > window else None
    # Split at once: backward is then one concatenation, where each slice's would fill a whole row.
    parts = zip(*(whole.split(lengths, dim=2) for whole in (query, key, value)), strict=True)
    attended = []
    for q, k, v in parts:
        length = q.shape[2]
        seen = band[:length, :length] if band is not None and length > window else None
        attended.append(
            F.scaled_dot_product_attention(
                q, k, v, seen, is_causal=seen is None, scale=scaling, enable_gqa=True
            )
        )
    return torch.cat(attended, dim=2).transpose(1, 2)


@lru_cache(maxsize=1)
def _band(length: int, window: int, device: torch.device) -> Tensor:
    """bool [length, length], True where a token looks. One for all layers of a forward, which keep it
    for the backward; a shorter sequence takes its first corner."""
    with torch.inference_mode(False):
        whole = torch.ones(length, length, dtype=torch.bool, device=device)
        return whole.tril_().triu_(1 - window)


@lru_cache(maxsize=8)
def _on_device(cu_seqlens: tuple[int, ...], device: torch.device) -> Tensor:
    """int32 [b+1]; copied to the GPU once for a forward, not once for each layer."""
    with torch.inference_mode(False):  # the cached tensor must serve a later backward too
        return torch.tensor(cu_seqlens, dtype=torch.int32, device=device)


def _no_mask(*, attention_mask: Tensor | None = None, **_: Any) -> None:
    if attention_mask is not None:
        raise ValueError(f"{NAME} takes no attention_mask: packed rows have no padding")


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, _no_mask)  # type: ignore[arg-type]
