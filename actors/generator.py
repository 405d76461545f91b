"""The generator: coroutines on an event loop, before the one thread that steps a vLLM engine.

    generate() --requests--> inbox --> engine thread: admit, step, deliver --> Completion
    receive_weights() -----> inbox     (between two steps, so weights change atomically)
    receive_answer() ------> inbox     (what the learner's weights answer to the probe)

The thread settles every future, also when it dies (engine_thread.py).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

from actors.config import GeneratorsConfig
from actors.engine_thread import Deliver, Delivery, EngineThread
from actors.generate_request import GenerateRequest
from actors.trajectory import Completion
from actors.vllm_engine import make_engine
from actors.weight_update import ProbeAnswer, WeightLayout, WeightUpdate


class Generator:
    """Samples completions, continuously batched; takes new weights without stopping."""

    def __init__(
        self,
        config: GeneratorsConfig,
        *,
        model: str,
        name: str,
        probe_bound: float,
        decode: Callable[[Sequence[int]], str],
        finish_all: bool = False,
    ) -> None:
        """`decode`: token ids -> text, without special tokens. `finish_all`: weights wait until every
        request that came before them is done, those that wait for a seat, too."""
        self.name = name
        self._config = config
        self._engine = make_engine(config, model)
        self._thread = EngineThread(
            self._engine,
            config,
            name=name,
            probe_bound=probe_bound,
            decode=decode,
            finish_all=finish_all,
        )

    async def generate(
        self, requests: Sequence[GenerateRequest]
    ) -> list[asyncio.Future[Completion]]:
        """Queue requests together; one future each. GeneratorFailed if the engine is dead."""
        if not requests:
            return []
        futures, deliveries = zip(*(self._future() for _ in requests), strict=True)

        def reject(error: Any) -> None:
            for _, reject_one in deliveries:
                reject_one(error)

        self._thread.put(lambda: self._thread.add(requests, deliveries), reject)
        return list(futures)

    async def agree_layout(self, layout: WeightLayout) -> str:
        config = self._config
        given = (layout, config.weight_memory == "shared", config.weight_push == "delta")
        return await self._call(lambda: self._engine.collective_rpc("agree_layout", args=given)[0])

    async def receive_weights(self, update: WeightUpdate) -> dict[str, float]:
        """Verify, apply, probe, compare with the learner's answer, which `receive_answer` brings before or
        after. Returns seconds, of the whole and of each part, and the probe's difference. Raises
        WeightsRejected, after which this generator samples nothing any more; or NeedsAll, after which all
        is as before: send the update in full."""
        started = time.perf_counter()
        future, delivery = self._future()
        self._thread.put(lambda: self._thread.apply(update, delivery), delivery[1])
        proof: dict[str, float] = await future
        return {"push_s": time.perf_counter() - started, **proof}

    async def receive_answer(self, answer: ProbeAnswer) -> None:
        """What the learner's weights answer to the probe of an update. Raises WeightsRejected if this
        engine has answered something else."""
        await self._call(lambda: self._thread.compare_with(answer))

    async def status(self) -> dict[str, Any]:
        """Asked of the engine thread itself, so that an answer proves that it still turns."""
        return await self._call(self._thread.describe)

    async def forget(self) -> None:
        """Give up every request; whoever waits for one gets GeneratorFailed. Weights stay."""
        await self._call(self._thread.forget)

    async def close(self) -> None:
        await asyncio.to_thread(self._thread.close)

    def _future(self) -> tuple[asyncio.Future[Any], Delivery]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()

        def settle(setter: Deliver, value: Any) -> None:
            if not future.done():
                setter(value)

        def from_thread(setter: Deliver) -> Deliver:
            def deliver(value: Any) -> None:
                loop.call_soon_threadsafe(settle, setter, value)

            return deliver

        return future, (from_thread(future.set_result), from_thread(future.set_exception))

    async def _call(self, function: Callable[[], Any]) -> Any:
        """Run `function` on the engine thread, between two steps."""
        future, (resolve, reject) = self._future()
        self._thread.put(lambda: resolve(function()), reject)
        return await future
