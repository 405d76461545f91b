"""vLLM's side of a weight push: a worker extension that checks the bytes and loads them in place.

vLLM mixes WeightReceiver into its worker (engine argument `worker_extension_cls`) and calls it
between two engine steps, so no step ever runs on half-loaded weights.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from actors import weight_delta
from actors.weight_segment import SegmentReader
from actors.weight_swap import NotPlanned, WeightSwap, tensors_of
from actors.weight_update import (
    NeedsAll,
    Refused,
    WeightLayout,
    WeightsRejected,
    WeightUpdate,
    verify,
)


class WeightReceiver:
    """Methods added to vLLM's worker; `self.model_runner` and `self.vllm_config` are the worker's."""

    model_runner: Any
    vllm_config: Any
    model_config: Any
    _receiver: _Receiver

    def agree_layout(self, layout: WeightLayout, shared: bool, keeps_image: bool) -> str:
        """Keep the layout all later updates are checked against; returns its id. `shared`: compute
        on the image itself; `keeps_image`: deltas will come, keep what they are deltas to."""
        swap = _plan(self.model_runner.model, self.vllm_config, layout, shared=shared)
        self._receiver = _Receiver(self, layout, swap, shared=shared, keeps_image=keeps_image)
        return layout.id

    def receive_weights(self, update: WeightUpdate) -> dict[str, float] | Refused:
        """Verify the bytes, then load them; seconds of both. Or why nothing was applied."""
        try:
            if not hasattr(self, "_receiver"):
                raise WeightsRejected(f"version {update.version}: no layout was agreed")
            return self._receiver.receive(update)
        except (WeightsRejected, NeedsAll) as error:
            return Refused(error)


class _Receiver:
    def __init__(
        self,
        worker: WeightReceiver,
        layout: WeightLayout,
        swap: WeightSwap | None,
        *,
        shared: bool,
        keeps_image: bool,
    ) -> None:
        self._worker = worker
        self._layout = layout
        self._swap = swap
        self._shared = shared
        self._keeps_image = keeps_image
        self._segments = SegmentReader()
        self._in_use = ""  # the segment that the engine computes on
        self._image: tuple[int, np.ndarray] | None = None  # version and bytes

    def receive(self, update: WeightUpdate) -> dict[str, float]:
        started = time.perf_counter()
        image = self._segment(update) if update.segment else self._payload(update)
        try:
            verify(update, self._layout, image)
        except WeightsRejected:
            if update.segment != self._in_use:
                self._segments.release(update.segment)
            raise
        verified = time.perf_counter()
        if self._swap is not None:
            self._swap.apply(image)
        else:
            _reload(self._worker, self._layout, image)
        self._let_go(update.segment)
        if self._keeps_image and not update.segment:
            self._image = (update.version, image)
        return {"verify_s": verified - started, "apply_s": time.perf_counter() - verified}

    def _let_go(self, segment: str) -> None:
        """Release the segment just read; where the engine computes on it, the one before."""
        left = self._in_use if self._shared else segment
        if left and not (self._shared and left == segment):
            self._segments.release(left)
        self._in_use = segment if self._shared else ""

    def _segment(self, update: WeightUpdate) -> np.ndarray:
        try:
            return self._segments.hold(update.segment)
        except FileNotFoundError:
            raise NeedsAll(
                f"version {update.version} lies in {update.segment}, which is not on this machine; "
                "send it in full"
            ) from None

    def _payload(self, update: WeightUpdate) -> np.ndarray:
        """The image that came in the message: whole, or as a delta to the one kept."""
        if update.base is None:
            return np.concatenate(update.payload)
        if self._image is None or self._image[0] != update.base:
            raise NeedsAll(
                f"version {update.version} came as a delta to {update.base}, and here is "
                f"{'none' if self._image is None else self._image[0]}; send it in full"
            )
        # What the engine computes on must not change before the result is verified.
        image = self._image[1].copy() if self._shared else self._image[1]
        self._image = None
        weight_delta.apply(self._layout, update.payload, image)
        return image


def _plan(model: Any, vllm_config: Any, layout: WeightLayout, *, shared: bool) -> WeightSwap | None:
    """None: this model, or this platform, takes vLLM's reload."""
    from vllm.platforms import current_platform

    try:
        if not current_platform.is_cpu():
            raise NotPlanned("the engine is not on CPU")
        if vllm_config.parallel_config.tensor_parallel_size > 1:
            raise NotPlanned("the engine holds shards")
        return WeightSwap(model, layout, shared=shared)
    except NotPlanned as reason:
        if shared:
            raise WeightsRejected(
                f"generators.weight_memory: shared is not possible with this model ({reason}); set "
                "it to packed"
            ) from None
        return None


def _reload(worker: WeightReceiver, layout: WeightLayout, image: np.ndarray) -> None:
    # vLLM's load_weights alone fails on CPU, where linear layers keep packed copies and drop
    # the originals; its layerwise reload rebuilds them, on every platform.
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.reload import (
        finalize_layerwise_reload,
        initialize_layerwise_reload,
    )

    model = worker.model_runner.model
    with set_current_vllm_config(worker.vllm_config), torch.no_grad():
        initialize_layerwise_reload(model)
        model.load_weights(tensors_of(layout, image))
        finalize_layerwise_reload(model, worker.model_config)
        _refresh_packed_heads(model)


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
