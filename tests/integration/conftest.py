"""One workshop serves all integration tests: data, a random policy, a trained reward model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.integration.runs import ROOT, Workshop


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return made_workshop(tmp_path_factory.mktemp("workshop"))


def made_workshop(folder: Path) -> Workshop:
    """With data, a policy, and a reward model that is trained here."""
    shop = Workshop(folder)
    generate = [sys.executable, "-m", "examples.support_replies.generate"]
    subprocess.run([*generate, "--out", str(shop.folder / "data")], cwd=ROOT, check=True)
    config = shop.folder / "reward.yaml"
    config.write_text(yaml.safe_dump(_reward_config(shop.folder, shop.runs)))
    done = shop.command("reward-model", str(config))
    assert done.returncode == 0, done.stderr
    return shop


def _reward_config(folder: Path, runs: Path) -> dict[str, object]:
    return {
        "stage": "reward_model",
        "name": "reward",
        "runs_dir": str(runs),
        "model": str(folder / "data/model"),
        "training": {
            "pairs": str(folder / "data/held_out_pairs.parquet"),
            "normalise_on": str(folder / "data/reference.parquet"),
            "lr": 1e-3,
        },
    }
