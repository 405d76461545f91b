"""Who computes what, the packed layout, and attention that stays inside each sequence."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from learner import packed_attention
from learner.packed_attention import use_packed_attention
from learner.packing import (
    PackedRows,
    balance,
    completion_mask,
    microbatches,
    pack,
    plan,
    unpack,
    work,
)

lengths_of = st.lists(st.integers(1, 60), max_size=40)
ranks_of = st.integers(1, 6)
budget_of = st.integers(1, 100)
quick = settings(max_examples=80, deadline=None)


def fits(bins, lengths, budget):
    return all(len(b) <= 1 or sum(lengths[i] for i in b) <= budget for b in bins)


@quick
@given(lengths_of, ranks_of)
def test_balance_deals_every_index_once_in_order_and_leaves_no_rank_idle(lengths, ranks):
    shares = balance(lengths, ranks)
    assert sorted(i for share in shares for i in share) == list(range(len(lengths)))
    assert all(share == sorted(share) for share in shares)
    assert sum(bool(share) for share in shares) == min(ranks, len(lengths))
    assert shares == balance(list(lengths), ranks)


@quick
@given(lengths_of.filter(bool), ranks_of)
def test_balance_gives_no_rank_more_than_the_mean_plus_one_sequence(lengths, ranks):
    loads = [sum(lengths[i] for i in share) for share in balance(lengths, ranks)]
    assert max(loads) <= sum(lengths) / ranks + max(lengths)


@quick
@given(lengths_of, budget_of)
def test_microbatches_hold_every_index_once_within_the_budget_and_none_is_empty(lengths, budget):
    bins = microbatches(lengths, budget)
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    assert all(b == sorted(b) for b in bins)
    assert all(bins)
    assert fits(bins, lengths, budget)
    assert bins == microbatches(lengths, budget)


@quick
@given(lengths_of, budget_of, st.integers(0, 5))
def test_microbatches_can_be_asked_for_more_bins_but_not_for_too_few(lengths, budget, extra):
    needed = len(microbatches(lengths, budget))
    bins = microbatches(lengths, budget, count=needed + extra)
    assert len(bins) == needed + extra
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    assert fits(bins, lengths, budget)
    if needed:
        with pytest.raises(ValueError, match=f"{needed} microbatches are needed"):
            microbatches(lengths, budget, count=needed - 1)


def test_microbatches_are_few_and_about_equal():
    lengths = np.random.default_rng(0).integers(20, 400, 200).tolist()
    bins = microbatches(lengths, 2048)
    loads = [sum(lengths[i] for i in b) for b in bins]
    assert len(bins) <= -(-sum(lengths) // 2048) + 1
    assert max(loads) - min(loads) < 0.1 * 2048


def test_a_balance_that_would_break_the_budget_gives_way_to_bins_that_fit():
    assert balance([3, 3, 2, 2, 2], 2) == [[0, 2, 4], [1, 3]]
    assert microbatches([3, 3, 2, 2, 2], 6) == [[0, 1], [2, 3, 4]]


@quick
@given(lengths_of, ranks_of, budget_of)
def test_plan_holds_every_index_once_within_the_budget_and_as_often_on_each_rank(
    lengths, ranks, budget
):
    planned = plan(lengths, ranks, budget)
    assert len(planned) == ranks
    assert len({len(bins) for bins in planned}) == 1
    assert sorted(i for bins in planned for b in bins for i in b) == list(range(len(lengths)))
    assert all(fits(bins, lengths, budget) for bins in planned)
    assert planned == plan(lengths, ranks, budget)


def test_ranks_share_work_and_attention_makes_a_long_sequence_worth_more_than_its_tokens():
    """At 1000 tokens attention costs as much as the matrices: 4000 tokens are the work of 20000."""
    lengths = [4000, *[1000] * 12]
    assert work(lengths, 1000.0) == [20000.0, *[2000.0] * 12]
    by_tokens, by_work = plan(lengths, 2, 8000), plan(lengths, 2, 8000, 1000.0)

    def costs(planned):
        return [sum(work([lengths[i] for b in bins for i in b], 1000.0)) for bins in planned]

    assert max(costs(by_tokens)) == 28000
    assert max(costs(by_work)) == 22000
    assert sorted(i for bins in by_work for b in bins for i in b) == list(range(13))
    assert all(fits(bins, lengths, 8000) for bins in by_work)


SEQUENCES = [[5, 6, 7, 8, 9], np.array([1, 2, 3, 4], dtype=np.int32), [11, 12]]
PROMPTS = [3, 1, 2]


def test_packed_rows_look_like_the_picture_in_the_docstring():
    packed = PackedRows.build(SEQUENCES, PROMPTS)
    assert packed.input_ids.tolist() == [[5, 6, 7, 8, 9, 1, 2, 3, 4, 11, 12]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1]]
    assert packed.cu_seqlens == (0, 5, 9, 11)
    assert packed.rows.tolist() == [2, 3, 5, 6, 7]
    assert packed.targets.tolist() == [8, 9, 2, 3, 4]
    assert packed.completion_lengths == (2, 3, 0)
    assert packed.to("cpu").rows.dtype == torch.int64


@pytest.mark.parametrize(("multiple", "tokens"), [(1, 11), (11, 11), (4, 12), (64, 64)])
def test_a_row_that_is_filled_up_asks_for_nothing_more(multiple, tokens):
    packed, plain = (
        PackedRows.build(SEQUENCES, PROMPTS, multiple),
        PackedRows.build(SEQUENCES, PROMPTS),
    )
    assert packed.input_ids.shape == packed.position_ids.shape == (1, tokens)
    assert packed.input_ids[:, :11].equal(plain.input_ids)
    assert packed.cu_seqlens == (*plain.cu_seqlens, *((tokens,) if tokens > 11 else ()))
    assert packed.rows.equal(plain.rows)
    assert packed.targets.equal(plain.targets)
    assert packed.completion_lengths == plain.completion_lengths
    assert PackedRows.build([], [], multiple).input_ids.shape == (1, multiple)
    assert PackedRows.build([], [], multiple).completion_lengths == ()


@quick
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=12))
def test_targets_are_the_completions_and_rows_the_states_before_them(shapes):
    sequences = [list(range(100 * i, 100 * i + p + c)) for i, (p, c) in enumerate(shapes)]
    packed = PackedRows.build(sequences, [p for p, _ in shapes])
    completions = [t for s, (p, _) in zip(sequences, shapes, strict=True) for t in s[p:]]
    assert packed.targets.tolist() == completions
    assert [x + 1 for x in packed.input_ids[0, packed.rows].tolist()] == completions
    padded = unpack(packed.targets, packed.completion_lengths, 9)
    assert [row[row > 0].tolist() for row in padded] == [
        [t for t in s[p:] if t > 0] for s, (p, _) in zip(sequences, shapes, strict=True)
    ]


@quick
@given(st.lists(st.integers(0, 7), max_size=10), st.integers(0, 3))
def test_pack_undoes_unpack_and_padding_is_zero(lengths, extra):
    width = max(lengths, default=0) + extra
    values = torch.arange(1.0, sum(lengths) + 1)
    padded = unpack(values, lengths, width)
    assert padded.shape == (len(lengths), width)
    assert torch.equal(pack(padded, lengths), values)
    assert torch.equal(padded != 0, completion_mask(lengths, width))


def test_gradients_pass_through_unpack_and_pack():
    values = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: unpack(x, [2, 0, 4], 5), values)
    padded = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: pack(x, [2, 0, 4]), padded)


def test_values_that_do_not_belong_to_the_lengths_are_refused():
    with pytest.raises(AssertionError):
        unpack(torch.zeros(5), [2, 4], 5)
    with pytest.raises(AssertionError):
        unpack(torch.zeros(6), [2, 4], 3)


@pytest.mark.parametrize("prompt", [0, 6])
def test_a_prompt_that_is_empty_or_longer_than_its_sequence_is_refused(prompt):
    with pytest.raises(ValueError, match="in a sequence of 5"):
        PackedRows.build([[1, 2, 3, 4, 5]], [prompt])


SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
MODELS = {
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SIZES, tie_word_embeddings=True)),
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES)),
}


@pytest.fixture(params=list(MODELS))
def model(request):
    torch.manual_seed(0)
    kind, config = MODELS[request.param]
    return kind(copy.deepcopy(config)).train()


def random_sequences(seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 97, n).tolist() for n in (17, 5, 1, 40, 2)]


def packed_logits(model, sequences):
    packed = PackedRows.build(sequences, [1] * len(sequences))
    out = model(packed.input_ids, position_ids=packed.position_ids, cu_seqlens=packed.cu_seqlens)
    assert out.past_key_values is None
    return out.logits[0], packed


def loss_gradients(model, logits, targets):
    model.zero_grad()
    F.cross_entropy(logits, targets, reduction="sum").backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_a_packed_forward_and_backward_equals_one_sequence_at_a_time(model):
    sequences = random_sequences()
    targets = torch.tensor([t for s in sequences for t in s]).roll(3)
    alone = torch.cat([model(torch.tensor([s]), use_cache=False).logits[0] for s in sequences])
    expected = loss_gradients(model, alone, targets)
    use_packed_attention(model)
    logits, _ = packed_logits(model, sequences)
    torch.testing.assert_close(logits, alone, rtol=1e-5, atol=1e-5)
    for name, gradient in loss_gradients(model, logits, targets).items():
        assert (gradient - expected[name]).norm() <= 1e-4 * expected[name].norm(), name


def test_gradient_checkpointing_changes_no_gradient(model):
    use_packed_attention(model)
    sequences = random_sequences()
    targets = torch.tensor([t for s in sequences for t in s])
    plain = loss_gradients(model, packed_logits(model, sequences)[0], targets)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for name, gradient in loss_gradients(
        model, packed_logits(model, sequences)[0], targets
    ).items():
        assert torch.equal(gradient, plain[name])


def test_another_sequence_in_the_pack_changes_no_bit_of_this_one(model):
    use_packed_attention(model)
    sequences = random_sequences()
    logits, packed = packed_logits(model, sequences)
    for changed in range(len(sequences)):
        others = list(sequences)
        others[changed] = [(t + 1) % 97 for t in sequences[changed]]
        again, _ = packed_logits(model, others)
        start, end = packed.cu_seqlens[changed : changed + 2]
        assert torch.equal(again[:start], logits[:start])
        assert torch.equal(again[end:], logits[end:])
        assert not torch.equal(again[start:end], logits[start:end])


def test_an_empty_microbatch_runs_the_model_and_gives_zero_gradients(model):
    use_packed_attention(model)
    packed = PackedRows.build([], [])
    assert packed.input_ids.shape == (1, 1)
    assert packed.completion_lengths == ()
    logits = model(
        packed.input_ids, position_ids=packed.position_ids, cu_seqlens=packed.cu_seqlens
    ).logits[0, packed.rows]
    assert unpack(logits[:, 0], packed.completion_lengths, 4).shape == (0, 4)
    logits.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_models_built_from_one_config_keep_their_own_attention():
    kind, config = MODELS["llama"]
    first, second = kind(config), kind(config)
    use_packed_attention(first)
    assert first.config._attn_implementation == "raylign_packed"
    assert first.model.layers[0].self_attn.config is first.config
    assert second.config._attn_implementation != "raylign_packed"
    assert second.config.use_cache
    assert not first.config.use_cache


def test_what_it_cannot_compute_it_refuses(model):
    use_packed_attention(model)
    packed = PackedRows.build([[1, 2, 3], [4, 5]], [1, 1])
    ids, cu = packed.input_ids, packed.cu_seqlens
    with pytest.raises(ValueError, match="needs model"):
        model(ids)
    with pytest.raises(ValueError, match="takes no attention_mask"):
        model(ids, attention_mask=torch.ones_like(ids), cu_seqlens=cu)
    with pytest.raises(ValueError, match="one packed row of 5 tokens"):
        model(ids.expand(2, -1), cu_seqlens=cu)
    with pytest.raises(ValueError, match="one packed row of 5 tokens"):
        model(ids[:, :4], cu_seqlens=cu)
    with pytest.raises(ValueError, match="softcap"):
        model(ids, cu_seqlens=cu, softcap=30.0)
    model.config.attention_dropout = 0.1
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    with pytest.raises(ValueError, match="set attention_dropout to 0"):
        model(ids, cu_seqlens=cu)


SLIDING = {
    "mistral": (MistralForCausalLM, MistralConfig(**SIZES, sliding_window=8)),
    "qwen2": (
        Qwen2ForCausalLM,
        Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=1),
    ),
    # Its layers leave the window to the mask.
    "qwen2_moe": (
        Qwen2MoeForCausalLM,
        Qwen2MoeConfig(
            **SIZES,
            use_sliding_window=True,
            sliding_window=8,
            max_window_layers=1,
            num_experts=4,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
        ),
    ),
    "gemma3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig(
            **SIZES,
            head_dim=8,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention"],
        ),
    ),
}


def sliding_model(kind):
    torch.manual_seed(0)
    made, config = SLIDING[kind]
    config = copy.deepcopy(config)
    config.initializer_range = 0.3  # attention that is nearly uniform would show little
    config._attn_implementation = "eager"
    return made(config).train()


@pytest.mark.parametrize("kind", SLIDING)
def test_a_sliding_window_is_computed_as_transformers_does_one_sequence_at_a_time(kind):
    model = sliding_model(kind)
    rng = np.random.default_rng(1)
    sequences = [rng.integers(0, 97, n).tolist() for n in (5, 7, 8, 9, 16, 17, 40)]
    targets = torch.tensor([t for s in sequences for t in s]).roll(3)
    alone = torch.cat([model(torch.tensor([s]), use_cache=False).logits[0] for s in sequences])
    expected = loss_gradients(model, alone, targets)
    use_packed_attention(model)
    logits, _ = packed_logits(model, sequences)
    picked = torch.log_softmax(logits, -1).gather(1, targets[:, None])
    wanted = torch.log_softmax(alone, -1).gather(1, targets[:, None])
    torch.testing.assert_close(picked, wanted, rtol=1e-5, atol=1e-5)
    for name, gradient in loss_gradients(model, logits, targets).items():
        assert (gradient - expected[name]).norm() <= 1e-4 * expected[name].norm(), name


@torch.no_grad()
def test_what_lies_behind_the_window_is_not_seen():
    model = sliding_model("mistral")
    for layer in model.model.layers[1:]:  # one layer: what it sees is the window alone
        layer.self_attn.o_proj.weight.zero_()
    use_packed_attention(model)
    first = [1, *range(2, 20)]
    logits = packed_logits(model, [first, [5, 6, 7]])[0]
    again = packed_logits(model, [[90, *first[1:]], [5, 6, 7]])[0]
    assert torch.equal(logits[8:], again[8:])
    assert not torch.equal(logits[7], again[7])


def test_sequences_within_the_window_keep_every_bit():
    query, key, value = (torch.randn(1, heads, 12, 8) for heads in (4, 2, 2))
    whole, windowed = (
        packed_attention._loop(query, key, value, (0, 4, 12), 8, window, None) for window in (8, 4)
    )
    assert torch.equal(whole[:, :8], windowed[:, :8])
    assert not torch.equal(whole[:, 8:], windowed[:, 8:])


def test_a_mask_that_a_model_makes_itself_is_refused_not_forgotten(model):
    use_packed_attention(model)
    row = torch.zeros(1, 4, 3, 8)
    with pytest.raises(ValueError, match=r"Attention makes a mask of its own"):
        packed_attention.packed_attention(
            model.model.layers[0].self_attn,
            row,
            row,
            row,
            torch.zeros(1, 1, 3, 3),
            cu_seqlens=(0, 3),
        )


def test_a_sequence_that_would_turn_the_others_of_its_row_otherwise_is_refused():
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16}
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "factor": 4.0}
    config = Phi3Config(
        **SIZES, pad_token_id=0, original_max_position_embeddings=16, rope_parameters=rope | factors
    )
    model = Phi3ForCausalLM(config)
    use_packed_attention(model)
    short = packed_logits(model, [list(range(9)), list(range(16))])[0][:9]
    torch.testing.assert_close(short, packed_logits(model, [list(range(9))])[0])
    with pytest.raises(ValueError, match=r"longrope changes beyond 16 tokens.* of 17 would"):
        packed_logits(model, [list(range(9)), list(range(17))])


def test_layers_that_mix_tokens_without_attention_are_refused():
    config = Qwen2Config(**SIZES)
    model = Qwen2ForCausalLM(config)
    config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(ValueError, match="would leak through"):
        use_packed_attention(model)


@pytest.mark.parametrize("window", [7, 3])
def test_the_flash_path_hands_varlen_attn_the_same_problem(monkeypatch, window):
    """No GPU here: a stand-in with varlen_attn's contract, so that layouts and arguments match."""

    def varlen(query, key, value, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):
        assert window_size == ((-1, 0) if window == 7 else (2, 0))
        assert cu_q is cu_k
        assert (cu_q.dtype, max_q, max_k) == (torch.int32, 7, 7)
        parts = []
        for start, end in zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), strict=True):
            q, k, v = (x[start:end].transpose(0, 1)[None] for x in (query, key, value))
            places = torch.arange(end - start)
            behind = places[:, None] - places
            seen = (behind >= 0) & (behind < window)
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=seen, scale=scale, enable_gqa=enable_gqa
            )
            parts.append(out[0].transpose(0, 1))
        return torch.cat(parts)

    monkeypatch.setattr(packed_attention, "varlen_attn", varlen)
    query, key, value = (torch.randn(1, heads, 12, 8) for heads in (4, 2, 2))
    flash = packed_attention._flash(query, key, value, (0, 5, 12), 7, window, 0.3)
    loop = packed_attention._loop(query, key, value, (0, 5, 12), 7, window, 0.3)
    torch.testing.assert_close(flash, loop, rtol=0, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [199, 50])
def test_the_flash_path_agrees_with_the_loop_on_a_gpu(window):
    generator = torch.Generator("cuda").manual_seed(0)
    query, key, value = (
        torch.randn(
            1, heads, 300, 64, device="cuda", dtype=torch.bfloat16, generator=generator
        ).requires_grad_()
        for heads in (8, 2, 2)
    )
    cu_seqlens = (0, 100, 101, 300)
    assert packed_attention._flash_can(query)
    results = []
    for attend in (packed_attention._flash, packed_attention._loop):
        out = attend(query, key, value, cu_seqlens, 199, window, None)
        results.append((out, *torch.autograd.grad(out.float().square().sum(), (query, key, value))))
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() < 0.02 * b.norm()
