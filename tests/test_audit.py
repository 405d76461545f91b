"""A correct run passes the audit, whatever its schedule; any one false record is found."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.trajectory import TRAJECTORY_SCHEMA, Trajectory, to_table, trajectory_id
from cluster.audit import AuditResult, audit
from cluster.config import BadInput
from cluster.heartbeat import here

NUM_PROMPTS, SAMPLES, BATCH, STEPS = 6, 2, 4, 7  # 3 steps an epoch; the run ends in the third
SCHEMA = (
    TRAJECTORY_SCHEMA.append(pa.field("staleness", pa.int64()))
    .append(pa.field("step", pa.int64()))
    .with_metadata(TRAJECTORY_SCHEMA.metadata)
)


def make_run(
    folder: Path,
    *,
    max_staleness: int = 0,
    seed: int = 0,
    drops: int = 1,
    steps: int = STEPS,
    order: list[tuple[str, int]] | None = None,
) -> Path:
    """A run folder as a correct run leaves it; `order`: (prompt, epoch) as they are trained."""
    run, random_ = folder / "run", random.Random(seed)
    for part in ("trajectories", "checkpoints/step-000004/learner"):
        (run / part).mkdir(parents=True)
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{i}+1="}) + "\n" for i in range(9)))
    config = {
        "stage": "train", "name": "run", "runs_dir": str(folder), "num_steps": STEPS,
        "batch_size": BATCH, "max_staleness": max_staleness, "policy": "policy",
        "prompts": {"path": str(prompts), "limit": NUM_PROMPTS},
        "sampling": {"max_tokens": 4, "samples_per_prompt": SAMPLES},
        "reward": {"scorer": {"kind": "function", "function": "rewards:score"}},
    }  # fmt: skip
    (run / "config.yaml").write_text(yaml.safe_dump(config))

    schedule, dropped = (order, []) if order else _schedule(random_, drops)
    for step in range(1, steps + 1):
        rows = [
            _row(prompt_id, epoch, sample, step, random_.randint(0, min(max_staleness, step - 1)))
            for prompt_id, epoch in (schedule.pop(0) for _ in range(BATCH // SAMPLES))
            for sample in range(SAMPLES)
        ]
        write_rows(run, step, rows)
    write_lines(run / "dropped.jsonl", dropped)
    events: list[dict[str, Any]] = [{"time": 0.0, "event": "run_started"}]
    events += [
        {"time": 0.0, "event": "weights_published", "version": v, "step": v} for v in range(steps)
    ]
    write_lines(run / "events.jsonl", events)
    write_checkpoint(run / "checkpoints/step-000004", 4)
    return run


def _schedule(random_: random.Random, drops: int) -> tuple[list[tuple[str, int]], list[dict]]:
    """(prompt, epoch) in the order of training, and the lines of dropped.jsonl."""
    order = [(f"p{i}", epoch) for epoch in range(4) for i in random_.sample(range(NUM_PROMPTS), 6)]
    lost = random_.sample(order[:10], drops)
    lines = [
        {"prompt_id": p, "epoch": e, "sample_index": s, "reason": "reward_failed", "time": 0.0}
        for p, e in lost
        for s in range(SAMPLES)
    ]
    return [key for key in order if key not in lost], lines


def _row(prompt_id: str, epoch: int, sample: int, step: int, staleness: int) -> dict[str, Any]:
    version = step - 1 - staleness
    spans = [(version, 0), (version + 1, 1)] if staleness else [(version, 0)]
    trajectory = Trajectory(
        trajectory_id=trajectory_id(prompt_id, epoch, sample), prompt_id=prompt_id, epoch=epoch,
        sample_index=sample, prompt_ids=(1, 2), completion_ids=(3, 4), behavior_logprobs=(-1, -1),
        policy_version=version, policy_version_max=spans[-1][0], version_spans=spans, prompt="1+1=",
        completion="2", finish_reason="stop", score=1.0, score_parts={}, temperature=1.0,
        generator_id="generator-0", generated_at=0.0, generate_s=0.1, score_s=0.1,
    )  # fmt: skip
    return {**to_table([trajectory]).to_pylist()[0], "staleness": staleness, "step": step}


def step_file(run: Path, step: int) -> Path:
    return run / f"trajectories/step-{step:06}.parquet"


def write_rows(run: Path, step: int, rows: list[dict], schema: pa.Schema = SCHEMA) -> None:
    pq.write_table(pa.Table.from_pylist(rows, schema), step_file(run, step))


def read_rows(run: Path, step: int) -> list[dict[str, Any]]:
    return pq.read_table(step_file(run, step)).to_pylist()


def edit(run: Path, step: int, row: int, /, **values: Any) -> None:
    rows = read_rows(run, step)
    rows[row] |= values
    write_rows(run, step, rows)


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_checkpoint(folder: Path, step: int) -> None:
    (folder / "learner").mkdir(parents=True, exist_ok=True)
    contents = {"driver.json": b"{}", "learner/weights.bin": b"weights"}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    (folder / "manifest.json").write_text(json.dumps({"step": step, "files": digests}))


def violation(run: Path) -> str:
    result = audit(run)
    assert result.violation is not None, f"not found: {result}"
    assert str(result).endswith(f"audit failed: {result.violation}")
    return result.violation


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("max_staleness", [0, 1, 3])
def test_a_correct_run_passes(tmp_path: Path, max_staleness: int, seed: int) -> None:
    result = audit(make_run(tmp_path, max_staleness=max_staleness, seed=seed, drops=seed))
    assert result.violation is None
    assert result.checked["samples trained"] == STEPS * BATCH
    assert result.checked["samples dropped"] == seed * SAMPLES
    assert result.checked["prompts"] == NUM_PROMPTS
    assert result.checked["checkpoint files"] == 2
    assert str(result).splitlines()[-1].startswith("audit passed: 28 samples in 7 steps")


@pytest.mark.parametrize("steps", range(STEPS))
def test_a_run_that_is_not_finished_passes_so_far(tmp_path: Path, steps: int) -> None:
    run = make_run(tmp_path, steps=steps, drops=0)
    if steps < 4:
        assert "there are trajectories of" in violation(run)
    else:
        assert audit(run).violation is None


def nothing_trained(folder: Path, state: str | None, pid: int) -> Path:
    run = make_run(folder, steps=0, drops=0)
    shutil.rmtree(run / "checkpoints")
    if state is not None:
        status = {**here(), "state": state, "pid": pid, "updated_at": time.time()}
        (run / "status.json").write_text(json.dumps(status))
    return run


@pytest.mark.parametrize("state", [None, "failed", "stopped", "running", "starting"])
def test_a_run_that_trained_nothing_fails_and_says_so(tmp_path: Path, state: str | None) -> None:
    """The one that claims to be starting has lost its process."""
    nobody = 2**22 + 1  # beyond the largest pid
    said = violation(nothing_trained(tmp_path, state, nobody))
    assert said == "0 samples: nothing was trained"


def test_a_run_that_is_still_starting_need_not_have_trained(tmp_path: Path) -> None:
    result = audit(nothing_trained(tmp_path, "starting", os.getpid()))
    assert result.violation is None
    assert str(result).splitlines()[-1] == "audit passed: 0 samples, the run is still starting"


def remove_line(name: str, index: int = -1) -> Callable[[Path], None]:
    def corrupt(run: Path) -> None:
        rows = read_lines(run / name)
        del rows[index]
        write_lines(run / name, rows)

    return corrupt


def drop_a_trained_one(run: Path) -> None:
    row = read_rows(run, 2)[0]
    key = {name: row[name] for name in ("prompt_id", "epoch", "sample_index")}
    drops = read_lines(run / "dropped.jsonl")
    write_lines(run / "dropped.jsonl", [*drops, {**key, "reason": "x", "time": 0.0}])


def drop_without_reason(run: Path) -> None:
    drops = read_lines(run / "dropped.jsonl")
    write_lines(run / "dropped.jsonl", [{**drop, "reason": ""} for drop in drops])


def drop_without_prompt(run: Path) -> None:
    write_lines(run / "dropped.jsonl", [{"epoch": 0, "sample_index": 0, "reason": "x"}])


def garbled_events(run: Path) -> None:
    (run / "events.jsonl").write_text("{\n" + (run / "events.jsonl").read_text())


def train_twice(run: Path) -> None:
    first = read_rows(run, 1)[0]
    edit(run, 3, 0, **{name: first[name] for name in ("prompt_id", "epoch", "sample_index")})


def fewer_rows(run: Path) -> None:
    write_rows(run, 3, read_rows(run, 3)[:-1])


def more_steps(run: Path) -> None:
    write_rows(run, STEPS + 1, [_row("p0", 9, i, STEPS + 1, 0) for i in range(BATCH)])


def other_schema(run: Path) -> None:
    write_rows(run, 2, read_rows(run, 2), SCHEMA.with_metadata({"schema_version": "0"}))


def without_column(run: Path) -> None:
    table = pq.read_table(step_file(run, 2))
    pq.write_table(table.drop_columns(["staleness"]), step_file(run, 2))


def torn_file(run: Path) -> None:
    step_file(run, 5).write_bytes(step_file(run, 5).read_bytes()[:-9])


def unfinished_prompt(run: Path) -> None:
    begun = {row["prompt_id"] for row in read_rows(run, STEPS - 1) + read_rows(run, STEPS)}
    other = next(f"p{i}" for i in range(NUM_PROMPTS) if f"p{i}" not in begun)
    edit(run, STEPS, 0, prompt_id=other)


def manifest_of_other_step(run: Path) -> None:
    write_checkpoint(run / "checkpoints/step-000004", 5)


CORRUPTIONS: list[tuple[Callable[[Path], None], str]] = [
    (train_twice, "trained already in step 1"),
    (lambda run: edit(run, 1, 0, epoch=2, prompt_id="p5", sample_index=1), "p"),
    (remove_line("dropped.jsonl"), "neither trained nor dropped"),
    (drop_a_trained_one, "trained in step 2"),
    (drop_without_reason, "no reason"),
    (drop_without_prompt, "no prompt_id"),
    (garbled_events, "events.jsonl, line 1: not JSON"),
    (lambda run: edit(run, 2, 0, prompt_id="p8"), "p8, epoch 0, sample 0: not among the prompts"),
    (lambda run: edit(run, 2, 1, sample_index=SAMPLES), "samples_per_prompt is 2"),
    (unfinished_prompt, "of 2 samples trained or dropped, though the run is finished"),
    (lambda run: edit(run, 5, 0, staleness=1), "staleness 1, of its policy_version 0"),
    (lambda run: edit(run, 5, 0, staleness=2, policy_version=2), "max_staleness is 0"),
    (lambda run: edit(run, 5, 0, staleness=-1, policy_version=5), "max_staleness is 0"),
    (lambda run: edit(run, 5, 0, policy_version_max=9), "contradict"),
    (lambda run: edit(run, 5, 0, version_spans=[]), "contradict"),
    (lambda run: edit(run, 5, 0, policy_version_max=9,
                      version_spans=[{"version": 4, "start": 0}, {"version": 9, "start": 1}]),
     "newer than the learner's"),
    (remove_line("events.jsonl", 1), "no publication of version 0"),
    (remove_line("events.jsonl"), "no publication of version 6"),
    (lambda run: step_file(run, 3).unlink(), "no step-000003.parquet"),
    (lambda run: step_file(run, 1).unlink(), "no step-000001.parquet"),
    (fewer_rows, "3 rows, batch_size is 4"),
    (more_steps, "num_steps is 7"),
    (lambda run: edit(run, 3, 0, step=4), "step column says 4"),
    (other_schema, "schema_version 0"),
    (without_column, "no column staleness"),
    (torn_file, "step-000005.parquet: not readable"),
    (lambda run: (run / "checkpoints/step-000004/driver.json").write_text("{ }"), "driver.json"),
    (lambda run: (run / "checkpoints/step-000004/learner/weights.bin").unlink(), "weights.bin"),
    (lambda run: (run / "checkpoints/step-000004/manifest.json").unlink(), "step-000004"),
    (manifest_of_other_step, "manifest is of step 5"),
]  # fmt: skip


@pytest.mark.parametrize(("corrupt", "found"), CORRUPTIONS)
def test_each_kind_of_false_record_is_found(
    tmp_path: Path, corrupt: Callable[[Path], Any], found: str
) -> None:
    run = make_run(tmp_path)
    assert audit(run).violation is None
    corrupt(run)
    assert found in violation(run)


@pytest.mark.parametrize("seed", range(12))
def test_no_row_of_a_synchronous_run_can_be_given_to_another_prompt(
    tmp_path: Path, seed: int
) -> None:
    run, random_ = make_run(tmp_path, seed=seed), random.Random(seed)
    step, row = random_.randint(1, STEPS), random_.randrange(BATCH)
    key = random_.choice(["prompt_id", "epoch", "sample_index"])
    old = read_rows(run, step)[row][key]
    new = f"p{(int(old[1:]) + 1) % NUM_PROMPTS}" if key == "prompt_id" else old + 1
    edit(run, step, row, **{key: new})
    violation(run)


def test_a_prompt_may_be_overtaken_by_max_staleness_steps(tmp_path: Path) -> None:
    """p0 of epoch 0 is late; epoch 1 begins in step 3."""
    order = [(f"p{i}", 0) for i in range(1, 6)] + [(f"p{i}", 1) for i in range(1, 6)]

    def run(max_staleness: int, order: list[tuple[str, int]]) -> Path:
        folder = tmp_path / f"{max_staleness}-{len(order)}"
        folder.mkdir()
        made = make_run(folder, max_staleness=max_staleness, steps=len(order) // 2, order=order)
        shutil.rmtree(made / "checkpoints")
        return made

    late = "prompt p0, epoch 0, sample 0: neither trained nor dropped"
    assert late in violation(run(0, order[:6]))
    assert late in violation(run(1, order[:8]))
    assert audit(run(1, order[:6])).violation is None
    assert audit(run(2, order[:8])).violation is None
    assert audit(run(1, [*order[:6], ("p0", 0), *order[6:9]])).violation is None


def test_a_prompt_dropped_for_good_is_expected_in_no_epoch(tmp_path: Path) -> None:
    run = make_run(tmp_path, drops=0)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["prompts"]["limit"] = NUM_PROMPTS + 1
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert f"prompt p{NUM_PROMPTS}" in violation(run)
    always = {"prompt_id": f"p{NUM_PROMPTS}", "epoch": None, "sample_index": None}
    write_lines(run / "dropped.jsonl", [{**always, "reason": "too long", "time": 0.0}])
    assert audit(run).violation is None


def test_a_checkpoint_being_written_is_no_violation(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    (run / "checkpoints/step-000007.partial").mkdir()
    result = audit(run)
    assert (result.violation, result.checked["checkpoints unfinished"]) == (None, 1)


def test_named_prompts_are_read_from_parquet(tmp_path: Path) -> None:
    run = make_run(tmp_path, drops=0)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["prompts"]["path"] = str(tmp_path / "prompts.parquet")
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    ids = [f"p{i}" for i in reversed(range(NUM_PROMPTS))] + ["beyond the limit"]
    pq.write_table(pa.table({"prompt_id": ids, "prompt": ids}), tmp_path / "prompts.parquet")
    assert audit(run).violation is None


def test_what_cannot_be_audited_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such run"):
        audit(tmp_path / "nowhere")
    run = make_run(tmp_path)
    (tmp_path / "prompts.jsonl").unlink()
    with pytest.raises(BadInput, match=r"prompts\.path: .*no such file"):
        audit(run)
    (run / "config.yaml").write_text("stage: sft\n")
    with pytest.raises(BadInput):
        audit(run)


def test_the_result_reads_as_a_table() -> None:
    text = str(AuditResult({"steps": 2, "samples trained": 1234}, None))
    assert text.splitlines()[:2] == ["steps                    2", "samples trained      1,234"]


@pytest.fixture(scope="module")
def shared_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("audited"))


@given(
    st.integers(0, 10**6),
    st.integers(0, 10**6),
    st.sampled_from(["flip", "cut", "insert", "empty"]),
    st.binary(min_size=1, max_size=9),
)
@settings(max_examples=150)
def test_whatever_happened_to_a_file_the_audit_ends_with_a_verdict(
    shared_run: Path, file: int, place: int, how: str, odd: bytes
) -> None:
    """BadInput where the config or the prompts are at fault; any other exception would be a bug."""
    files = sorted(path for path in shared_run.rglob("*") if path.is_file())
    path = files[file % len(files)]
    whole = path.read_bytes()
    place %= max(1, len(whole))
    broken = {
        "flip": whole[:place] + odd + whole[place + len(odd) :],
        "cut": whole[:place],
        "insert": whole[:place] + odd + whole[place:],
        "empty": b"",
    }[how]
    try:
        path.write_bytes(broken)
        with contextlib.suppress(BadInput):
            assert str(audit(shared_run))
    finally:
        path.write_bytes(whole)
