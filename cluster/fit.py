"""Whether a run fits: what its roles need (memory.py) against what is there, before anything starts.

Only where Ray is our own is this machine the one that counts; a cluster's memory is not asked for.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.config import BadInput, RunConfig
from cluster.disk import free_bytes, gib
from cluster.gpus import gpu_bytes, gpus_of
from cluster.memory import ITEM, Need, cache_needed, needs
from cluster.shapes import Shapes

SHARED_MEMORY = Path("/dev/shm")
CGROUP = Path("/sys/fs/cgroup")
MiB = 1 << 20

Setting = tuple[str, Any]  # "section.key" and its value
Fits = Callable[[RunConfig], bool]


@dataclass(frozen=True)
class Room:
    """Bytes of this machine that are free, and of each of its GPUs; none if torch cannot tell."""

    host: int
    gpus: tuple[int, ...]


@dataclass(frozen=True)
class TooMuch:
    role: str
    said: str  # needed and available, in words


def own_ray(config: RunConfig) -> bool:
    return config.ray_address is None and "RAY_ADDRESS" not in os.environ


def check_fit(config: RunConfig, shapes: Shapes, longest: int) -> str:
    """BadInput if the run cannot have the memory that it needs, with the largest setting that can. Where
    only an estimate says so, that is returned if the config wants a warning; else ""."""
    check_cache(config, shapes)
    if not own_ray(config):
        return ""
    _check_shared_memory(config, shapes)
    room = room_here(config)

    def fits(changed: RunConfig) -> bool:
        enough_gpus = not room.gpus or sum(gpus_of(changed).values()) <= len(room.gpus)
        return enough_gpus and too_much(changed, shapes, longest, room) is None

    over = too_much(config, shapes, longest, room)
    if over is None:
        return ""
    found = largest_settings(config, shapes, longest, fits)
    settings = " ".join(f"{key}={value}" for key, value in found or ())
    advice = f"{settings} would fit" if found else "take a smaller model or a larger machine"
    said = f"memory: {over.role}: {over.said}; {advice}"
    if config.too_little_memory == "refuse":
        raise BadInput(f"{said}; this is an estimate, too_little_memory=warn goes on all the same")
    return said


def check_cache(config: RunConfig, shapes: Shapes) -> None:
    """vLLM starts with no cache that does not hold one sequence."""
    given, least = config.generators.kv_cache_bytes, cache_needed(config, shapes.policy)
    if given is not None and given < least:
        raise BadInput(
            f"generators.kv_cache_bytes: {given} does not hold one sequence of generators.max_model_len "
            f"{config.generators.max_model_len}; set it to {least} or more"
        )


def room_here(config: RunConfig) -> Room:
    return Room(available_bytes(), gpu_bytes() if config.device == "cuda" else ())


def available_bytes() -> int:
    """What this machine, or the container, can still give."""
    import psutil

    available = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError, KeyError):  # no such group, or "max"
        limit = int((CGROUP / "memory.max").read_text())
        words = (CGROUP / "memory.stat").read_text().split()
        cached = int(dict(zip(words[::2], words[1::2], strict=True))["inactive_file"])
        used = int((CGROUP / "memory.current").read_text()) - cached
        return min(available, limit - used)
    return available


def too_much(config: RunConfig, shapes: Shapes, longest: int, room: Room) -> TooMuch | None:
    """The role that does not fit its GPU, or that takes most of a machine that is too small."""
    needed = needs(config, shapes, longest)
    for need in needed:
        has = min(room.gpus, default=0) * _share_of_gpu(config, need)
        if room.gpus and need.device_bytes > has:
            said = f"needs about {gib(need.device_bytes)} of a GPU, and may have {gib(int(has))}"
            return TooMuch(need.role, said)
    total = host_total(needed)
    if total <= room.host:
        return None
    most = max(needed, key=lambda need: need.count * need.host_bytes)
    said = (
        f"{most.count} x {gib(most.host_bytes)} of about {gib(total)} that the run needs, and "
        f"{gib(room.host)} are available here"
    )
    return TooMuch(most.role, said)


def host_total(needed: Iterable[Need]) -> int:
    return sum(need.count * need.host_bytes for need in needed)


def _share_of_gpu(config: RunConfig, need: Need) -> float:
    if need.role != "generators" or config.generators.kv_cache_bytes is not None:
        return 1.0
    return config.generators.gpu_memory_utilization


def _check_shared_memory(config: RunConfig, shapes: Shapes) -> None:
    if config.generators.weight_push == "delta" or not SHARED_MEMORY.is_dir():
        return
    images = 2 * shapes.policy.parameters * ITEM[config.generators.dtype]
    if (free := free_bytes(SHARED_MEMORY)) < images:
        raise BadInput(
            f"{SHARED_MEMORY}: has {gib(free)} free, the weights that are pushed take "
            f"{gib(images)} of it; enlarge it (docker run --shm-size=...), or set "
            "generators.weight_push=delta"
        )


# ---- what would fit


def largest_settings(
    config: RunConfig, shapes: Shapes, longest: int, fits: Fits
) -> list[Setting] | None:
    """The first knob that is enough alone, turned as little as needed; else knob after knob, each as
    far as it goes, until it fits. None if it never does."""
    for key, values in _knobs(config, shapes, longest):
        for value in values:
            if fits(with_value(config, key, value)):
                return [(key, value)]
    turned: list[Setting] = []
    for key, _ in _knobs(config, shapes, longest):
        values = dict(_knobs(config, shapes, longest))[key]  # anew: they depend on each other
        for value in values:
            changed = with_value(config, key, value)
            if fits(changed):
                return [*turned, (key, value)]
        if values:
            config = changed
            turned.append((key, values[-1]))
    return None


def with_value(config: RunConfig, key: str, value: Any) -> RunConfig:
    section, name = key.split(".")
    part = getattr(config, section).model_copy(update={name: value})
    return config.model_copy(update={section: part})


def _knobs(
    config: RunConfig, shapes: Shapes, longest: int
) -> Iterator[tuple[str, list[int] | list[float]]]:
    """Each with the values that need less memory than the one it has, the best first."""
    learner, generators = config.learner, config.generators
    tokens = learner.microbatch_tokens(config.device)
    yield "learner.max_tokens_per_microbatch", _down(tokens, longest, 64)
    cache = generators.kv_cache_bytes
    if cache is not None:
        yield "generators.kv_cache_bytes", _down(cache, cache_needed(config, shapes.policy), MiB)
    else:
        first = round(generators.gpu_memory_utilization * 100) + 1
        yield "generators.gpu_memory_utilization", [percent / 100 for percent in range(first, 96)]
    if config.device == "cuda":
        most = config.batch_size // config.ppo.minibatches
        yield "learner.ranks", [*range(learner.ranks + 1, min(most, 8 * learner.ranks) + 1)]
        return
    yield "learner.ranks", [*range(learner.ranks - 1, 0, -1)]
    yield "generators.count", [*range(generators.count - 1, 0, -1)]


def _down(now: int, least: int, unit: int) -> list[int]:
    """At most 128 values below `now`, multiples of `unit`, and at the end the least."""
    step = -(-max(now - least, 0) // 128 // unit) * unit or unit
    first = (now - 1) // step * step
    return [*range(first, least, -step), least] if least < now else []
