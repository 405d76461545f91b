"""Who imports whom, what loads what, and what no source file may contain."""

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


# ---- what no source may contain


def called_name(call: ast.Call) -> str:
    """`torch.load(...)` -> "torch.load"; "?.load" for a method of something that has no name."""
    parts: list[str] = []
    node = call.func
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id if isinstance(node, ast.Name) else "?", *reversed(parts)])


def is_literal(node: ast.expr, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def dangers(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            module = getattr(node, "module", None)
            for name in [module] if module else [alias.name for alias in node.names]:
                if name.split(".")[0] in ("pickle", "cloudpickle", "dill", "marshal", "shelve"):
                    yield f"imports {name}"
        elif isinstance(node, ast.Call):
            name = called_name(node)
            given = {keyword.arg: keyword.value for keyword in node.keywords}
            if name in ("eval", "exec", "compile", "os.system", "os.popen", "yaml.load"):
                yield f"calls {name}"
            if "shell" in given and not is_literal(given["shell"], False):
                yield "starts a shell"
            if name == "torch.load" and not is_literal(
                given.get("weights_only", ast.Constant(None)), True
            ):
                yield "torch.load of anything but weights"
            if name in ("np.load", "numpy.load") and "allow_pickle" in given:
                yield "numpy.load of pickles"
            if "trust_remote_code" in given and not is_literal(given["trust_remote_code"], False):
                yield "trusts remote code"
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if "ALLOW_INSECURE_SERIALIZATION" in node.value:
                yield "names VLLM_ALLOW_INSECURE_SERIALIZATION"
        elif (
            isinstance(node, ast.AnnAssign)
            and getattr(node.target, "id", "") == "trust_remote_code"
        ) and ast.unparse(node.annotation) != "Literal[False]":
            yield "lets trust_remote_code be true"


@by_path
def test_no_source_evaluates_unpickles_or_trusts(path: Path) -> None:
    found = list(dangers(parsed(path)))
    assert not found, f"{path.relative_to(ROOT)}: {found}"


@pytest.mark.parametrize(
    "source",
    [
        "eval('1')",
        "exec(text)",
        "import pickle",
        "from marshal import loads",
        "subprocess.run(x, shell=True)",
        "torch.load(p)",
        "torch.load(p, weights_only=False)",
        "EngineArgs(trust_remote_code=True)",
        "EngineArgs(trust_remote_code=config.trust)",
        "env['VLLM_ALLOW_INSECURE_SERIALIZATION'] = '1'",
        "class C:\n    trust_remote_code: bool = False",
    ],
)
def test_the_check_finds_each_danger(source: str) -> None:
    assert list(dangers(ast.parse(source)))


@pytest.mark.parametrize(
    "source", ["model.eval()", "f(x).eval()", "torch.load(p, weights_only=True)", "re.compile(x)"]
)
def test_the_check_leaves_the_harmless_alone(source: str) -> None:
    assert not list(dangers(ast.parse(source)))
