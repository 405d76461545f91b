"""The process around code that a model wrote: it isolates itself, then starts the code in a child.

    reward service      starts this file with nothing of its own: no environment, no open files
    this process        user nobody if it was root; namespaces; a root folder of its own; limits; filter
     +- init            process 1 of the namespace: when it ends, whatever was started in there ends
         +- python      the code, in a session of its own

Every step is taken, or the code is not started and the report says which one failed. sandbox.py runs this
file by its path, without site-packages: so there is nothing here but the standard library, and of it only
what loads fast.
"""

from __future__ import annotations

import ctypes
import os
import resource
import select
import struct
import sys

NOBODY = 65534
SIGKILL = 9
ROOT = "/tmp"  # where the new root is mounted, before it is the root
OWN_PROCESSES = 2  # this one and init

# ---- what the kernel's headers call it

NEW_NAMESPACES = {
    "user": 0x10000000, "mount": 0x20000, "process": 0x20000000, "network": 0x40000000,
    "ipc": 0x8000000, "host name": 0x4000000, "cgroup": 0x2000000,
}  # fmt: skip
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE = 442, -100, 0x8000
READ_ONLY, NO_SUID, NO_DEVICES = 1, 2, 4
PIVOT_ROOT, MNT_DETACH = 155, 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP = 1, 4, 22
PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 24, 38
CAPSET, CAPABILITY_VERSION_3, LAST_CAPABILITY = 126, 0x20080522, 40

# System calls (x86-64) that code has no use for here: those that kernels had most of their holes in, and
# those that give memory which no limit of a process counts.
DENIED = {
    "socket": 41, "ptrace": 101, "pivot_root": 155, "chroot": 161, "mount": 165, "umount2": 166,
    "add_key": 248, "request_key": 249, "keyctl": 250, "unshare": 272, "perf_event_open": 298,
    "name_to_handle_at": 303, "open_by_handle_at": 304, "setns": 308, "process_vm_readv": 310,
    "process_vm_writev": 311, "bpf": 321, "userfaultfd": 323, "io_uring_setup": 425,
    "open_tree": 428, "move_mount": 429, "fsopen": 430, "fsmount": 432, "pidfd_getfd": 438,
    "mount_setattr": 442, "shmget": 29, "shmat": 30, "shmctl": 31, "shmdt": 67, "semget": 64,
    "semop": 65, "semctl": 66, "semtimedop": 220, "msgget": 68, "msgsnd": 69, "msgrcv": 70,
    "msgctl": 71, "mq_open": 240, "memfd_create": 319,
}  # fmt: skip
CLONE, CLONE3, X32 = 56, 435, 0x40000000
SOCKETPAIR, AF_UNIX = 53, 1  # asyncio starts with a pair of them
EPERM, ENOSYS = 1, 38

libc = ctypes.CDLL(None, use_errno=True)


class Refused(Exception):
    """A part of the isolation that this machine does not give."""


def _check(what: str, result: int) -> None:
    if result < 0:
        raise Refused(f"{what}: {os.strerror(ctypes.get_errno())}")


def isolate(prefix: str, folder_bytes: int) -> None:
    """Leave the machine: what is left of it is this process, Python, /usr, and an empty /work."""
    os.chdir(prefix)  # while root can: its path may lead through a folder that nobody may not enter
    if os.geteuid() == 0:  # the limit of processes does not hold for root
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        _check("prctl", libc.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0))  # or /proc/self would be root's
    user, group = os.geteuid(), os.getegid()
    for name, flag in NEW_NAMESPACES.items():
        _check(f"a new {name} namespace", libc.unshare(flag))
        if name == "user":
            _write("/proc/self/setgroups", b"deny")
            _write("/proc/self/uid_map", b"%d %d 1" % (NOBODY, user))
            _write("/proc/self/gid_map", b"%d %d 1" % (NOBODY, group))
    _new_root(prefix, folder_bytes)


def _new_root(prefix: str, folder_bytes: int) -> None:
    """A root of bind mounts that cannot be written, and one empty folder that can."""
    _mount("none", "/", "", MS_REC | MS_PRIVATE)
    _mount("tmpfs", ROOT, "tmpfs", MS_NOSUID | MS_NODEV, "size=64k,mode=755")
    if not prefix.startswith("/usr/") and prefix != "/usr":
        _bind(".", prefix)
    for path in ("/usr", "/lib", "/lib64", "/bin"):
        if os.path.islink(path):
            os.symlink(os.readlink(path), ROOT + path)
        elif os.path.isdir(path):
            _bind(path, path)
    work = ROOT + "/work"
    os.mkdir(work)
    attributes = struct.pack("QQQQ", READ_ONLY | NO_SUID | NO_DEVICES, 0, 0, 0)
    call = (MOUNT_SETATTR, AT_FDCWD, ROOT.encode(), AT_RECURSIVE, attributes, len(attributes))
    _check("a read-only root", libc.syscall(*call))
    options = f"size={folder_bytes},nr_inodes=1024,mode=700"
    _mount("tmpfs", work, "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, options)
    os.chdir(ROOT)
    _check("a root of its own", libc.syscall(PIVOT_ROOT, b".", b"."))
    _check("leaving the old root", libc.umount2(b".", MNT_DETACH))
    os.chdir("/work")


def _bind(source: str, path: str) -> None:
    os.makedirs(ROOT + path)
    _mount(source, ROOT + path, "", MS_BIND | MS_REC)


def _mount(source: str, at: str, kind: str, flags: int, options: str = "") -> None:
    names = (os.fsencode(source), os.fsencode(at), kind.encode())
    _check(f"mounting {at}", libc.mount(*names, ctypes.c_ulong(flags), options.encode()))


def _write(path: str, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)


def confine(cpu_s: int, memory_bytes: int, file_bytes: int, processes: int, files: int) -> None:
    """Limits, no capabilities, no way to more, and the filter: for this process and all from it."""
    for limit, value in {
        resource.RLIMIT_CPU: cpu_s,
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_FSIZE: file_bytes,
        resource.RLIMIT_NPROC: processes + OWN_PROCESSES,
        resource.RLIMIT_NOFILE: files,
        resource.RLIMIT_CORE: 0,
    }.items():
        resource.setrlimit(limit, (value, value))
    for capability in range(LAST_CAPABILITY + 1):
        _check("dropping capabilities", libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0))
    header = struct.pack("II", CAPABILITY_VERSION_3, 0)
    _check("dropping capabilities", libc.syscall(CAPSET, header, bytes(24)))
    _check("no new privileges", libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    _filter_system_calls()


def _filter_system_calls() -> None:
    load, jump_equal, jump_above, jump_bits, end = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill, refuse = 0x7FFF0000, 0x80000000, 0x00050000  # refuse | errno
    number, architecture, first = 0, 4, 16  # offsets in struct seccomp_data
    program = [
        (load, 0, 0, architecture), (jump_equal, 1, 0, 0xC000003E), (end, 0, 0, kill),
        (load, 0, 0, number), (jump_above, 0, 1, X32), (end, 0, 0, kill),
        # clone3 hides its flags; without it the C library takes clone
        (jump_equal, 0, 1, CLONE3), (end, 0, 0, refuse | ENOSYS),
    ]  # fmt: skip
    for denied in DENIED.values():
        program += [(jump_equal, 0, 1, denied), (end, 0, 0, refuse | EPERM)]
    namespaces = sum(NEW_NAMESPACES.values())
    program += [
        (jump_equal, 0, 4, SOCKETPAIR), (load, 0, 0, first), (jump_equal, 0, 1, AF_UNIX),
        (end, 0, 0, allow), (end, 0, 0, refuse | EPERM),
        (jump_equal, 0, 3, CLONE), (load, 0, 0, first), (jump_bits, 0, 1, namespaces),
        (end, 0, 0, refuse | EPERM), (end, 0, 0, allow),
    ]  # fmt: skip
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *one) for one in program))
    filter_ = struct.pack("HxxxxxxP", len(program), ctypes.addressof(code))
    _check("a system call filter", libc.prctl(PR_SET_SECCOMP, 2, filter_, 0, 0))


def start(python: str, report: int) -> int:
    """Init, and the code's python below it. Returns init's process id."""
    if (init := os.fork()) == 0:
        _check("prctl", libc.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0))
        _check("prctl", libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0))  # until it is another program
        if (code := os.fork()) == 0:
            os.setsid()
            # The same hashes each time: a score must be repeatable.
            words = [python, "-P", "-s", "-S", "-B", "-X", "utf8", "main.py"]
            os.execve(python, words, {"PYTHONHASHSEED": "0", "PATH": "/usr/bin", "HOME": "/work"})
        while (ended := os.wait())[0] != code:
            pass  # an orphan in there
        os.write(report, b"exit %d\n" % os.waitstatus_to_exitcode(ended[1]))
        os._exit(0)
    return init


def end_by(deadline_ms: int, init: int, report: int) -> None:
    """Wait until init is gone, and with it everything that was started in its namespace."""
    ends = select.poll()
    ends.register(os.pidfd_open(init))
    if not ends.poll(deadline_ms):
        os.write(report, b"timeout\n")
        os.kill(init, SIGKILL)
    os.waitpid(init, 0)


def main(python: str, prefix: str, *numbers: str) -> None:
    """`numbers`: two open files, who asks, and the limits of sandbox.py."""
    source, report, asking, deadline_ms, folder_bytes, *limits = map(int, numbers)
    os.set_inheritable(source, False)
    os.set_inheritable(report, False)
    try:
        isolate(prefix, folder_bytes)
        _check("prctl", libc.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0))  # lost with the user before
        if os.getppid() != asking:
            return
        with open(source, "rb") as code:
            _write("main.py", code.read())
        confine(*limits)
        init = start(python, report)
    except (OSError, Refused) as error:
        os.write(report, f"error {error}\n".encode())
        os._exit(1)
    end_by(deadline_ms, init, report)


if __name__ == "__main__":
    main(*sys.argv[1:])
