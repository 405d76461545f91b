"""Makes the vLLM engine a generator steps: in this process, quiet, quick to start, exact logprobs."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

from actors.config import GeneratorsConfig
from actors.weight_update import PUSH_THREADS, Probe
from reward_service.fast_import import fast_import

# Settings of the C library. Huge pages for what is allocated; one arena, for a thread's own one gives its
# memory back, and takes it again page by page; and copies from half a megabyte on go past the caches, so that
# a weight push is written a third faster. Read when a process begins, so forked roles have it from the fork
# server: the same.
TUNABLES = ":".join(
    (
        "glibc.malloc.hugetlb=1",
        "glibc.malloc.arena_max=1",
        "glibc.cpu.x86_non_temporal_threshold=0x80000",
    )
)
# The environment of a process that runs an engine. Must be set before torch is imported.
ENGINE_ENV = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine lives in the actor: its death is the actor's
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",  # an engine's processes are on one machine; else the outer address
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # cores are shared with other roles
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "OMP_NUM_THREADS": "1",  # two small engines beat one with two threads
    "OMP_WAIT_POLICY": "PASSIVE",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "PYTHONWARNINGS": "ignore",
}
CPU_ENGINE_ENV = ENGINE_ENV | {
    "TORCHDYNAMO_DISABLE": "1",  # compiles one tiny function, for seconds, on the first logprob
    "GLIBC_TUNABLES": TUNABLES,  # packing new weights is a third faster
}


def import_vllm() -> None:
    """Import the engine, and on CPU what vLLM would only import when it makes one."""
    logging.getLogger("vllm").addHandler(logging.NullHandler())
    with fast_import():
        _torch_set_num_threads()
        import vllm.v1.engine.llm_engine
        from vllm.platforms import current_platform

        if current_platform.is_cpu():
            import vllm.v1.worker.cpu_worker  # noqa: F401


def set_num_threads(number: int) -> None:
    """Of what this thread computes on CPU."""
    _torch_set_num_threads()(number)


@functools.cache
def _torch_set_num_threads() -> Callable[[int], None]:
    """torch's own, taken before vLLM makes an engine on CPU: then it puts a refusal in its place, since
    it may have bound threads to cores. Here it binds none."""
    import torch

    return torch.set_num_threads


@contextlib.contextmanager
def all_cores() -> Iterator[None]:
    """What this thread computes on CPU is shared out among PUSH_THREADS meanwhile. Not for what packs
    weights (engine_thread.apply)."""
    import torch

    threads = torch.get_num_threads()
    set_num_threads(PUSH_THREADS)
    try:
        yield
    finally:
        set_num_threads(threads)


def make_engine(config: GeneratorsConfig, model: str) -> Any:
    """An LLMEngine on this process's device."""
    import_vllm()
    _single_process_group()
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    memory: dict[str, Any] = {"gpu_memory_utilization": config.gpu_memory_utilization}
    if config.kv_cache_bytes is not None:
        memory["kv_cache_memory_bytes"] = config.kv_cache_bytes
    return LLMEngine.from_engine_args(
        EngineArgs(
            model=model,
            load_format="safetensors",  # never a pickle
            dtype=config.dtype,
            max_model_len=config.max_model_len,
            max_num_seqs=config.max_num_seqs + 1,  # the probe always finds a seat
            tensor_parallel_size=config.tensor_parallel_size,
            # Not Ray, which vLLM takes in a placement group: its workers would want groups of their own.
            distributed_executor_backend="mp" if config.tensor_parallel_size > 1 else "uni",
            async_scheduling=False,  # or a step of the old weights is told as the new ones'
            enforce_eager=_on_cpu(),
            seed=0,
            logprobs_mode="processed_logprobs",  # at the sampling temperature
            worker_extension_cls="actors.weight_receiver.WeightReceiver",
            use_tqdm_on_load=False,
            disable_log_stats=True,
            generation_config="vllm",  # sampling is what the config says, not what the folder says
            **memory,
        )
    )


def salt_waiting(engine: Any, salt: str) -> None:
    """Requests that vLLM holds back, or has taken its cache from again, are of the weights that came just
    now: they must find no blocks of those before. Its own reset_prefix_cache does nothing while anything
    runs."""
    from vllm.v1.request import RequestStatus

    for request in engine.engine_core.engine_core.scheduler.requests.values():
        if request.status != RequestStatus.RUNNING:
            request.cache_salt = salt
            request.block_hashes.clear()
            request.update_block_hashes()


def _on_cpu() -> bool:
    from vllm.platforms import current_platform

    return current_platform.is_cpu()


def _single_process_group() -> None:
    """Left to itself vLLM opens a TCP store on every interface; on CPU a group that is there is taken."""
    import torch.distributed as dist

    if _on_cpu() and not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def completion_params(max_tokens: int, temperature: float, seed: int, stop: tuple[str, ...]) -> Any:
    """vLLM's parameters for a completion: the sampled tokens' logprobs, delivered when finished."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        stop=list(stop) or None,
        logprobs=0,
        flat_logprobs=True,
        detokenize=bool(stop),
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def probe_params(probe: Probe) -> Any:
    """vLLM's parameters for a probe. Not the prompt's own logprobs, for which vLLM would multiply by the
    vocabulary's matrix once more."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        max_tokens=1,
        temperature=0.0,
        logprob_token_ids=list(probe.next_ids),
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
