"""A Ray of our own is made of what is asked for, and of nothing that the one before it left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster import own_ray


class FakeRay:
    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []

    def init(self, *, _system_config: dict[str, Any], _temp_dir: str, **_: Any) -> None:
        self.asked.append(dict(_system_config))
        _system_config["object_spilling_config"] = _temp_dir  # as Ray does


def test_a_second_ray_spills_nothing_into_the_first_one_s_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.ray_folder._base", lambda: str(tmp_path))
    ray = FakeRay()
    for _ in range(2):
        own_ray.start(ray).remove()
    assert ray.asked == [own_ray.CONFIG] * 2
    assert "object_spilling_config" not in own_ray.CONFIG
