"""FSDP2: a model's layers and the whole of it sharded over the ranks, and filled from rank 0."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

from learner.config import LearnerConfig

# Layers smaller than this share a collective: a call costs the same however little it gathers.
UNIT_BYTES = 32 * 2**20


def shard(
    model: Any, hf_model: Any, full: nn.Module | None, mesh: DeviceMesh, config: LearnerConfig
) -> Any:
    """fully_shard layers and the whole, then fill the shards from rank 0's full weights."""
    trunk = getattr(hf_model, "base_model", hf_model)
    if not hasattr(trunk, "layers"):
        raise ValueError(
            f"{type(hf_model).__name__}: no list of decoder layers to shard; not supported"
        )
    if config.activation_checkpointing:
        hf_model.gradient_checkpointing_enable({"use_reentrant": False})
    precision = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if config.dtype == "bfloat16" else None,
        reduce_dtype=torch.float32,
    )
    offload = _offload(config, mesh)
    for unit in _units(trunk.layers):
        fully_shard(unit, mesh=mesh, mp_policy=precision, offload_policy=offload)
    # What the root holds stays whole from a forward pass to its backward pass, which needs it at once.
    fully_shard(
        model,
        mesh=mesh,
        mp_policy=precision,
        offload_policy=offload,
        reshard_after_forward=False,
    )
    model.register_forward_hook(_reshard)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Losses are normalised globally, so gradients are plain sums. One rank's are so of itself,
            # where a factor of 1 would cost a division and a copy.
            if mesh.size() > 1:
                module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    model.to_empty(device="cpu" if config.cpu_offload else mesh.device_type)
    if hasattr(hf_model, "tie_weights"):
        hf_model.tie_weights()
    set_model_state_dict(
        model,
        full.state_dict() if full is not None else {},
        options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
    )
    _fill_buffers(model, full, mesh.device_type)
    return model


def _reshard(model: Any, *_: Any) -> None:
    """Behind a forward pass without gradient: whole parameters would outlive the next optimizer step."""
    if not torch.is_grad_enabled():
        model.reshard()


def _offload(config: LearnerConfig, mesh: DeviceMesh) -> OffloadPolicy:
    if config.cpu_offload and mesh.device_type == "cpu":
        raise ValueError(
            "learner.cpu_offload: true, but the learner has no GPU to offload from; remove it"
        )
    return CPUOffloadPolicy() if config.cpu_offload else OffloadPolicy()


def _units(layers: Iterable[nn.Module]) -> list[list[nn.Module]]:
    """Consecutive layers that are gathered together, in units of UNIT_BYTES or more; what is left
    over at the end is gathered with the embeddings."""
    units: list[list[nn.Module]] = []
    unit: list[nn.Module] = []
    for layer in layers:
        unit.append(layer)
        weights = [parameter for one in unit for parameter in one.parameters()]
        if sum(weight.numel() * weight.element_size() for weight in weights) >= UNIT_BYTES:
            units.append(unit)
            unit = []
    return units


def _fill_buffers(model: nn.Module, full: nn.Module | None, device: str) -> None:
    """Rotary tables and other buffers are in no state dict: to_empty() left garbage in them. They
    stand on the computing device even where the weights wait on the CPU."""
    given = dict(full.named_buffers(remove_duplicate=False)) if full is not None else {}
    for path, module in model.named_modules():
        own = module.named_buffers(recurse=False, remove_duplicate=False)
        for name, buffer in list(own):
            filled = torch.empty_like(buffer, device=device)
            if given:
                filled.copy_(given[f"{path}.{name}" if path else name])
            dist.broadcast(filled, 0)
            setattr(module, name, filled)


def unsharded(model: Any) -> Any:
    """`model` of a group of one, without FSDP's hooks: its shards are the whole parameters, which the
    hooks would copy twice for every pass. The parameters are shared; no gradient is kept."""
    kind = type(model).__mro__[2] if isinstance(model, FSDPModule) else type(model)
    plain: Any = object.__new__(kind)
    parameters = {
        name: nn.Parameter(p.to_local(), requires_grad=False) if isinstance(p, DTensor) else p
        for name, p in model._parameters.items()
    }
    modules = {name: child and unsharded(child) for name, child in model._modules.items()}
    # Not by attribute: a module looks each of them over, for longer than a small model computes.
    vars(plain).update(
        vars(model),
        _forward_pre_hooks=OrderedDict(),
        _forward_hooks=OrderedDict(),
        _parameters=parameters,
        _modules=modules,
    )
    return plain
