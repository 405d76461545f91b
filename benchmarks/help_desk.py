"""The quickstart's commands, for the benchmarks that learn something: each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from benchmarks import work


def prepared(folder: Path, seed: int) -> Path:
    """A folder with the quickstart's data, SFT policy and reward model, made once."""
    if not (folder / "runs/support-rm/model").is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        python(folder, "-m", "examples.support_replies.generate", "--seed", str(seed))
        raylign(folder, "sft", "sft", f"seed={seed}", "--in-process", "--overwrite")
        raylign(folder, "reward-model", "reward_model", f"seed={seed}", "--overwrite")
    return folder


def raylign(folder: Path, command: str, config: str, *words: str, code: Path = work.ROOT) -> None:
    """A command of raylign on a config of the quickstart, in `folder`, with the code in `code`."""
    path = code / "examples/support_replies" / f"{config}.yaml"
    python(folder, "-m", "cluster.cli", command, str(path), *words, code=code)


def python(folder: Path, *words: str, code: Path = work.ROOT) -> None:
    """Raises CalledProcessError, the output before it on stderr, if it fails."""
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(code)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.stderr.write(done.stdout + done.stderr)
        done.check_returncode()
