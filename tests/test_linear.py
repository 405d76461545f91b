"""Products by oneDNN: the same numbers as torch's own, forward and backward, and only where they pay."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from learner import linear as products
from learner.linear import Linear, add_product, linear, use_fast_products


@pytest.fixture
def onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor for which it is the faster."""
    monkeypatch.setattr(products, "takes_onednn", lambda: True)
    monkeypatch.setattr(products, "rows_of_mkl", lambda: 0)


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    yield
    products.takes_onednn.cache_clear()
    products.rows_of_mkl.cache_clear()


def both(bias: bool) -> tuple[nn.Linear, nn.Linear]:
    torch.manual_seed(0)
    plain = nn.Linear(48, 33, bias=bias)
    fast = nn.Sequential(nn.Linear(48, 33, bias=bias))
    fast[0].load_state_dict(plain.state_dict())
    use_fast_products(fast)
    return plain, fast[0]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(64, 48), (1, 128, 48), (17, 48), (0, 48)])
def test_a_fast_linear_computes_what_a_plain_one_does(
    onednn: None, bias: bool, shape: tuple[int, ...]
) -> None:
    plain, fast = both(bias)
    assert type(fast) is Linear
    given = torch.randn(shape)
    answers = []
    for layer in (plain, fast):
        x = given.clone().requires_grad_()
        layer(x).square().sum().backward()
        answers.append((layer(x).detach(), x.grad, *(p.grad for p in layer.parameters())))
    for ours, theirs in zip(*answers, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_gradient_that_is_expanded_is_taken(onednn: None) -> None:
    plain, fast = both(bias=True)
    x = torch.randn(64, 48)
    for layer in (plain, fast):
        layer(x).sum().backward()  # one number, seen as [64, 33]
    torch.testing.assert_close(plain.weight.grad, fast.weight.grad, rtol=1e-5, atol=1e-5)


def test_only_what_needs_a_gradient_gets_one(onednn: None) -> None:
    _, fast = both(bias=False)
    fast.weight.requires_grad_(False)
    x = torch.randn(64, 48, requires_grad=True)
    fast(x).sum().backward()
    assert x.grad is not None
    assert fast.weight.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_products_are_added_in_parts(
    onednn: None, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(products, "ROWS_AT_ONCE", 7)
    a, b = torch.randn(30, 64, dtype=dtype), torch.randn(64, 9, dtype=dtype)
    total = torch.randn(30, 9)
    expected = total + (a @ b).float()
    add_product(total, a, b)
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)


def test_only_few_tokens_or_multiples_of_rows_are_onednn_s(
    onednn: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []
    product = products.product
    monkeypatch.setattr(products, "product", lambda x, *rest: taken.append(x) or product(x, *rest))
    weight = torch.randn(8, 4)
    for tokens in (1, 16, 17, 31, 32, 33, 128):
        linear(torch.randn(tokens, 4), weight)
        add_product(torch.zeros(8, 4), torch.randn(8, tokens), torch.randn(tokens, 4))
        Linear(4, 8)(torch.randn(1, tokens, 4))
    assert len(taken) == 4 * 3
    assert products.row_multiple(torch.device("cpu"), "float32") == products.ROWS
    assert products.row_multiple(torch.device("cuda"), "float32") == 1


def test_other_dtypes_are_torch_s_own(onednn: None) -> None:
    x, weight = torch.randn(64, 8, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64)
    assert torch.equal(linear(x, weight), nn.functional.linear(x, weight))


@pytest.mark.parametrize(
    ("vendor", "flags", "fast"),
    [
        ("GenuineIntel", "avx2 avx512f", False),
        ("AuthenticAMD", "avx2", False),
        ("AuthenticAMD", "avx2 avx512f", True),
    ],
)
def test_the_processor_decides_on_many_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vendor: str, flags: str, fast: bool
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\nflags\t\t: {flags}\n")
    monkeypatch.setattr("actors.onednn.CPUINFO", cpuinfo)
    products.takes_onednn.cache_clear()
    products.rows_of_mkl.cache_clear()
    taken = []
    product = products.product
    monkeypatch.setattr(products, "product", lambda x, *rest: taken.append(x) or product(x, *rest))
    _, layer = both(bias=True)
    layer(torch.randn(1, 8, 48))
    assert len(taken) == 1
    layer(torch.randn(1, 3, 48))  # a probe
    by_onednn = vendor != "GenuineIntel"
    assert len(taken) == 1 + by_onednn
    layer(torch.randn(1, 64, 48))
    assert len(taken) == 1 + by_onednn + fast
    assert (products.row_multiple(torch.device("cpu"), "float32") == products.ROWS) is fast
