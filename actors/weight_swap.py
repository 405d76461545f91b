"""Puts new weights straight into vLLM's modules on CPU, in place of a reload.

A reload walks every tensor through vLLM's loaders, at ten times the cost of copying them. Here each
parameter is planned once: it is one range of the image that updates bring, because q|k|v and gate|up
lie side by side there. An update then either re-packs each matrix from that range by vLLM's own
function (packed), or points each parameter at the range (shared). A model in which any parameter
is not understood for certain is not planned, and reloaded as before.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from actors.onednn import faster_product
from actors.vllm_engine import set_num_threads
from actors.weight_update import PUSH_THREADS, TensorSpec, WeightLayout

Kind = Literal["linear", "head", "table", "vector"]


class NotPlanned(Exception):
    """The model has a parameter whose place in the layout is not certain. Says which and why."""


@dataclass(frozen=True)
class Place:
    """One parameter of the engine and its range of the image."""

    module: torch.nn.Module
    name: str
    kind: Kind  # linear: a matrix, packed; head, table: an embedding with and without a product
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int  # bytes
    end: int

    def view(self, image: torch.Tensor) -> torch.Tensor:
        return image[self.start : self.end].view(self.dtype).view(self.shape)


class WeightSwap:
    """The plan for one model and layout."""

    def __init__(self, model: torch.nn.Module, layout: WeightLayout, *, shared: bool) -> None:
        """Raises NotPlanned."""
        self._shared = shared
        # The largest first, so that no thread packs it while all others are done.
        self._places = sorted(_plan(model, layout), key=lambda place: place.start - place.end)
        # Small weights are packed sooner by one.
        self._num_threads = 1 if shared else min(PUSH_THREADS, len(layout.buckets))

    def apply(self, image: np.ndarray) -> None:
        """Take the weights of `image` (uint8 [total_bytes]). Shared, the engine computes on `image`
        from now on; packed, it holds nothing of it afterwards."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch dislikes tensors that cannot be written
            whole = torch.from_numpy(image)
        renew = _renew_shared if self._shared else _renew_packed
        if self._num_threads == 1:
            for place in self._places:
                renew(place, place.view(whole))
            return
        # Several matrices at once, each by as many threads as here: vLLM's products are wrong on matrices
        # packed by another number of threads than the engine first met them with.
        with ThreadPoolExecutor(self._num_threads, initializer=_threads_as_here()) as threads:
            list(threads.map(lambda place: renew(place, place.view(whole)), self._places))


def _threads_as_here() -> Callable[[], None]:
    return functools.partial(set_num_threads, torch.get_num_threads())


@torch.no_grad()
def _renew_packed(place: Place, weights: torch.Tensor) -> None:
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    module: Any = place.module
    if place.kind == "linear":
        module.cpu_linear = None  # its memory is free for the new one
        module.weight.data = weights
        dispatch_cpu_unquantized_gemm(module, remove_weight=True)
        if module.weight.numel():  # vLLM could not pack it, and computes on what it was given
            module.weight.data = weights.clone()
        return
    # vLLM pads a vocabulary with rows that no token has: they stay.
    getattr(module, place.name).data[: len(weights)].copy_(weights)
    if place.kind == "head":
        module.cpu_linear = None
        dispatch_cpu_unquantized_gemm(module, remove_weight=False)
    elif place.kind == "table":
        module.cpu_linear = torch.nn.functional.linear  # its packed copy was never used


@torch.no_grad()
def _renew_shared(place: Place, weights: torch.Tensor) -> None:
    module: Any = place.module
    getattr(module, place.name).data = weights
    if place.kind != "vector":
        module.cpu_linear = faster_product


# ---- the plan


def _plan(model: Any, layout: WeightLayout) -> tuple[Place, ...]:
    """Every parameter and every tensor of the layout, once; or NotPlanned."""
    tensors = {spec.name: spec for spec in layout.tensors}
    packed: dict[str, list[str]] = getattr(model, "packed_modules_mapping", {})
    places: list[Place] = []
    planned: dict[int, str] = {}  # id of a parameter -> where it was first seen
    used: set[str] = set()
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            sources = _sources(path, name, packed)
            if not all(source in tensors for source in sources):
                # A tied head: the very parameter of the embedding, which comes before it.
                if id(parameter) not in planned or _kind(path, module, name) != "head":
                    raise NotPlanned(f"{path}.{name}: the layout has no {sources[0]}")
                sources = [planned[id(parameter)]]
            elif used & set(sources):
                raise NotPlanned(f"{path}.{name}: {sources[0]} is another parameter's already")
            specs = [tensors[source] for source in sources]
            places.append(_place(path, module, name, parameter, specs))
            if parameter.numel():
                planned[id(parameter)] = sources[0]
            used |= set(sources)
    if unused := tensors.keys() - used:
        raise NotPlanned(f"{min(unused)}: no parameter of the engine takes it")
    return tuple(places)


def _sources(path: str, name: str, packed: dict[str, list[str]]) -> list[str]:
    """The checkpoint's names of what makes up a parameter."""
    parent, _, leaf = path.rpartition(".")
    return [".".join(filter(None, (parent, source, name))) for source in packed.get(leaf) or [leaf]]


def _place(
    path: str, module: Any, name: str, parameter: torch.Tensor, specs: list[TensorSpec]
) -> Place:
    first, last = specs[0], specs[-1]
    end = first.offset
    for spec in specs:
        if spec.offset != end or spec.shape[1:] != first.shape[1:]:
            raise NotPlanned(f"{path}.{name}: its parts do not lie side by side")
        end += spec.num_bytes
    kind, fused = _kind(path, module, name), len(specs) > 1
    rows = sum(spec.shape[0] for spec in specs)
    shape = (rows, *first.shape[1:])
    if fused != (type(module).__name__ in ("QKVParallelLinear", "MergedColumnParallelLinear")):
        raise NotPlanned(f"{path}.{name}: fused in a way not known here")
    if kind == "linear":
        wanted: tuple[int, ...] = (module.output_size, module.input_size)
    elif kind == "vector":
        wanted = tuple(parameter.shape)
    else:
        wanted = (module.org_vocab_size, *parameter.shape[1:])
    if shape != wanted:
        raise NotPlanned(f"{path}.{name}: {wanted} in the engine, {shape} in the layout")
    dtype = getattr(torch, first.dtype)
    if kind != "vector" and parameter.dtype != dtype:  # vLLM widens the biases of some kernels
        raise NotPlanned(f"{path}.{name}: {parameter.dtype} in the engine, {dtype} in the layout")
    return Place(module, name, kind, shape, dtype, first.offset, last.offset + last.num_bytes)


def _kind(path: str, module: Any, name: str) -> Kind:
    """What a parameter is to its module; NotPlanned for every kind of module not known here."""
    from vllm.model_executor.layers.layernorm import RMSNorm
    from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import (
        ParallelLMHead,
        UnquantizedEmbeddingMethod,
        VocabParallelEmbedding,
    )

    method = type(getattr(module, "quant_method", None))
    if isinstance(module, LinearBase) and method is UnquantizedLinearMethod:
        return "linear" if name == "weight" else "vector"
    if isinstance(module, VocabParallelEmbedding) and method is UnquantizedEmbeddingMethod:
        if name != "weight":
            return "vector"
        return "head" if isinstance(module, ParallelLMHead) or path == "lm_head" else "table"
    if type(module) in (RMSNorm, torch.nn.LayerNorm):
        return "vector"
    raise NotPlanned(f"{path}.{name}: a parameter of {type(module).__name__}")


def tensors_of(layout: WeightLayout, image: np.ndarray) -> Iterator[tuple[str, torch.Tensor]]:
    """Each tensor of `image` (uint8 [total_bytes]) by its name in the checkpoint."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = torch.from_numpy(image)
    for spec in layout.tensors:
        piece = whole[spec.offset : spec.offset + spec.num_bytes]
        yield spec.name, piece.view(getattr(torch, spec.dtype)).view(spec.shape)
