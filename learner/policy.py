"""Policy, value model and reference: Hugging Face folders, packed forward passes, sharded by FSDP2.

Each forward pass of a sharded model is a collective: every rank calls the same models in the same order
equally often, with an empty share if need be.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)

from learner.config import LearnerConfig
from learner.logprobs import token_logprobs
from learner.packed_attention import use_packed_attention
from learner.packing import PackedRows

# Layers smaller than this share a collective: a call costs the same however little it gathers.
UNIT_BYTES = 32 * 2**20


class PolicyModel(nn.Module):
    """A causal language model that answers with logprobs of completion tokens, never with logits.

    With `value_head` its trunk also carries the critic (`value_model: shared`).
    """

    def __init__(self, lm: Any, *, chunk_rows: int, value_head: bool = False) -> None:
        super().__init__()
        self.lm = lm
        self.value_head = _zero_head(lm.config.hidden_size) if value_head else None
        self._chunk_rows = chunk_rows

    def forward(
        self, packed: PackedRows, temperature: float = 1.0, with_entropy: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(logprobs, entropy, values), each [N] float32 over the packed completion tokens; entropy
        is zeros unless asked for, values are zeros without a value head."""
        hidden = _hidden_rows(self.lm.base_model, packed)
        head = self.lm.get_output_embeddings()
        logprobs, entropy = token_logprobs(
            hidden,
            head.weight,
            packed.targets,
            temperature=temperature,
            chunk_rows=self._chunk_rows,
            with_entropy=with_entropy,
            bias=head.bias,
        )
        if self.value_head is None:
            return logprobs, entropy, torch.zeros_like(logprobs)
        return logprobs, entropy, _scalars(self.value_head, hidden)


class ValueModel(nn.Module):
    """V(s): a backbone of its own with a scalar head, read where the policy predicts each token."""

    def __init__(self, trunk: Any) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = _zero_head(trunk.config.hidden_size)

    def forward(self, packed: PackedRows) -> Tensor:
        """values [N] float32 over the packed completion tokens."""
        return _scalars(self.head, _hidden_rows(self.trunk, packed))


def _hidden_rows(trunk: Any, packed: PackedRows) -> Tensor:
    output = trunk(
        input_ids=packed.input_ids,
        position_ids=packed.position_ids,
        cu_seqlens=packed.cu_seqlens,
        use_cache=False,
    )
    return output.last_hidden_state[0].index_select(0, packed.rows)


def _scalars(head: nn.Linear, hidden: Tensor) -> Tensor:
    """[N, hidden] -> [N] float32; no view, because FSDP hooks what its modules return."""
    return head(hidden).sum(-1, dtype=torch.float32)


def _zero_head(hidden_size: int) -> nn.Linear:
    head = nn.Linear(hidden_size, 1)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def even_length(model: PolicyModel) -> float:
    """Tokens at which a sequence's attention costs as much as the matrices of the layers: per token
    and layer these are 2 * parameters operations, causal attention over n tokens 2 * hidden * n."""
    layers = model.lm.base_model.layers
    parameters = sum(p.numel() for p in layers.parameters()) / len(layers)
    return parameters / model.lm.config.hidden_size


def load_policy(
    folder: str,
    mesh: DeviceMesh,
    config: LearnerConfig,
    *,
    value_head: bool = False,
    frozen: bool = False,
) -> PolicyModel:
    """The policy, or the frozen reference, of a Hugging Face folder, sharded."""
    from transformers import AutoConfig, AutoModelForCausalLM

    def build(source: Any) -> PolicyModel:
        return PolicyModel(source, chunk_rows=config.logprob_chunk_rows, value_head=value_head)

    hf_config = _prepared(AutoConfig.from_pretrained(folder), folder)
    full = None
    if dist.get_rank() == 0:
        full = build(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
        _check_head(full.lm)
    with torch.device("meta"):
        empty = build(AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32))
    use_packed_attention(empty.lm)
    empty.requires_grad_(not frozen)
    return _shard(empty, empty.lm, full, mesh, config)


@torch.no_grad()
def _check_head(lm: Any) -> None:
    """Refuse a model that scales or caps its logits: the chunked logprobs would not."""
    ids = torch.arange(2)[None]
    hidden = lm.base_model(input_ids=ids, use_cache=False).last_hidden_state
    logits = lm(input_ids=ids, use_cache=False).logits
    if not torch.allclose(lm.get_output_embeddings()(hidden), logits, rtol=1e-3, atol=1e-3):
        raise ValueError(
            f"{type(lm).__name__}: its logits are more than a matrix times the trunk; not supported"
        )


def load_value_model(folder: str, mesh: DeviceMesh, config: LearnerConfig) -> ValueModel:
    """A critic from a language model's backbone (head zero) or from a reward model, head included."""
    from transformers import AutoConfig, AutoModel

    hf_config = _prepared(AutoConfig.from_pretrained(folder), folder)
    full = None
    if dist.get_rank() == 0:
        full = ValueModel(AutoModel.from_pretrained(folder, dtype=torch.float32))
        _copy_score_head(folder, hf_config, full.head)
    with torch.device("meta"):
        empty = ValueModel(AutoModel.from_config(hf_config, dtype=torch.float32))
    use_packed_attention(empty.trunk)
    return _shard(empty, empty.trunk, full, mesh, config)


def _prepared(hf_config: Any, folder: str) -> Any:
    """A copy of its own: models that share a config object share their attention setting too.

    Dropout is refused: the same weights must answer the same twice, or no ratio would start at 1.
    """
    for name, value in hf_config.to_dict().items():
        of_trunk = ("drop" in name) and not name.startswith(("classifier", "summary"))
        if of_trunk and isinstance(value, float) and value > 0:
            raise ValueError(
                f"{folder}: {name} is {value} in config.json; dropout would move every ratio away "
                "from 1, set it to 0"
            )
    hf_config = copy.deepcopy(hf_config)
    hf_config.use_cache = False
    return hf_config


def _copy_score_head(folder: str, hf_config: Any, head: nn.Linear) -> None:
    """A reward model's head, in the scale of its normalised score; others keep the zero head."""
    if not (hf_config.architectures or [""])[0].endswith("ForSequenceClassification"):
        return
    from transformers import AutoModelForSequenceClassification

    score = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).score
    mean, sd = getattr(hf_config, "score_mean", 0.0), getattr(hf_config, "score_sd", 1.0)
    with torch.no_grad():
        head.weight.copy_(score.weight / sd)
        head.bias.fill_(-mean / sd)


def _shard(
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
    # True on the root too: else its parameters stay whole after a forward pass without gradient,
    # and clip_grad_norm_ then leaves them out without a word.
    fully_shard(
        model,
        mesh=mesh,
        mp_policy=precision,
        offload_policy=offload,
        reshard_after_forward=True,
    )
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Losses are normalised globally, so gradients are plain sums.
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
