"""A scorer behind an HTTP endpoint. What comes back is not trusted: sizes, times, types and ids are
checked, and every way it can go wrong is a typed failure.

POST {"requests": [{trajectory_id, prompt, completion, answer, metadata, finish_reason}, ...]}
200  {"responses": [{trajectory_id, score, parts?}, ...]}    one a request, in the same order
"""

from __future__ import annotations

import ipaddress
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import aiohttp

from reward_service.api import (
    InvalidScore,
    ScoreRequest,
    ScoreResult,
    ScorerRaised,
    ScoreTimeout,
    one_line,
)
from reward_service.config import SECRET_NAME, HttpScorerConfig
from reward_service.rules import as_result


class HttpScorer:
    """Raises ValueError for an address that is neither https nor loopback, a host that is not
    allowed, or a token that is not there. The token stands in no message."""

    def __init__(self, config: HttpScorerConfig) -> None:
        self._config = config
        self._where = checked_address(config)
        # Not compressed: what is read is what was sent, so max_response_bytes bounds the memory.
        self._headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if config.token_env is not None:
            self._headers["Authorization"] = f"Bearer {_token(config.token_env)}"
        self._session: aiohttp.ClientSession | None = None

    async def score(self, requests: Sequence[ScoreRequest]) -> list[ScoreResult]:
        body = self._encode(requests)
        try:
            answer = await self._post(body)
        except TimeoutError as error:
            limit = self._config.timeout_s
            raise ScoreTimeout(f"{self._where}: no answer within {limit:g} s") from error
        except aiohttp.ClientError as error:
            raise ScorerRaised(f"{self._where}: {_without_answer(error)}") from None
        return self._decode(requests, answer)

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def _post(self, body: bytes) -> bytes:
        if self._session is None:  # made here, as it belongs to the running event loop
            self._session = aiohttp.ClientSession(
                headers=self._headers,
                auto_decompress=False,
                timeout=aiohttp.ClientTimeout(total=self._config.timeout_s),
            )
        async with self._session.post(
            self._config.url, data=body, allow_redirects=False
        ) as response:
            if 300 <= response.status < 400:
                raise ScorerRaised(
                    f"{self._where}: redirects ({response.status}), which is not followed; "
                    "give the final address"
                )
            if response.status != 200:  # the body may repeat our headers, so it is not shown
                raise ScorerRaised(f"{self._where}: answered with status {response.status}")
            return await self._read(response)

    async def _read(self, response: aiohttp.ClientResponse) -> bytes:
        limit, body = self._config.max_response_bytes, bytearray()
        async for chunk in response.content.iter_chunked(1 << 16):
            body += chunk
            if len(body) > limit:
                raise InvalidScore(f"{self._where}: answer is longer than {limit} bytes")
        return bytes(body)

    def _encode(self, requests: Sequence[ScoreRequest]) -> bytes:
        rows = [
            {
                "trajectory_id": request.trajectory_id,
                "prompt": request.prompt,
                "completion": request.completion,
                "answer": request.answer,
                "metadata": dict(request.metadata),
                "finish_reason": request.finish_reason,
                "messages": request.messages,
            }
            for request in requests
        ]
        try:
            return json.dumps({"requests": rows}, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise ScorerRaised(f"metadata that JSON cannot carry ({one_line(error)})") from error

    def _decode(self, requests: Sequence[ScoreRequest], answer: bytes) -> list[ScoreResult]:
        try:
            tree = json.loads(answer)
        except (ValueError, RecursionError) as error:
            raise InvalidScore(f"{self._where}: answer is not JSON") from error
        rows = tree.get("responses") if isinstance(tree, dict) else None
        if not isinstance(rows, list):
            raise InvalidScore(f'{self._where}: answer has no list "responses"')
        if len(rows) != len(requests):
            raise InvalidScore(f"{self._where}: {len(rows)} responses to {len(requests)} requests")
        return [
            self._result(request.trajectory_id, row)
            for request, row in zip(requests, rows, strict=True)
        ]

    def _result(self, trajectory_id: str, row: Any) -> ScoreResult:
        given = row.get("trajectory_id") if isinstance(row, Mapping) else None
        if given != trajectory_id:
            # One wrong id makes the whole answer doubtful: the scores may be shifted.
            raise InvalidScore(
                f"{self._where}: response for {str(given)[:80]!r} where {trajectory_id!r} was asked"
            )
        return as_result(trajectory_id, row)


def checked_address(config: HttpScorerConfig) -> str:
    """scheme://host:port/path of the URL, for messages. ValueError if it must not be used."""
    try:
        url = urlsplit(config.url)
        host, port = url.hostname, url.port
    except ValueError as error:
        raise ValueError(f"scorer url: {one_line(error)}; give https://HOST/PATH") from None
    if not host or url.scheme not in ("http", "https"):
        raise ValueError("scorer url: not an http address; give https://HOST/PATH")
    if url.username is not None or url.password is not None:
        raise ValueError("scorer url: holds a user or a password; use token_env instead")
    for name, _ in parse_qsl(url.query):
        if SECRET_NAME.search(
            name
        ):  # the config is stored as it is, with the run and each checkpoint
            raise ValueError(f"scorer url: {name} in its query is a secret; use token_env instead")
    if url.scheme == "http" and not _is_loopback(host):
        raise ValueError(
            f"scorer url: http to {host} is not encrypted; use https, or a loopback host"
        )
    if config.allow_hosts and host not in {allowed.lower() for allowed in config.allow_hosts}:
        raise ValueError(
            f"scorer url: host {host} is not in allow_hosts ({', '.join(config.allow_hosts)})"
        )
    return f"{url.scheme}://{host}{f':{port}' if port else ''}{url.path}"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _without_answer(error: aiohttp.ClientError) -> str:
    """What is said of it. Only this machine's own errors are quoted: others repeat what was sent."""
    if isinstance(error, OSError):
        return one_line(error)
    status = f" (status {error.status})" if isinstance(error, aiohttp.ClientResponseError) else ""
    return f"no whole, valid answer: {type(error).__name__}{status}"


def _token(variable: str) -> str:
    token = os.environ.get(variable, "")
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        state = "is not set" if not token else "is no plain token (printable ASCII, no spaces)"
        raise ValueError(f"scorer token_env: environment variable {variable} {state}; export it")
    return token
