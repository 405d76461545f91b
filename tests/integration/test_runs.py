"""Whole runs through Ray actors: 2 vLLM generators, 2 FSDP ranks, a reward model, a judge."""

from __future__ import annotations

import random
import shutil
import signal
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file

from actors.trajectory import TRAJECTORY_SCHEMA
from tests.integration.runs import Workshop, kill_everything, off_loopback, wait_until

pytestmark = pytest.mark.timeout(600)


LISTENERS: set[str] = set()


@pytest.fixture(scope="module")
def straight(workshop: Workshop) -> str:
    """A synchronous run of four steps, undisturbed; its listening sockets are noted."""
    process = workshop.start("train", str(workshop.config(name="straight")))
    while process.poll() is None:
        LISTENERS.update(off_loopback(process))
        time.sleep(0.3)
    assert process.returncode == 0, process.stdout and process.stdout.read()
    return "straight"


def test_nothing_listens_off_loopback(straight: str) -> None:
    assert not LISTENERS


def weights(workshop: Workshop, name: str) -> dict[str, bytes]:
    out = workshop.folder / f"export-{name}"
    shutil.rmtree(out, ignore_errors=True)
    done = workshop.command("export", name, str(out), "--runs-dir", str(workshop.runs))
    assert done.returncode == 0, done.stderr
    tensors = load_file(out / "model.safetensors")
    return {key: tensor.numpy().tobytes() for key, tensor in tensors.items()}


def audit(workshop: Workshop, name: str) -> None:
    done = workshop.command("audit", name, "--runs-dir", str(workshop.runs))
    assert done.returncode == 0, done.stdout


def test_the_first_minibatch_of_every_synchronous_step_has_ratio_1(
    workshop: Workshop, straight: str
) -> None:
    steps = workshop.metrics(straight)
    assert [step["step"] for step in steps] == [1, 2, 3, 4]
    for step in steps:
        assert step["learner/first_ratio_error"] <= 1e-4
        assert step["learner/first_clip_fraction"] == 0.0
        assert step["staleness/max"] == 0


def test_generators_and_learner_give_the_same_logprobs(workshop: Workshop, straight: str) -> None:
    for step in workshop.metrics(straight):
        assert step["learner/behavior_difference_mean"] <= 1e-4
        assert step["weights/probe_difference_max"] <= 1e-4


def test_rates_are_of_whole_steps(workshop: Workshop, straight: str) -> None:
    for step in workshop.metrics(straight):
        seconds = 16 / step["rollout/samples_per_s"]
        assert seconds > 0.75 * (step["time/rollout_wait_s"] + step["time/update_s"]), step["step"]


def test_the_policy_changes_and_every_version_is_published_once(
    workshop: Workshop, straight: str
) -> None:
    published = [e for e in workshop.events(straight) if e["event"] == "weights_published"]
    assert [event["version"] for event in published] == [0, 1, 2, 3, 4]
    assert len({event["digest"] for event in published}) == 5


def test_every_sample_is_on_disk_with_every_column(workshop: Workshop, straight: str) -> None:
    files = sorted((workshop.runs / straight / "trajectories").glob("*.parquet"))
    assert len(files) == 4
    for number, path in enumerate(files, 1):
        table = pq.read_table(path)
        assert table.num_rows == 16
        assert set(TRAJECTORY_SCHEMA.names) < set(table.column_names)
        assert set(table["step"].to_pylist()) == {number}
        assert table.schema.metadata[b"schema_version"] == b"1"
        for old, ids in zip(
            table["old_logprobs"].to_pylist(), table["completion_ids"], strict=True
        ):
            assert len(old) == len(ids)


def test_the_audit_passes_and_the_report_is_written(workshop: Workshop, straight: str) -> None:
    audit(workshop, straight)
    assert "win" in (workshop.runs / straight / "report.html").read_text()


def test_a_run_killed_at_a_random_moment_resumes_to_the_same_bits(
    workshop: Workshop, straight: str
) -> None:
    config = str(workshop.config(name="killed"))
    process = workshop.start("train", config)
    after = random.randint(2, 3)  # steps; the kill falls into the next one, somewhere
    wait_until(lambda: len(workshop.metrics("killed")) >= after, f"step {after}")
    time.sleep(random.uniform(0.0, 0.2))
    assert process.poll() is None, "it ended before it could be killed"
    kill_everything(process)
    done = workshop.command("train", config, "--resume")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resumed from the checkpoint of step" in done.stdout
    assert weights(workshop, "killed") == weights(workshop, straight)
    audit(workshop, "killed")


def test_an_asynchronous_run_stops_on_sigterm_with_a_checkpoint_and_goes_on(
    workshop: Workshop,
) -> None:
    config = workshop.config(
        name="async",
        max_staleness=2,
        num_steps=8,
        checkpoint={"every": 100},
        ppo={"policy": {"lr": 1e-3}, "value": {"lr": 1e-3}, "anchor": "behavior"},
    )
    process = workshop.start("train", str(config))
    wait_until(lambda: len(workshop.metrics("async")) >= 2, "two steps")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 143, process.stdout and process.stdout.read()
    assert any((workshop.runs / "async" / "checkpoints").glob("step-*"))
    done = workshop.command("train", str(config), "--resume")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resumed from the checkpoint of step" in done.stdout
    steps = workshop.metrics("async")
    assert [step["step"] for step in steps] == list(range(1, 9))
    assert max(step["staleness/max"] for step in steps) in (1, 2)
    audit(workshop, "async")


def test_a_changed_checkpoint_is_named_and_the_one_before_it_is_used(
    workshop: Workshop, straight: str
) -> None:
    shutil.copytree(workshop.runs / straight, workshop.runs / "damaged")
    newest = workshop.runs / "damaged/checkpoints/step-000004"
    shard = next((newest / "learner").glob("*.distcp"))
    flip_a_byte(shard)
    config = workshop.config(name="damaged", learner={"ranks": 1, "timeout_s": 120})
    done = workshop.command("train", str(config), "--resume", "evaluation=null")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{shard.name} is not as it was written" in done.stdout
    assert "resumed from the checkpoint of step 3" in done.stdout
    audit(workshop, "damaged")


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
