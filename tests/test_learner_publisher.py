"""What generators receive is, byte for byte, what the learner holds."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from actors import weight_delta, weight_update
from actors.weight_update import Probe, WeightUpdate, verify
from learner import weight_writer
from tests.learner_cases import (
    Case,
    batch_table,
    case,
    folders,
    ppo_config,
    run_ranks,
    weights_of,
)

DTYPES = ["float32", "bfloat16"]


def cases() -> dict[str, Case]:
    """Tied with a value head on the trunk, and untied; each in both dtypes, which the learner
    computes in float32 whatever it publishes."""
    short = {"epochs": 1, "minibatches": 1}
    shared = ppo_config(value_model="shared", **short)
    llama = folders().llama
    return {
        **{f"tied {dtype}": case(shared, push_dtype=dtype) for dtype in DTYPES},
        "untied bfloat16": Case(
            llama, llama, ppo_config(advantage="grpo", **short), push_dtype="bfloat16"
        ),
    }


def published(rank, meeting, one: Case, folder: Path, name: str | None):
    """Three versions, a training step before each: (layout, what each update was)."""
    worker = one.start(rank, meeting)
    segment = str(folder / f"weights {name}") if name else None
    layout = worker.prepare_publish(segment)
    versions, bytes_at_end = [], {}
    for version in (1, 2, 3):
        worker.update(batch_table(seed=version), version, version, str(folder))
        update, answer = worker.publish(version), worker.answer_probe(version)
        data = None
        if update is not None:
            data = (
                np.fromfile(update.segment, np.uint8) if segment else np.concatenate(update.payload)
            )
        versions.append(
            {"update": update, "answer": answer, "data": data, "weights": weights_of(worker)}
        )
    for one_version in versions[1:] if rank == 0 else []:
        update = one_version["update"]
        bytes_at_end[update.version] = (
            np.fromfile(update.segment, np.uint8) if segment else np.concatenate(update.payload)
        )
    files = sorted(folder.glob("weights*"))
    again = worker.last_update(in_message=False) if rank == 0 else None
    message = worker.last_update(in_message=True) if rank == 0 else None
    worker.close()
    left = sorted(folder.glob("weights*")) if rank == 0 else []
    return {
        "layout": layout,
        "again": again,
        "message": message,
        "versions": versions,
        "at the end": bytes_at_end,
        "files": [file.name for file in files],
        "left": left,
    }


def _at_two_ranks(rank, meeting, given, folder):
    return {
        (name, where): published(rank, meeting, one, folder, name if where else None)
        for name, one in given.items()
        for where in (True, False)
    }


def deltas(rank, meeting, one: Case, folder: Path):
    """What each of three versions was: the update, and the same in full."""
    worker = one.start(rank, meeting)
    worker._spec = replace(worker._spec, push_delta=True)
    layout = worker.prepare_publish(str(folder / "unused"))
    updates = []
    for version in (1, 2, 3):
        worker.update(batch_table(seed=version), version, version, str(folder))
        update, _ = worker.publish(version), worker.answer_probe(version)
        updates.append((update, worker.last_update(in_message=False)[0] if rank == 0 else None))
    worker.close()
    return layout, updates


def _deltas_at_two(rank, meeting, one, folder):
    return deltas(rank, meeting, one, folder)


NAMES = ["tied float32", "tied bfloat16", "untied bfloat16"]


@pytest.fixture(scope="module")
def at_two(tmp_path_factory):
    return run_ranks(_at_two_ranks, cases(), tmp_path_factory.mktemp("segments"))


@pytest.fixture(scope="module")
def at_one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("segments")
    return {
        (name, where): published(0, None, one, folder, name if where else None)
        for name, one in cases().items()
        for where in (True, False)
    }


@pytest.fixture(scope="module")
def beside(tmp_path_factory):
    """One rank again, as with large weights: many buckets, written by several threads."""
    folder = tmp_path_factory.mktemp("segments")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weight_writer, "PIECE_BYTES", 4096)
        patch.setattr(weight_update, "BUCKET_BYTES", 20_480)
        run = {
            (name, where): published(0, None, one, folder, name if where else None)
            for name, one in cases().items()
            for where in (True, False)
        }
    assert all(len(one["layout"].buckets) > 3 for one in run.values())
    return run


@pytest.fixture(params=["at_one", "at_two", "beside"])
def runs(request):
    found = request.getfixturevalue(request.param)
    return found[0] if request.param == "at_two" else found


def unpacked(layout, data) -> dict[str, torch.Tensor]:
    return {
        spec.name: torch.frombuffer(
            bytearray(data[spec.offset : spec.offset + spec.num_bytes]),
            dtype=getattr(torch, spec.dtype),
        ).view(spec.shape)
        for spec in layout.tensors
    }


@pytest.mark.parametrize("where", [True, False], ids=["shared memory", "in the message"])
@pytest.mark.parametrize("name", NAMES)
def test_the_bytes_are_the_live_weights_cast_and_pass_the_receivers_own_check(runs, name, where):
    run = runs[name, where]
    layout = run["layout"]
    for version in run["versions"]:
        update: WeightUpdate = version["update"]
        verify(update, layout, version["data"])
        found = unpacked(layout, version["data"])
        policy = {n: w for n, w in version["weights"].items() if n.startswith("policy.lm.")}
        assert {f"policy.lm.{n}" for n in found} == policy.keys()
        for tensor_name, tensor in found.items():
            exact = policy[f"policy.lm.{tensor_name}"].to(getattr(torch, name.split()[1]))
            assert torch.equal(tensor, exact), tensor_name
        assert bool(update.payload) != bool(update.segment)


@pytest.mark.parametrize("name", NAMES)
def test_both_ways_carry_the_same_bytes_and_each_version_other_ones(runs, name):
    mapped, sent = runs[name, True], runs[name, False]
    assert mapped["layout"].id == sent["layout"].id
    for a, b in zip(mapped["versions"], sent["versions"], strict=True):
        assert np.array_equal(a["data"], b["data"])
        assert a["update"].digests == b["update"].digests
        assert a["answer"].logprobs == b["answer"].logprobs
    digests = [version["update"].digests for version in mapped["versions"]]
    assert len(set(digests)) == 3
    assert [version["update"].version for version in mapped["versions"]] == [1, 2, 3]


@pytest.mark.parametrize("where", [True, False], ids=["shared memory", "in the message"])
def test_what_was_published_stays_as_it_was_while_the_next_version_is_made(runs, where):
    run = runs["tied float32", where]
    for version in run["versions"][1:]:
        assert np.array_equal(run["at the end"][version["update"].version], version["data"])


def test_for_a_generator_on_another_machine_the_segment_goes_into_the_message(runs):
    for where in (True, False):
        run = runs["tied float32", where]
        last, (message, answer) = run["versions"][-1], run["message"]
        assert answer == last["answer"]
        assert (message.version, message.digests, message.segment) == (
            last["update"].version,
            last["update"].digests,
            "",
        )
        assert np.array_equal(np.concatenate(message.payload), last["data"])


def test_two_segments_take_turns_and_none_is_left_behind(runs):
    run = runs["tied float32", True]
    segments = [version["update"].segment for version in run["versions"]]
    assert segments[0] == segments[2] != segments[1]
    *files, owner = run["files"]
    assert sorted(Path(segment).name for segment in set(segments)) == files
    assert owner.endswith("-owner")
    assert run["left"] == []


def test_names_are_those_of_the_hugging_face_folder(at_one):
    for name, folder in (("tied float32", "policy"), ("untied bfloat16", "llama")):
        model = AutoModelForCausalLM.from_pretrained(getattr(folders(), folder))
        layout = at_one[name, True]["layout"]
        expected = {n: tuple(p.shape) for n, p in model.named_parameters()}
        assert {spec.name: spec.shape for spec in layout.tensors} == expected


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_the_probe_is_what_transformers_answers_from_the_same_weights(runs, name):
    for version in runs[name, True]["versions"]:
        folder = folders().llama if name.startswith("untied") else folders().policy
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        weights = version["weights"].items()
        missing = model.load_state_dict(
            {n.removeprefix("policy.lm."): w for n, w in weights if n.startswith("policy.lm.")},
            strict=False,
        ).missing_keys
        assert set(missing) <= {"lm_head.weight"}
        probe, answer = version["update"].probe, version["answer"]
        assert answer.is_to(version["update"])
        logits = model(torch.tensor([probe.prompt_ids])).logits[0, -1]
        expected = torch.log_softmax(logits, -1)[list(probe.next_ids)]
        torch.testing.assert_close(torch.tensor(answer.logprobs), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("ranks", [1, 2], ids=["one rank", "two ranks"])
def test_deltas_make_each_version_of_the_one_before(ranks, tmp_path):
    one = cases()["tied bfloat16"]
    if ranks == 1:
        layout, updates = deltas(0, None, one, tmp_path)
    else:
        (layout, updates), (_, silent) = run_ranks(_deltas_at_two, one, tmp_path)
        assert silent == [(None, None)] * 3
    assert [update.base for update, _ in updates] == [None, 1, 2]
    image = np.concatenate(updates[0][0].payload)
    verify(updates[0][0], layout, image)
    for update, full in updates[1:]:
        weight_delta.apply(layout, update.payload, image)
        verify(update, layout, image)
        assert np.array_equal(image, np.concatenate(full.payload))
        assert (full.base, full.version, full.digests) == (None, update.version, update.digests)
    assert not list(tmp_path.glob("unused*"))


@pytest.mark.parametrize("where", [True, False], ids=["shared memory", "in the message"])
def test_the_last_version_can_be_had_again_in_full(runs, where):
    run = runs["tied float32", where]
    last, (again, answer) = run["versions"][-1]["update"], run["again"]
    assert answer.is_to(again)
    assert (again.version, again.digests, again.segment) == (3, last.digests, last.segment)
    assert again.payload_bytes == (0 if where else run["layout"].total_bytes)
    if not where:
        assert np.array_equal(np.concatenate(again.payload), run["versions"][-1]["data"])


def test_only_rank_zero_speaks_and_the_message_travels(at_two):
    for key, run in at_two[1].items():
        said = [(version["update"], version["answer"]) for version in run["versions"]]
        assert said == [(None, None)] * 3, key
        assert run["layout"] == at_two[0][key]["layout"]
    update = at_two[0]["tied bfloat16", False]["versions"][0]["update"]
    copied = pickle.loads(pickle.dumps(update))
    assert copied.digests == update.digests
    assert np.array_equal(copied.payload[0], update.payload[0])


def test_the_probe_is_fixed_and_of_ordinary_tokens():
    probe = Probe.of(97, {0, 1})
    assert probe == Probe.of(97, {0, 1})
    ids = [*probe.prompt_ids, *probe.next_ids]
    assert len(set(ids)) == 4
    assert all(type(token) is int and 1 < token < 97 for token in ids)


@pytest.mark.parametrize("length", [1, 2])
def test_every_weight_has_a_part_in_the_probe_but_not_over_one_token(length):
    probe = Probe.of(97, {0, 1})
    model = AutoModelForCausalLM.from_pretrained(folders().policy, dtype=torch.float32)
    logits = model(torch.tensor([probe.prompt_ids[:length]])).logits[0, -1]
    for token in probe.next_ids:
        model.zero_grad()
        torch.log_softmax(logits, -1)[token].backward(retain_graph=True)
        found = {n: float(p.grad.abs().max()) for n, p in model.named_parameters()}
        least = min(found, key=found.get)
        assert found[least] > 1e-3 if length == 2 else found[least] < 1e-6, (least, found[least])


def test_the_probe_of_weights_that_wait_on_the_cpu_goes_through_fsdp(monkeypatch, tmp_path):
    """Which alone brings them to the GPU."""
    worker = case(ppo_config(epochs=1)).start()
    worker.prepare_publish(None)
    worker.publish(1)
    expected = worker.answer_probe(1)
    offloaded = worker._spec.learner.model_copy(update={"cpu_offload": True})
    worker._spec = replace(worker._spec, learner=offloaded)
    monkeypatch.setattr("learner.learner_worker.unsharded", lambda _: pytest.fail("unsharded"))
    worker.publish(2)
    answer = worker.answer_probe(2)
    np.testing.assert_allclose(answer.logprobs, expected.logprobs, atol=1e-5)


def test_weights_that_have_changed_since_answer_for_no_version(tmp_path):
    worker = case(ppo_config(epochs=1)).start()
    worker.prepare_publish(None)
    worker.publish(1)
    worker.update(batch_table(seed=1), 1, 1, str(tmp_path))
    with pytest.raises(RuntimeError, match="no longer those of version 1"):
        worker.answer_probe(1)
    with pytest.raises(RuntimeError, match="publish and answer_probe come first"):
        worker.last_update(in_message=False)
