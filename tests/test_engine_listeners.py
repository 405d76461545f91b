"""What an engine's process listens on, on a machine whose name leads to its outer address."""

from __future__ import annotations

import ipaddress
import json
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

LISTENERS = """
import json, os
from actors.vllm_engine import CPU_ENGINE_ENV, _single_process_group
os.environ.update(CPU_ENGINE_ENV)
import psutil
_single_process_group()
found = psutil.Process().net_connections("inet")
print(json.dumps([one.laddr.ip for one in found if one.status == "LISTEN"]))
"""


def outer_address() -> str:
    for addresses in psutil.net_if_addrs().values():
        for one in addresses:
            if one.family == socket.AF_INET and not ipaddress.ip_address(one.address).is_loopback:
                return one.address
    pytest.skip("this machine has loopback only")


def test_the_group_of_an_engine_listens_on_loopback_only(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text(f"127.0.0.1 localhost\n{outer_address()} an-outer-name\n")
    named = ["unshare", "--user", "--map-root-user", "--uts", "--mount", "sh", "-c"]
    naming = f"mount --bind {shlex.quote(str(hosts))} /etc/hosts && hostname an-outer-name"
    if subprocess.run([*named, naming], capture_output=True, timeout=10).returncode:
        pytest.skip("no user namespace in which a machine can have another name")
    asking = shlex.join([sys.executable, "-c", LISTENERS])
    done = subprocess.run(
        [*named, f"{naming} && exec {asking}"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    addresses = json.loads(done.stdout.splitlines()[-1])
    assert all(ipaddress.ip_address(one).is_loopback for one in addresses), addresses
