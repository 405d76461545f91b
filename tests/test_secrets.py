"""Canaries in the environment: after runs that succeed, drop and fail, nothing a run writes holds one.

Whole runs of the command line in this process: real driver, reward service, learner, files and report;
the engine alone is made up.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest

from actors.generate_request import GenerateRequest
from actors.rollout_worker import RolloutWorker
from actors.trajectory import Completion
from actors.weight_update import ProbeAnswer, WeightLayout, WeightUpdate
from cluster import cli, deployment, redaction, submit
from cluster.redaction import hide, printable
from cluster.roles import RewardRole, RolloutSpec, settle_in
from cluster.stop import ENDING_S
from reward_service.client import RewardClient
from reward_service.config import RewardServiceConfig
from tests import tiny
from tests.learner_cases import mesh

CANARIES = {
    "JUDGE": "canary-of-the-endpoint",  # named as a secret by token_env alone
    "AWS_SECRET_ACCESS_KEY": "canary-of-the-cloud",
    "HF_TOKEN": "canary-of-the-hub",
    "RAY_AUTH_TOKEN": "canary-of-ray",
}


class TalkativeEngine:
    """Samples the same completion for all; a library it uses logs the environment."""

    def __init__(self, name: str) -> None:
        self.name, self._version = name, 0

    async def generate(
        self, requests: Sequence[GenerateRequest]
    ) -> list[asyncio.Future[Completion]]:
        logging.getLogger("library").warning("my environment: %s", secrets())
        loop = asyncio.get_running_loop()
        futures: list[asyncio.Future[Completion]] = [loop.create_future() for _ in requests]
        for future in futures:
            spans = ((self._version, 0),)
            future.set_result(Completion((5, 6, 1), (-1.0, -1.0, -1.0), "42", "stop", spans, 0.1))
        return futures

    async def agree_layout(self, layout: WeightLayout) -> str:
        return layout.id

    async def receive_weights(self, update: WeightUpdate) -> dict[str, float]:
        self._version = update.version
        return {"probe_difference": 0.0}

    async def receive_answer(self, answer: ProbeAnswer) -> None:
        return

    async def status(self) -> dict[str, Any]:
        return {"busy_s": 0.1, "running": 0, "waiting": 0, "first_token_at": 1.0,
                "weights_s": 0.0, "completion_tokens": 1}  # fmt: skip

    async def forget(self) -> None:
        return

    async def close(self) -> None:
        return


class TalkativeRole(RolloutWorker):
    def __init__(self, spec: RolloutSpec, rewards: Any) -> None:
        settle_in(spec.log_file)
        client = RewardClient(rewards.score, spec.reward)
        super().__init__(
            TalkativeEngine(spec.name),
            client,
            spec.sampling,
            seed=spec.seed,
            scoring=spec.scoring,
        )


class Endpoint(BaseHTTPRequestHandler):
    """Refuses its first call, and repeats the token in what it answers."""

    num_calls = 0

    def do_POST(self) -> None:
        Endpoint.num_calls += 1
        token = self.headers["Authorization"]
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["requests"]
        if token != f"Bearer {CANARIES['JUDGE']}" or Endpoint.num_calls == 1:
            self.send_error(500, token, token)
            return
        scored = [{"trajectory_id": r["trajectory_id"], "score": float(i), "parts": {"a": 1.0}}
                  for i, r in enumerate(asked)]  # fmt: skip
        body = json.dumps({"responses": scored, "token": token}).encode()
        self.send_response(200, token)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        return


def secrets() -> str:
    return " ".join(os.environ[name] for name in CANARIES)


@pytest.fixture
def endpoint() -> Iterator[dict[str, Any]]:
    """The config of a scorer that asks it."""
    Endpoint.num_calls = 0
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/"
    yield {"kind": "http", "url": url, "token_env": "JUDGE"}
    server.shutdown()
    server.server_close()


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    mesh()
    monkeypatch.setattr(os, "environ", {**os.environ, **CANARIES})  # the command sets more
    monkeypatch.setattr(deployment, "RolloutRole", TalkativeRole)
    monkeypatch.chdir(tmp_path)
    handlers = [*logging.getLogger().handlers]
    yield tmp_path
    for handler in {*logging.getLogger().handlers} - {*handlers}:
        logging.getLogger().removeHandler(handler)


@pytest.fixture
def raylign(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    def run(*words: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main(list(words))
        said = capfd.readouterr()
        return int(ended.value.code or 0), said.out + said.err

    return run


def config(world: Path, policy: Path, changes: dict[str, Any]) -> str:
    tree = tiny.run_tree(world, policy)
    small = {"num_steps": 2, "batch_size": 4, "checkpoint.every": 1}
    free = {"self_check.max_difference": 1e9, "self_check.max_mean_difference": 1e9}
    return str(tiny.write_yaml(world / "run.yaml", tiny.changed(tree, small | free | changes)))


def assert_clean(text: str, where: object) -> None:
    for name, canary in CANARIES.items():
        assert canary not in text, f"{where} holds {name}"


def assert_nothing_written_holds_one(folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 5
    for path in files:
        assert_clean(path.read_bytes().decode(errors="replace"), path)
        if path.suffix == ".parquet":  # may be compressed
            assert_clean(str(pq.read_table(path).to_pylist()), path)


def test_a_run_with_an_endpoint_that_repeats_its_token_keeps_every_secret(
    world: Path, policy: Path, endpoint: dict[str, Any], raylign: Callable[..., tuple[int, str]]
) -> None:
    rewards = {"reward.scorer": endpoint, "reward.on_failure": "drop", "reward.max_retries": 0}
    path = config(world, policy, rewards)
    code, said = raylign("train", path, "--in-process")
    assert code == 0, said
    assert Endpoint.num_calls > 1  # the token was sent, and accepted
    assert "status 500" in (world / "runs/tiny/dropped.jsonl").read_text()
    assert "my environment: ***" in (world / "runs/tiny/logs/generator-0.log").read_text()
    assert_clean(said, "the terminal")
    for command in ("status", "audit", "report"):
        code, said = raylign(command, "tiny")
        assert code == 0, said
        assert_clean(said, command)
    assert_nothing_written_holds_one(world / "runs")


def test_a_run_that_fails_with_a_secret_in_the_error_keeps_it(
    world: Path,
    policy: Path,
    endpoint: dict[str, Any],
    raylign: Callable[..., tuple[int, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = "import os\n\ndef score(requests):\n    raise ValueError(' '.join(os.environ[n] for n in {}))"
    (world / "telling_rewards.py").write_text(source.format([*CANARIES]))
    monkeypatch.syspath_prepend(str(world))
    parts = {
        "endpoint": {"weight": 1.0, "scorer": endpoint},
        "telling": {
            "weight": 1.0,
            "scorer": {"kind": "function", "function": "telling_rewards:score"},
        },
    }
    scorer = {"kind": "sum", "parts": parts}
    path = config(world, policy, {"reward.scorer": scorer, "reward.max_retries": 0})
    Endpoint.num_calls = 1
    code, said = raylign("train", path, "--in-process")
    assert code == 3
    assert "ValueError: *** *** *** ***" in said
    assert_clean(said, "the terminal")
    assert "*** *** ***" in json.loads((world / "runs/tiny/status.json").read_text())["error"]
    _, said = raylign("status", "tiny")
    assert_clean(said, "status")
    assert_nothing_written_holds_one(world / "runs")


def test_a_refused_step_leaves_a_bundle_without_a_secret(
    world: Path, policy: Path, endpoint: dict[str, Any], raylign: Callable[..., tuple[int, str]]
) -> None:
    refuse = {"grad_norm": 1e-12, "max_in_a_row": 1}
    path = config(world, policy, {"reward.scorer": endpoint, "ppo.refuse": refuse})
    Endpoint.num_calls = 1
    code, said = raylign("train", path, "--in-process")
    assert code == 3
    assert "1 in a row" in said
    (bundle,) = (world / "runs/tiny/replay").iterdir()
    assert {"config.yaml", "batch.parquet", "refusal.json"} < {p.name for p in bundle.iterdir()}
    code, replayed = raylign("replay", str(bundle))
    assert code == 0, replayed
    assert_clean(said + replayed, "the terminal")
    assert_nothing_written_holds_one(world / "runs")


def test_a_job_is_sent_without_the_environment(
    world: Path, policy: Path, endpoint: dict[str, Any], raylign: Callable[..., tuple[int, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    sent: dict[str, Any] = {}

    class Client:
        def __init__(self, address: str) -> None:
            sent["address"] = address

        def submit_job(self, **job: Any) -> str:
            sent.update(job)
            return "raysubmit_1"

    job_submission = SimpleNamespace(JobSubmissionClient=Client, JobStatus=SimpleNamespace())
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(job_submission=job_submission))
    monkeypatch.setitem(sys.modules, "ray.job_submission", job_submission)
    monkeypatch.setattr(submit, "_probe", lambda address: None)
    path = config(world, policy, {"reward.scorer": endpoint})
    code, said = raylign("submit", path, "--no-follow", "--resume", "--trust-checkpoint")
    assert code == 0, said
    assert sent["entrypoint"] == f"python -m cluster.cli train {path} --resume --trust-checkpoint"
    assert sent["metadata"] == {"job_name": "tiny"}
    variables = sent["runtime_env"]["env_vars"]
    assert variables.keys() == {"RAY_JOB_STOP_WAIT_TIME_S", "RAYLIGN_HOME"}
    assert int(variables["RAY_JOB_STOP_WAIT_TIME_S"]) == 120 + ENDING_S  # stop_grace_s, and the end
    assert ".env" in sent["runtime_env"]["excludes"]
    assert_clean(str(sent), "the job")
    assert_clean(said, "the terminal")


def test_a_secret_of_any_name_is_hidden_once_the_config_names_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PLAIN_NAME", "long-enough-value")
    assert printable("it is long-enough-value") == "it is long-enough-value"
    hide("PLAIN_NAME")
    assert printable("it is long-enough-value") == "it is ***"


@pytest.mark.parametrize("nested", [False, True])
def test_the_reward_service_hides_what_its_config_names(
    nested: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redaction, "_hidden", set())
    monkeypatch.setenv("ITS_JUDGE", "a-credential-by-config-alone")
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    scorer: dict[str, Any] = {
        "kind": "http",
        "url": "http://127.0.0.1:1/",
        "token_env": "ITS_JUDGE",
    }
    if nested:
        scorer = {"kind": "sum", "parts": {"judge": {"weight": 1.0, "scorer": scorer}}}
    config = RewardServiceConfig.model_validate({"scorer": scorer})
    RewardRole("reward", config, True, tmp_path / "reward.log")
    logging.getLogger("aiohttp").warning("headers: %s", os.environ["ITS_JUDGE"])
    assert (tmp_path / "reward.log").read_text().endswith("headers: ***\n")


def test_a_secret_may_look_like_a_path_and_a_path_to_one_is_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "/wJalrXUtnFEMI/K7MDENG")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/home/someone/token")
    said = printable(
        " ".join(os.environ[n] for n in ("AWS_SECRET_ACCESS_KEY", "RAY_AUTH_TOKEN_PATH"))
    )
    assert said == "*** /home/someone/token"


@pytest.mark.parametrize("quoted", [str, json.dumps, repr])
def test_a_secret_is_hidden_as_it_stands_in_what_quotes_it(
    quoted: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "abc&d\"e'f<ghi>\\12345\u00fc")
    monkeypatch.setenv("API_KEY", "abc&d\"e'f")
    assert "abc" not in printable(quoted(os.environ["HF_TOKEN"]))
    assert "345" not in printable(quoted(os.environ["HF_TOKEN"]))
