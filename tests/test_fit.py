"""Whether a run fits is decided by its machine's memory or its GPUs'; what is proposed instead does fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster import fit, gpus
from cluster.config import BadInput, RunConfig
from cluster.config_file import load_config
from cluster.fit import Room, available_bytes, check_fit, too_much, with_value
from cluster.gpus import check_gpus, gpus_of
from cluster.memory import cache_needed, needs
from cluster.shapes import Shape, Shapes
from tests import tiny

GiB = 1 << 30
LARGE = Shape(2048, 24, 8192, 16, 8, 128, vocabulary=32000, tied=False)
SHAPES = Shapes(LARGE, LARGE, LARGE, {})
LONGEST = 512


@pytest.fixture
def load(tmp_path: Path, policy: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """load(changes) -> the config of a run with a model of 1.7 billion parameters."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    base = {
        "batch_size": 64,
        "sampling.max_tokens": 256,
        "generators.max_model_len": 512,
        "generators.kv_cache_bytes": GiB,
        "learner.max_tokens_per_microbatch": 16384,
    }

    def loader(changes: dict[str, Any] | None = None) -> RunConfig:
        tree = tiny.changed(tiny.run_tree(tmp_path, policy), {**base, **(changes or {})})
        return load_config(tiny.write_yaml(tmp_path / "run.yaml", tree), [], RunConfig)

    return loader


def refusal(config: RunConfig, room: Room, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(fit, "room_here", lambda config: room)
    monkeypatch.setattr(fit, "SHARED_MEMORY", Path("/nowhere"))
    with pytest.raises(BadInput) as refused:
        check_fit(config, SHAPES, LONGEST)
    return str(refused.value)


def host_bytes(config: RunConfig) -> int:
    return fit.host_total(needs(config, SHAPES, LONGEST))


def proposed(message: str) -> list[tuple[str, Any]]:
    settings = message.rsplit("; ", 2)[1].removesuffix(" would fit").split()
    pairs = [setting.split("=") for setting in settings]
    return [(key, float(value) if "." in value else int(value)) for key, value in pairs]


def apply(config: RunConfig, settings: list[tuple[str, Any]]) -> RunConfig:
    for key, value in settings:
        config = with_value(config, key, value)
    return config


def test_a_run_that_fits_exactly_passes_and_one_byte_less_does_not(
    load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load()
    total = host_bytes(config)
    assert too_much(config, SHAPES, LONGEST, Room(total, ())) is None
    message = refusal(config, Room(total - 1, ()), monkeypatch)
    for part in ("memory: learner: 1 x ", "that the run needs", "are available here", "would fit"):
        assert part in message


FEW_TOKENS = {"learner.max_tokens_per_microbatch": LONGEST}


@pytest.mark.parametrize(
    ("changes", "spared", "key", "step"),
    [
        ({}, 2 * GiB, "learner.max_tokens_per_microbatch", 128),
        ({"learner.ranks": 4}, 15 * GiB, "learner.max_tokens_per_microbatch", 128),
        (FEW_TOKENS, GiB // 2, "generators.kv_cache_bytes", 9 << 20),
        ({"generators.count": 64, **FEW_TOKENS}, 30 * GiB, "generators.kv_cache_bytes", 9 << 20),
        ({"generators.count": 8, **FEW_TOKENS}, 30 * GiB, "generators.count", 1),
        ({"learner.ranks": 9, **FEW_TOKENS}, 3 * GiB, "learner.ranks", 1),
    ],
)
def test_what_is_proposed_fits_and_the_next_larger_value_does_not(
    load: Any,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    spared: int,
    key: str,
    step: int,
) -> None:
    config = load(changes)
    room = Room(host_bytes(config) - spared, ())
    settings = proposed(refusal(config, room, monkeypatch))
    assert [name for name, _ in settings] == [key]
    assert too_much(apply(config, settings), SHAPES, LONGEST, room) is None
    larger = with_value(config, key, settings[0][1] + step)
    assert too_much(larger, SHAPES, LONGEST, room) is not None


def test_where_no_setting_is_enough_alone_several_are_named(
    load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load({"learner.ranks": 4, "generators.count": 2})
    least = apply(
        config,
        [
            ("learner.ranks", 1),
            ("learner.max_tokens_per_microbatch", LONGEST),
            ("generators.kv_cache_bytes", cache_needed(config, LARGE)),
        ],
    )
    room = Room(host_bytes(least), ())
    settings = proposed(refusal(config, room, monkeypatch))
    assert len(settings) > 1
    assert too_much(apply(config, settings), SHAPES, LONGEST, room) is None


def test_where_nothing_helps_no_setting_is_proposed(
    load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = refusal(load(), Room(GiB, ()), monkeypatch)
    assert "; take a smaller model or a larger machine; this is an estimate" in message


def test_whoever_knows_better_than_the_estimate_is_warned_only(
    load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = refusal(load(), Room(GiB, ()), monkeypatch)
    assert message.endswith("; this is an estimate, too_little_memory=warn goes on all the same")
    warned = load({"too_little_memory": "warn"})
    assert check_fit(warned, SHAPES, LONGEST) == message.rsplit("; ", 1)[0]
    monkeypatch.setattr(fit, "room_here", lambda config: Room(1 << 50, ()))
    assert check_fit(warned, SHAPES, LONGEST) == ""


def test_a_cluster_that_is_joined_is_not_judged_by_this_machine(
    load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "available_bytes", lambda: GiB)
    check_fit(load({"ray_address": "auto"}), SHAPES, LONGEST)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")  # a job's
    check_fit(load(), SHAPES, LONGEST)


# ---- GPUs


def on_gpus(load: Any, **changes: Any) -> RunConfig:
    return load({"device": "cuda", "generators.kv_cache_bytes": None, **changes})


def test_a_learner_that_exceeds_its_gpu_is_named_with_fewer_tokens(
    load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = on_gpus(load, **{"learner.ranks": 2})
    need = next(n for n in needs(config, SHAPES, LONGEST) if n.role == "learner")
    room = Room(1000 * GiB, (need.device_bytes - GiB,) * 4)
    message = refusal(config, room, monkeypatch)
    assert "memory: learner: needs about" in message
    assert "of a GPU, and may have" in message
    settings = proposed(message)
    assert [key for key, _ in settings] == ["learner.max_tokens_per_microbatch"]
    assert too_much(apply(config, settings), SHAPES, LONGEST, room) is None


def test_ranks_are_proposed_only_as_far_as_there_are_gpus(
    load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = on_gpus(load, **{"learner.max_tokens_per_microbatch": LONGEST})
    four = with_value(config, "learner.ranks", 4)
    need = next(n for n in needs(four, SHAPES, LONGEST) if n.role == "learner")
    gpu = need.device_bytes
    assert proposed(refusal(config, Room(1000 * GiB, (gpu,) * 5), monkeypatch)) == [
        ("learner.ranks", 4)
    ]
    assert "larger machine" in refusal(config, Room(1000 * GiB, (gpu,) * 4), monkeypatch)


def test_an_engine_needs_its_weights_and_one_sequence_in_its_share_of_the_gpu(
    load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = on_gpus(load, **{"learner.ranks": 32, "generators.gpu_memory_utilization": 0.5})
    need = next(n for n in needs(config, SHAPES, LONGEST) if n.role == "generators")
    room = Room(1000 * GiB, (need.device_bytes * 10 // 7,) * 64)
    message = refusal(config, room, monkeypatch)
    assert "memory: generators: " in message
    assert proposed(message) == [("generators.gpu_memory_utilization", 0.71)]


def test_a_gpus_machine_must_hold_what_stands_beside_the_gpus(
    load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = on_gpus(load)
    room = Room(host_bytes(config) - 1, (1000 * GiB,) * 2)
    assert "are available here" in refusal(config, room, monkeypatch)


def test_without_torchs_word_on_gpus_only_the_machine_is_judged(load: Any) -> None:
    assert too_much(on_gpus(load), SHAPES, LONGEST, Room(1000 * GiB, ())) is None


def test_a_torch_that_cannot_tell_tells_of_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "ASK_TORCH", "print(80 << 30); print(24 << 30)")
    assert gpus.gpu_bytes() == (80 << 30, 24 << 30)
    monkeypatch.setattr(gpus, "ASK_TORCH", "raise ImportError('no torch')")
    assert gpus.gpu_bytes() == ()


@pytest.mark.parametrize(
    ("available", "fits"), [(6.5, True), (8.0, True), (6.0, False), (0.0, False)]
)
def test_roles_need_as_many_gpus_as_they_name(load: Any, available: float, fits: bool) -> None:
    config = load(
        {
            "device": "cuda",
            "generators.count": 2,
            "generators.tensor_parallel_size": 2,
            "learner.ranks": 2,
            "reward.num_gpus": 0.5,
        }
    )
    if fits:
        check_gpus(gpus_of(config), lambda: available)
        return
    with pytest.raises(BadInput) as refused:
        check_gpus(gpus_of(config), lambda: available)
    for part in (
        "6.5 GPUs",
        "4 for generators",
        "2 for learner.ranks",
        f"has {available:g}",
        "lower",
    ):
        assert part in str(refused.value)


def test_on_cpu_no_gpu_is_needed(load: Any) -> None:
    check_gpus(gpus_of(load({"generators.count": 64})), lambda: 0.0)


# ---- the machine


def test_a_containers_limit_counts_less_what_it_uses_but_not_the_files_it_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "CGROUP", tmp_path)
    machine = available_bytes()
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("700000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 200000\n")
    assert available_bytes() == 500000
    (tmp_path / "memory.max").write_text("max\n")
    assert available_bytes() == pytest.approx(machine, rel=0.3)


def test_shared_memory_must_hold_both_images_of_the_weights(
    load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "room_here", lambda config: Room(1000 * GiB, ()))
    monkeypatch.setattr(fit, "SHARED_MEMORY", Path("/tmp"))
    images = 2 * 4 * LARGE.parameters
    monkeypatch.setattr(fit, "free_bytes", lambda path: images)
    check_fit(load(), SHAPES, LONGEST)
    monkeypatch.setattr(fit, "free_bytes", lambda path: images - 1)
    check_fit(load({"generators.weight_push": "delta"}), SHAPES, LONGEST)
    with pytest.raises(BadInput, match=r"/tmp: has .*shm-size.*weight_push=delta"):
        check_fit(load(), SHAPES, LONGEST)


def test_a_cache_that_holds_no_sequence_is_refused_with_one_that_does(load: Any) -> None:
    least = cache_needed(load(), LARGE)
    check_fit(load({"generators.kv_cache_bytes": least, "ray_address": "auto"}), SHAPES, LONGEST)
    with pytest.raises(BadInput, match=f"kv_cache_bytes: {least - 1} .*set it to {least}"):
        check_fit(load({"generators.kv_cache_bytes": least - 1}), SHAPES, LONGEST)
