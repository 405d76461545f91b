"""A Ray of this run alone, on this machine: loopback only, and no more of it than a run needs.

Ray starts two idle workers, an autoscaler, a log monitor and the dashboard's server as well, which
nobody would ask here: seven seconds of CPU before the first actor. The dashboard is for clusters, which
people start by `ray start`, with all of these.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from cluster import ray_auth
from cluster.ray_folder import RayFolder

UNASKED = ("start_monitor", "start_log_monitor", "start_api_server")
CONFIG = {
    "enable_worker_prestart": False,
    "prestart_worker_first_driver": False,
    # The first workers come when the fork server has imported everything, however busy the machine.
    "worker_register_timeout_seconds": 600,
}


def prepare() -> None:
    """Before ray is imported."""
    ray_auth.guard_own()
    # Without it Ray takes the machine's outer address for its own, whatever address it is given, and
    # listens on every interface.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")


def start(ray: Any, **options: Any) -> RayFolder:
    """ray.init of a new Ray. The folder is to be removed when it has ended."""
    folder = RayFolder()
    try:
        with _without_the_unasked():
            ray.init(
                address="local",
                _node_ip_address="127.0.0.1",
                _temp_dir=folder.path,
                include_dashboard=False,
                # A copy: Ray writes into it where it spills objects to.
                _system_config=dict(CONFIG),
                **options,
            )
    except BaseException:
        folder.remove()
        raise
    return folder


@contextlib.contextmanager
def _without_the_unasked() -> Iterator[None]:
    """Ray has no option for it. In a version without these methods, or with others, all is started."""
    from ray._private.node import Node

    found = {name: getattr(Node, name) for name in UNASKED if hasattr(Node, name)}
    for name in found:
        setattr(Node, name, lambda *_, **__: None)
    try:
        yield
    finally:
        for name, method in found.items():
            setattr(Node, name, method)
