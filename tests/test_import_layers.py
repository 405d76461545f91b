"""Who imports whom, and what loads what."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = ("reward_service", "actors", "learner", "cluster")  # each imports only those before it
HEAVY = ("torch", "vllm", "ray", "transformers")
BAG_NAMES = {"common", "utils", "util", "helpers", "helper", "misc"}

SOURCES = sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))
by_path = pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def imports(path: Path) -> Iterator[str]:
    """Full names of all imported modules, those inside functions too; relative ones resolved."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write the whole module's name"
            yield str(node.module)


def test_the_check_sees_all_four_packages() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in SOURCES} == set(LAYERS)
    assert len(SOURCES) > 40


@by_path
def test_a_package_imports_only_packages_upstream_of_it(path: Path) -> None:
    own = path.relative_to(ROOT).parts[0]
    downstream = {*LAYERS[LAYERS.index(own) + 1 :], "examples", "tests", "benchmarks"}
    wrong = [name for name in imports(path) if name.split(".")[0] in downstream]
    assert not wrong, f"{own} must not import {wrong}"


@by_path
def test_ray_is_imported_under_cluster_only(path: Path) -> None:
    if path.relative_to(ROOT).parts[0] != "cluster":
        assert "ray" not in {name.split(".")[0] for name in imports(path)}


@pytest.mark.parametrize("layer", LAYERS)
def test_an_init_file_holds_a_docstring_and_nothing_else(layer: str) -> None:
    for path in (ROOT / layer).rglob("__init__.py"):
        body = parsed(path).body
        assert ast.get_docstring(parsed(path)), path
        assert len(body) == 1, path


@by_path
def test_there_is_no_bag_module(path: Path) -> None:
    assert not BAG_NAMES & set(path.relative_to(ROOT).with_suffix("").parts)


LIGHT = [
    *(f"{layer}.config" for layer in LAYERS),
    "actors.trajectory",
    "actors.weight_update",
    "reward_service.api",
    "cluster.ledger",
]


def modules_after(code: str) -> set[str]:
    """The modules that a fresh interpreter holds after `code`."""
    script = f"import sys\n{code}\nprint('LOADED', *sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rsplit("LOADED", 1)[1].split())


def test_configs_and_contracts_load_none_of_the_heavy_libraries() -> None:
    check = "assert not set(%r) & sys.modules.keys(), %r"
    code = "\n".join(f"import {name}\n{check % (HEAVY, name)}" for name in LIGHT)
    assert not modules_after(code) & set(HEAVY)


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["doctor", "--help"]])
def test_the_help_of_the_command_line_loads_none_of_them_either(words: list[str]) -> None:
    code = f"from cluster.cli import main\ntry: main({words!r})\nexcept SystemExit as e: assert not e.code"
    assert not modules_after(code) & set(HEAVY)
