"""Chunked log-probabilities and entropies against full logits, and the KL estimators."""

from __future__ import annotations

import pytest
import torch

from learner import logprobs as module
from learner.logprobs import kl_estimate, token_logprobs

N, D, V = 37, 16, 101


def inputs(dtype=torch.float32, n=N, requires_grad=True):
    """hidden, head_weight, bias, targets"""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        x = torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
        return x.requires_grad_(requires_grad)

    targets = torch.randint(V, (n,), generator=generator)
    return normal(n, D), normal(V, D), normal(V), targets


def full_logprobs(hidden, weight, targets, bias=None, temperature=1.0):
    logits = torch.nn.functional.linear(hidden, weight, bias).float().to(_exact(hidden))
    logp = (logits / temperature).log_softmax(-1)
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def _exact(x):
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def weigh(logprobs, entropy):
    """A scalar with another weight for every row."""
    ramp = torch.linspace(0.5, 1.5, len(logprobs))
    return (ramp * logprobs).sum() + (ramp.flip(0) * entropy).sum()


@pytest.mark.parametrize("chunk_rows", [1, 8, 37, 1024])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients_equal_those_of_full_logits(chunk_rows, temperature):
    hidden, weight, bias, targets = inputs()
    chunked = token_logprobs(
        hidden, weight, targets, temperature=temperature, chunk_rows=chunk_rows, bias=bias
    )
    full = full_logprobs(hidden, weight, targets, bias, temperature)
    leaves = (hidden, weight, bias)
    got = torch.autograd.grad(weigh(*chunked), leaves)
    expected = torch.autograd.grad(weigh(*full), leaves)
    for a, b in zip((*chunked, *got), (*full, *expected), strict=True):
        # oneDNN's product and the sum over chunks are each rounded, where addmm rounds once.
        torch.testing.assert_close(a, b, rtol=1e-5, atol=3e-5)


def gradients(monkeypatch, kept_chunks, *, again=False):
    """Of all leaves, and how often the logits of a chunk were computed."""
    hidden, weight, bias, targets = inputs()
    computed = []
    logits = module._logits
    with monkeypatch.context() as patch:
        patch.setattr(module, "KEPT_LOGITS_BYTES", kept_chunks * 8 * V * 4)
        patch.setattr(module, "_logits", lambda *given: computed.append(1) or logits(*given))
        loss = weigh(*token_logprobs(hidden, weight, targets, chunk_rows=8, bias=bias))
        if again:
            torch.autograd.grad(loss, (hidden, weight, bias), retain_graph=True)
            computed.clear()
        return torch.autograd.grad(loss, (hidden, weight, bias)), len(computed)


def test_chunks_that_are_kept_are_not_computed_again_and_change_no_bit(monkeypatch):
    """Five chunks, the last of five rows."""
    none, computed = gradients(monkeypatch, 0)
    assert computed == 5 + 5
    for kept, again in ((1, 4), (4, 1), (5, 0), (99, 0)):
        some, computed = gradients(monkeypatch, kept)
        assert computed == 5 + again
        assert all(torch.equal(a, b) for a, b in zip(none, some, strict=True))


def test_a_second_backward_pass_computes_them_again(monkeypatch):
    once, _ = gradients(monkeypatch, 0)
    twice, computed = gradients(monkeypatch, 99, again=True)
    assert computed == 5
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


def test_without_a_gradient_nothing_is_kept(monkeypatch):
    to_keep = []
    apply = module._TokenLogprobs.apply
    monkeypatch.setattr(
        module._TokenLogprobs, "apply", lambda *given: to_keep.append(given[-1]) or apply(*given)
    )
    hidden, weight, _, targets = inputs()
    token_logprobs(hidden, weight, targets)
    token_logprobs(hidden.detach(), weight.detach(), targets)
    with torch.no_grad():
        token_logprobs(hidden, weight, targets)
    assert to_keep == [module.KEPT_LOGITS_BYTES, 0, 0]


@pytest.mark.parametrize("temperature", [1.0, 1.3])
@pytest.mark.parametrize("with_bias", [False, True])
def test_gradients_of_logprob_and_entropy_equal_finite_differences(temperature, with_bias):
    generator = torch.Generator().manual_seed(1)
    shapes = [(5, 3), (7, 3)] + [(7,)] * with_bias
    leaves = [
        torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes
    ]
    targets = torch.tensor([0, 6, 3, 3, 1])

    def function(hidden, weight, bias=None):
        return token_logprobs(
            hidden, weight, targets, temperature=temperature, chunk_rows=2, bias=bias
        )

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_only_what_requires_a_gradient_gets_one(frozen):
    hidden, weight, _, targets = inputs()
    (hidden if frozen == "hidden" else weight).requires_grad_(False)
    live = weight if frozen == "hidden" else hidden
    got = torch.autograd.grad(weigh(*token_logprobs(hidden, weight, targets)), live)
    expected = torch.autograd.grad(weigh(*full_logprobs(hidden, weight, targets)), live)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("part", [0, 1])
def test_the_logprobs_alone_and_the_entropy_alone_have_their_own_gradients(part):
    hidden, weight, _, targets = inputs()
    got = torch.autograd.grad(token_logprobs(hidden, weight, targets)[part].sum(), hidden)
    expected = torch.autograd.grad(full_logprobs(hidden, weight, targets)[part].sum(), hidden)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_without_entropy_the_logprobs_and_their_gradients_are_bit_equal():
    hidden, weight, _, targets = inputs()
    bare, zeros = token_logprobs(hidden, weight, targets, with_entropy=False)
    logprobs, entropy = token_logprobs(hidden, weight, targets)
    assert torch.equal(bare, logprobs)
    assert not zeros.any()
    assert not zeros.requires_grad
    (plain,) = torch.autograd.grad(bare.sum(), hidden)
    (zero_weight,) = torch.autograd.grad(logprobs.sum() + 0.0 * entropy.sum(), hidden)
    assert torch.equal(plain, zero_weight)


def test_no_grad_gives_the_same_numbers_and_no_graph():
    hidden, weight, _, targets = inputs()
    with torch.no_grad():
        quiet = token_logprobs(hidden, weight, targets)
    for a, b in zip(quiet, token_logprobs(hidden, weight, targets), strict=True):
        assert not a.requires_grad
        assert torch.equal(a, b)


def test_autocast_around_it_changes_nothing():
    hidden, weight, _, targets = inputs()
    plain = token_logprobs(hidden, weight, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = token_logprobs(hidden, weight, targets)
        grads = torch.autograd.grad(weigh(*cast), (hidden, weight))
    expected = torch.autograd.grad(weigh(*plain), (hidden, weight))
    for a, b in zip((*cast, *grads), (*plain, *expected), strict=True):
        assert torch.equal(a, b)


def test_bfloat16_inputs_give_float32_results_and_bfloat16_gradients():
    hidden, weight, bias, targets = inputs(torch.bfloat16)
    results = token_logprobs(hidden, weight, targets, chunk_rows=8, bias=bias)
    full = full_logprobs(hidden, weight, targets, bias)
    leaves = (hidden, weight, bias)
    grads = torch.autograd.grad(weigh(*results), leaves)
    expected = torch.autograd.grad(weigh(*full), leaves)
    assert {x.dtype for x in results} == {torch.float32}
    assert {x.dtype for x in grads} == {torch.bfloat16}
    for a, b in zip(results, full, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    for a, b in zip(grads, expected, strict=True):
        assert (a - b).norm() < 0.02 * b.norm()


def test_no_rows_give_empty_results_and_zero_gradients():
    hidden, weight, bias, targets = inputs(n=0)
    logprobs, entropy = token_logprobs(hidden, weight, targets, bias=bias)
    assert logprobs.shape == entropy.shape == (0,)
    (logprobs.sum() + entropy.sum()).backward()
    for leaf in (hidden, weight, bias):
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))


def test_the_full_logits_never_exist():
    """The largest tensor of forward and backward has chunk_rows rows, or is the weight gradient."""
    hidden, weight, _, targets = inputs(n=512)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    with Watch():
        weigh(*token_logprobs(hidden, weight, targets, chunk_rows=16)).backward()
    assert largest == max(16 * V, V * D, 512 * D)


P = torch.tensor([0.5, 0.25, 0.15, 0.1], dtype=torch.float64)
Q = torch.tensor([0.3, 0.3, 0.3, 0.1], dtype=torch.float64)


def test_k1_and_k3_average_to_the_true_kl_and_k2_comes_near_it():
    true_kl = (P * (P / Q).log()).sum()

    def mean(kind):
        return (P * kl_estimate(P.log(), Q.log(), kind=kind)).sum()

    torch.testing.assert_close(mean("k1"), true_kl)
    torch.testing.assert_close(mean("k3"), true_kl)
    assert abs(mean("k2") - true_kl) < 0.2 * true_kl


def test_k2_and_k3_are_never_negative_and_all_vanish_at_equality():
    logprobs = torch.linspace(-20, 0, 400)
    ref = logprobs.flip(0)
    for kind in ("k2", "k3"):
        assert (kl_estimate(logprobs, ref, kind=kind) >= 0).all()
    for kind in ("k1", "k2", "k3"):
        assert not kl_estimate(logprobs, logprobs, kind=kind).any()


def test_an_unknown_estimator_is_refused():
    with pytest.raises(ValueError, match="use k1, k2 or k3"):
        kl_estimate(P, Q, kind="k4")  # type: ignore[arg-type]
