"""The estimate of memory: against what runs were measured to take, against autograd, and its parts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import end_to_end, growth, work
from cluster import memory
from cluster.config import RunConfig
from cluster.config_file import load_config
from cluster.memory import Need, activation_bytes, cache_needed, microbatches, needs
from cluster.model_folder import model_config
from cluster.shapes import Shape, Shapes, read_shapes
from examples import tiny_model
from tests import tiny

FORKED = Path(work.ROOT, "benchmarks/results/end_to_end.txt")
OWN_PROCESSES = Path(work.ROOT, "benchmarks/results/end_to_end_amx.txt")
GROWN = Path(work.ROOT, "benchmarks/results/growth.txt")
FUNCTION = {"kind": "function", "function": "examples.arithmetic.rewards:exact_answer"}
SHAPE = Shape(64, 4, 256, 4, 2, 16, vocabulary=1000, tied=True)
LARGE = Shape(4096, 32, 14336, 32, 8, 128, vocabulary=128256, tied=False)


def all_of(shape: Shape) -> Shapes:
    return Shapes(shape, shape, shape, {})


@pytest.fixture
def load(tmp_path: Path, policy: Path) -> Any:
    def loader(changes: dict[str, Any] | None = None) -> RunConfig:
        tree = tiny.changed(tiny.run_tree(tmp_path, policy), changes or {})
        return load_config(tiny.write_yaml(tmp_path / "run.yaml", tree), [], RunConfig)

    return loader


def need_of(role: str, config: RunConfig, shape: Shape = SHAPE, longest: int = 16) -> Need:
    return next(need for need in needs(config, all_of(shape), longest) if need.role == role)


# ---- sizes


def test_the_size_is_the_number_of_parameters_but_for_norms_and_biases(policy: Path) -> None:
    model = model_config(str(policy), "policy")
    shapes = tiny_model._shapes(model["vocab_size"])
    exact = sum(int.__mul__(*shape) for shape in shapes.values() if len(shape) == 2)
    shape = Shape.of(model)
    assert shape is not None
    assert shape.parameters == exact


def test_a_known_large_model_has_its_known_size() -> None:
    assert LARGE.parameters == pytest.approx(8.03e9, rel=1e-3)  # Llama 3 8B
    assert LARGE.parameters - LARGE.trunk == 128256 * 4096


@pytest.mark.parametrize(
    "change", [{"hidden_size": None}, {"num_experts": 8}, {"num_local_experts": 8}]
)
def test_a_model_of_another_form_has_no_size(policy: Path, change: dict[str, Any]) -> None:
    assert Shape.of(model_config(str(policy), "policy") | change) is None
    assert Shape.of({"vocab_size": 10}) is None


def test_every_network_of_a_run_is_read_from_its_own_folder(
    load: Any, policy: Path, stranger: Path
) -> None:
    part = {"weight": 1.0, "scorer": {"kind": "reward_model", "path": str(stranger)}}
    shapes = read_shapes(load({"reward.scorer": {"kind": "sum", "parts": {"rm": part}}}))
    assert shapes is not None
    assert shapes.policy == shapes.reference == shapes.value
    assert shapes.rewards[str(stranger)].vocabulary > shapes.policy.vocabulary


# ---- against what was measured


@pytest.mark.parametrize("name", end_to_end.VARIANTS)
def test_the_estimate_is_what_the_benchmarks_runs_took(tmp_path: Path, name: str) -> None:
    columns = ["s/step", "tokens/s", "share", "wait s", "update s", "GB", "first step s"]
    measured = gigabytes(OWN_PROCESSES, name, columns)
    found = estimate_of(tmp_path, work.TINY, end_to_end.VARIANTS[name])
    assert found == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("name", end_to_end.VARIANTS)
def test_it_is_a_little_more_where_workers_share_what_they_imported(
    tmp_path: Path, name: str
) -> None:
    columns = ["s/step", "tokens/s", "share", "tuned", "wait s", "update s", "idle", "stolen", "GB"]
    measured = gigabytes(FORKED, name, columns)
    found = estimate_of(tmp_path, work.TINY, end_to_end.VARIANTS[name])
    assert measured < found < 1.25 * measured


@pytest.mark.parametrize("name", growth.SHAPES)
def test_it_grows_with_the_model_as_a_run_does(tmp_path: Path, name: str) -> None:
    row = f"model {growth.PARAMETERS[name]:,.0f}"
    measured = gigabytes(GROWN, row, ["s/step", "tokens/s", "GB"])
    point = replace(growth.MODEL_BATCH, shape=name)
    found = estimate_of(tmp_path, growth.SHAPES[name], growth.changes_of(point, point.steps))
    assert found == pytest.approx(measured, rel=0.1)


def gigabytes(results: Path, name: str, columns: list[str]) -> float:
    lines = [line for line in results.read_text().splitlines() if line.startswith(f"{name}  ")]
    return float(lines[0].removeprefix(name).split()[columns.index("GB")])


def estimate_of(tmp_path: Path, size: work.Shape, changes: dict[str, Any]) -> float:
    """Gigabytes."""
    shape = Shape(
        *(size.hidden, size.layers, size.mlp, size.heads, size.heads, size.hidden // size.heads),
        vocabulary=size.vocabulary,
        tied=size.tied,
    )
    config = RunConfig.model_validate(work.config(tmp_path, "x", tmp_path, **changes))
    found = needs(config, all_of(shape), work.PROMPT_TOKENS + config.sampling.max_tokens)
    return sum(need.count * need.host_bytes for need in found) / 1e9


@pytest.mark.parametrize(("heads_of_keys", "mlp"), [(4, 384), (1, 384), (4, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_what_autograd_keeps(
    heads_of_keys: int, mlp: int, dtype: torch.dtype
) -> None:
    shape = Shape(128, 4, mlp, 4, heads_of_keys, 32, vocabulary=64, tied=True)
    tokens = 128
    a_layer = (kept(shape, dtype) - kept(replace(shape, layers=2), dtype)) / 2
    assert tokens * activation_bytes(shape, dtype.itemsize) == pytest.approx(a_layer, rel=0.01)


def kept(shape: Shape, dtype: torch.dtype) -> int:
    """Bytes that a forward pass over 128 packed tokens leaves for the backward pass."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    from learner.packed_attention import use_packed_attention
    from learner.packing import PackedRows

    config = Qwen2Config(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.mlp,
        vocab_size=shape.vocabulary,
        use_cache=False,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    use_packed_attention(model)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    stored: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        stored[tensor.untyped_storage().data_ptr()] = tensor  # held, or its place were used again
        return tensor

    rows = PackedRows.build([list(range(1, 33))] * 4, [4] * 4)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.base_model(
            input_ids=rows.input_ids, position_ids=rows.position_ids, cu_seqlens=rows.cu_seqlens
        )
    return sum(t.untyped_storage().nbytes() for place, t in stored.items() if place not in own)


# ---- the learner's parts


def learner(load: Any, **changes: Any) -> Need:
    return need_of("learner", load({"learner.ranks": 2, "ppo.minibatches": 1, **changes}), LARGE)


def test_shards_are_divided_by_the_ranks_and_the_critic_counts_as_configured(load: Any) -> None:
    whole, two = LARGE.parameters, 2
    separate = learner(load).host
    assert separate["weights"] == 4 * (2 * whole + LARGE.trunk) // two
    assert separate["gradients and AdamW"] == 12 * (whole + LARGE.trunk) // two
    for changes in ({"ppo.value_model": "shared"}, {"ppo.advantage": "grpo"}):
        alone = learner(load, **changes).host
        assert alone["weights"] == 4 * 2 * whole // two
        assert alone["gradients and AdamW"] == 12 * whole // two


def test_a_step_is_kept_only_if_a_second_optimizer_step_may_be_refused(load: Any) -> None:
    copy = "copy to undo a step"
    assert copy not in learner(load, **{"ppo.epochs": 1}).host
    assert (
        learner(load, **{"ppo.epochs": 2}).host[copy] == 12 * (LARGE.parameters + LARGE.trunk) // 2
    )


def test_gradients_stay_whole_where_there_are_several_microbatches(load: Any) -> None:
    config = load({"learner.max_tokens_per_microbatch": 16})
    assert microbatches(config, longest=16) == 4
    assert microbatches(config, longest=8) == 2
    assert microbatches(config, longest=100) == 4  # a sequence is never cut
    assert "gradients not yet summed" in need_of("learner", config).host
    assert "gradients not yet summed" not in need_of("learner", load()).host


def test_activations_grow_with_the_microbatch_and_shrink_with_checkpointing(load: Any) -> None:
    def activations(**changes: Any) -> int:
        return learner(load, **{"learner.max_tokens_per_microbatch": 32, **changes}).host[
            "activations"
        ]

    assert activations(**{"learner.max_tokens_per_microbatch": 64}) == 2 * activations()
    assert activations(**{"learner.activation_checkpointing": True}) < activations() / 8
    assert activations(**{"learner.dtype": "bfloat16"}) < activations() * 0.6
    # No more than the rank's share of the minibatch: 4 sequences of 16 tokens.
    most = activations(**{"learner.max_tokens_per_microbatch": 10**6})
    assert most == activations(**{"learner.max_tokens_per_microbatch": 64})


def test_logits_are_of_the_rows_of_a_chunk(load: Any) -> None:
    few = learner(load, **{"learner.logprob_chunk_rows": 8}).host["logits"]
    assert learner(load, **{"learner.logprob_chunk_rows": 16}).host["logits"] == 2 * few


def test_whole_chunks_of_log_probabilities_are_kept_within_a_bound(
    load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = LARGE.vocabulary * 4

    def kept(num_rows: float) -> float:
        monkeypatch.setattr(memory, "KEPT_LOGITS_BYTES", int(num_rows * row))
        return (
            learner(load, **{"learner.logprob_chunk_rows": 8}).host["log-probabilities kept"] / row
        )

    assert [kept(7.5), kept(8), kept(17), kept(10**6)] == [0, 8, 16, 64]


def test_on_a_gpu_the_undo_copy_and_what_is_offloaded_are_the_machines(load: Any) -> None:
    on_gpu = learner(load, device="cuda")
    assert "gradients and AdamW" in on_gpu.device
    assert "copy to undo a step" in on_gpu.host
    offloaded = learner(load, device="cuda", **{"learner.cpu_offload": True})
    assert "gradients and AdamW" in offloaded.host
    assert offloaded.device_bytes < on_gpu.device_bytes - 12 * LARGE.parameters // 2


# ---- the other roles


def test_a_generators_weights_are_packed_or_shared_and_divided_on_gpus(load: Any) -> None:
    weights = 4 * SHAPE.parameters
    assert need_of("generators", load()).host["weights"] == weights + 4 * SHAPE.embedding
    shared = load({"generators.weight_memory": "shared"})
    assert need_of("generators", shared).host["weights"] == 0
    two = load({"device": "cuda", "generators.tensor_parallel_size": 2})
    assert need_of("generators", two).device["weights"] == weights // 2
    delta = load({"generators.weight_push": "delta"})
    assert need_of("generators", delta).host["image for deltas"] == weights


def test_the_least_cache_holds_one_sequence_in_whole_blocks_and_one_block_more(load: Any) -> None:
    a_token = 2 * 4 * 2 * 16 * 4  # keys and values, layers, heads, head size, float32
    assert cache_needed(load({"generators.max_model_len": 129}), SHAPE) == 3 * 128 * a_token
    on_gpu = load({"device": "cuda", "generators.max_model_len": 129})
    assert cache_needed(on_gpu, SHAPE) == 10 * 16 * a_token


def test_a_reward_model_is_counted_where_it_runs_and_a_judge_beside_it(load: Any) -> None:
    shapes = Shapes(SHAPE, SHAPE, SHAPE, {"rm": SHAPE})
    scorer = {"kind": "reward_model", "path": "rm"}
    judge = {"prompts": {"path": "x"}, "scorer": FUNCTION}
    changes = {"reward.scorer": scorer, "evaluation": judge, "device": "cuda"}
    by_role = {need.role: need for need in needs(load(changes), shapes, 16)}
    assert by_role["judge"].host == {"process": memory.REWARD}
    assert by_role["reward"].host["weights"] == 4 * SHAPE.trunk
    on_gpu = needs(load({**changes, "reward.num_gpus": 0.5}), shapes, 16)
    assert next(n for n in on_gpu if n.role == "reward").device["weights"] == 4 * SHAPE.trunk
