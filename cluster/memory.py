"""How much memory each role of a run takes, from its config and the sizes of its models.

How exact: it is within 5 % of the five runs in benchmarks/results/end_to_end_amx.txt (2.7 million
parameters, two cores), but that is no independent check: nearly all of it is what the processes cost
before they hold a model, and these constants were fitted to the same runs. Workers that are forked share
what they imported: the runs in end_to_end.txt took 1 to 11 % less than is estimated, with some 130 MB a
rank of oneDNN's programs (learner/linear.py), which are not counted. With 43 and 194 million parameters
it is 9 and 0 % more than was measured (growth.txt). Weights, gradients, moments and the KV cache are
arithmetic. Activations are what autograd keeps of Qwen2's layers (within 1 %, tests/test_memory.py), for
the most tokens that a microbatch may have: completions that end early take less. Not counted: what an
allocator holds and does not use, Ray's store of trajectories, padding of a reward model's batches. A run
in one process takes less. The figures for GPUs are not measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from cluster.config import RunConfig
from cluster.shapes import Shape, Shapes, reward_models
from learner.config import KEPT_LOGITS_BYTES
from reward_service.config import RewardServiceConfig, ScorerConfig

MB = 10**6
# What a process takes before it holds anything: interpreter, libraries, its share of those in common.
# From a look at a tiny run's processes (a rank 0.43 GB), LEARNER then raised to meet the five runs.
DRIVER_AND_RAY = 700 * MB  # the driver 160; Ray's own processes the rest
GENERATOR = 520 * MB  # vLLM
LEARNER = 500 * MB  # torch and transformers, with huge pages
REWARD = 100 * MB
REWARD_MODEL = 450 * MB
# So much more took a rank that computes in bfloat16 on CPU: the difference of two of the runs.
BFLOAT16_ON_CPU = 650 * MB
GPU_CONTEXT = 1000 * MB  # on the GPU: CUDA's context, its libraries' workspaces, NCCL's buffers
GPU_PROCESS = 2000 * MB  # on the host: the same libraries

FLOAT32 = 4
ITEM = {"float32": FLOAT32, "bfloat16": 2}
MOMENTS = 2 * FLOAT32
# Parameters that FSDP gathers together, at least (learner/sharding.py).
UNIT = (32 << 20) // FLOAT32
LOGITS_AT_ONCE = 2  # chunks of [rows, vocabulary] alive together (benchmarks/results/learner.txt)


@dataclass(frozen=True)
class Need:
    """Bytes that each of `count` processes takes, by what for: of its GPU, and of the machine."""

    role: str
    count: int
    host: Mapping[str, int]
    device: Mapping[str, int] = field(default_factory=dict)

    @property
    def host_bytes(self) -> int:
        return sum(self.host.values())

    @property
    def device_bytes(self) -> int:
        return sum(self.device.values())


def needs(config: RunConfig, shapes: Shapes, longest: int) -> list[Need]:
    """`longest`: tokens of the longest prompt and completion."""
    image = shapes.policy.parameters * ITEM[config.generators.dtype]
    return [
        Need("driver", 1, {"driver and Ray": DRIVER_AND_RAY, "weights to push": 2 * image}),
        generators_need(config, shapes.policy),
        _learner(config, shapes, longest),
        *_services(config, shapes, longest),
    ]


def tokens_at_once(config: RunConfig, trajectories: int, longest: int) -> int:
    """The most tokens of one microbatch of `trajectories`: a sequence is never cut, and a rank has only
    its share."""
    share = math.ceil(trajectories / config.learner.ranks)
    return max(longest, min(config.learner.microbatch_tokens(config.device), share * longest))


def microbatches(config: RunConfig, longest: int) -> int:
    """The most microbatches of a rank in a minibatch of sequences of equal work."""
    share = math.ceil(config.batch_size / config.ppo.minibatches / config.learner.ranks)
    return math.ceil(share / max(1, config.learner.microbatch_tokens(config.device) // longest))


def checkpoint_bytes(config: RunConfig, num_parameters: int) -> int:
    """Bytes on disk: weights and AdamW's two moments in float32, and a margin."""
    return num_parameters * 14 * (2 if config.ppo.separate_critic else 1)


def cache_needed(config: RunConfig, shape: Shape) -> int:
    """The least cache that vLLM starts with: blocks for one sequence of max_model_len, and one more."""
    block = 128 if config.device == "cpu" else 16
    blocks = math.ceil(config.generators.max_model_len / block) + 1
    item = ITEM[config.generators.dtype]
    return shape.cache_bytes(blocks * block, item) // config.generators.tensor_parallel_size


def generators_need(config: RunConfig, shape: Shape) -> Need:
    generators, item = config.generators, ITEM[config.generators.dtype]
    weights = shape.parameters * item
    taken = {
        "weights": weights // generators.tensor_parallel_size,
        "KV cache": generators.kv_cache_bytes or cache_needed(config, shape),
        "logits": LOGITS_AT_ONCE * generators.max_num_seqs * shape.vocabulary * FLOAT32,
    }
    if config.device == "cpu":
        # A tied head keeps the embedding and a packed copy of it; shared weights are the driver's.
        packed = weights + (shape.embedding * item if shape.tied else 0)
        taken["weights"] = packed if generators.weight_memory == "packed" else 0
    image = {"image for deltas": weights} if generators.weight_push == "delta" else {}
    return _place(config, Need("generators", generators.count, image, taken), GENERATOR)


def _learner(config: RunConfig, shapes: Shapes, longest: int) -> Need:
    learner, ppo = config.learner, config.ppo
    trained = shapes.policy.parameters + (shapes.value.trunk if ppo.separate_critic else 0)
    waiting = {
        "weights": FLOAT32 * (trained + shapes.reference.parameters) // learner.ranks,
        "gradients and AdamW": (FLOAT32 + MOMENTS) * trained // learner.ranks,
    }
    largest = max(shapes.policy, shapes.value, key=lambda shape: shape.parameters)
    working = _working(config, largest if ppo.separate_critic else shapes.policy, longest)
    if microbatches(config, longest) > 1:  # summed over ranks with the last one only
        working["gradients not yet summed"] = FLOAT32 * trained
    state = (FLOAT32 + MOMENTS) * trained // learner.ranks
    host = {"copy that checkpoints are written from": state}
    if ppo.epochs * ppo.minibatches > 1:
        host["copy to undo a step"] = state
    if learner.dtype == "bfloat16" and config.device == "cpu":
        host["bfloat16 on CPU"] = BFLOAT16_ON_CPU
    device = working if learner.cpu_offload else waiting | working
    host |= waiting if learner.cpu_offload else {}
    return _place(config, Need("learner", learner.ranks, host, device), LEARNER)


def _working(config: RunConfig, shape: Shape, longest: int) -> dict[str, int]:
    """What a forward and backward pass of one model holds, beside its shards."""
    learner, item = config.learner, ITEM[config.learner.dtype]
    trained = tokens_at_once(config, config.batch_size // config.ppo.minibatches, longest)
    swept = tokens_at_once(config, config.batch_size, longest)  # without gradient
    kept = activation_bytes(shape, item)
    layers = shape.layers * kept
    if learner.activation_checkpointing:  # the layers' inputs, and one layer computed again
        layers = shape.layers * shape.hidden * item + kept
    passing = (2 * shape.mlp + 4 * shape.hidden) * item  # gradients on their way through a layer
    row = shape.vocabulary * FLOAT32
    rows = min(learner.logprob_chunk_rows, swept)
    chunk = min(rows, trained)
    kept_rows = min(KEPT_LOGITS_BYTES // (chunk * row) * chunk, trained)
    outer = shape.parameters - shape.layers * shape.layer  # embedding and head, gathered throughout
    whole = outer + min(shape.layers * shape.layer, 2 * max(shape.layer, UNIT))
    return {
        "activations": max(trained * (layers + passing), swept * passing),
        "logits": LOGITS_AT_ONCE * rows * row,
        "log-probabilities kept": kept_rows * row,
        "gathered by FSDP": whole * 2 * item,  # weights and gradients
    }


def activation_bytes(shape: Shape, item: int) -> int:
    """What autograd keeps of one layer for one token. The two norms compute in float32."""
    queries, keys = shape.heads * shape.head_size, 2 * shape.kv_heads * shape.head_size
    norms = 2 * shape.hidden * FLOAT32 + 4 * shape.hidden * item
    return norms + (3 * queries + keys + 4 * shape.mlp) * item


def _services(config: RunConfig, shapes: Shapes, longest: int) -> list[Need]:
    """The reward service; and the judge, where it is another one."""
    services = {"reward": config.reward}
    if config.judge is not None:
        services["judge"] = config.judge
    return [_service(config, name, it, shapes, longest) for name, it in services.items()]


def _service(
    config: RunConfig, role: str, service: RewardServiceConfig, shapes: Shapes, longest: int
) -> Need:
    taken = _reward_models(service.scorer, shapes, service.batch_size * longest)
    fixed = REWARD_MODEL if taken else REWARD
    if config.device == "cuda" and service.num_gpus > 0:
        return _place(config, Need(role, 1, {}, taken), fixed)
    return Need(role, 1, {"process": fixed, **taken})


def _reward_models(scorer: ScorerConfig, shapes: Shapes, tokens: int) -> dict[str, int]:
    weights = passing = 0
    for model in reward_models(scorer):
        shape, item = shapes.rewards[model.path], ITEM[model.dtype]
        weights += shape.trunk * item
        batch = min(tokens, model.max_batch_tokens)
        passing = max(passing, batch * (3 * shape.mlp + 6 * shape.hidden) * item)
    return {"weights": weights, "activations": passing} if weights else {}


def _place(config: RunConfig, need: Need, process: int) -> Need:
    """Add the process itself; on CPU everything is the machine's memory."""
    if config.device == "cpu":
        return replace(need, host={"process": process, **need.device, **need.host}, device={})
    return replace(
        need,
        host={"process": GPU_PROCESS, **need.host},
        device={"CUDA": GPU_CONTEXT, **need.device},
    )
