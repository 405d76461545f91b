"""Ranks on several machines meet over the interface that leads to rank 0."""

from __future__ import annotations

from types import SimpleNamespace

import psutil
import pytest

from learner.process_group import free_port, interface_to


def test_a_machine_that_is_reached_over_loopback_is_met_there() -> None:
    assert interface_to("127.0.0.1") == "lo"


def test_the_interface_is_the_one_whose_address_leads_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interface(*addresses: str) -> list[SimpleNamespace]:
        return [SimpleNamespace(address=address) for address in addresses]

    there = {"lo": interface("::1"), "eth7": interface("02:42:00:00:00:01", "127.0.0.1")}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: there)
    assert interface_to("127.0.0.1") == "eth7"
    monkeypatch.setattr(psutil, "net_if_addrs", dict)
    with pytest.raises(ValueError, match=r"127\.0\.0\.1: no network interface"):
        interface_to("127.0.0.1")


def test_a_port_that_is_free_can_be_had() -> None:
    assert 1024 <= free_port() < 65536
