"""Policy, value model and reference: Hugging Face folders, packed forward passes, sharded by FSDP2.

Each forward pass of a sharded model is a collective: every rank calls the same models in the same order
equally often, with an empty share if need be.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from learner.config import LearnerConfig
from learner.linear import use_fast_products
from learner.logprobs import token_logprobs
from learner.model_limits import refuse_inexact
from learner.packed_attention import use_packed_attention
from learner.packing import PackedRows
from learner.sharding import shard
from reward_service.weight_names import pretrained


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

    hf_config = _prepared(AutoConfig.from_pretrained(folder, trust_remote_code=False), folder)
    full = None
    if dist.get_rank() == 0:
        full = build(_pretrained(AutoModelForCausalLM, folder))
        _check_head(full.lm)
    with torch.device("meta"):
        empty = build(AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32))
    use_packed_attention(empty.lm)
    use_fast_products(empty)
    empty.requires_grad_(not frozen)
    return shard(empty, empty.lm, full, mesh, config)


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

    hf_config = _prepared(AutoConfig.from_pretrained(folder, trust_remote_code=False), folder)
    full = None
    if dist.get_rank() == 0:
        full = ValueModel(_pretrained(AutoModel, folder))
        _copy_score_head(folder, hf_config, full.head)
    with torch.device("meta"):
        empty = ValueModel(AutoModel.from_config(hf_config, dtype=torch.float32))
    use_packed_attention(empty.trunk)
    use_fast_products(empty)
    return shard(empty, empty.trunk, full, mesh, config)


def _pretrained(kind: Any, folder: str) -> Any:
    return pretrained(kind, folder, give="a whole model", dtype=torch.float32)


def _prepared(hf_config: Any, folder: str) -> Any:
    """A copy of its own: models that share a config object share their attention setting too."""
    refuse_inexact(folder, hf_config.to_dict())
    hf_config = copy.deepcopy(hf_config)
    hf_config.use_cache = False
    return hf_config


def _copy_score_head(folder: str, hf_config: Any, head: nn.Linear) -> None:
    """A reward model's head, in the scale of its normalised score; others keep the zero head."""
    if not (hf_config.architectures or [""])[0].endswith("ForSequenceClassification"):
        return
    from transformers import AutoModelForSequenceClassification

    score = _pretrained(AutoModelForSequenceClassification, folder).score
    mean, sd = getattr(hf_config, "score_mean", 0.0), getattr(hf_config, "score_sd", 1.0)
    with torch.no_grad():
        head.weight.copy_(score.weight / sd)
        head.bias.fill_(-mean / sd)
