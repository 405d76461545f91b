"""Folders that transformers loads, and that say of themselves what is true."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from learner.hf_folder import export_checkpoint, gather_weights, write_folder
from reward_service.tokenizer import load_tokenizer
from tests.learner_cases import (
    Case,
    batch_table,
    case,
    folders,
    ppo_config,
    run_ranks,
    weights_of,
    write_checkpoint,
)


def trained_cases() -> dict[str, Case]:
    llama = folders().llama
    return {
        "tied": case(ppo_config(value_model="shared", epochs=1)),
        "untied": Case(llama, llama, ppo_config(advantage="grpo", epochs=1)),
    }


def _train_and_save(rank, meeting, given, folder):
    found = {}
    for name, one in given.items():
        worker = one.start(rank, meeting)
        worker.update(batch_table(), 1, 3, folder)
        write_checkpoint(worker, f"{folder}/{name}")
        gathered = gather_weights(worker._update.models.policy)
        worker.update(batch_table(), 2, 3, folder)
        found[name] = {"gathered": gathered, "after": weights_of(worker)}
    return found


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    return folder, run_ranks(_train_and_save, trained_cases(), str(folder))


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    return folder, [_train_and_save(0, None, trained_cases(), str(folder))]


@pytest.fixture(params=["one_rank", "two_ranks"])
def saved(request):
    return request.getfixturevalue(request.param)


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["tied", "untied"])
def test_an_exported_checkpoint_is_the_weights_that_were_saved(saved, name, dtype, tmp_path):
    checkpoints, ranks = saved
    source = trained_cases()[name].policy
    out = tmp_path / "exported"
    export_checkpoint(checkpoints / name, source, out, dtype)
    model, loading = AutoModelForCausalLM.from_pretrained(
        out, dtype="auto", output_loading_info=True
    )
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert model.dtype == getattr(torch, dtype)
    live = ranks[0][name]["gathered"]
    assert live.keys() == dict(model.named_parameters()).keys()
    for tensor_name, parameter in model.named_parameters():
        assert torch.equal(parameter, live[tensor_name].to(parameter.dtype)), tensor_name
    assert tensors_in(out).keys() == live.keys()  # a tied weight once, no value head
    assert ("lm_head.weight" in live) == (name == "untied")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_config_names_the_dtype_of_the_tensors_beside_it(saved, dtype, tmp_path):
    source = shutil.copytree(folders().policy, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    given = {**config, "dtype": "float16", "torch_dtype": "float16"}
    (source / "config.json").write_text(json.dumps(given))
    export_checkpoint(saved[0] / "tied", str(source), tmp_path / "out", dtype)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == {**given, "dtype": dtype, "torch_dtype": dtype}
    assert {str(t.dtype) for t in tensors_in(tmp_path / "out").values()} == {f"torch.{dtype}"}
    export_checkpoint(saved[0] / "tied", folders().policy, tmp_path / "new", dtype)
    assert "torch_dtype" not in json.loads((tmp_path / "new" / "config.json").read_text())


def test_gathered_weights_are_copies_that_training_does_not_reach(saved):
    for name, found in saved[1][0].items():
        before, after = found["gathered"], found["after"]
        assert any(not torch.equal(t, after[f"policy.lm.{n}"]) for n, t in before.items()), name
    for rank in saved[1][1:]:
        assert all(found["gathered"] == {} for found in rank.values())


def test_a_folder_carries_the_tokenizer_and_nothing_of_the_old_weights(tmp_path):
    source = shutil.copytree(folders().policy, tmp_path / "source")
    for name in ("model-00001-of-00002.safetensors", "pytorch_model.bin", "old.index.json"):
        (source / name).write_text("old")
    (source / "a folder").mkdir()
    weights = tensors_in(source)
    write_folder(weights, str(source), tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    kept = {path.name for path in Path(folders().policy).iterdir()}
    assert names == kept
    tokenizer = load_tokenizer(tmp_path / "out")
    assert tokenizer("a b").input_ids == load_tokenizer(source)("a b").input_ids
    assert tokenizer.chat_template


def test_code_pickles_and_whatever_else_lies_in_a_folder_stay_there(tmp_path):
    source = shutil.copytree(folders().policy, tmp_path / "source")
    stay = {
        "tf_model.h5", "flax_model.msgpack", "model.gguf", "model.ckpt", "training_args.pkl", ".env",
        "modeling_own.py", "tokenization_own.py", "tokenizer_own.py", "optimizer.pth", "notes.txt",
    }  # fmt: skip
    go = {"LICENSE", "LICENSE.txt", "NOTICE", "tokenizer.model", "vocab.txt", "chat_template.jinja"}
    for name in stay | go:
        (source / name).write_text("from the source")
    for name in ("config.json", "tokenizer_config.json"):
        tree = json.loads((source / name).read_text())
        (source / name).write_text(
            json.dumps({**tree, "auto_map": {"AutoModel": "modeling_own.M"}})
        )
    write_folder(tensors_in(source), str(source), tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert not names & stay
    assert names >= go
    for path in (tmp_path / "out").glob("*.json"):
        assert "auto_map" not in path.read_text(), path
    kept = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert kept == json.loads((Path(folders().policy) / "tokenizer_config.json").read_text())


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    """Whatever fails on the way, the old one stays until the new one is complete."""
    weights = tensors_in(Path(folders().policy))
    out = tmp_path / "out"
    write_folder(weights, folders().policy, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    broken = {**weights, "shares memory": next(iter(weights.values()))}
    with pytest.raises(RuntimeError):
        write_folder(broken, folders().policy, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    doubled = {name: 2 * tensor for name, tensor in weights.items()}
    write_folder(doubled, folders().policy, out)
    assert all(torch.equal(t, doubled[n]) for n, t in tensors_in(out).items())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_views_and_transposed_tensors_are_written_as_what_they_show(tmp_path):
    weights = {"a": torch.arange(6.0).view(2, 3).t(), "b": torch.arange(10.0)[2:4]}
    write_folder(weights, folders().policy, tmp_path / "out")
    found = tensors_in(tmp_path / "out")
    assert torch.equal(found["a"], weights["a"])
    assert torch.equal(found["b"], weights["b"])
