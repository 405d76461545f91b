"""The learner's process group: how ranks meet, and the few collectives they use beside FSDP's own."""

from __future__ import annotations

import os
import socket
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from learner.learner_spec import Rendezvous


def free_port() -> int:
    """One that is free now, for rank 0 of a group over machines."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port


def join(rendezvous: Rendezvous, rank: int, timeout_s: float) -> DeviceMesh:
    """Join the group (gloo on CPU, NCCL on CUDA) and return its one-dimensional mesh."""
    cuda = torch.cuda.is_available()
    # On one machine nothing off loopback; else not the address of the machine's name, which may be loopback.
    interface = "lo" if rendezvous.file else interface_to(rendezvous.host)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    timeout = timedelta(seconds=timeout_s)
    if cuda:
        torch.cuda.set_device(0)
    if not dist.is_initialized():  # in one process vLLM may have made the group of one
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            store=_store(rendezvous, rank, timeout),
            rank=rank,
            world_size=rendezvous.world_size,
            timeout=timeout,
        )
    mesh_device = "cuda" if cuda else "cpu"
    return init_device_mesh(mesh_device, (rendezvous.world_size,), mesh_dim_names=("fsdp",))


def interface_to(host: str) -> str:
    """The network interface over which this machine reaches another, or itself under that address."""
    import psutil

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 1))  # sends nothing
        own = probe.getsockname()[0]
    for name, addresses in psutil.net_if_addrs().items():
        if own in [address.address for address in addresses]:
            return name
    raise ValueError(f"{host}: no network interface has {own}, the address that leads there")


def group_for_saves(timeout_s: float) -> dist.ProcessGroup:
    """A collective. Of all ranks, for the threads that write checkpoints."""
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
    assert isinstance(group, dist.ProcessGroup)
    return group


def _store(rendezvous: Rendezvous, rank: int, timeout: timedelta) -> dist.Store:
    world_size = rendezvous.world_size
    if rendezvous.file:
        store = dist.FileStore(rendezvous.file, world_size)
        store.set_timeout(timeout)
        return store
    address = (rendezvous.host, rendezvous.port)
    return dist.TCPStore(*address, world_size, is_master=rank == 0, timeout=timeout)


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Sum in place; every rank must call it with the same shape."""
    dist.all_reduce(tensor, dist.ReduceOp.SUM)
    return tensor


def max_over_ranks(tensor: Tensor) -> Tensor:
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor
