"""What no source file may contain: ways to run what it was given, and waits that need not end.

Both are read from the syntax trees. A place that must break a rule stands below, by file and function,
with the reason; one that no longer breaks it must go from the list.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.test_import_layers import ROOT, SOURCES, parsed

# ---- where a rule may be broken, and why

RUNS_WHAT_IT_IS_GIVEN = {
    "cluster/fork_client.py:main": "Python itself, as Ray would have run it",
    "cluster/fork_server.py:_import": "its own list of modules",
    "cluster/fork_server.py:_become": "the script that Ray starts its workers with",
    "learner/checkpoint.py:load": "cluster/ppo.py has verified digests and run_id",
    "learner/hf_folder.py:export_checkpoint": "cluster/export.py has verified the digests",
    "reward_service/sandbox_child.py:start": "code that a model wrote, isolated by then",
    "reward_service/rules.py:load_function": "the user's own reward function, named in the config",
}

# "asked": runs inside an actor for a caller that asked through placement.ask, which has a deadline.
WAITS = {
    "actors/generator.py:Generator.receive_weights": "asked; the engine thread settles every future",
    "actors/generator.py:Generator._call": "asked; the engine thread settles every future",
    "actors/generator.py:Generator.close": "the thread is joined for 10 s",
    "actors/engine_thread.py:EngineThread._take_inbox": "the idle engine; close() puts something in",
    "actors/engine_thread.py:EngineThread._refuse_all": "the dead engine; close() puts something in",
    "actors/rollout_worker.py:RolloutWorker.sample": "asked; futures of the engine thread",
    "actors/rollout_worker.py:RolloutWorker._gather": "the supervisor's rollout_timeout_s",
    "actors/rollout_worker.py:RolloutWorker._roll_out": "the supervisor's rollout_timeout_s",
    "actors/rollout_worker.py:RolloutWorker._cancel": "tasks that were cancelled",
    "actors/vllm_engine.py:_single_process_group": "a group of one waits for nobody",
    "learner/process_group.py:_store": "a FileStore is told it by set_timeout",
    "actors/weight_swap.py:WeightSwap.apply": "threads that pack matrices in memory",
    "reward_service/http_scorer.py:HttpScorer._post": "the session's total timeout, timeout_s",
    "reward_service/http_scorer.py:HttpScorer._read": "the session's total timeout, timeout_s",
    "reward_service/reward_model.py:RewardModelScorer.score": "the service's deadline_s",
    "reward_service/sandbox_child.py:start": "end_by ends init at the deadline",
    "reward_service/rules.py:FunctionScorer._call": "the service's deadline_s",
    "reward_service/rules.py:_in_daemon_thread": "the service's deadline_s",
    "reward_service/service.py:RewardService.score": "every batch is settled within deadline_s",
    "reward_service/service.py:RewardService.close": "tasks that were cancelled",
    "cluster/fork_server.py:_serve": "a client is there, and the server ends with its driver",
    "cluster/roster.py:Roster._changed": "raced against a poll with a deadline",
    "cluster/generator_group.py:GeneratorGroup._proof.tell": "the learner was asked with a deadline",
    "cluster/generator_group.py:GeneratorGroup.or_lost": "awaits a question, which has a deadline",
    "cluster/generator_group.py:GeneratorGroup.push": "held during questions with deadlines",
    "cluster/generator_group.py:GeneratorGroup.bring_up": "held during questions with deadlines",
    "cluster/replacements.py:Replacements.dismiss": "held during questions with deadlines",
    "cluster/replacements.py:Replacements._kill_started": "what is done is asked for its result",
    "cluster/replacements.py:Replacements._start": "Host.start waits for a place for 60 s",
    "cluster/placement.py:_answer": "only what is done is asked for its result",
    "cluster/placement.py:_settle": "_answer awaits it, with the deadline",
    "cluster/restarts.py:run_again": "a run takes as long as it does; without heartbeat it is killed",
    "cluster/roles.py:_awaiting.score": "RewardClient awaits it, within deadline_s",
    "cluster/submit.py:_follow": "a person reads the log, and can leave",
    "cluster/run.py:Run.wait_checkpoint": "the learner's answers and the commit have deadlines",
    "cluster/run.py:Run.forget_checkpoint": "a task that was cancelled; a commit has a deadline",
    "cluster/polling.py:Poller.until_lost": "the poll has a deadline",
    "cluster/watched.py:Watched.wait": "collectors fail within rollout_timeout_s",
    "cluster/supervisor.py:Supervisor.wait_push": "a push is questions, each with a deadline",
    "cluster/supervisor.py:Supervisor.scale": "generators come up by questions, each with a deadline",
    "cluster/supervisor.py:Supervisor.close": "tasks that were cancelled",
}


class Finding(NamedTuple):
    where: str  # the function within the file
    line: int
    what: str


class Walker(ast.NodeVisitor):
    """Visits a tree knowing in which function it is and what its names were imported as."""

    def __init__(self) -> None:
        self.found: list[Finding] = []
        self._scope: list[str] = []
        self._functions: list[ast.AST] = []
        self._imported: dict[str, str] = {}

    def report(self, node: ast.AST, what: str) -> None:
        self.found.append(Finding(".".join(self._scope), getattr(node, "lineno", 0), what))

    def name(self, node: ast.expr) -> str:
        """`system(...)` after `from os import system` -> "os.system"; "?.x" of what has no name."""
        parts: list[str] = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        first = self._imported.get(node.id, node.id) if isinstance(node, ast.Name) else "?"
        return ".".join([first, *reversed(parts)])

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            if alias.asname:
                self._imported[alias.asname] = alias.name

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        for alias in node.names:
            self._imported[alias.asname or alias.name] = f"{node.module}.{alias.name}"

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._within(node, node.name)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._within(node, node.name)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
        self._within(node, node.name)

    def _within(self, node: ast.AST, name: str) -> None:
        self._scope.append(name)
        self._functions.append(node)
        self.generic_visit(node)
        self._functions.pop()
        self._scope.pop()


def keywords(call: ast.Call) -> dict[str | None, ast.expr]:
    return {keyword.arg: keyword.value for keyword in call.keywords}


def is_literal(node: ast.expr | None, *values: object) -> bool:
    return isinstance(node, ast.Constant) and any(node.value is value for value in values)


def not_allowed(path: Path, found: list[Finding], allowed: dict[str, str]) -> list[Finding]:
    file = str(path.relative_to(ROOT))
    return [finding for finding in found if f"{file}:{finding.where}" not in allowed]


def not_needed(found: dict[str, list[Finding]], allowed: dict[str, str]) -> set[str]:
    """Entries of an allow-list for places that break no rule."""
    places = {f"{file}:{finding.where}" for file, each in found.items() for finding in each}
    return set(allowed) - places


by_path = pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))


# ---- nothing that was given is run

NO = ast.Constant(False)
PICKLERS = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "jsonpickle"}
RUNNERS = {
    "eval", "exec", "compile", "builtins.eval", "builtins.exec", "builtins.compile", "__import__",
    "importlib.import_module", "os.system", "os.popen", "os.execv", "os.execve", "os.execvp",
    "os.execvpe", "os.execl", "os.execle", "os.execlp", "os.posix_spawn", "os.posix_spawnp",
    "runpy.run_path", "runpy.run_module",
    "yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "pandas.read_pickle",
    "torch.hub.load", "torch.distributed.checkpoint.load",
}  # fmt: skip


class Dangers(Walker):
    def visit_Import(self, node: ast.Import) -> None:
        super().visit_Import(node)
        self._modules(node, *(alias.name for alias in node.names))

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        super().visit_ImportFrom(node)
        self._modules(node, str(node.module))

    def _modules(self, node: ast.AST, *names: str) -> None:
        for name in names:
            if name.split(".")[0] in PICKLERS:
                self.report(node, f"imports {name}")

    def visit_Call(self, node: ast.Call) -> None:
        name, given = self.name(node.func), keywords(node)
        if name in RUNNERS:
            self.report(node, f"calls {name}")
        if "shell" in given and not is_literal(given["shell"], False):
            self.report(node, "starts a shell")
        if name == "torch.load" and not is_literal(given.get("weights_only"), True):
            self.report(node, "torch.load of anything but weights")
        if name == "numpy.load" and not is_literal(given.get("allow_pickle", NO), False):
            self.report(node, "numpy.load of pickles")
        if "trust_remote_code" in given and not is_literal(given["trust_remote_code"], False):
            self.report(node, "trusts remote code")
        self._weights(node, name, given)
        self.generic_visit(node)

    def _weights(self, node: ast.Call, name: str, given: dict[str | None, ast.expr]) -> None:
        """transformers falls back to pickled weights, vLLM too, unless told not to."""
        loader, _, method = name.rpartition(".")
        loads = loader.startswith("transformers.Auto") and method == "from_pretrained"
        if loads and "trust_remote_code" not in given:  # it would ask at the terminal
            self.report(node, "loads without trust_remote_code=False")
        if loads and "AutoModel" in loader and not is_literal(given.get("use_safetensors"), True):
            self.report(node, "loads a model without use_safetensors=True")
        if name.endswith(".EngineArgs"):
            form = given.get("load_format")
            if not isinstance(form, ast.Constant) or form.value != "safetensors":
                self.report(node, 'starts an engine without load_format="safetensors"')

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str) and "ALLOW_INSECURE_SERIALIZATION" in node.value:
            self.report(node, "names VLLM_ALLOW_INSECURE_SERIALIZATION")

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        may_be_true = ast.unparse(node.annotation) != "Literal[False]"
        if getattr(node.target, "id", "") == "trust_remote_code" and may_be_true:
            self.report(node, "lets trust_remote_code be true")
        self.generic_visit(node)


def dangers(tree: ast.Module) -> list[Finding]:
    walker = Dangers()
    walker.visit(tree)
    return walker.found


@by_path
def test_no_source_runs_unpickles_or_trusts_what_it_is_given(path: Path) -> None:
    assert not not_allowed(path, dangers(parsed(path)), RUNS_WHAT_IT_IS_GIVEN)


def test_the_exceptions_to_that_are_those_that_are_needed() -> None:
    found = {str(path.relative_to(ROOT)): dangers(parsed(path)) for path in SOURCES}
    assert not not_needed(found, RUNS_WHAT_IT_IS_GIVEN)


@pytest.mark.parametrize(
    "source",
    [
        "eval('1')",
        "exec(text)",
        "def f():\n    return compile(text, '', 'exec')",
        "import builtins\nbuiltins.eval('1')",
        "import pickle",
        "import cloudpickle as cp",
        "from marshal import loads",
        "from dill import loads",
        "import os\nos.system(x)",
        "from os import system\nsystem(x)",
        "import os\nos.execve(python, words, {})",
        "from os import system as run\nrun(x)",
        "subprocess.run(x, shell=True)",
        "subprocess.run(x, shell=config.shell)",
        "import torch\ntorch.load(p)",
        "from torch import load\nload(p)",
        "torch.load(p, weights_only=False)",
        "import torch.distributed.checkpoint as dcp\ndcp.load(state)",
        "import yaml\nyaml.load(text, yaml.Loader)",
        "import yaml as y\ny.unsafe_load(text)",
        "import numpy as np\nnp.load(p, allow_pickle=True)",
        "import importlib\nimportlib.import_module(text)",
        "EngineArgs(load_format='safetensors', trust_remote_code=True)",
        "EngineArgs(load_format='safetensors', trust_remote_code=config.trust)",
        "from vllm import EngineArgs\nEngineArgs(model=m)",
        "from vllm import EngineArgs\nEngineArgs(model=m, load_format='auto')",
        "from transformers import AutoModel\nAutoModel.from_pretrained(p, trust_remote_code=False)",
        "from transformers import AutoModel\nAutoModel.from_pretrained(p, use_safetensors=True)",
        "import transformers\ntransformers.AutoTokenizer.from_pretrained(p)",
        "from transformers import AutoModelForCausalLM as M\nM.from_pretrained(p, use_safetensors=x)",
        "env['VLLM_ALLOW_INSECURE_SERIALIZATION'] = '1'",
        "class C:\n    trust_remote_code: bool = False",
    ],
)
def test_each_danger_is_found(source: str) -> None:
    assert dangers(ast.parse(source))


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "f(x).eval()",
        "torch.load(p, weights_only=True)",
        "re.compile(x)",
        "yaml.safe_load(text)",
        "subprocess.run([x], shell=False)",
        "json.load(file)",
        "import numpy as np\nnp.load(p)",
        "from transformers import AutoModel\nAutoModel.from_config(c)",
        "from transformers import AutoConfig\nAutoConfig.from_pretrained(p, trust_remote_code=False)",
        "class C:\n    trust_remote_code: Literal[False] = False",
    ],
)
def test_the_harmless_is_left_alone(source: str) -> None:
    assert not dangers(ast.parse(source))


# ---- every wait ends
#
# A wait is bare if nothing in it says when it ends:
#   - a call of one of BLOCKING without a bound: no argument but True, False or None;
#   - a call of one of NEEDS_TIMEOUT without timeout=. (Collectives have their process group's.)
#   - `with ThreadPoolExecutor`, whose end waits for its threads;
#   - `async for`, `async with`;
#   - `await` of anything but: one of SHORT; asyncio.wait_for; asyncio.wait with timeout=; a call of a
#     coroutine of these packages, by name (it is checked where it stands); several of these gathered,
#     in a list, or under a name that the function gave them. So `await` of a future, a task or a
#     `.remote()` is bare: placement.ask is the way.
# Nothing is bare under asyncio.wait_for, asyncio.timeout or asyncio.timeout_at.

BLOCKING = {"wait", "join", "get", "acquire", "result", "communicate", "recv", "accept"}
NEEDS_TIMEOUT = {
    "ray.get", "ray.wait", "_ray.get", "_ray.wait", "asyncio.wait", "asyncio.as_completed",
    "futures.wait", "futures.as_completed", "subprocess.run", "subprocess.call",
    "subprocess.check_call", "subprocess.check_output", "request.urlopen",
    "socket.create_connection", "aiohttp.ClientSession", "distributed.init_process_group",
    "distributed.new_group", "distributed.TCPStore", "distributed.FileStore",
}  # fmt: skip
DEADLINES = ("asyncio.wait_for", "asyncio.timeout", "asyncio.timeout_at")
SHORT = ("asyncio.sleep", "asyncio.create_subprocess_exec")
GATHERING = ("asyncio.gather", "asyncio.create_task", "asyncio.ensure_future", "asyncio.shield")


class Waits(Walker):
    def __init__(self, coroutines: set[str]) -> None:
        super().__init__()
        self._coroutines = coroutines
        self._bounded = 0

    def _within(self, node: ast.AST, name: str) -> None:
        outside, self._bounded = self._bounded, 0  # it runs some other time
        super()._within(node, name)
        self._bounded = outside

    def _bare(self, node: ast.AST, what: str) -> None:
        if not self._bounded:
            self.report(node, what)

    def visit_Call(self, node: ast.Call) -> None:
        name = self.name(node.func)
        self._bounded += (deadline := self._is_deadline(node))
        if name.rpartition(".")[2] in BLOCKING and not _bounds(node) and "." in name:
            self._bare(node, f"{name} without a bound")
        if ".".join(name.split(".")[-2:]) in NEEDS_TIMEOUT and not _has_timeout(node):
            self._bare(node, f"{name} without timeout=")
        self.generic_visit(node)
        self._bounded -= deadline

    def visit_Await(self, node: ast.Await) -> None:
        if not self._ends(node.value):
            self._bare(node, f"await {ast.unparse(node.value)}")
        self.generic_visit(node)

    def visit_AsyncFor(self, node: ast.AsyncFor) -> None:
        self._bare(node, "async for")
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        if node.is_async:
            self._bare(node.iter, "async for")
        self.generic_visit(node)

    def visit_With(self, node: ast.With) -> None:
        made = [i.context_expr.func for i in node.items if isinstance(i.context_expr, ast.Call)]
        if any(self.name(func).endswith("ThreadPoolExecutor") for func in made):
            self._bare(node, "with ThreadPoolExecutor")
        self.generic_visit(node)

    def visit_AsyncWith(self, node: ast.AsyncWith) -> None:
        deadline = any(self._is_deadline(item.context_expr) for item in node.items)
        if not deadline:
            self._bare(node, "async with")
        self._bounded += deadline
        self.generic_visit(node)
        self._bounded -= deadline

    def _is_deadline(self, node: ast.expr) -> bool:
        if isinstance(node, ast.Name):
            return any(self._is_deadline(value) for value in self._assigned(node.id))
        if not isinstance(node, ast.Call) or self.name(node.func) not in DEADLINES:
            return False
        bounds = [*node.args[-1:], *keywords(node).values()]
        return bool(bounds) and not any(is_literal(bound, None) for bound in bounds)

    def _ends(self, node: ast.expr) -> bool:
        match node:
            case ast.Call():
                return self._call_ends(node)
            case ast.Starred() | ast.NamedExpr():
                return self._ends(node.value)
            case ast.ListComp() | ast.GeneratorExp():
                return self._ends(node.elt)
            case ast.IfExp():
                return self._ends(node.body) and self._ends(node.orelse)
            case ast.List() | ast.Tuple():
                return all(self._ends(each) for each in node.elts)
            case ast.Name():
                given = self._assigned(node.id)
                return bool(given) and all(self._ends(value) for value in given)
        return False

    def _call_ends(self, node: ast.Call) -> bool:
        name = self.name(node.func)
        if name in SHORT or self._is_deadline(node):
            return True
        if name == "asyncio.wait":
            return _has_timeout(node)
        if name in GATHERING:
            return all(self._ends(argument) for argument in node.args)
        return name.rpartition(".")[2] in self._coroutines

    def _assigned(self, name: str) -> list[ast.expr]:
        """What the function gives a name."""
        found = []
        for node in ast.walk(self._functions[-1]) if self._functions else ():
            targets = (
                node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            )
            value = getattr(node, "value", None)
            if value is not None and any(getattr(t, "id", None) == name for t in targets):
                found.append(value)
        return found


def _has_timeout(call: ast.Call) -> bool:
    return not is_literal(keywords(call).get("timeout", ast.Constant(None)), None)


def _bounds(call: ast.Call) -> bool:
    return _has_timeout(call) or any(not is_literal(a, True, False, None) for a in call.args)


def coroutines(trees: Iterator[ast.Module]) -> set[str]:
    return {n.name for t in trees for n in ast.walk(t) if isinstance(n, ast.AsyncFunctionDef)}


OURS = coroutines(parsed(path) for path in SOURCES)


def bare_waits(tree: ast.Module) -> list[Finding]:
    walker = Waits(OURS)
    walker.visit(tree)
    return walker.found


@by_path
def test_every_wait_has_a_deadline(path: Path) -> None:
    assert not not_allowed(path, bare_waits(parsed(path)), WAITS)


def test_the_waits_without_one_are_those_that_are_listed() -> None:
    found = {str(path.relative_to(ROOT)): bare_waits(parsed(path)) for path in SOURCES}
    assert not not_needed(found, WAITS)


@pytest.mark.parametrize(
    "body",
    [
        "event.wait()",
        "thread.join()",
        "queue.get()",
        "queue.get(block=True)",
        "queue.get(True)",
        "queue.get(timeout=None)",
        "lock.acquire()",
        "future.result()",
        "future.result(None)",
        "process.communicate()",
        "import ray\n    ray.get(reference)",
        "from ray import get\n    get(reference)",
        "self._ray.get(reference)",
        "ray.wait([reference])",
        "subprocess.run(words)",
        "subprocess.check_output(words, timeout=None)",
        "urllib.request.urlopen(url)",
        "socket.create_connection(address)",
        "aiohttp.ClientSession(headers=headers)",
        "dist.init_process_group('gloo')".replace("dist", "torch.distributed"),
        "import torch.distributed as dist\n    dist.TCPStore(host, port)",
        "with ThreadPoolExecutor(2) as threads:\n        threads.map(f, x)",
        "await future",
        "await task",
        "await self._push",
        "await actor.method.remote()",
        "await asyncio.wait([task])",
        "await asyncio.wait([task], timeout=None)",
        "await asyncio.wait_for(future, None)",
        "await asyncio.gather(*futures)",
        "calls = [actor.method.remote() for actor in actors]\n    await asyncio.gather(*calls)",
        "await asyncio.gather(ask(member, method, within=1), future)",
        "await asyncio.to_thread(work)",
        "await loop.run_in_executor(None, work)",
        "await queue.get()",
        "await event.wait()",
        "async for line in lines:\n        pass",
        "[line async for line in lines]",
        "async with lock:\n        pass",
        "async with asyncio.timeout(None):\n        await future",
        "async with asyncio.timeout(1):\n        pass\n    await future",
        "async with asyncio.timeout(1):\n        async def later():\n            await future",
    ],
)
def test_each_bare_wait_is_found(body: str) -> None:
    assert bare_waits(ast.parse(f"async def function(self):\n    {body}"))


@pytest.mark.parametrize(
    "body",
    [
        "event.wait(1.0)",
        "thread.join(timeout=limit)",
        "queue.get(timeout=1)",
        "values.get('key')",
        "', '.join(words)",
        "ray.get(reference, timeout=5)",
        "subprocess.run(words, timeout=60)",
        "await asyncio.sleep(1)",
        "await ask(member, method, within=5)",
        "await asyncio.wait_for(future, 5)",
        "await asyncio.wait_for(queue.get(), limit)",
        "await asyncio.wait([task], timeout=5)",
        "await asyncio.gather(*(ask(m, m.handle.status, within=5) for m in members))",
        "calls = [ask(m, m.handle.status, within=5) for m in members]\n    await asyncio.gather(*calls)",
        "async with asyncio.timeout(5):\n        await future",
        "limit = asyncio.timeout(5)\n    async with limit:\n        await future",
    ],
)
def test_a_wait_with_a_deadline_is_left_alone(body: str) -> None:
    assert not bare_waits(ast.parse(f"async def function(self):\n    {body}"))
