"""A refused step costs its batch and nothing else, and its bundle shows the same refusal again.

A whole run in this process: the real loop, ledger, files and learner; generators that make trajectories
up, which a test may spoil. A score of 1e300 is a number to everybody but the learner's float32.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from actors.prompts import PromptStream
from actors.rollout_worker import Rollouts
from actors.trajectory import Prompt, keys_of, packed, to_table
from actors.weight_update import ProbeAnswer, WeightUpdate
from cluster import checkpoints, cli, replay_bundle, run_state
from cluster.audit import audit
from cluster.config import RunConfig
from cluster.config_file import load_config
from cluster.doctor import check_inputs
from cluster.json_lines import read as read_json_lines
from cluster.learner_group import LearnerGroup
from cluster.ledger import Ledger
from cluster.live_view import LiveView
from cluster.metrics_writer import MetricsWriter
from cluster.placement import InProcessHost, Member, RoleFailed
from cluster.roles import LearnerRole
from cluster.run import Run
from cluster.run_files import RunFiles
from cluster.specs import learner_spec
from cluster.supervisor import Supervisor
from cluster.train import train
from learner.learner_spec import StepRefused
from learner.learner_worker import LearnerWorker
from tests import tiny
from tests.learner_cases import mesh

SAMPLES, TOO_LARGE = 2, 1e300
Spoil = Callable[[int, int], bool]  # (version, prompts rolled out so far) -> whether to spoil it


@dataclass
class Rollers:
    """A rollout worker whose completions are made up, and scored out of range where `spoil` says so."""

    spoil: Spoil
    version: int = 0
    count: int = 0
    ready: list[Prompt] = field(default_factory=list)

    async def submit(self, prompts: list[Prompt]) -> None:
        self.ready += prompts

    async def take(self, timeout_s: float, linger_s: float) -> tuple[Rollouts, Any]:
        if not self.ready:
            await asyncio.sleep(0.01)
            return Rollouts(), None
        prompts, self.ready = self.ready, []
        rows = [row for prompt in prompts for row in self._roll_out(prompt)]
        return Rollouts([prompt.key for prompt in prompts]), packed(to_table(rows))

    def _roll_out(self, prompt: Prompt) -> list[Any]:
        score = TOO_LARGE if self.spoil(self.version, self.count) else 1.0
        self.count += 1
        return [
            tiny.trajectory(
                int(prompt.prompt_id[1:]),
                prompt.epoch,
                sample,
                prompt_ids=prompt.ids,
                score=score * (1 + sample),
                policy_version=self.version,
                policy_version_max=self.version,
                version_spans=((self.version, 0),),
            )
            for sample in range(SAMPLES)
        ]

    async def status(self) -> dict[str, Any]:
        return {"busy_s": 0.0, "running": 0, "waiting": len(self.ready), "first_token_at": 0.0,
                "completion_tokens": 0, "scoring": 0}  # fmt: skip

    async def receive_weights(self, update: WeightUpdate) -> dict[str, float]:
        self.version = update.version
        return {"probe_difference": 0.0}

    async def receive_answer(self, answer: ProbeAnswer) -> None:
        return


class Rewards:
    def stats(self) -> dict[str, float]:
        return {"reward/busy_s": 0.0}


class Rank(LearnerRole):
    """In this process, with no log of its own."""

    def __init__(self, spec: Any) -> None:
        self._name = "learner-0"
        self._worker = LearnerWorker(spec, 0)


@dataclass
class Workshop:
    """A folder for runs, and how to make one."""

    folder: Path
    policy: Path
    said: io.StringIO = field(default_factory=io.StringIO)

    def config(self, **changes: Any) -> RunConfig:
        tree = tiny.changed(
            tiny.run_tree(self.folder, self.policy),
            {"batch_size": 4, "num_steps": 3, "checkpoint.every": 1, **changes},
        )
        return load_config(tiny.write_yaml(self.folder / "run.yaml", tree), [], RunConfig)

    async def run(self, spoil: Spoil, config: RunConfig, *, resume: bool = False) -> Run:
        """A run that is up: its learner loaded, its first version proved."""
        inputs = check_inputs(config)
        files = RunFiles(config)
        files.create(overwrite=False)
        found = checkpoints.newest_intact(files.folder)[0] if resume else None
        host = InProcessHost()
        run = Run(
            config=config,
            host=host,
            files=files,
            metrics=MetricsWriter(files.folder, resume_step=found.step if found else None),
            view=LiveView("tiny", config.num_steps, console=Console(file=self.said, width=500)),
            supervisor=Supervisor(
                [Member("generator-0", Rollers(spoil))],
                host,
                PromptStream(inputs.prompts, seed=0, shuffle=True),
                Ledger(
                    prompts_per_step=config.prompts_per_step, max_staleness=config.max_staleness
                ),
                rollout_timeout_s=5.0,
                on_drop=lambda dropped: None,
            ),
            learner=LearnerGroup(
                [Member("learner-0", Rank(learner_spec(config, inputs)))], host, timeout_s=60.0
            ),
            rewards=Member("reward", Rewards()),
            evaluation=None,
            prompts=inputs.prompts,
            started=0.0,
        )
        await run.learner.start(files.folder)
        if found is not None:
            await run_state.restore(run, found)
        await run.learner.prepare_publish(None)
        await run.publish(run.step)
        await run.wait_push()
        return run

    async def trained(self, spoil: Spoil, *, resume: bool = False, **changes: Any) -> Run:
        """Trained to its end; its audit passes, however it ended."""
        run = await self.run(spoil, self.config(**changes), resume=resume)
        try:
            await train(run)
        finally:
            await run.supervisor.close()
            run.metrics.close()
            if run.step:  # of a run without a step there is nothing to prove
                result = audit(run.files.folder)
                assert result.violation is None, result
        return run

    def events(self, run_dir: Path, event: str) -> list[dict[str, Any]]:
        return [row for row in read_json_lines(run_dir / "events.jsonl") if row["event"] == event]


@pytest.fixture
def shop(tmp_path: Path, policy: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    mesh()
    monkeypatch.setattr(os, "environ", dict(os.environ))  # a replay sets a learner's
    return Workshop(tmp_path, policy)


@pytest.fixture
def raylign(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def command(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main(list(words))
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out.strip(), said.err.strip()

    return command


def never(version: int, count: int) -> bool:
    return False


def first_of_version(wanted: int) -> Spoil:
    """The first prompt that is sampled from that version or a newer one, for two may come close together;
    and no other."""
    spoilt: list[int] = []

    def spoil(version: int, count: int) -> bool:
        if version >= wanted and not spoilt:
            spoilt.append(count)
            return True
        return False

    return spoil


@pytest.mark.parametrize("staleness", [0, 1])
async def test_the_run_goes_on_with_another_batch_and_accounts_for_the_refused_one(
    shop: Workshop, staleness: int
) -> None:
    run = await shop.trained(first_of_version(1), max_staleness=staleness)
    folder = run.files.folder
    [refusal] = shop.events(folder, "step_refused")
    number = refusal["step"] + 1
    assert refusal["reason"].startswith(
        f"step {number} refused: score is not finite in 2 of 4 trajectories: p"
    )
    assert refusal["replay"] == f"raylign replay {folder}/replay/step-{number:06d}-1"
    assert f"WARNING: {refusal['reason']}; its batch is dropped" in shop.said.getvalue()
    assert [row["step"] for row in read_json_lines(folder / "metrics.jsonl")] == [1, 2, 3]
    published = [event["version"] for event in shop.events(folder, "weights_published")]
    assert published == [0, 1, 2, 3]

    lost = read_json_lines(folder / "dropped.jsonl")
    batch = pq.read_table(folder / f"replay/step-{number:06d}-1/batch.parquet")
    assert {row["reason"] for row in lost} == {refusal["reason"]}
    named = [(row["prompt_id"], row["epoch"]) for row in lost]
    assert named == keys_of(batch)
    assert sorted({row["sample_index"] for row in lost}) == [0, 1]
    ledger = run.supervisor.ledger
    assert (ledger.num_consumed, ledger.num_dropped) == (3 * 2, 2)
    assert read_json_lines(folder / "metrics.jsonl")[-1]["reward/dropped"] == 2


async def test_too_many_refusals_in_a_row_end_the_run_and_a_resume_goes_on_with_other_prompts(
    shop: Workshop,
) -> None:
    def late(version: int, count: int) -> bool:
        return version == 1

    with pytest.raises(RoleFailed) as failed:
        await shop.trained(late, **{"ppo.refuse": {"max_in_a_row": 2}, "checkpoint.every": 9})
    folder = shop.config().run_dir
    message = str(failed.value)
    assert "\n" not in message
    for part in (
        "step 2 refused: score is not finite",
        "that is 2 in a row",
        f"raylign replay {folder}/replay/step-000002-2",
        "there is a checkpoint of step 1",
    ):
        assert part in message
    assert len(shop.events(folder, "step_refused")) == 2
    assert (folder / "checkpoints/step-000001/manifest.json").is_file()

    run = await shop.trained(never, resume=True, **{"checkpoint.every": 9})
    assert run.step == 3
    assert len(read_json_lines(folder / "dropped.jsonl")) == 2 * 4
    assert len(shop.events(folder, "step_refused")) == 2  # a resume forgets neither


async def test_an_asynchronous_run_ends_so_too_with_what_is_out_in_its_checkpoint(
    shop: Workshop,
) -> None:
    changes = {"max_staleness": 1, "num_steps": 5, "checkpoint.every": 9}
    with pytest.raises(RoleFailed, match="that is 2 in a row"):
        await shop.trained(
            lambda version, count: version >= 1, **changes, **{"ppo.refuse": {"max_in_a_row": 2}}
        )
    # More of them may lie in the buffer: they are refused after the resume.
    run = await shop.trained(never, resume=True, **changes, **{"ppo.refuse": {"max_in_a_row": 9}})
    assert run.step == 5
    assert run.supervisor.ledger.num_consumed == 5 * 2
    lost = len(read_json_lines(run.files.folder / "dropped.jsonl")) // SAMPLES
    assert lost == run.supervisor.ledger.num_dropped >= 4


async def test_a_disk_that_refuses_the_bundle_does_not_end_the_run(shop: Workshop) -> None:
    folder = shop.config().run_dir
    folder.mkdir(parents=True)
    (folder / "replay").write_text("in the way")
    run = await shop.trained(first_of_version(1))
    assert run.step == 3
    [refusal] = shop.events(folder, "step_refused")
    assert refusal["replay"].startswith("no replay bundle: ")


async def test_a_success_between_refusals_starts_the_count_again(shop: Workshop) -> None:
    first, second = first_of_version(0), first_of_version(1)
    run = await shop.trained(
        lambda *seen: first(*seen) or second(*seen), **{"ppo.refuse": {"max_in_a_row": 2}}
    )
    assert run.step == 3
    assert len(shop.events(run.files.folder, "step_refused")) == 2


async def test_the_newest_bundles_are_kept_and_none_is_written_over(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = await shop.run(never, shop.config(**{"ppo.refuse": {"max_in_a_row": 2}}))
    batch = await _batch(run)
    written = [
        await replay_bundle.write(
            run.config, run.learner, batch, StepRefused(step, "why", {"x": float("nan")}), step - 1
        )
        for step in (7, 7, 3)  # as after a resume
    ]
    await run.supervisor.close()
    assert [path.name for path in written] == ["step-000007-1", "step-000007-2", "step-000003-1"]
    kept = sorted(path.name for path in (run.files.folder / "replay").iterdir())
    assert kept == ["step-000003-1", "step-000007-2"]
    again, version = replay_bundle.read(written[-1])
    assert (again.step, again.reason, version) == (3, "why", 2)
    assert str(again.metrics["x"]) == "nan"
    json.loads(
        (written[-1] / "refusal.json").read_text(), parse_constant=lambda name: pytest.fail(name)
    )


async def _batch(run: Run) -> Any:
    batch = await run.take()
    assert batch is not None
    return batch


# ---- the command


CAUSES: dict[str, tuple[Spoil, dict[str, Any], str]] = {
    "a score": (first_of_version(1), {}, "score is not finite in 2 of 4 trajectories"),
    "approx_kl": (
        never,
        {"ppo.refuse": {"approx_kl": 1e-7, "max_in_a_row": 1}, "ppo.policy": {"lr": 1e-2}},
        "approx_kl",
    ),
    "a gradient": (
        never,
        {"ppo.refuse": {"grad_norm": 1e-6, "max_in_a_row": 1}},
        "grad_norm_",
    ),
    "logprobs": (
        never,
        {"ppo.refuse": {"behavior_difference": 1e-3, "max_in_a_row": 1}},
        "behavior_difference_mean",
    ),
}


@pytest.mark.parametrize("cause", CAUSES)
async def test_a_bundle_shows_the_same_refusal_again_to_the_last_digit(
    shop: Workshop, raylign: Any, cause: str
) -> None:
    spoil, changes, reason = CAUSES[cause]
    config = shop.config(**changes)
    if "ppo.refuse" in changes:
        with pytest.raises(RoleFailed):
            await shop.trained(spoil, **changes)
    else:
        await shop.trained(spoil, **changes)
    [refusal] = shop.events(config.run_dir, "step_refused")
    bundle = refusal["replay"].removeprefix("raylign replay ")
    code, out, _ = raylign("replay", bundle)
    assert code == 0
    assert out.startswith(f"reproduced: {reason}")
    assert out.removeprefix("reproduced: ") == refusal["reason"].partition(" refused: ")[2]


async def test_a_replay_that_comes_out_otherwise_says_how(shop: Workshop, raylign: Any) -> None:
    run = await shop.run(never, shop.config())
    batch = await _batch(run)
    await run.supervisor.close()
    refused = StepRefused(1, "score is not finite in 1 of 4 trajectories: p0-e0-0", {})
    bundle = await replay_bundle.write(run.config, run.learner, batch, refused, 0)
    code, out, _ = raylign("replay", str(bundle))
    assert code == 1
    assert out.startswith("not reproduced: the step went through (learner/approx_kl ")
    assert out.endswith(f"in the run it was refused because {refused.reason}")

    bounded = shop.config(**{"ppo.refuse": {"grad_norm": 1e-6}})
    bundle = await replay_bundle.write(bounded, run.learner, batch, refused, 0)
    code, out, _ = raylign("replay", str(bundle))
    assert code == 1
    assert out.startswith("not reproduced: refused because grad_norm_")
    assert refused.reason in out


async def test_a_bundle_that_is_not_as_it_was_written_is_bad_input(
    shop: Workshop, raylign: Any
) -> None:
    run = await shop.trained(first_of_version(0))
    bundle = next((run.files.folder / "replay").iterdir())
    for name in ("batch.parquet", "refusal.json", "config.yaml", "learner/.metadata"):
        whole = (bundle / name).read_bytes()
        (bundle / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        code, out, err = raylign("replay", str(bundle))
        assert (code, out) == (2, "")
        assert len(err.splitlines()) == 1
        assert f"{name} is not as it was written" in err
        (bundle / name).write_bytes(whole)
    assert raylign("replay", str(bundle))[0] == 0
    (bundle / "batch.parquet").unlink()
    assert "batch.parquet is missing" in raylign("replay", str(bundle))[2]


async def test_a_bundle_from_elsewhere_is_opened_only_if_it_is_trusted(
    shop: Workshop, raylign: Any
) -> None:
    run = await shop.trained(first_of_version(0))
    bundle = next((run.files.folder / "replay").iterdir())
    elsewhere = shop.folder / "mail/replay/bundle"
    shutil.copytree(bundle, elsewhere)
    code, _, err = raylign("replay", str(elsewhere))
    assert code == 2
    assert "--trust-checkpoint" in err
    assert raylign("replay", str(elsewhere), "--trust-checkpoint")[0] == 0


def test_what_is_no_bundle_is_bad_input(tmp_path: Path, raylign: Any) -> None:
    code, _, err = raylign("replay", str(tmp_path / "nothing"))
    assert code == 2
    assert "no such bundle; give a folder such as runs/NAME/replay/" in err
