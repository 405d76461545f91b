"""Ray's workers by fork, from a process that has already imported what they need.

    driver --starts--> trunk: torch, transformers             raylet --runs--> fork_client
                         |  fork                                    | its arguments, environment,
                         +--> branch "engine":  vLLM    <--socket---+ folder and open files
                         +--> branch "learner": FSDP    --fork--> worker

Importing is most of a run's start and most of a new generator's. Here it is done once, and the
processes share the memory of what was imported. The server computes nothing and has one Python thread,
so a fork is safe. A client that finds no server becomes the worker itself.
Only on CPU, and for a Ray of our own: what is imported may look at a GPU.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import random
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from actors.vllm_engine import CPU_ENGINE_ENV
from cluster.driver_folder import DriverFolder
from learner.learner_spec import LEARNER_ENV

TRUNK = "trunk"
# What is imported where; each branch has what the trunk has, too.
IMPORTS = {
    TRUNK: ("torch", "transformers", "pyarrow.parquet", "cluster.roles"),
    "engine": ("actors.generator", "actors.prompts", "transformers.tokenization_utils_fast",
               "vllm.v1.engine.llm_engine", "vllm.v1.worker.cpu_worker"),
    "learner": ("learner.learner_worker", "learner.sft"),
}  # fmt: skip
BRANCHES = {"RolloutRole": "engine", "LearnerRole": "learner", "SFTWorker": "learner"}
CLIENT = Path(__file__).with_name("fork_client.py")
LONGEST = 64  # bytes of the folder for temporary files
FDS = 3  # a worker's standard input, output and error


class ForkServer:
    """The driver's side."""

    def __init__(self, python_path: str, imports: Mapping[str, Sequence[str]] = IMPORTS) -> None:
        self._folder = DriverFolder(_short())
        listeners = {branch: self._listener(branch) for branch in imports}
        fds = {branch: listener.fileno() for branch, listener in listeners.items()}
        words = json.dumps([imports, fds])
        environment = {**os.environ, **LEARNER_ENV, **CPU_ENGINE_ENV, "PYTHONPATH": python_path}
        # It ends when its standard input does, and that when this process does.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "cluster.fork_server", words],
            env={**environment, "CUDA_VISIBLE_DEVICES": ""},
            # `-m` looks for modules there, before all others.
            cwd=Path(__file__).resolve().parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[*fds.values()],
            start_new_session=True,  # Ctrl-C is for the driver
        )
        for listener in listeners.values():
            listener.close()  # there is a server only as long as it has them

    def python_for(self, kind: type) -> list[str]:
        """What Ray is to run as Python for a worker that will be a `kind`."""
        branch = self._path(BRANCHES.get(kind.__name__, TRUNK))
        return [sys.executable, "-I", "-S", str(CLIENT), branch]

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()  # for the branches, when they have imported
        self._process.kill()
        self._process.wait(10.0)
        self._folder.remove()

    def _path(self, branch: str) -> str:
        return f"{self._folder.path}/{branch}"

    def _listener(self, branch: str) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self._path(branch))
        listener.listen(128)
        return listener


def _short() -> str:
    """Where a socket's path fits: it may have 107 bytes."""
    given = tempfile.gettempdir()
    return given if len(os.fsencode(given)) <= LONGEST else "/tmp"


def main(imports: Mapping[str, Sequence[str]], fds: Mapping[str, int]) -> None:
    """The server's side. Goes on only in a worker, and returns when that is done."""
    gc.disable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _import(imports[TRUNK])
    branch = next((name for name in fds if name != TRUNK and os.fork() == 0), TRUNK)
    for name, fd in fds.items():
        if name != branch:
            os.close(fd)
    if branch != TRUNK:
        _import(imports[branch])
    gc.freeze()
    if arguments := _serve(socket.socket(fileno=fds[branch])):
        _become(arguments)


def _import(names: Sequence[str]) -> None:
    """All but ray, which reads its environment when it is imported: the worker's, then."""
    sys.modules["ray"] = None  # type: ignore[assignment]
    for name in names:
        importlib.import_module(name)
    del sys.modules["ray"]


def _serve(listener: socket.socket) -> list[str]:
    """Fork a worker for each client. Returns the worker's arguments, in the worker; [] here, when
    standard input ends. Of a client and its worker, if one goes the other does."""
    died = _deaths()
    clients: dict[int, socket.socket] = {}  # by the worker's process id
    while True:
        watched: list[Any] = [0, listener, died, *clients.values()]
        ready, _, _ = select.select(watched, [], [])
        if 0 in ready:
            return []
        if died in ready:
            died.recv(4096)
            _bury(clients)
        for pid, client in clients.items():
            if client in ready and not client.recv(1):
                os.kill(pid, signal.SIGKILL)  # a child of ours: its number is its own until _bury
        if listener in ready:
            client, _ = listener.accept()
            request, fds = _received(client)
            if (pid := os.fork()) == 0:
                for one in (listener, died, client, *clients.values()):
                    one.close()
                return _settle(request, fds)
            clients[pid] = client
            for fd in fds:
                os.close(fd)


def _deaths() -> socket.socket:
    """Readable when a child has died."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    signal.set_wakeup_fd(theirs.detach())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    return ours


def _bury(clients: dict[int, socket.socket]) -> None:
    for pid in list(clients):
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            with clients.pop(pid) as client:
                code = struct.pack("i", os.waitstatus_to_exitcode(status))
                client.send(code, socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)


def _received(client: socket.socket) -> tuple[dict[str, Any], list[int]]:
    head, fds, _, _ = socket.recv_fds(client, 4, FDS)
    body = client.recv(struct.unpack("I", head)[0], socket.MSG_WAITALL)
    return json.loads(body), list(fds)


def _settle(request: dict[str, Any], fds: list[int]) -> list[str]:
    """Make this process what the client was: its files, folder and environment. Its arguments."""
    os.setsid()  # when a worker ends, Ray ends its whole process group
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGCHLD, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    for target, fd in enumerate(fds):
        os.dup2(fd, target)
        os.close(fd)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    arguments: list[str] = request["arguments"]
    return arguments


def _become(arguments: list[str]) -> None:
    """Run the script that is the first argument, as if Python had been started with it."""
    import numpy as np

    random.seed()  # brothers must not draw alike
    np.random.seed()
    gc.enable()
    sys.argv, sys.path[0] = arguments, str(Path(arguments[0]).parent)
    runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main(*json.loads(sys.argv[1]))
