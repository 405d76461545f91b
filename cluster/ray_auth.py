"""The token that a Ray asks its callers for: one of our own gets a fresh one, a joined one is asked
whether it wants one.

All in environment variables of Ray's: its processes and actors inherit them, no command line shows them,
and nothing is left in the home folder, where Ray would keep a token of its own for every later Ray.
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
from pathlib import Path
from typing import Any

from cluster.config import BadInput

MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
ASK_TIMEOUT_S = 5.0


def guard_own() -> None:
    """For a Ray of our own: nobody reaches it but this process and what it starts, unless
    RAY_AUTH_MODE says otherwise."""
    os.environ.setdefault(MODE, "token")
    if TOKEN not in os.environ and TOKEN_PATH not in os.environ:
        os.environ[TOKEN] = _fresh_token()


def reread() -> None:
    """After ray is imported. Whoever imported it first, as vLLM does, let it read the environment as it was
    then, and Ray reads it once."""
    import ray

    raylet: Any = ray._raylet  # the C++ part
    raylet.Config.initialize("")
    raylet.AuthenticationTokenLoader.instance().reset_cache()


@functools.cache
def _fresh_token() -> str:
    """One a process: Ray reads it once."""
    return secrets.token_hex(32)


def prepare_to_join(address: str) -> None:
    """For a Ray that somebody started: as RAY_AUTH_MODE says; where it says nothing, with a token if that
    Ray wants one. BadInput if it would refuse us, which Ray itself says after a minute."""
    token = _token()
    if address == "auto":  # where that is only Ray knows
        os.environ.setdefault(MODE, "token" if token else "disabled")
        return
    wanted = _refuses(address, None)
    mode = os.environ.setdefault(MODE, "token" if wanted and token else "disabled")
    if wanted and (mode.lower() != "token" or token is None):
        problem = "wants a token; export RAY_AUTH_MODE=token"
    elif wanted and _refuses(address, token):
        problem = "refuses the token it is given; export another one: RAY_AUTH_TOKEN"
    else:
        return
    raise BadInput(
        f"ray_address: the Ray at {address} {problem}, and {TOKEN_PATH} with the file that holds it"
    )


def _token() -> str | None:
    """What Ray would find, where Ray looks for it."""
    path = os.environ.get(TOKEN_PATH) or Path.home() / ".ray" / "auth_token"
    with contextlib.suppress(OSError, RuntimeError):
        return os.environ.get(TOKEN) or Path(path).read_text().strip() or None
    return None


def _refuses(address: str, token: str | None) -> bool:
    """Whether Ray's control store wants another token than this; False if it did not say."""
    import grpc

    sent = [("authorization", f"Bearer {token}")] if token is not None else []
    direct = [("grpc.enable_http_proxy", 0)]
    with grpc.insecure_channel(address.removeprefix("ray://"), direct) as channel:
        ask = channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive")
        try:
            ask(b"", timeout=ASK_TIMEOUT_S, metadata=sent)
        except grpc.RpcError as error:
            return error.code() is grpc.StatusCode.UNAUTHENTICATED
    return False
