"""`raylign submit`: the train command as a Ray job, its log followed, its exit code passed on."""

from __future__ import annotations

import asyncio
import math
import os
import urllib.error
import urllib.request
from pathlib import Path

from cluster.config import BadInput, RunConfig
from cluster.stop import ENDING_S

EXCLUDES = ["runs/", "data/", ".venv/", "*.log", ".env", ".env.*"]


def submit_job(
    run: RunConfig,
    config: Path,
    overrides: list[str],
    flags: list[str],
    address: str,
    *,
    follow: bool,
) -> int:
    """Submit from the working directory; returns 0, or 3 if the job failed.

    `runs_dir`, data and model paths must be on storage that all nodes see; relative ones are taken
    from here.
    """
    _probe(address)
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    from ray.job_submission import JobStatus, JobSubmissionClient

    client = JobSubmissionClient(address)
    words = ["python", "-m", "cluster.cli", "train", str(config), *overrides, *flags]
    job = client.submit_job(
        entrypoint=" ".join(_quoted(word) for word in words),
        metadata={"job_name": run.name},
        runtime_env={
            "working_dir": ".",
            "excludes": EXCLUDES,
            "env_vars": {
                # Ray's own 3 s, and then kill -9, would cut off the checkpoint.
                "RAY_JOB_STOP_WAIT_TIME_S": str(math.ceil(run.stop_grace_s + ENDING_S)),
                "RAYLIGN_HOME": os.getcwd(),
            },
        },
    )
    print(f"job {job} submitted; stop it with: ray job stop --address {address} {job}", flush=True)
    if not follow:
        return 0
    asyncio.run(_follow(client, job))
    status = client.get_job_status(job)
    print(f"job {job}: {status}")
    return 0 if status in (JobStatus.SUCCEEDED, JobStatus.STOPPED) else 3


async def _follow(client: object, job: str) -> None:
    async for lines in client.tail_job_logs(job):  # type: ignore[attr-defined]
        print(lines, end="", flush=True)


def _quoted(word: str) -> str:
    import shlex

    return shlex.quote(word)


def _probe(address: str) -> None:
    try:
        urllib.request.urlopen(f"{address}/api/version", timeout=5).close()
    except urllib.error.HTTPError as refused:
        if refused.code not in (401, 403):
            raise BadInput(
                f"--address: {address} is no Ray dashboard (it answers with status {refused.code}); "
                "give the head's, such as http://HEAD:8265"
            ) from None
        if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
            raise BadInput(
                f"--address: {address} wants a token; export RAY_AUTH_MODE=token, and "
                "RAY_AUTH_TOKEN_PATH with the file that holds it"
            ) from None
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise BadInput(
            f"--address: no Ray dashboard answers at {address} ({error}); start one with: ray start --head"
        ) from None
