"""Runs Python that a model wrote, for reward functions: isolated, or not at all.

Each call is a process without network, in namespaces of its own, that sees Python, /usr and one empty
folder (sandbox_child.py says how). For root and for ordinary users, on Linux on x86-64, where user
namespaces are allowed.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import os
import platform
import signal
import subprocess
import sys
import time
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, Self

CHILD = Path(__file__).with_name("sandbox_child.py")
OVERDUE_S = 5.0  # the child keeps the deadline; so much later it is killed from here


class IsolationMissing(Exception):
    """This machine cannot isolate code, so it is not run. One line: what is missing, and the fix."""

    def __init__(self, missing: str) -> None:
        super().__init__(
            f"code is not run, as it cannot be isolated here ({missing}); allow user namespaces: "
            "user.max_user_namespaces, kernel.apparmor_restrict_unprivileged_userns=0, in a container a "
            "seccomp profile with unshare and mount"
        )


@dataclass(frozen=True, slots=True)
class SandboxLimits:
    """Of one call. All its processes together may take memory_bytes * max_processes + folder_bytes."""

    deadline_s: float = 5.0  # wall time, start-up included
    folder_bytes: int = 16 << 20  # the one folder that can be written; it is in memory
    cpu_s: int = 5  # of one process
    memory_bytes: int = 512 << 20  # address space of one process
    file_bytes: int = 1 << 20  # of one file; also of stdout, and of stderr
    max_processes: int = 8  # threads count
    max_open_files: int = 64


@dataclass(frozen=True, slots=True)
class SandboxResult:
    exit_code: int  # -N: ended by signal N
    stdout: str
    stderr: str
    timed_out: bool
    truncated: bool  # stdout or stderr came to file_bytes
    seconds: float


DEFAULTS = SandboxLimits()


async def run_python(
    code: str, *, stdin: str = "", limits: SandboxLimits = DEFAULTS
) -> SandboxResult:
    """Run `code` as a program. IsolationMissing if any part of the isolation cannot be had; whatever the
    code does is a result. A call that is cancelled ends its processes."""
    require_isolation()
    with _Call(code, stdin, limits) as call:
        child = await asyncio.create_subprocess_exec(*call.words, **call.options)
        try:
            await asyncio.wait_for(child.wait(), call.timeout_s)
        except TimeoutError:
            pass
        finally:
            if child.returncode is None:
                call.kill(child.pid)
        return call.outcome()


@functools.cache
def require_isolation() -> None:
    """IsolationMissing where run_python would raise it: called while a scorer's module is imported, it
    refuses the run before anything starts. Tried once a process."""
    with _Call("print(6 * 7)", "", DEFAULTS) as call:
        with subprocess.Popen(call.words, **call.options) as child:
            try:
                child.wait(call.timeout_s)
            except subprocess.TimeoutExpired:
                call.kill(child.pid)
        tried = call.outcome()
    if tried.stdout != "42\n":  # else each program would seem to fail, and get a score for it
        raise IsolationMissing(f"Python does not run in it: {tried.stderr.strip()[-200:] or tried}")


class _Call:
    """The child's words and files. Its files are in memory, without a name, and bounded by file_bytes."""

    def __init__(self, code: str, stdin: str, limits: SandboxLimits) -> None:
        if (sys.platform, platform.machine()) != ("linux", "x86_64"):
            here = f"{sys.platform} on {platform.machine()}"
            raise IsolationMissing(f"it takes Linux on x86-64, this is {here}")
        self._limits = limits
        self._given = {"code": code, "stdin": stdin, "stdout": "", "stderr": "", "report": ""}
        self.timeout_s = limits.deadline_s + OVERDUE_S

    def __enter__(self) -> Self:
        self._started = time.perf_counter()
        self._files = {name: _in_memory(name, text) for name, text in self._given.items()}
        source, report = self._files["code"], self._files["report"]
        python = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
        deadline_s, *others = astuple(self._limits)
        numbers = [source, report, os.getpid(), math.ceil(1000 * deadline_s), *others]
        interpreter = [python, "-I", "-S", "-B", str(CHILD)]
        self.words = [*interpreter, python, sys.base_prefix, *map(str, numbers)]
        self.options: dict[str, Any] = {
            "env": {},
            "pass_fds": (source, report),
            "start_new_session": True,
            **{name: self._files[name] for name in ("stdin", "stdout", "stderr")},
        }
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            os.close(file)

    def kill(self, pid: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        os.write(self._files["report"], b"timeout\n")

    def outcome(self) -> SandboxResult:
        said, _, what = self._read("report").partition("\n")[0].partition(" ")
        if said == "error":
            raise IsolationMissing(what)
        if said not in ("exit", "timeout"):
            raise RuntimeError(f"the sandbox's own process died: {self._read('stderr')[-200:]}")
        sizes = [os.fstat(self._files[name]).st_size for name in ("stdout", "stderr")]
        return SandboxResult(
            exit_code=int(what) if said == "exit" else -signal.SIGKILL,
            stdout=self._read("stdout"),
            stderr=self._read("stderr"),
            timed_out=said == "timeout",
            truncated=max(sizes) >= self._limits.file_bytes,
            seconds=time.perf_counter() - self._started,
        )

    def _read(self, name: str) -> str:
        return os.pread(self._files[name], self._limits.file_bytes, 0).decode(errors="replace")


def _in_memory(name: str, text: str) -> int:
    file = os.memfd_create(name)
    os.write(file, text.encode(errors="replace"))
    os.lseek(file, 0, os.SEEK_SET)
    return file
