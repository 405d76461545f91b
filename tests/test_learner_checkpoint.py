"""Saving and loading: as if nothing had happened, and at another number of ranks the same weights."""

from __future__ import annotations

import errno
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.utils._pytree import tree_leaves

from learner import checkpoint
from learner.config import KLConfig, OptimizerConfig
from tests.learner_cases import (
    Case,
    batch_table,
    case,
    everything,
    folders,
    largest_difference,
    ppo_config,
    run_ranks,
    same_bytes,
    weights_of,
    write_checkpoint,
)

STEPS, SAVED_AFTER = 3, 2
SHORT = {"kl": KLConfig(coef=0.1, target=0.01, horizon=50), "epochs": 1}
NAMES = ["separate", "shared", "critic-free"]


@pytest.fixture(scope="module")
def cases():
    untied = folders().llama
    return {
        "separate": case(ppo_config(**SHORT)),
        "shared": case(ppo_config(value_model="shared", **SHORT)),
        "critic-free": Case(untied, untied, ppo_config(advantage="grpo", **SHORT)),
    }


def train(worker, steps, folder) -> None:
    for step in steps:
        torch.rand(3)  # so that the random state has something to restore
        worker.update(batch_table(seed=step), step, 3, str(folder))


def straight_and_resumed(rank, meeting, one, folder):
    """(all steps in one worker, the same with a save and a new worker between)."""
    straight = one.start(rank, meeting)
    train(straight, range(1, STEPS + 1), folder)
    expected = everything(straight)
    first = one.start(rank, meeting)
    train(first, range(1, SAVED_AFTER + 1), folder)
    saved = everything(first)
    write_checkpoint(first, folder / "checkpoint")
    unharmed = same_bytes(everything(first), saved)
    second = one.start(rank, meeting)
    second.load(str(folder / "checkpoint"))
    loaded = everything(second)
    train(second, range(SAVED_AFTER + 1, STEPS + 1), folder)
    return {
        "straight": expected,
        "resumed": everything(second),
        "saved": saved,
        "loaded": loaded,
        "unharmed": unharmed,
    }


def _at_two_ranks(rank, meeting, cases, folder, from_one):
    found = {}
    for name, one in cases.items():
        own = Path(folder) / name
        found[name] = straight_and_resumed(rank, meeting, one, own)
        worker = one.start(rank, meeting)
        worker.load(from_one[name])
        found[name]["loaded from one rank"] = everything(worker)
    found["refused"] = refusal_of_a_full_disk(worker, rank, Path(folder) / "full")
    return found


def refusal_of_a_full_disk(worker, rank, folder):
    """What saving raises when the disk is full for the last rank's shard alone."""
    folder.mkdir(exist_ok=True)
    if rank == worker._share.world_size - 1:
        (folder / f"__{rank}_0.distcp").symlink_to("/dev/full")
    try:
        write_checkpoint(worker, folder)
    except Exception as error:
        return type(error), getattr(error, "errno", None)


@pytest.fixture(scope="module")
def at_one(cases, tmp_path_factory):
    root = tmp_path_factory.mktemp("one")
    found = {name: straight_and_resumed(0, None, one, root / name) for name, one in cases.items()}
    return root, found


@pytest.fixture(scope="module")
def at_two(cases, at_one, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    from_one = {name: str(at_one[0] / name / "checkpoint") for name in cases}
    return folder, run_ranks(_at_two_ranks, cases, str(folder), from_one)


@pytest.mark.parametrize("name", NAMES)
def test_steps_straight_equal_steps_with_a_resume_between_bit_for_bit(name, at_one):
    found = at_one[1][name]
    assert same_bytes(found["loaded"], found["saved"])
    assert same_bytes(found["resumed"], found["straight"])
    assert not same_bytes(found["resumed"], found["loaded"])
    assert found["unharmed"]
    assert found["straight"]["kl_coef"] != 0.1


@pytest.mark.parametrize("name", NAMES)
def test_they_do_so_at_two_ranks_too(name, at_two):
    for rank in at_two[1]:
        found = rank[name]
        assert same_bytes(found["loaded"], found["saved"])
        assert same_bytes(found["resumed"], found["straight"])
        assert found["unharmed"]


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_of_one_rank_loads_at_two_and_the_other_way_round(name, cases, at_one, at_two):
    saved = at_one[1][name]["saved"]
    for rank in at_two[1]:
        assert same_bytes(rank[name]["loaded from one rank"], saved)
    worker = cases[name].start()
    worker.load(str(at_two[0] / name / "checkpoint"))
    assert same_bytes(everything(worker), at_two[1][0][name]["saved"])
    assert largest_difference(weights_of(worker), {n: saved[n] for n in weights_of(worker)}) < 1e-4


def test_a_full_disk_is_told_to_every_rank_as_what_it_is(cases, at_two, tmp_path):
    folder, found_by_rank = at_two
    assert [found["refused"] for found in found_by_rank] == [(OSError, errno.ENOSPC)] * 2
    assert not (folder / "full").exists()  # the room it took is free for the run's other files
    worker = cases["shared"].start()
    train(worker, [1], tmp_path)
    before = everything(worker)
    assert refusal_of_a_full_disk(worker, 0, tmp_path / "full") == (OSError, errno.ENOSPC)
    assert not (tmp_path / "full").exists()
    assert same_bytes(everything(worker), before)
    write_checkpoint(worker, tmp_path / "elsewhere")


@pytest.mark.parametrize("name", NAMES)
def test_what_is_learned_while_it_is_written_is_no_part_of_it(name, cases, tmp_path, monkeypatch):
    go_on, written = threading.Event(), FileSystemWriter.write_data

    def slow(*args):
        assert go_on.wait(60)
        return written(*args)

    monkeypatch.setattr(FileSystemWriter, "write_data", slow)
    worker = cases[name].start()
    train(worker, [1], tmp_path)
    at_save = everything(worker)
    worker.save(str(tmp_path / "checkpoint"))
    train(worker, [2], tmp_path)
    assert not worker.saved()
    go_on.set()
    while not worker.saved():
        time.sleep(0.01)
    assert not same_bytes(everything(worker), at_save)
    fresh = cases[name].start()
    fresh.load(str(tmp_path / "checkpoint"))
    assert same_bytes(everything(fresh), at_save)


@pytest.mark.parametrize("name", NAMES)
def test_the_next_one_is_copied_into_the_same_memory_and_holds_its_own_step(name, cases, tmp_path):
    worker = cases[name].start()
    saved, places = [], []
    for step in (1, 2, 3):
        train(worker, [step], tmp_path)
        saved.append(everything(worker))
        write_checkpoint(worker, tmp_path / f"checkpoint-{step}")
        leaves = tree_leaves(worker._copy._kept)
        places.append([checkpoint._local(x).data_ptr() for x in leaves if isinstance(x, Tensor)])
    assert places[0] == places[1] == places[2]
    for step, expected in enumerate(saved, 1):
        fresh = cases[name].start()
        fresh.load(str(tmp_path / f"checkpoint-{step}"))
        assert same_bytes(everything(fresh), expected)


def test_torchs_own_writer_is_understood_too(cases, tmp_path, monkeypatch):
    """It tells of a file that grew too large in words alone."""
    torn = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")

    def save(*_, **__):
        future = Future()
        future.set_exception(CheckpointException("write", {0: (torn, None)}))
        return future

    worker = cases["shared"].start()
    monkeypatch.setattr(checkpoint.dcp, "async_save", save)
    with pytest.raises(OSError, match="inline_container") as refused:
        write_checkpoint(worker, tmp_path / "torn")
    assert refused.value.errno == errno.EIO


def test_a_checkpoint_before_the_first_step_counts_no_step(cases, tmp_path):
    one = cases["separate"]
    straight = one.start()
    train(straight, [1], tmp_path)
    first = one.start()
    write_checkpoint(first, tmp_path / "checkpoint")
    second = one.start()
    second.load(str(tmp_path / "checkpoint"))
    for worker in (first, second):
        torch.manual_seed(0)
        train(worker, [1], tmp_path)
        assert same_bytes(weights_of(worker), weights_of(straight))


@pytest.mark.parametrize("target", [None, 0.01])
def test_a_resumed_run_goes_on_as_the_config_says_now(target, tmp_path):
    """Moments come from the checkpoint, and the KL coefficient where a controller moves it."""
    first = case(ppo_config(epochs=1, kl=KLConfig(coef=0.1, target=target))).start()
    train(first, [1], tmp_path)
    write_checkpoint(first, tmp_path / "checkpoint")
    adam = {"lr": 1e-3, "betas": (0.5, 0.6), "weight_decay": 0.5}
    changed = ppo_config(
        epochs=1, kl=KLConfig(coef=0.7, target=target), policy=OptimizerConfig(**adam)
    )
    second = case(changed).start()
    second.load(str(tmp_path / "checkpoint"))
    (group,) = second._update.policy_optimizer.adamw.param_groups
    assert (group["betas"], group["weight_decay"]) == ((0.5, 0.6), 0.5)
    assert second._update.kl_coef == (0.7 if target is None else first._update.kl_coef)
    kept, given = everything(second), everything(first)
    moments = [name for name in given if ".adam." in name]
    assert moments
    assert same_bytes({n: kept[n] for n in moments}, {n: given[n] for n in moments})
