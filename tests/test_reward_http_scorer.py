"""The HTTP scorer: what an endpoint answers is checked, and the token stays secret."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.trajectory import to_table
from reward_service.api import (
    InvalidScore,
    RewardFailure,
    ScoreFailure,
    ScoreRequest,
    ScoreResponse,
    ScorerRaised,
    ScoreTimeout,
)
from reward_service.config import HttpScorerConfig
from reward_service.http_scorer import HttpScorer
from tests import tiny

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
TOKEN = "s3cret-token"


SAID = [{"role": "user", "content": "p"}]


def requests(count: int) -> list[ScoreRequest]:
    return [
        ScoreRequest(f"t{i}", "p", "ü" * i, (2,), (3, 1), "stop", "42", {"k": i}, SAID)
        for i in range(count)
    ]


@asynccontextmanager
async def endpoint(handler: Handler, **changes: Any) -> AsyncIterator[HttpScorer]:
    """A scorer of a server on a free loopback port."""
    app = web.Application()
    app.router.add_post("/score", handler)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}/score?key=in-the-query"
    scorer = HttpScorer(HttpScorerConfig(kind="http", url=url, **changes))
    try:
        yield scorer
    finally:
        await scorer.close()
        await runner.cleanup()


def replying(answer: Any) -> Handler:
    async def handler(request: web.Request) -> web.StreamResponse:
        body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        return web.Response(body=body)

    return handler


def rows(*scores: Any) -> dict[str, Any]:
    return {"responses": [{"trajectory_id": f"t{i}", "score": s} for i, s in enumerate(scores)]}


async def test_requests_are_sent_whole_and_responses_come_back_in_order() -> None:
    seen: dict[str, Any] = {}

    async def handler(request: web.Request) -> web.StreamResponse:
        seen.update(await request.json())
        asked = seen["requests"]
        scored = [
            {"trajectory_id": r["trajectory_id"], "score": len(r["completion"]), "parts": {"a": 1}}
            for r in asked
        ]
        return web.json_response({"responses": scored})

    async with endpoint(handler) as scorer:
        for _ in range(2):  # the connection is used again
            results = await scorer.score(requests(3))
    assert results == [ScoreResponse(f"t{i}", float(i), {"a": 1.0}) for i in range(3)]
    assert seen["requests"][1] == {
        "trajectory_id": "t1",
        "prompt": "p",
        "completion": "ü",
        "answer": "42",
        "metadata": {"k": 1},
        "finish_reason": "stop",
        "messages": SAID,
    }


@pytest.mark.parametrize("bad", [None, "1", True, [1], {}], ids=repr)
async def test_a_score_of_a_wrong_type_fails_its_request(bad: Any) -> None:
    async with endpoint(replying(rows(1.0, bad))) as scorer:
        first, second = await scorer.score(requests(2))
    assert first == ScoreResponse("t0", 1.0)
    assert isinstance(second, ScoreFailure)
    assert second.kind == "invalid"


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
async def test_json_that_holds_no_finite_number_is_no_score(number: str) -> None:
    body = f'{{"responses": [{{"trajectory_id": "t0", "score": {number}}}]}}'.encode()
    async with endpoint(replying(body)) as scorer:
        (result,) = await scorer.score(requests(1))
    assert isinstance(result, ScoreFailure)


@pytest.mark.parametrize(
    "answer",
    [
        b"not json",
        b"\xff\xfe",
        b"[" * 100_000,
        gzip.compress(json.dumps(rows(1.0, 2.0)).encode()),
        [],
        {"scores": [1.0, 2.0]},
        {"responses": {"t0": 1.0}},
        {"responses": [1.0, 2.0]},
        rows(1.0),
        rows(1.0, 2.0, 3.0),
        {"responses": rows(1.0, 2.0)["responses"][::-1]},
        {"responses": [{"score": 1.0}, {"score": 2.0}]},
    ],
    ids=[
        "text", "bytes", "nested", "gzip", "list", "other key", "mapping", "bare numbers",
        "missing", "extra", "misplaced", "no ids",
    ],
)  # fmt: skip
async def test_an_answer_of_another_shape_fails_the_call(answer: Any) -> None:
    async with endpoint(replying(answer)) as scorer:
        with pytest.raises(InvalidScore):
            await scorer.score(requests(2))


async def test_redirects_are_not_followed() -> None:
    visited = []

    async def handler(request: web.Request) -> web.StreamResponse:
        visited.append(request.path_qs)
        raise web.HTTPTemporaryRedirect("/score?again")

    async with endpoint(handler) as scorer:
        with pytest.raises(ScorerRaised, match="redirects"):
            await scorer.score(requests(1))
    assert len(visited) == 1


async def test_an_answer_beyond_the_size_limit_is_cut_off() -> None:
    sent = 0

    async def handler(request: web.Request) -> web.StreamResponse:
        nonlocal sent
        response = web.StreamResponse()
        await response.prepare(request)
        while True:  # endless; ends when the client hangs up
            await response.write(b" " * 65536)
            sent += 65536

    async with endpoint(handler, max_response_bytes=1 << 20) as scorer:
        with pytest.raises(InvalidScore, match="longer than 1048576"):
            await scorer.score(requests(1))
    assert sent < 64 << 20


async def test_a_slow_endpoint_is_a_timeout() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(0.3)
        return web.Response()

    async with endpoint(handler, timeout_s=0.05) as scorer:
        with pytest.raises(ScoreTimeout, match=r"within 0\.05 s"):
            await scorer.score(requests(1))


async def test_the_token_is_sent_and_stands_in_no_message(monkeypatch) -> None:
    monkeypatch.setenv("JUDGE_TOKEN", TOKEN)
    seen = []

    async def handler(request: web.Request) -> web.StreamResponse:
        seen.append(request.headers["Authorization"])
        return web.Response(status=500, text=str(dict(request.headers)), reason=TOKEN)

    async with endpoint(handler, token_env="JUDGE_TOKEN") as scorer:
        with pytest.raises(ScorerRaised, match="status 500") as caught:
            await scorer.score(requests(1))
    assert seen == [f"Bearer {TOKEN}"]
    for secret in (TOKEN, "in-the-query"):
        assert secret not in str(caught.value)
        assert secret not in repr(scorer)


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nbad header %s\r\n\r\n",
        b"HTTP/9.9 %s\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%s\r\n",
        b"HTTP/1.1 200 %s\r\nX: y\r\n",
    ],
)
async def test_what_is_no_http_is_not_quoted(answer: bytes, monkeypatch) -> None:
    monkeypatch.setenv("JUDGE_TOKEN", TOKEN)

    async def reply(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        (token,) = [line for line in head.split(b"\r\n") if line.startswith(b"Authorization")]
        writer.write(answer % token)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(reply, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
    scorer = HttpScorer(HttpScorerConfig(kind="http", url=url, token_env="JUDGE_TOKEN"))
    with pytest.raises(ScorerRaised, match="no whole, valid answer: ") as caught:
        await scorer.score(requests(1))
    await scorer.close()
    server.close()
    assert TOKEN not in str(caught.value)
    assert "Bearer" not in str(caught.value)


async def test_nobody_listening_is_a_typed_failure() -> None:
    async with endpoint(replying(rows(1.0))) as scorer:
        pass
    with pytest.raises(RewardFailure):
        await scorer.score(requests(1))
    await scorer.close()


async def test_metadata_that_json_cannot_carry_is_a_typed_failure() -> None:
    asked = [ScoreRequest("t0", "p", "c", (2,), (1,), "stop", None, {"when": object()})]
    async with endpoint(replying(rows(1.0))) as scorer:
        with pytest.raises(ScorerRaised, match="metadata"):
            await scorer.score(asked)


@pytest.mark.parametrize(
    "url",
    [
        "http://judge.example.com/score",
        "http://10.0.0.1/score",
        "http://127.0.0.1@judge.example.com/score",
        "http://localhost.example.com/score",
        "https://user:password@judge.example.com/",
        "https://judge.example.com/score?model=large&api_key=canary-of-the-query",
        "ftp://127.0.0.1/",
        "judge.example.com",
        "https://",
        "http://[::1/",
        "https://judge.example.com:port/",
    ],
)
def test_addresses_that_are_not_safe_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match="scorer url") as refused:
        HttpScorer(HttpScorerConfig(kind="http", url=url))
    assert "canary" not in str(refused.value)


@pytest.mark.parametrize(
    "url",
    [
        "https://judge.example.com/x?model=large",
        "http://localhost:1/",
        "http://[::1]:1/",
        "http://127.0.0.2/",
    ],
)
def test_https_and_loopback_addresses_are_taken(url: str) -> None:
    HttpScorer(HttpScorerConfig(kind="http", url=url))


def test_a_host_that_is_not_on_the_list_is_refused() -> None:
    allowed = ("judge.example.com",)
    HttpScorer(HttpScorerConfig(kind="http", url="https://JUDGE.example.com/", allow_hosts=allowed))
    with pytest.raises(ValueError, match="allow_hosts"):
        HttpScorer(HttpScorerConfig(kind="http", url="https://evil.com/", allow_hosts=allowed))


@pytest.mark.parametrize("value", [None, "", "two words", "line\nbreak", "smörgås"])
def test_a_token_that_cannot_be_used_is_refused_by_the_name_of_its_variable(
    monkeypatch, value: str | None
) -> None:
    monkeypatch.delenv("JUDGE_TOKEN", raising=False)
    if value is not None:
        monkeypatch.setenv("JUDGE_TOKEN", value)
    with pytest.raises(ValueError, match="JUDGE_TOKEN") as caught:
        HttpScorer(HttpScorerConfig(kind="http", url="https://j.example/", token_env="JUDGE_TOKEN"))
    assert not value or value not in str(caught.value)


# ---- whatever an endpoint answers


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=9)
    | st.sampled_from(["\ud800", "t0", "t1", 10**400, "1.0", "\x1b[2J"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3)
    ),
    max_leaves=6,
)
one_row = st.fixed_dictionaries(
    {},
    optional={
        "trajectory_id": st.sampled_from(["t0", "t1"]) | json_values,
        "score": st.floats() | json_values,
        "parts": st.dictionaries(st.sampled_from(["\ud800", "a", "\n"]) | st.text(max_size=3),
                                 st.floats() | json_values, max_size=3) | json_values,
    },
)  # fmt: skip
right_ids = st.tuples(one_row, one_row).map(
    lambda two: [row | {"trajectory_id": f"t{i}"} for i, row in enumerate(two)]
)
answers = st.binary(max_size=80) | (
    json_values | st.fixed_dictionaries({"responses": right_ids | st.lists(one_row, max_size=3)})
).map(lambda value: json.dumps(value).encode())


@given(answers)
@settings(max_examples=500)
def test_whatever_is_answered_is_a_whole_score_or_a_typed_failure(answer: bytes) -> None:
    scorer = HttpScorer(HttpScorerConfig(kind="http", url="https://judge.example.com/"))
    try:
        results = scorer._decode(requests(2), answer)
    except RewardFailure as refused:
        said = str(refused)
        said.encode()
        assert "\x1b" not in said
        return
    assert [result.trajectory_id for result in results] == ["t0", "t1"]
    for result in results:
        if isinstance(result, ScoreFailure):
            result.reason.encode()
        else:  # such a score can be trained on, and stored
            to_table([tiny.trajectory(score=result.score, score_parts=result.parts)])


openings = st.sampled_from(
    [
        b"",
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n",
        b"HTTP/1.1 999 \xff\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: http://[\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 20_000,
        b"HTTP/9.9 200 OK\r\n\r\n",
    ]
)


@given(openings, st.binary(max_size=60))
@settings(max_examples=80)
def test_whatever_bytes_come_over_the_wire_are_a_typed_failure(opening: bytes, rest: bytes) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(opening + rest)
        await writer.drain()
        writer.close()

    async def ask() -> None:
        server = await asyncio.start_server(talk, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
        scorer = HttpScorer(HttpScorerConfig(kind="http", url=url, timeout_s=2))
        try:
            with pytest.raises(RewardFailure):
                await scorer.score(requests(1))
        finally:
            await scorer.close()
            server.close()

    asyncio.run(ask())
