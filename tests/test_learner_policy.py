"""The sharded models answer as transformers does, one sequence at a time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
)

from learner import sharding
from learner.config import LearnerConfig
from learner.packing import PackedRows
from learner.policy import _check_head, even_length, load_policy, load_value_model
from learner.process_group import join
from reward_service.reward_model import last_token_scores
from tests.learner_cases import (
    TEMPERATURE,
    case,
    folders,
    hf_logprobs,
    mesh,
    ppo_config,
    run_ranks,
    trajectories,
    weights_of,
    whole,
)
from tests.test_weight_names import rewritten, without

FOLDERS = ["policy", "llama"]  # tied and untied
rows = trajectories()


def packed(chosen=rows) -> PackedRows:
    sequences = [[*row.prompt_ids, *row.completion_ids] for row in chosen]
    return PackedRows.build(sequences, [len(row.prompt_ids) for row in chosen])


def hugging_face(kind: str):
    return AutoModelForCausalLM.from_pretrained(getattr(folders(), kind), dtype=torch.float32)


def loaded(kind: str, **changes):
    return load_policy(
        getattr(folders(), kind), mesh(), LearnerConfig(logprob_chunk_rows=7), **changes
    )


@pytest.mark.parametrize("kind", FOLDERS)
@torch.no_grad()
def test_packed_logprobs_and_entropy_equal_transformers_one_sequence_at_a_time(kind):
    policy, model = loaded(kind), hugging_face(kind)
    logprobs, entropy, values = policy(packed(), TEMPERATURE, True)
    expected = [hf_logprobs(model, r.prompt_ids, r.completion_ids, TEMPERATURE) for r in rows]
    torch.testing.assert_close(logprobs, torch.cat(expected), rtol=0, atol=1e-5)
    assert not values.any()
    row = rows[0]
    ids = torch.tensor([[*row.prompt_ids, *row.completion_ids]])
    scaled = model(ids).logits[0, len(row.prompt_ids) - 1 : -1] / TEMPERATURE
    exact = torch.distributions.Categorical(logits=scaled).entropy()
    torch.testing.assert_close(entropy[: len(exact)], exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", FOLDERS)
def test_loading_through_meta_gives_every_weight_and_buffer_of_from_pretrained_exactly(kind):
    policy, model = loaded(kind), hugging_face(kind)
    given = {name: whole(p) for name, p in policy.lm.named_parameters()}
    expected = dict(model.named_parameters())
    assert given.keys() == expected.keys()
    assert all(torch.equal(given[name], expected[name]) for name in given)
    buffers, expected_buffers = dict(policy.lm.named_buffers()), dict(model.named_buffers())
    assert any("inv_freq" in name for name in buffers)
    assert buffers.keys() == expected_buffers.keys()
    assert all(torch.equal(buffers[name], expected_buffers[name]) for name in buffers)


def test_tied_embeddings_stay_one_parameter_and_untied_ones_two():
    tied, untied = loaded("policy").lm, loaded("llama").lm
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert "lm_head.weight" not in dict(tied.named_parameters())
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight
    assert "lm_head.weight" in dict(untied.named_parameters())


def test_the_gradient_of_tied_embeddings_is_that_of_both_uses():
    policy, model = loaded("policy"), hugging_face("policy")
    policy(packed(rows[2:4]), TEMPERATURE)[0].sum().backward()
    for row in rows[2:4]:
        hf_logprobs(model, row.prompt_ids, row.completion_ids, TEMPERATURE).sum().backward()
    given = whole(policy.lm.model.embed_tokens.weight.grad)
    expected = model.model.embed_tokens.weight.grad
    assert (given - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_frozen_model_has_nothing_to_train():
    assert not any(p.requires_grad for p in loaded("policy", frozen=True).parameters())


@torch.no_grad()
def test_a_new_critic_says_zero_and_a_shared_one_leaves_the_logprobs_alone():
    config = LearnerConfig()
    assert not load_value_model(folders().policy, mesh(), config)(packed()).any()
    plain, shared = loaded("policy"), loaded("policy", value_head=True)
    assert not shared(packed())[2].any()
    assert torch.equal(plain(packed())[0], shared(packed())[0])
    shared.value_head.bias.to_local().fill_(1.5)
    assert torch.equal(shared(packed())[2], torch.full_like(plain(packed())[2], 1.5))


@torch.no_grad()
def test_a_critic_from_a_reward_model_gives_its_normalised_score_at_the_state_it_reads():
    folder = folders().reward_model
    critic = load_value_model(folder, mesh(), LearnerConfig())
    values = critic(packed())
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    # The last row of a completion is the state before its last token.
    states = [[*row.prompt_ids, *row.completion_ids[:-1]] for row in rows]
    expected = (last_token_scores(model, states) - 0.8) / 2.5
    ends = torch.tensor([len(row.completion_ids) for row in rows]).cumsum(0) - 1
    torch.testing.assert_close(values[ends], expected, rtol=0, atol=1e-5)
    assert expected.abs().max() > 0.1


@torch.no_grad()
def test_a_model_that_caps_its_logits_is_refused():
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1, "head_dim": 32}
    config = Gemma2Config(vocab_size=50, num_key_value_heads=1, intermediate_size=32, **shape)
    config.final_logit_softcapping = 0.1
    with pytest.raises(ValueError, match="Gemma2ForCausalLM: its logits are more than a matrix"):
        _check_head(Gemma2ForCausalLM(config))


@pytest.mark.parametrize("part", ["lm_head", "layers.1.mlp.up_proj", "norm.weight"])
def test_weights_that_the_folder_lacks_are_refused_not_made_up(tmp_path, part):
    folder = rewritten(folders().llama, tmp_path / "model", without(part))
    with pytest.raises(
        ValueError, match=rf"model: the weights lack .*{part}.*, which would be rand"
    ):
        load_policy(str(folder), mesh(), LearnerConfig())
    if part == "lm_head":  # of which a critic has no use
        load_value_model(str(folder), mesh(), LearnerConfig())
        return
    with pytest.raises(
        ValueError, match=rf"model: the weights lack .*{part}.*, which would be rand"
    ):
        load_value_model(str(folder), mesh(), LearnerConfig())


def test_a_weight_under_a_longer_name_is_told(tmp_path):
    def wrapped(weights):
        return {f"inner.{name}": one for name, one in weights.items()}

    folder = rewritten(folders().llama, tmp_path / "model", wrapped)
    with pytest.raises(ValueError, match=r"lack lm_head.weight \(there is inner.lm_head.weight\)"):
        load_policy(str(folder), mesh(), LearnerConfig())


def test_a_reward_model_without_its_head_makes_no_critic(tmp_path):
    folder = rewritten(folders().reward_model, tmp_path / "model", without("score."))
    with pytest.raises(ValueError, match=r"the weights lack score\.weight"):
        load_value_model(str(folder), mesh(), LearnerConfig())


def test_a_model_without_a_list_of_layers_is_refused_by_name(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    shape = {"vocab_size": 20, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 1}
    config = GPT2Config(**shape, **no_dropout)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="GPT2LMHeadModel: no list of decoder layers"):
        load_policy(str(tmp_path), mesh(), LearnerConfig())


@pytest.mark.parametrize("key", ["attention_dropout", "resid_pdrop", "hidden_dropout"])
def test_a_model_with_dropout_is_refused_by_policy_and_critic_in_one_line(tmp_path, key):
    folder = shutil.copytree(folders().policy, tmp_path / "model")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, key: 0.1}))
    for load in (load_policy, load_value_model):
        with pytest.raises(ValueError, match=f"model: {key} is 0.1 in config.json.*set it to 0$"):
            load(str(folder), mesh(), LearnerConfig())


def test_dropout_of_a_head_that_is_not_used_is_no_reason_to_refuse(tmp_path):
    folder = shutil.copytree(folders().policy, tmp_path / "model")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "classifier_dropout": 0.1}))
    load_policy(str(folder), mesh(), LearnerConfig())


def test_offloading_to_the_cpu_is_refused_where_there_is_no_gpu():
    with pytest.raises(ValueError, match=r"learner\.cpu_offload: true, but the learner has no GPU"):
        load_policy(folders().policy, mesh(), LearnerConfig(cpu_offload=True))


def test_layers_are_gathered_in_units_of_a_least_size_and_the_rest_with_the_embeddings(monkeypatch):
    layers = [torch.nn.Linear(8, 8, bias=False) for _ in range(5)]  # of 256 bytes
    for least, sizes in ((1, [1] * 5), (256, [1] * 5), (257, [2, 2]), (768, [3]), (2000, [])):
        monkeypatch.setattr(sharding, "UNIT_BYTES", least)
        units = sharding._units(layers)
        assert [len(unit) for unit in units] == sizes
        assert [one for unit in units for one in unit] == layers[: sum(sizes)]


def test_attention_costs_as_much_as_the_matrices_at_the_even_length():
    model = loaded("policy")
    matrices = sum(p.numel() for p in model.lm.model.layers.parameters()) / 2
    assert even_length(model) == matrices / 64


def test_a_folder_stored_in_bfloat16_is_trained_in_float32(tmp_path):
    model = hugging_face("policy").to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    policy = load_policy(str(tmp_path), mesh(), LearnerConfig())
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    given = whole(policy.lm.model.norm.weight)
    assert torch.equal(given, model.model.norm.weight.float())


def _load_at_two_ranks(rank, meeting, tied, untied, reward_model):
    group = join(meeting, rank, 60.0)
    config = LearnerConfig(ranks=2)
    rows_of_mine = packed(rows[4 * rank : 4 * rank + 4])
    found = {}
    with torch.no_grad():
        for name, folder in (("policy", tied), ("llama", untied)):
            policy = load_policy(folder, group, config)
            logprobs = policy(rows_of_mine, TEMPERATURE)[0]
            found[name] = (
                {n: whole(p) for n, p in policy.lm.named_parameters()},
                dict(policy.lm.named_buffers()),
                logprobs,
            )
        critic = load_value_model(reward_model, group, config)
        found["values"] = critic(rows_of_mine)
        found["empty"] = critic(PackedRows.build([], []))
    return found


def test_two_ranks_load_the_same_weights_and_buffers_and_give_the_same_answers():
    made = folders()
    ranks = run_ranks(_load_at_two_ranks, made.policy, made.llama, made.reward_model)
    for kind in FOLDERS:
        model = hugging_face(kind)
        one = loaded(kind)
        with torch.no_grad():
            expected = one(packed(), TEMPERATURE)[0]
        for weights, buffers, _ in (rank[kind] for rank in ranks):
            assert all(torch.equal(weights[n], p) for n, p in model.named_parameters())
            assert all(torch.equal(buffers[n], b) for n, b in model.named_buffers())
        found = torch.cat([rank[kind][2] for rank in ranks])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    critic = load_value_model(made.reward_model, mesh(), LearnerConfig())
    with torch.no_grad():
        expected = critic(packed())
    found = torch.cat([rank["values"] for rank in ranks])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert all(rank["empty"].shape == (0,) for rank in ranks)


def test_value_init_takes_the_critic_from_another_folder(tmp_path):
    copied = shutil.copytree(folders().reward_model, tmp_path / "reward model")
    ppo = ppo_config(value_init=str(copied))
    worker = case(ppo).start()
    score = AutoModelForSequenceClassification.from_pretrained(copied).score.weight
    head = weights_of(worker)["value.head.weight"]
    torch.testing.assert_close(head, score.float() / 2.5)
    assert Path(copied).is_dir()
