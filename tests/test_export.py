"""A folder that is exported to is filled where it is, and nothing is left of what failed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster import checkpoints
from cluster.export import export_run
from learner import hf_folder
from tests import tiny

Write = Callable[[Path], None]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "runs/tiny"
    folder.mkdir(parents=True)
    tiny.write_yaml(folder / "config.yaml", tiny.run_tree(tmp_path))
    (folder / checkpoints.RUN_ID).write_text("tiny-1")
    aside = checkpoints.begin(folder, 1)
    (aside / checkpoints.DRIVER).write_text("{}")
    checkpoints.commit(aside, 1, keep=1)
    return folder


def writing(patch: pytest.MonkeyPatch, write: Write) -> None:
    """In place of a model's weights."""

    def export(checkpoint: Path, source: str, out: Path, dtype: str) -> None:
        write(out)

    patch.setattr(hf_folder, "export_checkpoint", export)


def whole(out: Path) -> None:
    out.mkdir()
    (out / "model.safetensors").write_text("weights")


def broken(out: Path) -> None:
    out.with_name(out.name + ".1.partial").mkdir()
    raise OSError("No space left on device")


@pytest.mark.parametrize("out", [".", "link", "new", "there", "below/new"])
def test_what_is_named_holds_the_model(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    here = tmp_path / "here"
    for folder in (here, here / "there", tmp_path / "real"):
        folder.mkdir()
    (here / "link").symlink_to(tmp_path / "real")
    if out == ".":
        here = here / "there"
    monkeypatch.chdir(here)
    before = set(here.parent.iterdir())
    writing(monkeypatch, whole if out != "below/new" else whole_with_parents)
    export_run(run, Path(out), None, "float32")
    assert os.listdir(out) == ["model.safetensors"]
    assert set(here.parent.iterdir()) == before
    assert (here / "link").is_symlink() is (out != ".")


def whole_with_parents(out: Path) -> None:
    out.parent.mkdir()
    whole(out)


@pytest.mark.parametrize("there", [True, False])
def test_an_export_that_fails_leaves_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    out: Any = tmp_path / "out/new"
    (out if there else out.parent).mkdir(parents=True)
    writing(monkeypatch, broken)
    with pytest.raises(OSError, match="No space"):
        export_run(run, out, None, "float32")
    assert list(out.parent.iterdir()) == ([out] if there else [])
    assert not there or list(out.iterdir()) == []
