"""Another number of generators is asked for in a file, and holds until the config says another."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster import cli, fit, scale
from cluster.config import RunConfig
from cluster.config_file import load_config
from cluster.heartbeat import here
from cluster.learner_group import LearnerLost
from cluster.placement import InProcessHost, RoleFailed
from tests import tiny


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "EVERY_S", 0.001)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture
def config(tmp_path: Path, policy: Path) -> RunConfig:
    tree = tiny.changed(tiny.run_tree(tmp_path, policy), {"generators.count": 2})
    return load_config(tiny.write_yaml(tmp_path / "run.yaml", tree), [], RunConfig)


class Generators:
    """A supervisor that counts, and fails as often as it is told."""

    def __init__(self, *failures: Exception) -> None:
        self.count, self.collecting, self.failures = 2, True, [*failures]

    def num_generators(self) -> int:
        return self.count

    async def scale(self, count: int) -> bool:
        if self.failures:
            raise self.failures.pop(0)
        self.count = count
        return True


class Run:
    def __init__(self, config: RunConfig, folder: Path, supervisor: Generators) -> None:
        self.config, self.supervisor, self.host = config, supervisor, None
        self.events: list[dict[str, Any]] = []
        self.said: list[str] = []
        self.files = SimpleNamespace(
            folder=folder,
            event=lambda event, **facts: self.events.append({"event": event, **facts}),
        )
        self.view = SimpleNamespace(note=self.said.append)


def asked(folder: Path, generators: int, configured: int = 2, at: float = 0.0) -> None:
    request = {"generators": generators, "configured": configured, "asked_at": at}
    (folder / scale.REQUEST).write_text(json.dumps(request))


@contextmanager
def watched(run: Run) -> Iterator[None]:
    watching = asyncio.create_task(scale.watch_scale(run))  # type: ignore[arg-type]
    try:
        yield
    finally:
        assert not watching.done()
        watching.cancel()


async def settle() -> None:
    await asyncio.sleep(0.05)


async def test_what_is_asked_for_is_done_once_the_first_weights_are_out(
    config: RunConfig, tmp_path: Path
) -> None:
    run = Run(config, tmp_path, Generators())
    run.supervisor.collecting = False
    with watched(run):
        asked(tmp_path, 3)
        await settle()
        assert run.supervisor.count == 2
        run.supervisor.collecting = True
        await settle()
        asked(tmp_path, 1, at=1.0)
        await settle()
    facts = [(event["event"], event["instead_of"], event["generators"]) for event in run.events]
    assert facts == [("scaled", 2, 3), ("scaled", 3, 1)]


async def test_what_cannot_be_had_is_told_once_and_the_run_goes_on(
    config: RunConfig, tmp_path: Path
) -> None:
    run = Run(config, tmp_path, Generators(RoleFailed("generator-2: no place for 1 GPUs")))
    asked(tmp_path, 3)
    with watched(run):
        await settle()
    assert [event["event"] for event in run.events] == ["scale_failed"]
    assert (run.events[0]["asked"], run.events[0]["generators"]) == (3, 2)
    assert "no place for 1 GPUs" in run.events[0]["reason"]
    assert any("going on with 2" in said for said in run.said)
    assert scale.scaled(config, tmp_path) == config  # nor does a resume ask for it again


async def test_a_learner_that_is_lost_meanwhile_delays_it_only(
    config: RunConfig, tmp_path: Path
) -> None:
    lost = LearnerLost("learner-0: its process died", kind="died")
    run = Run(config, tmp_path, Generators(lost, lost))
    asked(tmp_path, 3)
    with watched(run):
        await settle()
    assert [event["event"] for event in run.events] == ["scaled"]


async def test_one_process_says_that_it_holds_one_generator(
    config: RunConfig, tmp_path: Path
) -> None:
    run = Run(config, tmp_path, Generators())
    run.host = InProcessHost()  # type: ignore[assignment]
    asked(tmp_path, 3)
    with watched(run):
        await settle()
    assert "--in-process" in run.events[0]["reason"]


@pytest.mark.parametrize(
    ("changes", "done"),
    [({}, False), ({"too_little_memory": "warn"}, True), ({"ray_address": "auto"}, True)],
    ids=["refused", "the user knows better", "not the machine that counts"],
)
async def test_more_generators_than_memory_are_refused(
    config: RunConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    done: bool,
) -> None:
    monkeypatch.setattr(scale, "available_bytes", lambda: 10**9)  # of one, not of two
    run = Run(config.model_copy(update=changes), tmp_path, Generators())
    asked(tmp_path, 4)
    with watched(run):
        await settle()
    assert run.supervisor.count == (4 if done else 2)
    assert done or "memory: 2 more generators" in run.events[0]["reason"]


def test_a_resumed_run_has_as_many_as_were_asked_for_last(
    config: RunConfig, tmp_path: Path
) -> None:
    assert scale.scaled(config, tmp_path) == config
    asked(tmp_path, 5)
    assert scale.scaled(config, tmp_path).generators.count == 5
    assert config.generators.count == 2


def test_unless_the_config_was_given_another_number_since(
    config: RunConfig, tmp_path: Path
) -> None:
    asked(tmp_path, 5)
    changed = fit.with_value(config, "generators.count", 3)
    assert scale.scaled(changed, tmp_path) == changed
    assert scale.scaled(config, tmp_path) == config  # and it is not remembered either


def test_the_command_leaves_what_the_driver_reads(
    config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "runs/tiny"
    run.mkdir(parents=True)
    tiny.write_yaml(run / "config.yaml", config.model_dump(mode="json"))
    status = {"state": "running", "updated_at": time.time(), **here()}
    (run / "status.json").write_text(json.dumps(status))
    with pytest.raises(SystemExit) as ended:
        cli.main(["scale", str(run), "--generators", "7"])
    assert not ended.value.code
    assert "generators.count=7" in capsys.readouterr().out
    assert scale.scaled(config, run).generators.count == 7
    assert not list(run.glob("*.partial"))
