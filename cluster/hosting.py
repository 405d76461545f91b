"""Where a stage's roles live: actors of a Ray, or this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from cluster.config import LearnerStageConfig
from cluster.placement import Host, InProcessHost
from cluster.ray_host import RayHost, fork_server


@contextmanager
def hosting(config: LearnerStageConfig, *, in_process: bool) -> Iterator[Callable[[], Host]]:
    """A function that opens the host, to be called once all is checked; it is closed with the block.
    Until then workers' imports are done beside the checks."""
    on_cpu = config.device == "cpu" and not in_process
    with fork_server(config.ray_address, on_cpu=on_cpu) as forks, ExitStack() as opened:

        def open_host() -> Host:
            host: Host = (
                InProcessHost()
                if in_process
                else RayHost(config.ray_address, f"raylign-{config.name}", forks)
            )
            opened.callback(host.close)
            return host

        yield open_host
