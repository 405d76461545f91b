"""A YAML file and overrides become a checked config, or one line that says what is wrong with them."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from cluster.config import BadInput, RewardRunConfig, RunConfig, SFTRunConfig, StageConfig
from reward_service.config import StrictModel

Stage = TypeVar("Stage", bound=StageConfig)


def load_config(path: str | Path, overrides: list[str], kind: type[Stage]) -> Stage:
    """YAML file + `key.path=value` overrides -> a checked config, or BadInput in one line."""
    path = Path(path)
    if not path.is_file():
        raise BadInput(
            f"{path}: no such config file; give a YAML file, e.g. examples/support_replies/ppo.yaml"
        )
    try:
        tree = _read(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: not YAML ({' '.join(str(error).split())}); fix the file") from None
    if not isinstance(tree, dict):
        raise BadInput(f"{path}: not a mapping of keys; see examples/support_replies/ppo.yaml")
    for override in overrides:
        _apply(tree, override)
    _check_stage(path, tree, kind)
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise BadInput(f"{path}: {_first_problem(error, kind)}") from None


class _Loader(yaml.SafeLoader):
    """Refuses duplicate keys, of which SafeLoader silently keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]  # type: ignore[no-untyped-call]
        for place, key in enumerate(keys):
            if key in keys[:place]:
                mark = node.value[place][0].start_mark
                raise yaml.constructor.ConstructorError(
                    problem=f"{key} stands twice", problem_mark=mark
                )
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """What looks like a date or a number and is none, YAML's own tells without its place."""
        try:
            return super().construct_object(node, deep)  # type: ignore[no-untyped-call]
        except (ValueError, KeyError, AttributeError, OverflowError):
            looks_like = node.tag.rpartition(":")[2]
            raise yaml.constructor.ConstructorError(
                problem=f"{node.value!s:.40} looks like {looks_like} and is none; if it is text, quote it",
                problem_mark=node.start_mark,
            ) from None


def _read(text: str) -> Any:
    """The YAML's one document, or YAMLError."""
    try:
        return _Loader(text).get_single_data()
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None


def _check_stage(path: Path, tree: dict[str, Any], kind: type[StageConfig]) -> None:
    """What is for another command would be told as keys that are unknown."""
    commands = {
        _stage_of(other): command
        for other, command in (
            (SFTRunConfig, "sft"),
            (RewardRunConfig, "reward-model"),
            (RunConfig, "train"),
        )
    }
    stage = tree.get("stage")
    if stage in commands and stage != _stage_of(kind):
        raise BadInput(
            f"{path}: stage: {stage}: it is for `raylign {commands[stage]}`, where stage: "
            f"{_stage_of(kind)} is wanted"
        )


def _stage_of(kind: type[StageConfig]) -> str:
    annotation: Any = kind.model_fields["stage"].annotation
    return str(annotation.__args__[0])


def _apply(tree: dict[str, Any], override: str) -> None:
    keys, equals, value = override.partition("=")
    if not equals or not keys:
        raise BadInput(f"{override!r}: not an override; write key.path=value")
    *parents, last = keys.split(".")
    for key in parents:
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise BadInput(
                f"{override!r}: {key} is a value, not a section; see the config file for its keys"
            )
    try:
        tree[last] = _read(value)
    except yaml.YAMLError:
        raise BadInput(f"{override!r:.200}: the value is not YAML; quote it") from None


def _first_problem(error: ValidationError, kind: type[StrictModel]) -> str:
    """The first problem in words; unknown keys first, as they explain missing ones."""
    problems = sorted(error.errors(), key=lambda p: p["type"] != "extra_forbidden")
    problem = problems[0]
    where = ".".join(str(part) for part in problem["loc"])
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if problem["type"] == "extra_forbidden":
        known = known_keys(kind, problem["loc"][:-1])
        near = difflib.get_close_matches(str(problem["loc"][-1]), known, 1, 0.5)
        hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known) or 'none'}"
        return f"unknown key {where}; {hint}{more}"
    message = problem["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:] if problem["type"] != "value_error" else message
    given = (
        "" if problem["type"] in ("missing", "value_error") else f" (got {problem['input']!r:.60})"
    )
    return f"{where + ': ' if where else ''}{message}{given}{more}"


def known_keys(kind: type[StrictModel], location: tuple[Any, ...]) -> list[str]:
    """The keys of the config at `location`; discriminator tags in it are passed over."""
    models: list[Any] = [kind]
    for part in location:
        if tagged := [m for m in models if _tag(m) == part]:  # first: a field may be called so too
            models = tagged
            continue
        found = [
            f.annotation
            for m in models
            if (f := getattr(m, "model_fields", {}).get(part)) is not None
        ]
        if found:
            models = [model for annotation in found for model in _models_in(annotation)]
    return sorted({key for model in models for key in model.model_fields})


def _tag(model: type[StrictModel]) -> object:
    kind = model.model_fields.get("kind")
    arguments = getattr(kind.annotation, "__args__", None) if kind is not None else None
    return arguments[0] if arguments else None


def _models_in(annotation: Any) -> list[type[StrictModel]]:
    if isinstance(annotation, type) and issubclass(annotation, StrictModel):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in _models_in(part)]
