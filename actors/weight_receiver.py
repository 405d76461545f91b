"""vLLM's side of a weight push: a worker extension that checks the bytes and loads them in place.

vLLM mixes WeightReceiver into its worker (engine argument `worker_extension_cls`) and calls it
between two engine steps, so no step ever runs on half-loaded weights.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from actors.weight_update import WeightLayout, WeightsRejected, WeightUpdate, verify


class WeightReceiver:
    """Methods added to vLLM's worker; `self.model_runner` and `self.vllm_config` are the worker's."""

    model_runner: Any
    vllm_config: Any
    model_config: Any

    def agree_layout(self, layout: WeightLayout) -> str:
        """Keep the layout all later updates are checked against; returns its id."""
        self._layout = layout
        return layout.id

    def receive_weights(self, update: WeightUpdate) -> None:
        """Verify the bytes, then load them. On WeightsRejected nothing was applied."""
        layout = getattr(self, "_layout", None)
        if layout is None:
            raise WeightsRejected(f"version {update.version}: no layout was agreed")
        data = np.concatenate(update.payload) if update.payload else _map(update.segment)
        verify(update, layout, data)
        self._load(_tensors(layout, torch.from_numpy(data)))

    def _load(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        # vLLM's load_weights alone fails on CPU, where linear layers keep packed copies and drop
        # the originals; its layerwise reload rebuilds them, on every platform.
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import (
            finalize_layerwise_reload,
            initialize_layerwise_reload,
        )

        model = self.model_runner.model
        with set_current_vllm_config(self.vllm_config), torch.no_grad():
            initialize_layerwise_reload(model)
            model.load_weights(tensors)
            finalize_layerwise_reload(model, self.model_config)
            _refresh_packed_heads(model)


def _map(path: str) -> np.ndarray:
    """The segment's bytes, private to this process: what is verified is what is loaded."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        mapped = mmap.mmap(
            descriptor, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE
        )
    finally:
        os.close(descriptor)
    return np.frombuffer(mapped, np.uint8)


def _tensors(layout: WeightLayout, data: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    for spec in layout.tensors:
        piece = data[spec.offset : spec.offset + spec.num_bytes]
        yield spec.name, piece.view(getattr(torch, spec.dtype)).view(spec.shape)


def _refresh_packed_heads(model: torch.nn.Module) -> None:
    """On CPU a tied lm_head keeps a packed copy of the embedding that the reload does not renew."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    for module in model.modules():
        packed = getattr(module, "cpu_linear", None) is not None
        if type(module).__name__ == "ParallelLMHead" and packed and module.weight.numel():
            dispatch_cpu_unquantized_gemm(module, remove_weight=False)
