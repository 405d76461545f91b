"""A Ray of our own: what the driver holds of an actor's answer stays when the actor is gone, and nobody
else gets in."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from cluster import ray_auth
from cluster.placement import Member, RoleFailed, ask, ask_beside
from cluster.ray_host import RayHost
from cluster.roles import RewardRole
from reward_service.api import ScoreRequest
from reward_service.config import RewardServiceConfig
from reward_service.sandbox import IsolationMissing, require_isolation, run_python

LARGE = 300_000  # beyond what Ray sends along with the answer: it lies in the object store


class Worker:
    async def take(self, rows: int) -> tuple[str, pa.Table]:
        return "two prompts", pa.table({"x": list(range(rows))})

    async def broken(self) -> tuple[str, pa.Table]:
        raise ValueError("no such token")

    def pid(self) -> int:
        return os.getpid()


class Programs:
    async def run(self, code: str) -> str:
        done = await run_python(code)
        return done.stdout + done.stderr


class Reader:
    def length(self, table: pa.Table) -> int:
        return len(table)


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayHost]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        for name in (ray_auth.MODE, ray_auth.TOKEN, ray_auth.TOKEN_PATH):
            patch.setenv(name, "")  # so that it is put back
            patch.delenv(name)
        host = RayHost("local", "test-ray-host")
        yield host
        host.close()


def start(host: RayHost, kind: type, *args: Any) -> Member:
    return host.start(f"{kind.__name__}-{time.monotonic_ns()}", kind, *args, env={})


@pytest.mark.parametrize("rows", [3, LARGE])
async def test_a_payload_outlives_the_actor_that_made_it(host: RayHost, rows: int) -> None:
    worker, reader = start(host, Worker), start(host, Reader)
    answer, payload = await ask_beside(worker, worker.handle.take, rows, within=60)
    assert answer == "two prompts"
    assert not isinstance(payload, pa.Table)  # a reference: nothing was fetched
    os.kill(await ask(worker, worker.handle.pid, within=60), signal.SIGKILL)
    await asyncio.sleep(1.0)
    with pytest.raises(RoleFailed, match="died"):
        await ask(worker, worker.handle.pid, within=60)
    assert await ask(reader, reader.handle.length, payload, within=60) == rows


async def test_a_failure_is_raised_with_the_answer(host: RayHost) -> None:
    worker = start(host, Worker)
    with pytest.raises(RoleFailed, match="broken: ValueError: no such token"):
        await ask_beside(worker, worker.handle.broken, within=60)


async def test_what_a_reward_function_prints_is_in_its_log_without_secrets(
    host: RayHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "talkative.py").write_text(
        "import os, sys\n\ndef score(asked):\n    print('scoring', len(asked))\n"
        "    print('with', os.environ['REWARD_TOKEN'], file=sys.stderr)\n    return [1.0] * len(asked)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    given = {"scorer": {"kind": "function", "function": "talkative:score"}}
    config = RewardServiceConfig.model_validate(given)
    log = tmp_path / "reward.log"
    member = host.start(
        "talkative", RewardRole, "reward", config, True, log,
        env={"REWARD_TOKEN": "a-long-secret"},
    )  # fmt: skip
    request = ScoreRequest("t0", "p", "c", (2,), (3, 1), "stop")
    (result,) = await ask(member, member.handle.score, [request], within=60)
    assert result.score == 1.0
    assert log.read_text() == "scoring 1\nwith ***\n"


def test_our_own_ray_answers_none_but_us(host: RayHost) -> None:
    address = host._ray.get_runtime_context().gcs_address
    assert ray_auth._refuses(address, None)
    assert ray_auth._refuses(address, "0" * 64)
    assert not ray_auth._refuses(address, os.environ["RAY_AUTH_TOKEN"])


async def test_its_token_is_in_no_file_and_no_command_line(host: RayHost) -> None:
    token = os.environ["RAY_AUTH_TOKEN"]
    worker = start(host, Worker)
    pid = await ask(worker, worker.handle.pid, within=60)
    assert token in Path(f"/proc/{pid}/environ").read_text()  # which other users cannot read
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended
            assert token.encode() not in command.read_bytes()
    assert not [*Path(os.environ["HOME"]).rglob("auth_token")]
    written = [p for p in Path(session(host)).rglob("*") if p.is_file() and not p.is_socket()]
    assert len(written) > 5
    assert not [path for path in written if token.encode() in path.read_bytes()]


def test_no_other_user_can_enter_the_folder_of_its_sockets(host: RayHost) -> None:
    sockets = Path(session(host)) / "sockets"
    assert [path for path in sockets.iterdir() if path.is_socket()]
    assert any(folder.stat().st_mode & 0o077 == 0 for folder in sockets.parents)


def test_nothing_is_left_of_its_folder_when_it_is_closed() -> None:
    code = (
        "from pathlib import Path\nfrom cluster.ray_host import RayHost\n"
        "host = RayHost('local', 'test')\nprint(host._folder.path, flush=True)\n"
        "assert Path(host._folder.path).exists()\nhost.close()\n"
    )
    with tempfile.TemporaryDirectory(dir="/tmp") as base:
        done = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "RAY_TMPDIR": base},
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert Path(done.stdout.strip()).is_relative_to(base)
        assert not os.listdir(base)


SCORES = """
import asyncio
from pathlib import Path
from cluster.placement import ask
from cluster.ray_host import RayHost
from cluster.roles import RewardRole
from reward_service.api import ScoreRequest
from reward_service.config import RewardServiceConfig
host = RayHost("local", "test")
given = {"scorer": {"kind": "function", "function": "my_rewards:brevity"}}
config = RewardServiceConfig.model_validate(given)
member = host.start("reward", RewardRole, "reward", config, True, Path("reward.log"), env={})
request = ScoreRequest("t0", "p", "c", (2,), (3, 1), "stop")
print(asyncio.run(ask(member, member.handle.score, [request], within=60))[0].score)
host.close()
"""


def test_an_actor_runs_nothing_of_the_current_folder_but_its_reward_function(
    tmp_path: Path,
) -> None:
    for name in ("statistics", "colorsys", "pyarrow", "numpy", "pydantic"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a trap')\n")
    (tmp_path / "my_rewards.py").write_text(
        "import statistics, sys\n\ndef brevity(asked):\n    return [2.0 for _ in asked]\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", SCORES], cwd=tmp_path,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.stdout == "2.0\n", done.stderr


async def test_code_of_a_model_runs_below_an_actor_and_sees_nothing_of_it(host: RayHost) -> None:
    try:
        require_isolation()
    except IsolationMissing as error:
        pytest.skip(str(error))
    member = start(host, Programs)
    code = "import os\nprint(dict(os.environ), os.listdir('/work'), os.path.exists('/tmp'))"
    said = await ask(member, member.handle.run, code, within=60)
    assert said.endswith("['main.py'] False\n")
    assert "RAY" not in said


def session(host: RayHost) -> str:
    """The folder with the logs of Ray's processes."""
    folder: str = host._ray._private.worker._global_node.get_session_dir_path()
    return folder
