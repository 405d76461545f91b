"""What `raylign doctor` prints: the data, the arithmetic of a step, who runs where, and what they take.

Nothing is started. Where `ray_address` names a Ray, it is joined for a moment and asked for its GPUs.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster import json_lines
from cluster.config import BadInput, RunConfig
from cluster.disk import free_bytes
from cluster.doctor import Inputs, longest_sequence
from cluster.fit import available_bytes, host_total
from cluster.gpus import check_gpus, gpu_bytes, gpus_in_words, gpus_of
from cluster.memory import ITEM, Need, checkpoint_bytes, microbatches, needs
from cluster.pace import step_seconds
from cluster.placement import Host
from cluster.ray_host import RayHost
from cluster.redaction import printable
from cluster.shapes import read_shapes
from cluster.versions import versions

WARNING = "WARNING"
Row = tuple[str, str]  # label and text; a label of "" goes on with the one above


def plan(config: RunConfig, inputs: Inputs) -> list[Row]:
    return [
        *_data(config, inputs),
        *_step(config, inputs),
        *_roles(config, inputs),
        *_surroundings(config, inputs),
    ]


def show(rows: Iterable[Row]) -> None:
    """Print it: a table on a terminal, plain lines elsewhere."""
    console = Console(highlight=False)
    if not console.is_terminal:
        for label, text in rows:
            print(printable(f"{label:12}{text}"))
        return
    table = Table(show_header=False, box=None)
    for label, text in rows:
        table.add_row(Text(label, style="bold"), Text(printable(text)))
    console.print(table)


# ---- prompts


def _data(config: RunConfig, inputs: Inputs) -> Iterator[Row]:
    prompts = inputs.prompts
    epochs = config.num_steps * config.prompts_per_step / len(prompts)
    longest = max(len(prompt.ids) for prompt in prompts)
    yield (
        "prompts",
        f"{len(prompts)} ({len(inputs.dropped)} too long and dropped), the longest of {longest} tokens; "
        f"{epochs:.2f} epochs in {config.num_steps} steps",
    )
    texts = {prompt.text for prompt in prompts}
    if twice := len(prompts) - len(texts):
        yield (
            "",
            f"WARNING: {twice} have the text of another one: they are trained that much more often",
        )
    if seen := sum(prompt.text in texts for prompt in inputs.held_out):
        held_out = len(inputs.held_out)
        yield (
            "",
            f"WARNING: {seen} of {held_out} held-out prompts are trained on: they test nothing",
        )
    if inputs.tokenizer.chat_template is not None and "messages" not in _columns(
        config.prompts.path
    ):
        yield "", "plain text, without the policy's chat template: a column messages would use it"


def _columns(path: str) -> list[str]:
    if path.endswith(".parquet"):
        return pq.read_schema(path).names
    with open(path, encoding="utf-8") as file:
        return list(json.loads(next(line for line in file if line.strip())))


# ---- a step


def _step(config: RunConfig, inputs: Inputs) -> Iterator[Row]:
    ppo, longest = config.ppo, longest_sequence(config, inputs)
    steps = ppo.epochs * ppo.minibatches
    yield (
        "step",
        f"{config.prompts_per_step} prompts x {config.sampling.samples_per_prompt} = "
        f"{config.batch_size} trajectories; {ppo.epochs} epochs x {ppo.minibatches} minibatches "
        f"of {config.batch_size // ppo.minibatches}; microbatches of one on a rank: at most "
        f"{microbatches(config, longest)}",
    )
    yield "", f"{steps} optimizer steps a step, {steps * config.num_steps:,} in the run"
    staleness = config.max_staleness
    mode = f"asynchronous, staleness at most {staleness}" if staleness else "synchronous"
    flying = (1 + staleness) * config.prompts_per_step
    yield "mode", f"{mode}; up to {flying} prompts in flight; anchor {ppo.anchor}"
    yield "time", _time(config, inputs)


def _time(config: RunConfig, inputs: Inputs) -> str:
    """Time of a step: from an earlier run of that name, if there is one, else a rough estimate, if any."""
    took = list(_step_seconds(config.run_dir / "metrics.jsonl"))
    if took:
        step_s, by = statistics.median(took), "a step in the earlier run of this name"
    elif config.device == "cuda" or (shapes := read_shapes(config)) is None:
        what = (
            "GPUs are not measured" if config.device == "cuda" else "the model's form is not known"
        )
        return f"not known: there is no earlier run of this name, and {what}"
    else:
        step_s = step_seconds(config, inputs, shapes)
        by = (
            "a step at the very least (a rough estimate: products of matrices alone, at this machine's "
            "rate, completions of max_tokens; tiny models take several times that)"
        )
    whole = step_s * config.num_steps / 60
    return f"{step_s:.2f} s {by}: {whole:,.1f} min for {config.num_steps}"


def _step_seconds(path: Path) -> Iterator[float]:
    with contextlib.suppress(ValueError):  # of a run that is damaged nothing is known
        for row in json_lines.read(path):
            if "time/step_s" in row:
                yield float(row["time/step_s"])


# ---- roles


def _roles(config: RunConfig, inputs: Inputs) -> Iterator[Row]:
    shapes = read_shapes(config)
    found = needs(config, shapes, longest_sequence(config, inputs)) if shapes is not None else []
    by_role = {need.role: need for need in found}
    for role, text in _who(config).items():
        need = by_role.get(role)
        yield (
            role,
            f"{text}; {_each(need) if need else 'memory not known for a model of this form'}",
        )
    if found:
        total, has = _gib(host_total(found)), _gib(available_bytes())
        yield "memory", f"about {total} of this machine together, of {has} available"
    if inputs.too_little_memory:
        yield "", f"WARNING: {inputs.too_little_memory}"


def _who(config: RunConfig) -> dict[str, str]:
    """Role -> how many and on what."""
    generators, learner, device = config.generators, config.learner, config.device
    who = {
        "driver": "1, with Ray's own processes",
        "generators": f"{generators.count} x vLLM on {generators.tensor_parallel_size} {device} each, "
        f"{generators.dtype}, {generators.max_num_seqs} completions together",
        "learner": f"{learner.ranks} x FSDP on {device}, {learner.dtype}",
        "reward": f"1 x {config.reward.scorer.kind} on {_place(config, config.reward.num_gpus)}",
    }
    if config.judge is not None:
        who["judge"] = f"1 x {config.judge.scorer.kind} on cpu"
    return who


def _place(config: RunConfig, num_gpus: float) -> str:
    return f"{num_gpus:g} cuda" if config.device == "cuda" and num_gpus else "cpu"


def _each(need: Need) -> str:
    places = [(need.device, need.device_bytes, " of its GPU"), (need.host, need.host_bytes, "")]
    return "about " + " and ".join(
        f"{_gib(total)}{where} each ({_parts(parts)})" for parts, total, where in places if parts
    )


def _parts(parts: Mapping[str, int]) -> str:
    """The larger ones, largest first."""
    largest = sorted(parts.items(), key=lambda part: -part[1])
    shown = [f"{name} {_gib(size)}" for name, size in largest if size >= 0.02 * sum(parts.values())]
    return ", ".join(shown)


# ---- machine, cluster, disk


def _surroundings(config: RunConfig, inputs: Inputs) -> Iterator[Row]:
    if (config.run_dir / "config.yaml").exists():
        yield (
            "run",
            f"{WARNING}: {config.run_dir} is there already: --resume goes on with it, --overwrite deletes it",
        )
    push = inputs.num_parameters * ITEM[config.generators.dtype]
    yield "push", f"{push / 2**20:,.1f} MiB of weights a step, {config.generators.weight_push}"
    saved = checkpoint_bytes(config, inputs.num_parameters) / 2**20
    yield (
        "disk",
        f"{_gib(free_bytes(config.run_dir))} free for {config.run_dir}; a checkpoint takes about "
        f"{saved:,.0f} MiB, {config.checkpoint.keep} are kept",
    )
    yield "machine", f"{os.cpu_count()} cores, {_gib(_memory())}"
    yield "versions", ", ".join(f"{name} {version}" for name, version in versions().items())


def resources(config: RunConfig, join: Callable[[str, str], Host] = RayHost) -> Row:
    """The GPUs asked for and there; BadInput if a cluster that answers has too few."""
    address, wanted = config.ray_address or os.environ.get("RAY_ADDRESS"), gpus_of(config)
    asked = gpus_in_words(wanted) if wanted else "no GPU"
    if address is None:
        if not wanted:
            return "resources", f"{asked}; a Ray of its own is started here"
        here = len(gpu_bytes())
        short = (
            f"{WARNING}: too few for a run on this machine: " if here < sum(wanted.values()) else ""
        )
        return (
            "resources",
            f"{short}{asked}, this machine has {here}; a Ray of its own is started here",
        )
    try:
        host = join(address, "raylign-doctor")
    except (BadInput, OSError, RuntimeError) as error:
        return "resources", f"{asked}; the Ray at {address} could not be asked ({error})"
    try:
        check_gpus(wanted, host.num_gpus)
        return "resources", f"{asked}; the Ray at {address} has {host.num_gpus():g} GPUs"
    finally:
        host.close()


def _memory() -> int:
    import psutil

    return psutil.virtual_memory().total


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.2f} GiB"
