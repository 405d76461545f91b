"""An engine of two processes takes weights, proves them and refuses them as one of a single process does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.runs import ROOT

pytestmark = pytest.mark.timeout(300)


def test_an_engine_of_two_workers_computes_what_the_learner_does(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.integration.two_workers", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["probe_difference"] < 1e-4
    assert found["difference"] < 1e-4
    assert found["spans"] == [[1, 0]]
    (elsewhere, missing), (rejected, digest) = found["refusals"]
    assert (elsewhere, rejected) == ("NeedsAll", "WeightsRejected")
    assert "not on this machine" in missing
    assert "the bytes of bucket 0" in digest
