"""Who may talk to a Ray: a fresh token for one of our own, and what a joined one wants, known at once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path

import grpc
import pytest

from cluster import ray_auth
from cluster.config import BadInput

VARIABLES = (ray_auth.MODE, ray_auth.TOKEN, ray_auth.TOKEN_PATH)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty one, and none of Ray's variables; afterwards these are as before."""
    monkeypatch.setattr(os, "environ", {**os.environ, "HOME": str(tmp_path)})
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    for name in VARIABLES:
        os.environ.pop(name, None)
    return tmp_path


class Ray(grpc.GenericRpcHandler):
    """A control store that wants this token, if any."""

    def __init__(self) -> None:
        self.token: str | None = None

    def service(self, call: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        return grpc.unary_unary_rpc_method_handler(self._answer)

    def _answer(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        sent = dict(context.invocation_metadata()).get("authorization")
        if self.token is not None and sent != f"Bearer {self.token}":
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
        return b""


@pytest.fixture
def cluster() -> Iterator[tuple[Ray, str]]:
    ray, server = Ray(), grpc.server(futures.ThreadPoolExecutor(1))
    server.add_generic_rpc_handlers((ray,))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield ray, f"127.0.0.1:{port}"
    server.stop(None).wait(5)


def test_a_ray_of_our_own_gets_a_token_that_is_written_nowhere(home: Path) -> None:
    ray_auth.guard_own()
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64
    assert not [*home.rglob("*")]


def test_what_the_user_says_of_our_own_ray_holds() -> None:
    os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN_PATH"] = "disabled", "/the/users"
    ray_auth.guard_own()
    assert os.environ["RAY_AUTH_MODE"] == "disabled"
    assert "RAY_AUTH_TOKEN" not in os.environ


def test_a_ray_that_wants_no_token_is_joined_without(cluster: tuple[Ray, str]) -> None:
    ray_auth.prepare_to_join(cluster[1])
    assert os.environ["RAY_AUTH_MODE"] == "disabled"


@pytest.mark.parametrize("where", ["variable", "file", "home"])
def test_a_ray_that_wants_a_token_is_joined_with_the_one_that_ray_would_find(
    cluster: tuple[Ray, str], home: Path, where: str
) -> None:
    ray, address = cluster
    ray.token = "the-token-of-the-cluster"
    path = home / ".ray/auth_token" if where == "home" else home / "token"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"{ray.token}\n")
    if where == "variable":
        os.environ["RAY_AUTH_TOKEN"] = ray.token
    elif where == "file":
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(path)
    ray_auth.prepare_to_join(address)
    assert os.environ["RAY_AUTH_MODE"] == "token"


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({}, "wants a token"),
        ({"RAY_AUTH_MODE": "token"}, "wants a token"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "/nothing/here"}, "wants a token"),
        ({"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": "its-token"}, "wants a token"),
        ({"RAY_AUTH_TOKEN": "that-of-another"}, "refuses the token"),
    ],
)
def test_without_the_token_that_is_wanted_it_is_bad_input(
    cluster: tuple[Ray, str], given: dict[str, str], problem: str
) -> None:
    ray, address = cluster
    ray.token = "its-token"
    os.environ.update(given)
    with pytest.raises(BadInput, match=problem) as refused:
        ray_auth.prepare_to_join(address)
    for said in ("ray_address", address, "RAY_AUTH_TOKEN_PATH"):
        assert said in str(refused.value)
    assert "that-of-another" not in str(refused.value)


@pytest.mark.parametrize(("token", "mode"), [(None, "disabled"), ("a-token", "token")])
def test_ray_is_left_to_find_the_one_of_this_machine(token: str | None, mode: str) -> None:
    if token is not None:
        os.environ["RAY_AUTH_TOKEN"] = token
    ray_auth.prepare_to_join("auto")
    assert os.environ["RAY_AUTH_MODE"] == mode
