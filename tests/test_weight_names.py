"""Weights that a folder lacks are refused from the names in its files, before a model is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from reward_service.weight_names import INDEX, check_weights
from tests.learner_cases import folders

Weights = dict[str, Tensor]


def rewritten(folder: str, to: Path, change: Callable[[Weights], Weights]) -> Path:
    """A copy of a model's folder with other weights."""
    shutil.copytree(folder, to)
    weights = change(load_file(to / "model.safetensors"))
    save_file(weights, to / "model.safetensors", metadata={"format": "pt"})
    return to


def without(part: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name: w for name, w in weights.items() if part not in name}


def check(folder: Path | str, *, head: bool = True) -> None:
    settings = json.loads((Path(folder) / "config.json").read_text())
    check_weights(f"policy: {folder}", str(folder), settings, head=head)


@pytest.mark.parametrize("kind", ["policy", "llama", "reward_model"])
def test_a_whole_model_passes_tied_or_not(kind: str) -> None:
    check(getattr(folders(), kind), head=kind != "reward_model")


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "base_model.model."])
def test_names_that_a_wrapper_saved_are_refused(tmp_path: Path, wrapper: str) -> None:
    folder = rewritten(
        folders().llama, tmp_path / "m", lambda w: {wrapper + name: one for name, one in w.items()}
    )
    with pytest.raises(ValueError, match=rf"^policy: .* named {wrapper}.*; take '{wrapper}' off"):
        check(folder)


def test_a_missing_layer_and_a_missing_head_are_named(tmp_path: Path) -> None:
    shorter = rewritten(folders().llama, tmp_path / "shorter", without("layers.1."))
    with pytest.raises(ValueError, match=r"lack layer 1 of 2, which would be random"):
        check(shorter)
    headless = rewritten(folders().llama, tmp_path / "headless", without("lm_head"))
    with pytest.raises(ValueError, match=r"lack lm_head\.weight, which would be random"):
        check(headless)
    check(headless, head=False)


def test_files_that_are_cut_or_not_there_are_refused(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders().llama, tmp_path / "m"))
    whole = folder / "model.safetensors"
    shards = [folder / f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    names = list(load_file(whole))
    whole.rename(shards[0])
    index = {"weight_map": dict.fromkeys(names, shards[0].name)}
    (folder / INDEX).write_text(json.dumps(index))
    check(folder)
    index["weight_map"][names[0]] = shards[1].name
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf"no {shards[1].name} there, which {INDEX} names"):
        check(folder)
    for content in (b"", b"{}", whole_start(shards[0])):
        shards[1].write_bytes(content)
        with pytest.raises(ValueError, match="is no safetensors file; copy the model again"):
            check(folder)
    (folder / INDEX).write_text("[]")
    with pytest.raises(ValueError, match="names no weights; copy"):
        check(folder)


def whole_start(path: Path) -> bytes:
    return path.read_bytes()[:100]
