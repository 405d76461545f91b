"""One tokenizer for every stage: that of tokenizer.json, whatever class its config names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.model_folder import same_vocabulary
from reward_service.config import RewardTrainingConfig
from reward_service.reward_training import train
from reward_service.tokenizer import load_tokenizer
from tests import tiny
from tests.test_import_layers import ROOT, SOURCES
from tests.test_reward_model import scorer, tiny_language_model

TEXT = "is it late?  yes."


def test_a_folder_without_a_readable_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)
    for broken in ("{", "{}", json.dumps({"model": {"type": "BPE"}})):
        (tmp_path / "tokenizer.json").write_text(broken)
        with pytest.raises(ValueError, match="tokenizer cannot be read"):
            load_tokenizer(tmp_path)


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.fixture
def renamed(tmp_path: Path) -> Path:
    """A byte-level tokenizer that is called a LlamaTokenizer, as many folders have it."""
    folder = Path(tiny_language_model(tmp_path / "lm"))
    edit(folder / "tokenizer_config.json", tokenizer_class="LlamaTokenizer")
    return folder


def test_a_reward_model_is_trained_and_scores_with_the_tokens_that_all_others_use(
    renamed: Path, tmp_path: Path
) -> None:
    expected = load_tokenizer(renamed)(TEXT).input_ids
    assert load_tokenizer(renamed).decode(expected) == TEXT
    pairs = tiny.write_jsonl(
        tmp_path / "pairs.jsonl", [{"prompt": "is it", "chosen": " yes", "rejected": " no"}]
    )
    out = tmp_path / "rm"
    config = RewardTrainingConfig(pairs=pairs)
    train(config, model=str(renamed), out=out, seed=0, device="cpu", progress=lambda *_: None)
    assert load_tokenizer(out)(TEXT).input_ids == expected
    same_vocabulary(str(renamed), str(out), "reward.scorer")
    edit(out / "tokenizer_config.json", tokenizer_class="LlamaTokenizer")
    assert scorer(str(out), input="text")._tokenizer(TEXT).input_ids == expected


def test_no_source_loads_a_tokenizer_in_another_way() -> None:
    loads = {str(path.relative_to(ROOT)): path.read_text() for path in SOURCES}
    others = ("AutoTokenizer.", "import AutoTokenizer", "PreTrainedTokenizerFast")
    found = [name for name, text in loads.items() if any(other in text for other in others)]
    assert found == ["reward_service/tokenizer.py"]


def of_metaspaces(folder: Path) -> None:
    tree = json.loads((folder / "tokenizer.json").read_text())
    metaspace = {
        "type": "Metaspace",
        "replacement": "Ġ",
        "prepend_scheme": "always",
        "split": False,
    }
    edit(folder / "tokenizer.json", **tree | {"pre_tokenizer": metaspace})


def of_another_end(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", eos_token="<pad>")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (of_metaspaces, r"'Hello world, the fox' is \[.*\] there, \[.*\] here"),
        (of_another_end, "eos_token is '<pad>' there, '<eos>' here"),
    ],
)
def test_the_same_vocabulary_is_not_yet_the_same_tokenizer(
    tmp_path: Path, change: object, said: str
) -> None:
    ours, theirs = (tiny_language_model(tmp_path / name) for name in ("ours", "theirs"))
    same_vocabulary(ours, theirs, "scorer", scores=True)
    change(Path(theirs))  # type: ignore[operator]
    with pytest.raises(ValueError, match=f"^scorer: .* is not the policy's .{said}.; give") as e:
        same_vocabulary(ours, theirs, "scorer", scores=True)
    assert "\n" not in str(e.value)


def test_a_base_model_with_its_own_end_may_be_the_reference(tmp_path: Path) -> None:
    ours, theirs = (tiny_language_model(tmp_path / name) for name in ("ours", "theirs"))
    of_another_end(Path(theirs))
    same_vocabulary(ours, theirs, "reference")
    of_metaspaces(Path(theirs))
    with pytest.raises(ValueError, match=r"^reference: .* is not the policy.s"):
        same_vocabulary(ours, theirs, "reference")
