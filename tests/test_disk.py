"""A disk that refuses a checkpoint costs that checkpoint, never the run or the checkpoint before it."""

from __future__ import annotations

import asyncio
import errno
import io
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from actors.prompts import PromptStream
from actors.trajectory import to_table
from cluster import checkpoints, cli, disk
from cluster.checkpoints import CheckpointFailed, newest_intact
from cluster.config import BadInput, RunConfig
from cluster.config_file import load_config
from cluster.disk import check_disk, refusal_of
from cluster.doctor import check_same_prompts
from cluster.learner_group import LearnerGroup
from cluster.ledger import Ledger
from cluster.live_view import LiveView
from cluster.placement import InProcessHost, Member, RoleFailed
from cluster.run import Run
from cluster.run_files import RunFiles
from learner.trajectory_buffer import TrajectoryBuffer
from tests import tiny

FULL = OSError(errno.ENOSPC, "No space left on device")
SHARD = b"weights" * 100


class FakeLearner:
    """Writes what a rank would, to the real disk; `link_to` is where its files end up instead."""

    def __init__(self) -> None:
        self.raises: Exception | None = None
        self.is_written = True
        self.link_to: dict[str, str] = {}
        self.num_saves = 0

    def save(self, folder: str) -> None:
        self.num_saves += 1
        Path(folder).mkdir()
        shard = self._linked(Path(folder) / "__0_0.distcp")
        shard.write_bytes(b"half" if self.raises is not None else SHARD)

    def saved(self) -> bool:
        if self.raises is not None:
            raise self.raises
        return self.is_written

    def save_trajectories(self, path: str, keys: Any, *chunks: Any) -> None:
        pq.write_table(to_table([]), self._linked(Path(path)))

    def _linked(self, path: Path) -> Path:
        if path.name in self.link_to:
            path.symlink_to(self.link_to[path.name])
        return path


PROMPTS = [tiny.prompt(0), tiny.prompt(1)]


class World:
    """A run of nine steps whose learner is a fake and whose disk is real."""

    def __init__(self, folder: Path) -> None:
        tree = tiny.changed(tiny.run_tree(folder), {"num_steps": 9})
        config = load_config(tiny.write_yaml(folder / "run.yaml", tree), [], RunConfig)
        self.files = RunFiles(config)
        self.files.create(overwrite=False)
        self.learner = FakeLearner()
        self.text = io.StringIO()
        host, member = InProcessHost(), Member("learner-0", self.learner)
        self.run = Run(
            config=config,
            host=host,
            files=self.files,
            metrics=SimpleNamespace(),  # type: ignore[arg-type]
            view=LiveView("tiny", 9, console=Console(file=self.text)),
            supervisor=SimpleNamespace(  # type: ignore[arg-type]
                buffer=TrajectoryBuffer(),
                ledger=Ledger(prompts_per_step=4, max_staleness=0),
                stream=PromptStream(PROMPTS, seed=0, shuffle=True),
            ),
            learner=LearnerGroup([member], host, timeout_s=5),
            rewards=member,
            evaluation=None,
            prompts=PROMPTS,
            started=0.0,
        )

    @property
    def folder(self) -> Path:
        return self.files.folder / "checkpoints"

    async def save(self, step: int) -> bool:
        self.run.step = step
        await self.run.checkpoint()
        await self.run.wait_checkpoint()
        return self.run.saved_step == step

    def events(self) -> list[dict[str, Any]]:
        lines = (self.files.folder / "events.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def assert_only_the_first_is_there(self, problems: tuple[str, ...] = ()) -> None:
        found, said = newest_intact(self.files.folder)
        assert found is not None
        assert (found.step, tuple(said)) == (3, problems)
        assert [path.name for path in self.folder.iterdir()] == ["step-000003"]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def by_the_learner(world: World, _: pytest.MonkeyPatch) -> None:
    world.learner.raises = FULL


def by_a_wrapped_error_of_the_learner(world: World, _: pytest.MonkeyPatch) -> None:
    """As Ray hands it on: an exception whose `cause` is what was raised over there."""

    class TaskError(Exception):
        cause = OSError(errno.EROFS, "Read-only file system")

    world.learner.raises = TaskError("it failed")


def by_a_device_that_is_full(world: World, _: pytest.MonkeyPatch) -> None:
    world.learner.link_to["__0_0.distcp"] = "/dev/full"


def by_a_device_that_is_full_for_the_buffer(world: World, _: pytest.MonkeyPatch) -> None:
    world.learner.link_to["buffer.parquet"] = "/dev/full"


def when_made_durable(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise FULL

    monkeypatch.setattr(checkpoints, "_make_durable", refuse)


def by_too_little_room(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "free_bytes", lambda path: len(SHARD))


REFUSALS = [
    by_the_learner,
    by_a_wrapped_error_of_the_learner,
    by_a_device_that_is_full,
    by_a_device_that_is_full_for_the_buffer,
    when_made_durable,
    by_too_little_room,
]


@pytest.mark.parametrize("refused", REFUSALS)
async def test_a_refused_checkpoint_is_told_and_swept_and_the_next_one_is_saved(
    world: World, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., None]
) -> None:
    assert await world.save(3)
    with monkeypatch.context() as patch:
        refused(world, patch)
        assert not await world.save(6)
        world.assert_only_the_first_is_there()
    event = world.events()[-1]
    assert (event["event"], event["step"]) == ("checkpoint_failed", 6)
    assert event["path"].endswith("checkpoints/step-000006")
    assert event["reason"]
    assert event["needed_bytes"] > len(SHARD)
    assert event["free_bytes"] > 0
    (warning,) = world.text.getvalue().splitlines()
    assert "WARNING: " in warning
    assert event["path"] in warning
    assert event["reason"] in warning
    world.learner.raises, world.learner.link_to = None, {}
    assert await world.save(7)
    assert newest_intact(world.files.folder)[0] is not None
    assert sorted(path.name for path in world.folder.iterdir()) == ["step-000003", "step-000007"]


@pytest.mark.parametrize("refused", REFUSALS)
@pytest.mark.parametrize("stopped", [False, True])
async def test_the_last_checkpoint_refused_fails_the_run_in_one_line(
    world: World, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., None], stopped: bool
) -> None:
    assert await world.save(3)
    if stopped:
        world.run.stop.set()
    with monkeypatch.context() as patch:
        refused(world, patch)
        with pytest.raises(CheckpointFailed) as failed:
            await world.save(6 if stopped else 9)
    assert "\n" not in str(failed.value)
    assert "make room" in str(failed.value)
    world.assert_only_the_first_is_there()


def test_a_failure_of_that_kind_is_exit_code_3_and_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def command() -> None:
        raise CheckpointFailed("step-000009: checkpoint not saved")

    assert cli._guarded(command) == 3
    assert len(capsys.readouterr().err.splitlines()) == 1


async def test_where_there_is_too_little_room_nothing_is_begun(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.run.checkpoint_bytes = 1 << 60
    assert not await world.save(3)
    assert world.learner.num_saves == 0
    world.run.checkpoint_bytes = 0
    assert await world.save(3)


async def test_the_size_of_the_last_one_is_what_the_next_one_needs(world: World) -> None:
    assert checkpoints.expected_bytes(world.files.folder, 12345) == 12345
    assert await world.save(3)
    needed = checkpoints.expected_bytes(world.files.folder, 12345)
    assert needed == disk.size_of(world.folder / "step-000003") > len(SHARD)


async def test_a_folder_that_cannot_be_written_is_a_refusal_too(world: World) -> None:
    world.folder.write_text("a file where the checkpoints should be")
    assert not await world.save(3)
    assert world.events()[-1]["event"] == "checkpoint_failed"
    world.folder.unlink()
    assert await world.save(4)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
async def test_a_folder_without_the_right_to_write_is_a_refusal_too(world: World) -> None:
    world.folder.mkdir()
    world.folder.chmod(0o500)
    assert not await world.save(3)
    world.folder.chmod(0o700)
    assert await world.save(4)


async def test_what_the_disk_has_no_part_in_fails_as_before(world: World) -> None:
    for error in (ValueError("a bug"), TimeoutError("late"), ConnectionResetError(104, "reset")):
        world.learner.raises = error
        with pytest.raises(RoleFailed, match=type(error).__name__):
            await world.save(3)


async def test_events_that_cannot_be_written_either_do_not_end_the_run(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise FULL

    world.learner.raises = FULL
    monkeypatch.setattr(world.files, "event", refuse)
    assert not await world.save(3)
    assert "WARNING" in world.text.getvalue()


async def test_a_run_goes_on_while_its_checkpoint_is_written(world: World) -> None:
    world.learner.is_written = False
    world.run.step = 3
    await world.run.checkpoint()
    world.run.step = 4  # the next step is done meanwhile
    assert newest_intact(world.files.folder) == (None, [])
    world.learner.is_written = True
    await world.run.wait_checkpoint()
    found, _ = newest_intact(world.files.folder)
    assert found is not None
    assert (found.step, world.run.saved_step) == (3, 3)
    event = world.events()[-1]
    assert (event["event"], event["step"]) == ("checkpoint_saved", 3)
    assert 0 < event["stall_s"] < event["seconds"]


async def test_one_that_nobody_waits_for_any_more_is_written_all_the_same(world: World) -> None:
    world.learner.is_written = False
    world.run.step = 3
    await world.run.checkpoint()
    waiting = asyncio.create_task(world.run.wait_checkpoint())
    await asyncio.sleep(0)
    waiting.cancel()  # as a stop does that takes too long
    with pytest.raises(asyncio.CancelledError):
        await waiting
    world.learner.is_written = True
    await world.run.wait_checkpoint()
    assert world.run.saved_step == 3
    assert newest_intact(world.files.folder)[0] is not None


async def test_one_that_is_refused_late_is_not_the_last_one(world: World) -> None:
    world.learner.is_written = False
    world.run.step = 3
    await world.run.checkpoint()
    world.run.step = 4
    world.run.stop.set()
    world.learner.raises = FULL
    await world.run.wait_checkpoint()
    assert world.events()[-1]["step"] == 3
    world.learner.raises, world.learner.is_written = None, True
    assert await world.save(4)


async def test_the_next_one_waits_for_the_one_before_it(world: World) -> None:
    world.learner.is_written = False
    world.run.step = 3
    await world.run.checkpoint()
    second = asyncio.create_task(world.save(6))
    await asyncio.sleep(0.05)
    assert world.learner.num_saves == 1
    world.learner.is_written = True
    assert await second
    assert sorted(path.name for path in world.folder.iterdir()) == ["step-000003", "step-000006"]


async def test_a_step_that_has_a_checkpoint_gets_no_second_one(world: World) -> None:
    assert await world.save(3)
    assert await world.save(3)
    assert world.learner.num_saves == 1


async def test_what_is_wrong_beside_the_disk_is_raised_at_the_next_step(world: World) -> None:
    world.learner.is_written = False
    world.run.step = 3
    await world.run.checkpoint()
    world.learner.raises = ValueError("a bug")
    await asyncio.sleep(0.3)
    with pytest.raises(RoleFailed, match="a bug"):
        await world.run.take()


async def test_one_whose_learner_is_lost_is_forgotten(world: World) -> None:
    assert await world.save(3)
    world.learner.is_written = False
    world.run.step = 6
    await world.run.checkpoint()
    await world.run.forget_checkpoint()
    await world.run.wait_checkpoint()
    assert newest_intact(world.files.folder)[0] is not None
    world.learner.is_written = True
    assert await world.save(7)
    assert sorted(path.name for path in world.folder.iterdir()) == ["step-000003", "step-000007"]


async def test_what_is_being_committed_is_committed_even_if_it_is_forgotten(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on, seal = threading.Event(), threading.Event(), checkpoints.seal

    def slow(*args: Any) -> Path:
        begun.set()
        assert go_on.wait(10)
        return seal(*args)

    monkeypatch.setattr(checkpoints, "seal", slow)
    world.run.step = 3
    await world.run.checkpoint()
    assert await asyncio.to_thread(begun.wait, 10)
    forgotten = asyncio.create_task(world.run.forget_checkpoint())
    await asyncio.sleep(0.05)
    assert not forgotten.done()
    go_on.set()
    await forgotten
    found, _ = newest_intact(world.files.folder)
    assert found is not None
    assert found.step == 3


async def test_a_disk_that_is_stuck_is_named(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world.run.learner, "_timeout_s", 0.2)
    world.learner.is_written = False
    with pytest.raises(RoleFailed, match=r"not written within 0.2 s: is the disk stuck"):
        await world.save(3)


def test_a_refusal_is_found_wherever_it_stands_in_the_chain() -> None:
    wrapped = RoleFailed("learner-0: save", cause=FULL)
    outer = RuntimeError("outer")
    outer.__cause__ = wrapped
    assert refusal_of(outer) is FULL
    assert refusal_of(FULL) is FULL
    assert refusal_of(RoleFailed("learner-0: died")) is None
    assert refusal_of(None) is None


@pytest.mark.parametrize("error", [TimeoutError(), ConnectionRefusedError(111, "no"), OSError("?")])
def test_other_errors_of_the_system_are_none(error: OSError) -> None:
    assert refusal_of(error) is None


# ---- before anything begins


async def test_a_checkpoint_says_of_which_prompts_it_is(world: World) -> None:
    assert await world.save(3)
    found, _ = newest_intact(world.files.folder)
    assert found is not None
    state = found.driver_state()
    check_same_prompts(world.run.config, PROMPTS, state)
    for others in (PROMPTS[::-1], PROMPTS[:1], [PROMPTS[0], tiny.prompt(1, ids=(2, 9))]):
        with pytest.raises(BadInput, match=r"^prompts: .*prompts\.jsonl: .* are not those that"):
            check_same_prompts(world.run.config, others, state)
    check_same_prompts(world.run.config, PROMPTS[:1], {"cursor": 4})  # of before it was written


def test_a_run_with_room_for_those_it_keeps_and_one_more_may_begin(tmp_path: Path) -> None:
    check_disk(tmp_path / "runs/new", disk.free_bytes(tmp_path) // 7, keep=5)
    assert not (tmp_path / "runs").exists()


def test_a_run_without_is_refused_with_both_figures(tmp_path: Path) -> None:
    with pytest.raises(
        BadInput, match=r"GiB free, checkpoints take about .*checkpoint\.keep 5.* make room"
    ):
        check_disk(tmp_path / "runs/new", disk.free_bytes(tmp_path) // 5, keep=5)


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(BadInput, match=r"runs_dir: .*runs is no folder that can be written to"):
        check_disk(tmp_path / "runs/new", 0, keep=2)


def test_a_folder_of_somebody_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(BadInput, match="set runs_dir"):
        check_disk(tmp_path / "runs/new", 0, keep=2)
