"""The one thread that steps a vLLM engine.

    inbox --> admit, step, deliver --> Completion

Everything reaches the engine through the inbox, between two steps; a crash of the thread fails every
waiter with GeneratorFailed. After an update no completion leaves before the engine has answered the
probe as the learner has: what is finished in the meantime is held, and discarded if it answers otherwise.
"""

from __future__ import annotations

import collections
import contextlib
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from actors.config import GeneratorsConfig
from actors.generate_request import GenerateRequest, GeneratorFailed
from actors.trajectory import Completion
from actors.vllm_engine import all_cores, completion_params, probe_params, salt_waiting
from actors.weight_proof import Deliver, Delivery, WeightProof
from actors.weight_update import NeedsAll, ProbeAnswer, Refused, WeightsRejected, WeightUpdate

PROBE_ID = "probe"


class EngineThread:
    """Everything but `put` and `close` runs on the thread itself: it is handed to `put`."""

    def __init__(
        self,
        engine: Any,
        config: GeneratorsConfig,
        *,
        name: str,
        probe_bound: float,
        decode: Callable[[Sequence[int]], str],
        finish_all: bool,
    ) -> None:
        """`decode`, `finish_all`: see Generator."""
        self._engine = engine
        self._config = config
        self._name = name
        self._decode = decode
        self._finish_all = finish_all
        self._inbox: queue.SimpleQueue[tuple[Callable[[], None], Deliver]] = queue.SimpleQueue()
        self._waiting: collections.deque[GenerateRequest] = collections.deque()
        self._futures: dict[str, Delivery] = {}
        self._started: dict[str, float] = {}
        self._held: list[Any] = []
        self._proof = WeightProof(name, probe_bound)
        self._num_updates = 0  # a version's number may come again, of other weights
        self._closed = False
        self._busy_s = 0.0
        self._weights_s = 0.0
        self._num_tokens = 0
        self._first_token_at: float | None = None
        self._thread = threading.Thread(target=self._run, daemon=True, name=f"engine-{name}")
        self._thread.start()

    def put(self, operation: Callable[[], None], reject: Deliver) -> None:
        """Run `operation` between two steps. If it fails, the engine is given up and `reject` told."""
        self._inbox.put((operation, reject))

    def close(self) -> None:
        """Waits until it has ended, 10 s at most."""
        self._closed = True
        self.put(lambda: None, lambda _: None)
        self._thread.join(10.0)

    def add(self, requests: Sequence[GenerateRequest], deliveries: Sequence[Delivery]) -> None:
        ids = [request.request_id for request in requests]
        self._futures.update(zip(ids, deliveries, strict=True))
        self._waiting.extend(requests)

    def _run(self) -> None:
        try:
            while not self._closed:
                self._take_inbox(wait=self._is_idle())
                self._admit(len(self._waiting))
                if self._engine.has_unfinished_requests():
                    self._step()
        except Exception as error:
            self._refuse_all(error)

    def _is_idle(self) -> bool:
        return not self._waiting and not self._engine.has_unfinished_requests()

    def _take_inbox(self, *, wait: bool) -> None:
        """Do what has been put there; with `wait` at least one of it."""
        while True:
            try:
                operation, reject = self._inbox.get(block=wait)
            except queue.Empty:
                return
            try:
                operation()
            except Exception as error:
                reject(self._in_words(error))
                raise
            wait = False

    def _admit(self, most: int) -> int:
        """Give the engine as much as it decodes together, `most` at most; how many that was. The rest
        waits here, not in vLLM, so that a probe is never queued behind prompts, and a late prompt starts
        under the newest weights."""
        seats = self._config.max_num_seqs - len(self._started)
        admitted = [self._waiting.popleft() for _ in range(min(seats, most, len(self._waiting)))]
        for request in admitted:
            self._started[request.request_id] = time.time()
            params = completion_params(
                request.max_tokens, request.temperature, request.seed, request.stop
            )
            self._engine.add_request(request.request_id, self._prompt(request.prompt_ids), params)
        return len(admitted)

    def _prompt(self, ids: Sequence[int]) -> dict[str, Any]:
        """vLLM's prompt, salted so that it shares no KV cache that other weights computed."""
        return {"prompt_token_ids": list(ids), "cache_salt": self._salt}

    @property
    def _salt(self) -> str:
        return f"weights-{self._num_updates}"

    def _step(self) -> None:
        started = time.perf_counter()
        with all_cores() if self._proof.probing else contextlib.nullcontext():
            outputs = self._engine.step()
        self._busy_s += time.perf_counter() - started
        if self._first_token_at is None and self._started:
            self._first_token_at = time.time()
        for output in outputs:
            if output.finished and output.request_id == PROBE_ID:
                self._proof.engine_answers(output.outputs[0].logprobs[0])
            elif output.finished:
                self._held.append(output)
        self._let_go()

    def _let_go(self) -> None:
        """Deliver what is finished, unless the weights are not proved."""
        if self._held and not self._proof.pending:
            held, self._held = self._held, []
            for output in held:
                self._deliver(output)

    def _deliver(self, output: Any) -> None:
        sample = output.outputs[0]
        started = self._started.pop(output.request_id)
        resolve, _ = self._futures.pop(output.request_id)
        ids = tuple(sample.token_ids)
        self._num_tokens += len(ids)
        resolve(
            Completion(
                ids=ids,
                logprobs=tuple(sample.logprobs.logprobs),
                # vLLM cuts the text at a stop string; everything else is decoded here.
                text=sample.text if isinstance(sample.stop_reason, str) else self._decode(ids),
                finish_reason=sample.finish_reason,
                spans=tuple((int(span.version), span.start) for span in sample.weight_versions),
                generate_s=time.time() - started,
            )
        )

    def apply(self, update: WeightUpdate, delivery: Delivery) -> None:
        if self._proof.pending:  # and never to be proved: its learner is gone
            self.forget()
        if self._finish_all or self._config.weight_update == "drained":
            self._drain()
        started = time.perf_counter()
        try:
            # Not by all cores: packing is shared out otherwise (weight_swap.py).
            spent = _received(self._engine.collective_rpc("receive_weights", args=(update,)))
        except NeedsAll as missing:
            delivery[1](NeedsAll(f"{self._name}: {missing}"))
            return
        except Exception as error:
            raise WeightsRejected(f"{self._name}: {error}") from error
        self._weights_s += time.perf_counter() - started
        self._engine.set_weight_version(str(update.version))
        self._num_updates += 1
        salt_waiting(self._engine, self._salt)
        self._proof.begin(update, delivery, spent)
        prompt = self._prompt(update.probe.prompt_ids)
        self._engine.add_request(PROBE_ID, prompt, probe_params(update.probe))

    def _drain(self) -> None:
        """Step until no request runs; with finish_all, until none waits either that waits by now. Calls are
        answered meanwhile, and requests that are added wait for the new weights."""
        left = len(self._waiting) if self._finish_all else 0
        while not self._closed and (self._started or (left and self._waiting)):
            left -= self._admit(left)
            self._step()
            self._take_inbox(wait=False)

    def compare_with(self, answer: ProbeAnswer) -> None:
        """The learner's answer; the update that it is to may still be to come."""
        self._proof.learner_answers(answer)
        self._let_go()

    def describe(self) -> dict[str, Any]:
        return {
            "pid": os.getpid(),
            "running": len(self._started),
            "waiting": len(self._waiting),
            "version": self._proof.version,
            "busy_s": self._busy_s,
            "weights_s": self._weights_s,
            "completion_tokens": self._num_tokens,
            "first_token_at": self._first_token_at,
        }

    def forget(self) -> None:
        """Give up every request, and the update that is not proved yet: nothing leaves until another is."""
        probe = [PROBE_ID] if self._proof.probing else []
        self._engine.abort_request([*self._started, *probe])
        self._proof.give_up(GeneratorFailed(f"{self._name}: the update was given up"))
        for _, reject in self._futures.values():
            reject(GeneratorFailed(f"{self._name}: the request was given up"))
        for gone in (self._futures, self._started, self._waiting, self._held):
            gone.clear()

    def _refuse_all(self, error: Exception) -> None:
        """The engine is gone: every waiter, and whoever still comes, is told why. Nobody hangs."""
        error = self._in_words(error)
        for _, reject in self._futures.values():
            reject(error)
        self._proof.give_up(error)
        while not self._closed:
            _, reject = self._inbox.get()
            reject(error)

    def _in_words(self, error: Exception) -> Exception:
        """vLLM's exceptions need vLLM to unpickle."""
        if isinstance(error, WeightsRejected):
            return error
        return GeneratorFailed(f"{self._name}: {type(error).__name__}: {error}")


def _received(answers: Sequence[dict[str, float] | Refused]) -> dict[str, float]:
    """What the slowest worker took; or raises why one of them refused."""
    taken: dict[str, float] = {}
    for answer in answers:
        if isinstance(answer, Refused):
            raise answer.error
        taken |= {part: max(seconds, taken.get(part, 0.0)) for part, seconds in answer.items()}
    return taken
