"""Runs of the real thing for the tests: tiny models, the command line, real Ray, vLLM and FSDP."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 180


@dataclass(frozen=True)
class Workshop:
    """A folder with data, a policy and a reward model, and how to run commands on them."""

    folder: Path

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self._words(arguments), cwd=ROOT, capture_output=True, text=True, timeout=300
        )

    def start(self, *arguments: str, log: Path | None = None) -> subprocess.Popen[str]:
        """In a session of its own, so that the whole job can be killed at once. `log`: where the output
        of a long run goes; else into a pipe."""
        return subprocess.Popen(
            self._words(arguments),
            cwd=ROOT,
            stdout=log.open("w") if log is not None else subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def config(self, **changes: Any) -> Path:
        """A small synchronous PPO config; `changes` replace whole top-level sections."""
        tree: dict[str, Any] = {
            "stage": "train",
            "name": "run",
            "runs_dir": str(self.runs),
            "num_steps": 4,
            "batch_size": 16,
            "policy": str(self.folder / "data/model"),
            "prompts": {"path": str(self.folder / "data/prompts.parquet"), "limit": 24},
            "sampling": {"max_tokens": 16},
            "generators": {
                "count": 2,
                "max_model_len": 64,
                "max_num_seqs": 8,
                "kv_cache_bytes": 1 << 25,
            },
            "reward": {"scorer": {"kind": "reward_model", "path": str(self.runs / "reward/model")}},
            "learner": {"ranks": 2, "timeout_s": 120},
            "ppo": {"policy": {"lr": 1e-3}, "value": {"lr": 1e-3}},
            "evaluation": {
                "prompts": {"path": str(self.folder / "data/held_out_prompts.parquet"), "limit": 8},
                "scorer": {
                    "kind": "function",
                    "function": "examples.support_replies.judge:score",
                },
            },
            "checkpoint": {"every": 1, "keep": 2},
        }
        tree |= changes
        path = self.folder / f"{tree['name']}.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    def events(self, name: str) -> list[dict[str, Any]]:
        return read_lines(self.runs / name / "events.jsonl")

    def metrics(self, name: str) -> list[dict[str, Any]]:
        return read_lines(self.runs / name / "metrics.jsonl")

    def _words(self, arguments: tuple[str, ...]) -> list[str]:
        return [sys.executable, "-m", "cluster.cli", *arguments]


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_until(
    condition: Callable[[], bool], what: str, timeout_s: float = START_TIMEOUT_S
) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        time.sleep(0.05)


def off_loopback(process: subprocess.Popen[str]) -> set[str]:
    """Sockets of the job that listen where other machines could reach them."""
    import psutil

    found = set()
    try:
        driver = psutil.Process(process.pid)
        for member in [driver, *driver.children(recursive=True)]:
            for connection in member.net_connections(kind="inet"):
                address = connection.laddr.ip.removeprefix("::ffff:") if connection.laddr else ""
                if connection.status == "LISTEN" and not address.startswith("127."):
                    found.add(f"{member.name()} on {address}:{connection.laddr.port}")
    except psutil.Error:  # a process ended while we looked
        pass
    return found


def kill_everything(process: subprocess.Popen[str]) -> None:
    """kill -9 of the job: the driver, Ray's processes and every actor."""
    import psutil

    driver = psutil.Process(process.pid)
    for victim in [driver, *driver.children(recursive=True)]:
        try:
            os.kill(victim.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()
