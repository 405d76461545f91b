"""Collectives through shared memory give what gloo gives, whatever the sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from learner import shared_memory
from learner.learner_spec import Rendezvous
from learner.process_group import join
from learner.shared_memory import AllGather, ReduceScatter, SharedSlots, use_shared_memory
from tests.learner_cases import mesh, run_ranks

SIZES = (1, 7, 64, 65, 1000)  # numbers of a rank; a slot of 256 bytes holds 64 of float32


def both_ways(rank: int, meeting: Rendezvous, dtype: torch.dtype) -> list[list[torch.Tensor]]:
    """[size][gathered and reduced through slots, then by gloo], for sizes below and above a slot's."""
    join(meeting, rank, 60.0)
    shared_memory.SLOT_BYTES = 256
    slots, world_size = SharedSlots(), meeting.world_size
    torch.manual_seed(rank)
    results = []
    for size in [*SIZES, *reversed(SIZES)]:
        mine = torch.randn(size, dtype=dtype)
        whole = torch.empty(world_size * size, dtype=dtype)
        in_place = whole[rank * size :][:size].copy_(mine)  # as FSDP gives it
        AllGather(slots)(output_tensor=whole, input_tensor=in_place, group=None, async_op=False)
        apart = torch.empty_like(whole)
        slots.all_gather(apart, mine)
        assert torch.equal(apart, whole)

        grads, part = torch.randn(world_size * size, dtype=dtype), torch.empty(size, dtype=dtype)
        ReduceScatter(slots)(
            output_tensor=part, input_tensor=grads, group=None, op=dist.ReduceOp.SUM
        )
        expected = [torch.empty_like(mine) for _ in range(world_size)]
        dist.all_gather(expected, mine)
        dist.all_reduce(grads)
        results.append([whole, part, torch.cat(expected), grads[rank * size :][:size]])
    return results


@pytest.mark.parametrize(
    ("world_size", "dtype"), [(2, torch.float32), (2, torch.bfloat16), (3, torch.float32)]
)
def test_they_give_what_gloo_gives(world_size: int, dtype: torch.dtype) -> None:
    for results in run_ranks(both_ways, dtype, world_size=world_size):
        for gathered, reduced, expected, summed in results:
            assert torch.equal(gathered, expected)
            if world_size == 2:
                assert torch.equal(reduced, summed)
            else:  # gloo adds in another order
                torch.testing.assert_close(reduced, summed)


def test_a_mean_is_refused() -> None:
    mine: Any = None
    with pytest.raises(AssertionError, match="AVG"):
        ReduceScatter(mine)(output_tensor=mine, input_tensor=mine, op=dist.ReduceOp.AVG)


def test_a_group_of_one_needs_none() -> None:
    mesh()
    use_shared_memory([torch.nn.Linear(1, 1)])
