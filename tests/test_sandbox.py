"""Code that means harm is contained, in seconds; where a part of that cannot be had, nothing runs."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from reward_service import sandbox
from reward_service.api import ScoreRequest, check_results
from reward_service.rules import FunctionScorer
from reward_service.sandbox import (
    IsolationMissing,
    SandboxLimits,
    SandboxResult,
    require_isolation,
    run_python,
)

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True, scope="module")
def possible() -> None:
    try:
        require_isolation()
    except IsolationMissing as error:
        pytest.skip(str(error))


async def run(code: str, *, stdin: str = "", **limits: float) -> SandboxResult:
    return await run_python(code, stdin=stdin, limits=SandboxLimits(**limits))  # type: ignore[arg-type]


def inside() -> list[int]:
    """Processes that run what a sandbox was given."""
    found = []
    for process in psutil.process_iter():
        try:
            found += [process.pid] if "main.py" in process.cmdline() else []
        except psutil.Error:
            continue
    return found


async def test_a_program_reads_its_input_and_is_answered_for() -> None:
    done = await run("print(sum(map(int, input().split())))", stdin="3 4\n")
    assert (done.exit_code, done.stdout, done.stderr) == (0, "7\n", "")
    assert not done.timed_out
    assert not done.truncated


@pytest.mark.parametrize(
    ("code", "exit_code", "said"),
    [
        ("raise SystemExit(3)", 3, ""),
        ("1 / 0", 1, "ZeroDivisionError"),
        ("def f(:", 1, "SyntaxError"),
        ("import os; os.abort()", -6, ""),
        ("import os; os.kill(os.getpid(), 9)", -9, ""),
    ],
)
async def test_how_it_ended_is_told(code: str, exit_code: int, said: str) -> None:
    done = await run(code)
    assert (done.exit_code, done.timed_out) == (exit_code, False)
    assert said in done.stderr


async def test_it_is_the_same_each_time() -> None:
    code = "print({*'abcdefgh'}, hash('text'))"
    first, second = await asyncio.gather(run(code), run(code))
    assert first.stdout == second.stdout


@pytest.mark.parametrize(
    "code",
    [
        "import socket; socket.socket()",
        "import socket; socket.create_connection(('127.0.0.1', {port}), 1)",
        "import socket; socket.socket(socket.AF_UNIX)",
        "import urllib.request; urllib.request.urlopen('http://127.0.0.1:{port}', timeout=1)",
    ],
)
async def test_there_is_no_network(code: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.01)
        done = await run(code.format(port=server.getsockname()[1]))
        with pytest.raises(TimeoutError):
            server.accept()
    assert done.exit_code == 1
    assert "Operation not permitted" in done.stderr


@pytest.mark.parametrize(
    "folder", ["/", "/usr", "/tmp", "{prefix}", "{tests}", "/dev/shm", "/proc"]
)
async def test_nothing_can_be_written_but_its_own_folder(folder: str) -> None:
    folder = folder.format(prefix=sys.base_prefix, tests=Path(__file__).parent)
    done = await run(f"open('{folder}/written-by-a-model', 'w')")
    assert done.exit_code == 1
    assert "Read-only file system" in done.stderr or "No such file" in done.stderr
    assert not (Path(folder) / "written-by-a-model").exists()


async def test_its_own_folder_is_bounded_and_gone_afterwards() -> None:
    code = (
        "import os\nprint(os.listdir())\nfor i in range(99): open(str(i), 'wb').write(bytes(10**5))"
    )
    for _ in range(2):
        done = await run(code, folder_bytes=1 << 20)
        assert done.stdout == "['main.py']\n"
        assert "No space left on device" in done.stderr


async def test_no_secret_of_this_process_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "canary-of-the-hub")
    (secret := tmp_path / "secret").write_text("canary-in-a-file")
    with secret.open() as held:
        os.set_inheritable(held.fileno(), True)
        done = await run(f"""
import os
print(dict(os.environ), os.listdir('/'))
for path in ({str(secret)!r}, '/proc/1/environ', '/proc/self/environ', '/etc/passwd', '/dev/null', '/home'):
    print(path, os.path.exists(path))
for fd in range(64):
    try: print('open', fd, os.read(fd, 100))
    except OSError: pass
""")
    assert done.exit_code == 0, done.stderr
    assert "canary" not in done.stdout
    assert "True" not in done.stdout
    assert "PYTHONHASHSEED" in done.stdout
    assert done.stdout.count("open") == 3  # stdin, and what it has written itself


async def test_it_has_no_privileges_and_no_way_to_any() -> None:
    done = await run("""
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
for name, *arguments in (('unshare', 0x10000000), ('mount', b'a', b'/work', b'tmpfs', 0, b''),
    ('ptrace', 0, 0, 0, 0), ('chroot', b'/work'), ('setuid', 0), ('sethostname', b'x', 1),
    ('syscall', 250, 0, 0), ('syscall', 56, 0x10000011, 0, 0, 0, 0), ('syscall', 425, 8, bytes(120))):
    print(name, getattr(libc, name)(*arguments))
print(os.getuid(), libc.prctl(39, 0, 0, 0, 0))
""")
    *calls, last = done.stdout.splitlines()
    assert len(calls) == 9, done
    assert all(call.endswith(" -1") for call in calls), done.stdout
    assert last == "65534 1"  # nobody, and no new privileges


async def test_it_can_not_take_the_open_files_of_its_init() -> None:
    """In one of them init reports how the code has ended."""
    done = await run("""
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
init = libc.syscall(434, 1, 0)  # pidfd_open
taken = [libc.syscall(438, init, fd, 0) for fd in range(20)]  # pidfd_getfd
for fd in taken:
    if fd >= 0: os.write(fd, b'error forged by a model\\n')
print(set(taken))
""")
    assert (done.exit_code, done.stdout) == (0, "{-1}\n")


async def test_a_bomb_of_forks_stops_at_the_limit() -> None:
    done = await run("import os\nwhile True: os.fork()", max_processes=8, deadline_s=2)
    assert "Resource temporarily unavailable" in done.stderr
    assert not inside()


async def test_it_gets_no_more_memory_than_its_limit() -> None:
    done = await run("x = bytearray(1 << 30)", memory_bytes=1 << 28)
    assert "MemoryError" in done.stderr


SEGMENTS = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
libc.shmat.restype, libc.shmdt.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
kept, size = 0, 64 << 20
for _ in range(8):
    segment = libc.shmget(0, size, 0o1600)
    at = libc.shmat(segment, None, 0) if segment >= 0 else None
    if at in (None, 2**64 - 1):
        break
    ctypes.memset(at, 1, size)
    libc.shmdt(at)
    kept += size
print(kept >> 20)
"""


async def test_no_memory_is_kept_beside_that_of_its_processes() -> None:
    done = await run(SEGMENTS, memory_bytes=1 << 28)
    assert done.stdout == "0\n", done.stderr
    for call in ("os.memfd_create('x')", "ctypes.CDLL(None).mq_open(b'/x', 66, 0o600, None)"):
        done = await run(f"import ctypes, os\nassert {call} < 0")
        assert done.exit_code == 0 or "Operation not permitted" in done.stderr


@pytest.mark.parametrize(
    "code",
    [
        "import asyncio\nasync def f(): return 3\nprint(asyncio.run(f()))",
        "import subprocess as s\nprint(s.run(['/bin/echo', '3'], capture_output=True, text=True).stdout)",
        "import threading, queue\nq = queue.Queue()\nthreading.Thread(target=q.put, args=(3,)).start()"
        "\nprint(q.get())",
        "import tempfile\nwith tempfile.TemporaryFile('w+', dir='.') as f: print(f.write('abc'))",
        "import sqlite3\nprint(sqlite3.connect('a.db').execute('select 3').fetchone()[0])",
    ],
)
async def test_what_programs_do_still_works(code: str) -> None:
    done = await run(code)
    assert done.stdout.strip() == "3", done.stderr


async def test_pairs_of_sockets_are_of_this_machine_only() -> None:
    code = "import socket\nfor family in range(2, 46):\n  try: socket.socketpair(family); print(family)\n"
    done = await run(code + "  except PermissionError: pass")
    assert (done.exit_code, done.stdout) == (0, ""), done.stderr


@pytest.mark.parametrize("code", ["while True: pass", "import time; time.sleep(99)"])
async def test_what_does_not_end_is_ended_at_the_deadline(code: str) -> None:
    deaf = "import signal\nfor n in (1, 2, 15): signal.signal(n, lambda *_: 0)\n"
    started = time.perf_counter()
    done = await run(deaf + code, deadline_s=0.5)
    assert done.timed_out
    assert time.perf_counter() - started < 3
    assert not inside()


async def test_time_of_the_cpu_has_a_limit_too() -> None:
    done = await run("while True: pass", cpu_s=1, deadline_s=20)
    assert not done.timed_out
    assert done.exit_code in (-24, -9)  # SIGXCPU


@pytest.mark.parametrize("ends", ["", "while True: pass"])
async def test_a_grandchild_does_not_outlive_it(ends: str) -> None:
    code = "import os, time\nfor _ in range(2):\n  if os.fork() == 0: os.setsid(); time.sleep(99)\n"
    done = await run(code + ends, deadline_s=1)
    assert done.timed_out == bool(ends)
    assert not inside()


async def test_output_without_end_is_cut() -> None:
    done = await run("while True: print('x' * 1000)", file_bytes=10_000)
    assert done.truncated
    assert len(done.stdout) == 10_000
    assert "File too large" in done.stderr


async def test_a_cancelled_call_leaves_nothing_behind() -> None:
    call = asyncio.create_task(run("import time; time.sleep(99)", deadline_s=60))
    while not inside():
        await asyncio.sleep(0.01)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await _none_inside()


STARTS_ONE = """
import asyncio
from reward_service.sandbox import SandboxLimits, run_python
asyncio.run(run_python("import time; time.sleep(99)", limits=SandboxLimits(deadline_s=60)))
"""


async def test_it_ends_with_the_process_that_asked_for_it() -> None:
    asking = subprocess.Popen([sys.executable, "-c", STARTS_ONE], cwd=ROOT)
    while not inside():
        await asyncio.sleep(0.01)
    asking.kill()
    asking.wait(5)
    await _none_inside()


async def _none_inside() -> None:
    deadline = time.monotonic() + 5
    while inside():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    "step", ["isolate", "_new_root", "confine", "_filter_system_calls", "start"]
)
async def test_where_a_step_can_not_be_taken_nothing_runs(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = sandbox.CHILD.read_text()
    refuse = (
        f"def {step}(*_):\n    raise Refused('a new network namespace: Operation not permitted')\n"
    )
    child = tmp_path / "child.py"
    child.write_text(
        source.replace('if __name__ == "__main__"', refuse + 'if __name__ == "__main__"')
    )
    monkeypatch.setattr(sandbox, "CHILD", child)
    require_isolation.cache_clear()
    with pytest.raises(
        IsolationMissing, match="network namespace: Operation not permitted"
    ) as refused:
        await run("print('it ran')")
    require_isolation.cache_clear()
    assert "\n" not in str(refused.value)
    assert "user.max_user_namespaces" in str(refused.value)


async def test_on_another_system_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox.platform, "machine", lambda: "riscv64")
    with pytest.raises(IsolationMissing, match="riscv64"):
        await run("print('it ran')")


async def test_a_reward_function_scores_programs_by_what_they_print() -> None:
    programs = ["print(sum(map(int, input().split())))", "print(7)", "print(7", "print(7); exit(1)"]
    cases = {"cases": [["3 4\n", "7\n"], ["1 1\n", "2\n"]]}
    requests = [
        ScoreRequest(f"t{i}", "Add.", program, (2,), (3, 1), "stop", metadata=cases)
        for i, program in enumerate(programs)
    ]
    scorer = FunctionScorer("examples.code_reward.rewards:passed_cases")
    scores = [result.score for result in check_results(requests, await scorer.score(requests))]  # type: ignore[union-attr]
    assert scores == [1.0, 0.5, 0.0, 0.0]


ASKS = """
import asyncio, os
from reward_service.sandbox import run_python
done = asyncio.run(run_python("import os\\nprint(os.getuid(), os.listdir('/work'))"))
print(os.getuid(), done.stdout)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="then all the others show it")
def test_it_takes_no_root() -> None:
    python = "/usr/bin/python3.11"  # this one may be in root's own folder
    if not Path(python).exists():
        pytest.skip(f"no {python}")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        shutil.copytree(ROOT / "reward_service", Path(folder) / "reward_service")
        done = subprocess.run(
            [python, "-c", ASKS], cwd=folder, user=1234, group=1234, extra_groups=[],
            capture_output=True, text=True, timeout=30,
        )  # fmt: skip
    assert done.stdout.split() == ["1234", "65534", "['main.py']"], done.stderr
