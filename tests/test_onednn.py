"""Products of float32 by oneDNN: torch's own numbers, on whichever side the matrix is."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from actors import onednn
from actors.onednn import BATCHED_WIDTH, FEW_ROWS, batch, faster_product, product


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 2, 8, FEW_ROWS, FEW_ROWS + 1])
@pytest.mark.parametrize("leading", [(), (1,)])
@pytest.mark.parametrize("height", [33, 34])
def test_a_product_is_torch_s_own(
    height: int, leading: tuple[int, ...], rows: int, bias: bool
) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(*leading, rows, 48), torch.randn(height, 48)
    b = torch.randn(height) if bias else None
    answer = product(x, weight, b)
    assert answer.is_contiguous()
    torch.testing.assert_close(answer, F.linear(x, weight, b), rtol=1e-5, atol=1e-5)


def test_one_or_two_rows_are_a_batch_of_halves_if_the_matrix_has_halves_and_is_not_wide(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken = []
    monkeypatch.setattr(onednn, "batch", lambda weight, x: taken.append(len(x)) or batch(weight, x))
    for shape, rows in (
        *(((34, 48), rows) for rows in (1, 2, 3)),
        ((33, 48), 2),
        ((34, BATCHED_WIDTH + 1), 2),
    ):
        x, weight = torch.randn(rows, shape[1]), torch.randn(shape)
        torch.testing.assert_close(product(x, weight), F.linear(x, weight), rtol=1e-4, atol=1e-4)
    assert taken == [1, 2]


def test_a_single_row_needs_no_other() -> None:
    x, weight = torch.randn(48), torch.randn(33, 48)
    torch.testing.assert_close(product(x, weight), F.linear(x, weight), rtol=1e-5, atol=1e-5)


def test_a_transposed_matrix_is_taken_as_it_lies() -> None:
    x, weight = torch.randn(8, 33), torch.randn(33, 48).t()
    torch.testing.assert_close(product(x, weight), F.linear(x, weight), rtol=1e-5, atol=1e-5)


def test_nothing_that_was_given_is_changed() -> None:
    x, weight, bias = torch.randn(8, 48), torch.randn(33, 48), torch.randn(33)
    before = [given.clone() for given in (x, weight, bias)]
    product(x, weight, bias)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, weight, bias), strict=True))


@pytest.mark.parametrize("many_are_faster", [False, True])
def test_the_processor_decides_on_many_rows(
    monkeypatch: pytest.MonkeyPatch, many_are_faster: bool
) -> None:
    taken = []
    monkeypatch.setattr(onednn, "takes_onednn", lambda: many_are_faster)
    monkeypatch.setattr(onednn, "rows_of_mkl", lambda: 0 if many_are_faster else 3)
    monkeypatch.setattr(
        onednn, "product", lambda x, *rest: taken.append(len(x)) or product(x, *rest)
    )
    weight = torch.randn(33, 48)
    for rows in (1, 3, 4, FEW_ROWS, FEW_ROWS + 1, 500):
        x = torch.randn(rows, 48)
        torch.testing.assert_close(
            faster_product(x, weight), F.linear(x, weight), rtol=1e-5, atol=1e-5
        )
    low = torch.randn(8, 48, dtype=torch.bfloat16), torch.randn(33, 48, dtype=torch.bfloat16)
    assert torch.equal(faster_product(*low), F.linear(*low))
    few = [4, FEW_ROWS]
    assert taken == ([1, 3, *few, FEW_ROWS + 1, 500] if many_are_faster else few)
