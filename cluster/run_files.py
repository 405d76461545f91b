"""The run folder: what the driver writes there beside metrics, checkpoints and evaluations."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import time
from collections.abc import Iterator
from threading import Event, Lock, Thread
from typing import Any
from uuid import uuid4

import yaml

from cluster import json_lines
from cluster.checkpoints import RUN_ID, run_id, step_of
from cluster.config import BadInput, RunConfig, StageConfig
from cluster.heartbeat import BEAT_S, STATUS, goes_on, here
from cluster.redaction import printable
from cluster.replace_file import read_object, replace_text
from cluster.run_lock import at_this_run

SAID = {"error", "message", "reason", "stack", "replay"}


class RunFiles:
    """runs/<name>/: config.yaml, run_id, events.jsonl, dropped.jsonl, status.json, summary.json."""

    def __init__(self, config: StageConfig) -> None:
        self.folder = config.run_dir
        self._config = config
        self._facts: dict[str, Any] = {}
        self._one_writes = Lock()  # of status.json

    def check(self, *, resume: bool, overwrite: bool) -> None:
        """BadInput if there is a run and neither `resume` nor `overwrite`, or none to resume."""
        if resume and overwrite:
            raise BadInput(
                "--resume goes on with a run, --overwrite deletes it; give one of the two"
            )
        exists = self._exists()
        if exists and not (resume or overwrite):
            resumed = "--resume goes on with it, " if isinstance(self._config, RunConfig) else ""
            raise BadInput(
                f"{self.folder}: there is a run already; {resumed}--overwrite deletes it, name=... makes "
                "another"
            )
        if resume and not exists:
            raise BadInput(f"{self.folder}: no run to resume; leave --resume out")
        if exists and overwrite and self.folder.is_symlink():
            raise BadInput(
                f"{self.folder}: a symbolic link, to {self.folder.resolve()}; --overwrite deletes no link: "
                "remove it, or name=... makes another"
            )
        if exists:
            self._refuse_a_second_driver()

    def _refuse_a_second_driver(self) -> None:
        """Two would undo each other's files and checkpoints."""
        path = self.folder / STATUS
        status = read_object(path)
        ours = here().items() <= status.items()
        if not ours and goes_on(status, path):
            who = at_this_run(status["pid"], status["host"])
            raise BadInput(f"{self.folder}: {who}, or name=... makes another")

    def create(self, *, overwrite: bool) -> None:
        """Make the folder, or BadInput; also if another driver has come since `check`."""
        if self._exists():
            self._refuse_a_second_driver()
        try:
            if overwrite and self._exists():
                shutil.rmtree(self.folder)
            self.folder.mkdir(parents=True, exist_ok=True)
            text = yaml.safe_dump(self._config.model_dump(mode="json"), sort_keys=False)
            (self.folder / "config.yaml").write_text(text)
            if not run_id(self.folder):
                (self.folder / RUN_ID).write_text(f"{self._config.name}-{uuid4().hex}\n")
        except OSError as error:
            raise BadInput(
                f"{self.folder}: cannot write there ({error.strerror}); set runs_dir"
            ) from None

    def start_over(self) -> int | None:
        """Forget what an earlier attempt left that had no checkpoint yet. Returns the step for
        MetricsWriter: None in a new folder."""
        if not (self.folder / "events.jsonl").exists():
            return None
        self.rewind(0, 0)
        (self.folder / "events.jsonl").unlink()
        shutil.rmtree(self.folder / "evaluation", ignore_errors=True)
        return -1

    def _exists(self) -> bool:
        return (self.folder / "config.yaml").exists()

    def event(self, event: str, **facts: Any) -> None:
        self._append("events.jsonl", {"time": time.time(), "event": event, **facts})

    def dropped(self, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            self._append("dropped.jsonl", row)

    def status(self, state: str, **facts: Any) -> None:
        """Facts not given stay as they were."""
        self._say({"state": state, "stage": self._config.stage, **here(), **facts})

    async def beat(self, every_s: float) -> None:
        """Say in status.json, again and again, that this process turns. Never ends."""
        while True:
            self._beat()
            await asyncio.sleep(every_s)

    @contextlib.contextmanager
    def beating(self, every_s: float = BEAT_S) -> Iterator[None]:
        """`beat`, from a thread, for one whose own is at work."""
        over = Event()

        def beat() -> None:
            self._beat()
            while not over.wait(every_s):
                self._beat()

        thread = Thread(target=beat, name="heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join(every_s)

    def _beat(self) -> None:
        with contextlib.suppress(OSError):  # a full disk is for others to name
            self._say({"heartbeat_at": time.time()})

    def _say(self, facts: dict[str, Any]) -> None:
        """Often, so not durably: if the machine fails, what this says is out of date anyhow."""
        with self._one_writes:
            self._facts |= facts
            said = {**self._facts, "updated_at": time.time()}
            self._replace(STATUS, said, durable=False)

    def summary(self, summary: dict[str, Any]) -> None:
        self._replace("summary.json", summary)

    def num_dropped(self) -> int:
        return json_lines.count(self.folder / "dropped.jsonl")

    def rewind(self, step: int, num_dropped: int) -> None:
        """Withdraw what a run did after its checkpoint of `step`, before it goes on from there."""
        for path in (self.folder / "trajectories").glob("step-*.parquet"):
            if step_of(path) > step:
                path.unlink()
        json_lines.keep(self.folder / "dropped.jsonl", lambda place, _: place < num_dropped)
        json_lines.keep(self.folder / "events.jsonl", lambda _, event: event.get("step", 0) <= step)

    def _append(self, name: str, row: dict[str, Any]) -> None:
        json_lines.append(self.folder / name, _without_secrets(row))

    def _replace(self, name: str, content: dict[str, Any], *, durable: bool = True) -> None:
        text = json.dumps(_without_secrets(content), indent=1)
        replace_text(self.folder / name, text, durable=durable)


def _without_secrets(row: dict[str, Any]) -> dict[str, Any]:
    """What others said goes through `printable`: a library's error may quote a token."""
    return {
        key: printable(value) if key in SAID and isinstance(value, str) else value
        for key, value in row.items()
    }
