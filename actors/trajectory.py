"""The trajectory: what one rollout yields, and its Arrow schema.

Prompt -> Completion -> Trajectory; each is complete when it is made. Arrow checks neither null-ness
nor equal list lengths, so `Trajectory.__post_init__` does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import pyarrow as pa

SCHEMA_VERSION = "1"

Key = tuple[str, int]  # prompt_id, epoch: what is leased, finished and consumed as one

TRAJECTORY_SCHEMA = pa.schema(
    [
        pa.field("trajectory_id", pa.string(), nullable=False),
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("sample_index", pa.int32(), nullable=False),
        pa.field("epoch", pa.int32(), nullable=False),
        pa.field("prompt_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("completion_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("behavior_logprobs", pa.list_(pa.float32()), nullable=False),
        pa.field("policy_version", pa.int64(), nullable=False),
        pa.field("policy_version_max", pa.int64(), nullable=False),
        pa.field(
            "version_spans",
            pa.list_(pa.struct([("version", pa.int64()), ("start", pa.int32())])),
            nullable=False,
        ),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("completion", pa.string(), nullable=False),
        pa.field("finish_reason", pa.string(), nullable=False),
        pa.field("score", pa.float64(), nullable=False),
        pa.field("score_parts", pa.map_(pa.string(), pa.float64()), nullable=False),
        pa.field("temperature", pa.float32(), nullable=False),
        pa.field("generator_id", pa.string(), nullable=False),
        pa.field("generated_at", pa.float64(), nullable=False),
        pa.field("generate_s", pa.float32(), nullable=False),
        pa.field("score_s", pa.float32(), nullable=False),
    ],
    metadata={"schema_version": SCHEMA_VERSION},
)


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt to be rolled out `samples_per_prompt` times.

    Example: Prompt("p12", 0, "37+5=", (40, 44, 12, 42, 30), "42", {})
    """

    prompt_id: str
    epoch: int
    text: str
    ids: tuple[int, ...]
    answer: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    # Role and content, where the data has it as a conversation.
    messages: Sequence[Mapping[str, str]] | None = None

    @property
    def key(self) -> Key:
        return self.prompt_id, self.epoch

    def of_epoch(self, epoch: int) -> Prompt:
        """The same prompt, to be rolled out in another epoch."""
        if epoch == self.epoch:
            return self
        given = (self.text, self.ids, self.answer, self.metadata, self.messages)
        return Prompt(self.prompt_id, epoch, *given)


@dataclass(frozen=True, slots=True)
class Completion:
    """What an engine sampled for a prompt. `spans` are (version, index of its first token)."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]  # of the sampled tokens, at the sampling temperature
    text: str  # without the end-of-sequence token
    finish_reason: str
    spans: tuple[tuple[int, int], ...]
    generate_s: float


@dataclass(frozen=True, slots=True)
class Trajectory:
    """A scored completion; one row of TRAJECTORY_SCHEMA, same names and order."""

    trajectory_id: str
    prompt_id: str
    sample_index: int
    epoch: int
    prompt_ids: Sequence[int]
    completion_ids: Sequence[int]
    behavior_logprobs: Sequence[float]
    policy_version: int  # of the first token
    policy_version_max: int  # of the last token
    version_spans: Sequence[tuple[int, int]]
    prompt: str
    completion: str
    finish_reason: str
    score: float
    score_parts: Mapping[str, float]
    temperature: float
    generator_id: str
    generated_at: float  # unix time
    generate_s: float
    score_s: float

    def __post_init__(self) -> None:
        def refuse(what: str) -> None:
            raise ValueError(f"trajectory {self.trajectory_id}: {what}")

        if not self.prompt_ids or not self.completion_ids:
            refuse("prompt and completion need at least one token each")
        if len(self.behavior_logprobs) != len(self.completion_ids):
            refuse(f"{len(self.behavior_logprobs)} logprobs for {len(self.completion_ids)} tokens")
        if not math.isfinite(self.score):
            refuse(f"score is {self.score}")
        if not all(math.isfinite(x) and x <= 1e-6 for x in self.behavior_logprobs):
            refuse("a behavior logprob is not finite or above 0")
        versions = [version for version, _ in self.version_spans]
        starts = [start for _, start in self.version_spans]
        if (
            not starts
            or starts[0] != 0
            or starts != sorted(set(starts))
            or starts[-1] >= len(self.completion_ids)
        ):
            refuse(f"version spans {list(self.version_spans)} do not cover the completion")
        if versions != sorted(versions) or (versions[0], versions[-1]) != (
            self.policy_version,
            self.policy_version_max,
        ):
            refuse(f"version spans {list(self.version_spans)} contradict the policy versions")


def trajectory_id(prompt_id: str, epoch: int, sample_index: int) -> str:
    """The name of one sample, the same in every run with the same data."""
    return f"{prompt_id}-e{epoch}-{sample_index}"


def keys_of(table: pa.Table) -> list[Key]:
    """The key of each row."""
    return list(zip(table["prompt_id"].to_pylist(), table["epoch"].to_pylist(), strict=True))


def packed(table: pa.Table) -> pa.Buffer:
    """The table as one Arrow stream, to be sent: Ray pickles a Table column by column, which takes forty
    times as long to write, beside an engine, and eight times to read."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return sink.getvalue()


def unpacked(chunk: pa.Buffer) -> pa.Table:
    return pa.ipc.open_stream(chunk).read_all()


def select(chunks: Iterable[pa.Buffer], keys: Sequence[Key]) -> pa.Table:
    """The trajectories of `keys` out of packed tables, in the order of `keys`. KeyError if one is in none."""
    whole = pa.concat_tables(map(unpacked, chunks))
    rows: dict[Key, list[int]] = {}
    for row, key in enumerate(keys_of(whole)):
        rows.setdefault(key, []).append(row)
    return whole.take([row for key in keys for row in rows[key]]).combine_chunks()


def to_table(trajectories: Iterable[Trajectory]) -> pa.Table:
    """Trajectories -> one Table; lists are built from numpy, ten times faster than from Python lists."""
    rows = list(trajectories)
    columns = [
        _column([getattr(row, spec.name) for row in rows], spec) for spec in TRAJECTORY_SCHEMA
    ]
    return pa.Table.from_arrays(columns, schema=TRAJECTORY_SCHEMA)


def _column(values: list[Any], spec: pa.Field) -> pa.Array:
    if pa.types.is_list(spec.type) and not pa.types.is_struct(spec.type.value_type):
        offsets = np.concatenate([[0], np.cumsum([len(v) for v in values])]).astype(np.int32)
        dtype = spec.type.value_type.to_pandas_dtype()
        flat = np.concatenate([np.zeros(0, dtype), *(np.asarray(v, dtype) for v in values)])
        return pa.ListArray.from_arrays(
            pa.array(offsets), pa.array(flat, spec.type.value_type), type=spec.type
        )
    if spec.name == "version_spans":
        values = [[{"version": v, "start": s} for v, s in spans] for spans in values]
    if spec.name == "score_parts":
        values = [list(parts.items()) for parts in values]
    return pa.array(values, spec.type)


def from_table(table: pa.Table) -> list[Trajectory]:
    """The inverse of `to_table`, for reading runs back and for tests; not on the hot path. ValueError
    if it holds anything that is no trajectory."""
    names = [f.name for f in fields(Trajectory)]
    try:
        rows = table.select(names).cast(TRAJECTORY_SCHEMA).to_pylist()
        for row in rows:
            spans = [(span["version"], span["start"]) for span in row["version_spans"]]
            row |= {"version_spans": spans, "score_parts": dict(row["score_parts"])}
        return [Trajectory(**row) for row in rows]
    except (KeyError, TypeError, pa.ArrowException) as error:
        raise ValueError(f"no table of trajectories: {type(error).__name__}: {error}") from error
