"""Sequences laid end to end instead of padded, and who computes which of them.

`plan` deals the sequences of a minibatch to ranks and microbatches; `PackedRows` is one microbatch
as the model sees it:

    sequence 0 = p p p c c        sequence 1 = p c c c
    input_ids     p  p  p  c  c | p  c  c  c      [1,T]
    position_ids  0  1  2  3  4 | 0  1  2  3      [1,T]
    cu_seqlens    0               5             9
    rows                2  3      5  6  7         [N]  positions whose NEXT token is a completion's
    targets             c  c      c  c  c         [N]  that next token

The position that predicts completion token j is also the state s_j, so critic values taken at the
same rows are V(s_j). `unpack` turns [N] into the padded [b,C] of the PPO maths, `pack` turns back.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor


def work(lengths: Sequence[int], even_length: float) -> list[float]:
    """What each sequence costs, in tokens of matrix work: its tokens, and its attention, which grows
    with the square and at `even_length` tokens costs as much as the matrices do."""
    return [length * (1.0 + length / even_length) for length in lengths]


def balance(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Indices of `costs` (tokens or work) for each rank, ascending; sums about equal, deterministic.

    Greedy, dearest first, to the rank with the least so far (Graham's LPT: at most 4/3 of the
    best maximum). No rank is left empty while there are sequences for it (each costs at least 1).
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    heap = [(0.0, rank) for rank in range(ranks)]  # cost so far
    for index in _longest_first(costs):
        cost, rank = heap[0]
        shares[rank].append(index)
        heapq.heapreplace(heap, (cost + costs[index], rank))
    return [sorted(share) for share in shares]


def microbatches(
    lengths: Sequence[int], max_tokens: int, count: int | None = None
) -> list[list[int]]:
    """Indices of `lengths` in bins of at most max_tokens, few bins, about equal; deterministic.

    A sequence longer than max_tokens gets a bin of its own. `count` asks for exactly so many bins,
    the last ones empty if there are too few sequences.
    """
    bins = _first_fit(lengths, max_tokens)
    if count is not None and count < len(bins):
        raise ValueError(f"{len(bins)} microbatches are needed, count is {count}")
    count = len(bins) if count is None else count
    even = balance(lengths, count)
    fits = all(len(b) <= 1 or sum(lengths[i] for i in b) <= max_tokens for b in even)
    return even if fits else bins + [[] for _ in range(count - len(bins))]


def plan(
    lengths: Sequence[int], ranks: int, max_tokens: int, even_length: float = math.inf
) -> list[list[list[int]]]:
    """[rank][microbatch] -> indices of `lengths`, every index once.

    Ranks get about equal work, microbatches of a rank about equal tokens: time is shared by the one,
    memory bounded by the other. All ranks get the same number of microbatches, because each forward
    is a collective; where a rank has too few sequences some are empty lists, and PackedRows.build
    makes those runnable.
    """
    shares = balance(work(lengths, even_length), ranks)
    share_lengths = [[lengths[i] for i in share] for share in shares]
    count = max(len(_first_fit(own, max_tokens)) for own in share_lengths)
    return [
        [[share[i] for i in one] for one in microbatches(own, max_tokens, count)]
        for share, own in zip(shares, share_lengths, strict=True)
    ]


@dataclass(frozen=True)
class PackedRows:
    """One microbatch; the module's docstring shows the fields. All tensors int64.

    logits = model(packed.input_ids, position_ids=..., cu_seqlens=packed.cu_seqlens).logits[0]
    after `packed_attention.use_packed_attention(model)`.
    """

    input_ids: Tensor
    position_ids: Tensor
    cu_seqlens: tuple[int, ...]  # on the host: the attention reads it without waiting for a GPU
    rows: Tensor
    targets: Tensor
    completion_lengths: tuple[int, ...]

    @classmethod
    def build(
        cls,
        sequences: Sequence[Sequence[int] | np.ndarray],
        prompt_lengths: Sequence[int],
        multiple: int = 1,
    ) -> PackedRows:
        """From b sequences of prompt + completion ids. No sequences: one token, no rows.

        So a rank without work runs the same forwards and backwards as the others (each is a
        collective), with an empty [N] whose losses and gradients are 0. T is filled up to a `multiple`
        by a sequence without rows.
        """
        lengths = [len(sequence) for sequence in sequences]
        if room := -sum(lengths) % multiple or (0 if lengths else multiple):
            filled = cls.build([*sequences, [0] * room], [*prompt_lengths, room])
            return replace(filled, completion_lengths=filled.completion_lengths[:-1])
        shapes = list(zip(prompt_lengths, lengths, strict=True))
        for prompt, total in shapes:
            if not 1 <= prompt <= total:
                raise ValueError(f"a prompt of {prompt} tokens in a sequence of {total}")
        ids = torch.from_numpy(np.concatenate([np.asarray(s, dtype=np.int64) for s in sequences]))
        starts = [0, *np.cumsum(lengths).tolist()]
        rows = _ranges(
            (start + prompt - 1, start + total - 1)
            for start, (prompt, total) in zip(starts, shapes, strict=False)
        )
        return cls(
            input_ids=ids[None],
            position_ids=_ranges((0, total) for total in lengths)[None],
            cu_seqlens=tuple(starts),
            rows=rows,
            targets=ids[rows + 1],
            completion_lengths=tuple(total - prompt for prompt, total in shapes),
        )

    @classmethod
    def after(cls, prompt: Sequence[int], following: Sequence[int]) -> PackedRows:
        """One sequence, and each token of `following` as the one after it."""
        return replace(
            cls.build([prompt], [len(prompt)]),
            rows=torch.full((len(following),), len(prompt) - 1),
            targets=torch.tensor(following),
            completion_lengths=(1,) * len(following),
        )

    def to(self, device: torch.device | str) -> PackedRows:
        names = ("input_ids", "position_ids", "rows", "targets")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


def completion_mask(
    completion_lengths: Sequence[int] | Tensor,
    max_length: int,
    device: torch.device | str | None = None,
) -> Tensor:
    """bool [b, max_length], True in the first completion_lengths[i] columns of row i."""
    lengths = torch.as_tensor(completion_lengths, dtype=torch.int64, device=device)
    return torch.arange(max_length, device=lengths.device) < lengths[:, None]


def unpack(values: Tensor, completion_lengths: Sequence[int], max_length: int) -> Tensor:
    """[N] -> [b, max_length], 0 behind each completion. Gradients pass."""
    assert len(values) == sum(completion_lengths), (len(values), sum(completion_lengths))
    assert max(completion_lengths, default=0) <= max_length, (completion_lengths, max_length)
    mask = completion_mask(completion_lengths, max_length, values.device)
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def pack(padded: Tensor, completion_lengths: Sequence[int]) -> Tensor:
    """[b,C] -> [N], the inverse of `unpack`."""
    return padded[completion_mask(completion_lengths, padded.shape[1], padded.device)]


def _longest_first(lengths: Sequence[float]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))


def _first_fit(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """First-fit decreasing: at most 11/9 of the fewest possible bins, plus one."""
    bins: list[list[int]] = []
    room: list[int] = []
    for index in _longest_first(lengths):
        need = lengths[index]
        place = next((b for b, free in enumerate(room) if need <= free), len(bins))
        if place == len(bins):
            bins.append([])
            room.append(max_tokens)
        bins[place].append(index)
        room[place] -= need
    return [sorted(one) for one in bins]


def _ranges(bounds: Iterable[tuple[int, int]]) -> Tensor:
    """The integers of each [start, stop), one range after the other; int64."""
    ranges = [np.arange(start, stop, dtype=np.int64) for start, stop in bounds]
    return torch.from_numpy(np.concatenate([np.zeros(0, dtype=np.int64), *ranges]))
