"""One real vLLM engine and one real FSDP policy in this process serve all tests here."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import threading
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors import vllm_engine, weight_segment
from actors.vllm_engine import CPU_ENGINE_ENV
from actors.weight_segment import SegmentInUse
from actors.weight_update import ProbeAnswer, WeightsRejected, WeightUpdate
from tests.integration.engines import learner_and_engine, prove

pytestmark = pytest.mark.timeout(300)


@dataclass
class Bench:
    """A generator, a learner with the same weights, and a loop in a thread to reach them by."""

    generator: Any
    learner: Any
    model: Path
    loop: asyncio.AbstractEventLoop
    version: int = 0

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(120)

    def publish(self) -> tuple[WeightUpdate, ProbeAnswer]:
        self.version += 1
        return self.learner.publish(self.version), self.learner.answer_probe(self.version)

    def push(self) -> dict[str, float]:
        return self.run(prove(self.generator, *self.publish()))

    def generate(self, *requests: Any) -> list[Any]:
        async def all_of_them() -> list[Any]:
            return await asyncio.gather(*await self.generator.generate(requests))

        return self.run(all_of_them())


def request(name: str, **changes: Any) -> Any:
    from actors.generate_request import GenerateRequest

    base = GenerateRequest(name, (40, 41, 42, 43), max_tokens=24, temperature=0.7, seed=1)
    return dataclasses.replace(base, **changes)


async def under_way(bench: Bench, requests: list[Any]) -> list[Any]:
    """Their futures, once all of them have run for a few steps."""
    futures = await bench.generator.generate(requests)
    while (await bench.generator.status())["running"] < len(requests):
        await asyncio.sleep(0)
    await asyncio.sleep(0.03)
    return list(futures)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    os.environ.update(CPU_ENGINE_ENV)
    folder = tmp_path_factory.mktemp("engine")
    learner, layout, make = learner_and_engine(folder)
    generator = make()
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    made = Bench(generator, learner, folder / "model", loop)
    made.run(generator.agree_layout(layout))
    made.push()
    yield made
    made.run(generator.close())
    loop.call_soon_threadsafe(loop.stop)


def perturb(bench: Bench, scale: float) -> None:
    """Change the learner's weights, as an update would."""
    import torch

    torch.manual_seed(bench.version)
    with torch.no_grad():
        for parameter in bench.learner._update.models.policy.parameters():
            local = parameter.to_local()
            local.add_(torch.randn_like(local) * scale * local.std().clamp(min=1e-3))


def learner_logprobs(bench: Bench, prompt: tuple[int, ...], completion: Any, at: float) -> Any:
    from learner.learner_spec import Samples

    samples = Samples((np.array(prompt),), (np.array(completion.ids),), at)
    return bench.learner.policy_logprobs(samples)[0]


def test_the_same_seed_gives_the_same_completion_alone_and_in_company(bench: Bench) -> None:
    alone = bench.generate(request("alone"))[0]
    company = [request(f"c{i}", seed=i + 10) for i in range(12)]
    among = bench.generate(*company[:6], request("among"), *company[6:])[6]
    assert among.ids == alone.ids
    np.testing.assert_allclose(among.logprobs, alone.logprobs, atol=1e-5)


def test_logprobs_are_the_learners_at_the_sampling_temperature(bench: Bench) -> None:
    for temperature in (0.7, 1.0):
        completion = bench.generate(request(f"t{temperature}", temperature=temperature))[0]
        expected = learner_logprobs(bench, (40, 41, 42, 43), completion, temperature)
        np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4)


def test_a_push_changes_what_is_sampled_and_the_probe_proves_it(bench: Bench) -> None:
    before = bench.generate(request("before", temperature=1.0))[0]
    perturb(bench, 0.5)
    assert bench.push()["probe_difference"] <= 1e-4
    after = bench.generate(request("after", temperature=1.0))[0]
    expected = learner_logprobs(bench, (40, 41, 42, 43), after, 1.0)
    np.testing.assert_allclose(after.logprobs, expected, atol=1e-4)
    assert after.spans == ((bench.version, 0),)
    assert before.spans == ((bench.version - 1, 0),)


def test_running_completions_go_on_under_new_weights_and_know_where(bench: Bench) -> None:
    requests = [request(f"long{i}", max_tokens=100, seed=i) for i in range(8)]

    async def push_in_flight() -> list[Any]:
        futures = await under_way(bench, requests)
        perturb(bench, 0.01)
        await prove(bench.generator, *bench.publish())
        return await asyncio.gather(*futures)

    completions = bench.run(push_in_flight())
    cut = [completion for completion in completions if len(completion.spans) == 2]
    assert cut, "no completion was cut by the push"
    for completion in cut:
        (old, start), (new, middle) = completion.spans
        assert (old, new, start) == (bench.version - 1, bench.version, 0)
        assert 0 < middle < len(completion.ids)


def test_a_probe_leaves_the_logprobs_beside_it_alone(bench: Bench) -> None:
    """vLLM computes those of a step together, and the probe's are of tokens that it names."""
    prompt = (40, 41, 42, 43)
    requests = [request(f"beside{i}", max_tokens=100, seed=i) for i in range(4)]

    async def push_in_flight() -> list[Any]:
        futures = await under_way(bench, requests)
        await prove(bench.generator, *bench.publish())  # the same weights
        return await asyncio.gather(*futures)

    completions = bench.run(push_in_flight())
    assert any(len(completion.spans) == 2 for completion in completions), "none ran at the push"
    for completion in completions:
        expected = learner_logprobs(bench, prompt, completion, 0.7)
        np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4)


def test_a_prompt_finds_no_cache_that_older_weights_computed(bench: Bench) -> None:
    """While something runs vLLM does not empty its cache."""
    prompt = tuple(5 + i % 40 for i in range(140))  # more than a block
    alike = [request(f"alike{i}", prompt_ids=prompt, max_tokens=4) for i in range(3)]

    async def push_in_flight() -> list[Any]:
        running = request("running", prompt_ids=prompt, max_tokens=100, seed=5)
        long, short = await bench.generator.generate([running, alike[0]])
        await short
        perturb(bench, 0.5)
        await prove(bench.generator, *bench.publish())
        assert not long.done(), "nothing ran any more"
        new = await asyncio.gather(*await bench.generator.generate(alike[1:]))
        await long
        return new

    for completion in bench.run(push_in_flight()):
        assert completion.spans == ((bench.version, 0),)
        expected = learner_logprobs(bench, prompt, completion, 0.7)
        np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4)


def test_what_vllm_holds_back_at_a_push_is_of_the_new_weights(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a prompt too long for one step: the others with it wait in vLLM, not in the generator."""
    prompt = tuple(5 + i % 37 for i in range(140))
    scheduler = bench.generator._engine.engine_core.engine_core.scheduler
    monkeypatch.setattr(scheduler, "max_num_active_reqs", 1)
    alike = [request(f"held{i}", prompt_ids=prompt, max_tokens=90) for i in range(2)]

    async def push_in_flight() -> list[Any]:
        futures = await under_way(bench, alike)
        perturb(bench, 0.5)
        pushing = asyncio.create_task(prove(bench.generator, *bench.publish()))
        await asyncio.sleep(0.02)
        monkeypatch.undo()  # the probe has no seat otherwise
        await pushing
        return await asyncio.gather(*futures)

    first, second = bench.run(push_in_flight())
    assert len(first.spans) == 2, "it did not run when the push came"
    assert second.spans == ((bench.version, 0),)
    expected = learner_logprobs(bench, prompt, second, 0.7)
    np.testing.assert_allclose(second.logprobs, expected, atol=1e-4)


def test_stop_strings_end_a_completion(bench: Bench) -> None:
    free = bench.generate(request("free", max_tokens=40))[0]
    text = free.text
    if len(text) < 4:
        pytest.skip("the random model said too little to stop in")
    stopped = bench.generate(request("stopped", max_tokens=40, stop=(text[2:4],)))[0]
    assert stopped.finish_reason == "stop"
    assert len(stopped.ids) <= len(free.ids)


@pytest.mark.parametrize("more", [1, 2, 3])
def test_a_probe_is_shared_out_among_threads_and_nothing_else_is(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, more: int
) -> None:
    """Packing is not: on some processors vLLM's products are then wrong, and the push is refused."""
    import torch

    usual = bench.run(bench.generator._call(torch.get_num_threads))
    monkeypatch.setattr(vllm_engine, "PUSH_THREADS", usual + more)
    engine = bench.generator._engine
    threads: dict[str, set[int]] = {"collective_rpc": set(), "step": set()}

    def counted(method: str, plain: Any) -> Any:
        def count(*args: Any, **named: Any) -> Any:
            threads[method].add(torch.get_num_threads())
            return plain(*args, **named)

        return count

    for method in threads:
        monkeypatch.setattr(engine, method, counted(method, getattr(engine, method)))
    bench.push()
    assert threads == {"collective_rpc": {usual}, "step": {usual + more}}
    threads["step"].clear()
    bench.generate(request("alone", max_tokens=3))
    assert threads["step"] == {usual}


def test_more_requests_than_seats_are_all_answered(bench: Bench) -> None:
    completions = bench.generate(*(request(f"many{i}", seed=i, max_tokens=4) for i in range(40)))
    assert len(completions) == 40
    assert all(1 <= len(completion.ids) <= 4 for completion in completions)


def test_exported_weights_give_the_same_greedy_completion_in_transformers(
    bench: Bench, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from learner.hf_folder import gather_weights, write_folder

    bench.push()
    write_folder(
        gather_weights(bench.learner._update.models.policy), str(bench.model), tmp_path / "m"
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    greedy = bench.generate(request("greedy", temperature=0.0, max_tokens=16))[0]
    prompt = torch.tensor([[40, 41, 42, 43]])
    with torch.no_grad():
        theirs = model.generate(prompt, max_new_tokens=16, do_sample=False, pad_token_id=0)
    assert tuple(theirs[0, 4:].tolist()) == greedy.ids


def test_an_engine_may_compute_on_the_segment_that_the_learner_writes(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From here on it does; the head is tied to the embedding."""
    generator = bench.generator
    generator._config = generator._config.model_copy(update={"weight_memory": "shared"})
    bench.run(generator.agree_layout(bench.learner._publisher.layout))
    for number in range(3):
        perturb(bench, 0.1)
        assert bench.push()["probe_difference"] <= 1e-5
        completion = bench.generate(request(f"shared{number}", temperature=1.0))[0]
        expected = learner_logprobs(bench, (40, 41, 42, 43), completion, 1.0)
        np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4)
    written = bench.publish()
    monkeypatch.setattr(weight_segment, "WRITE_WAIT_S", 0.0)
    with pytest.raises(SegmentInUse, match="a receiver still reads"):  # what it proved last
        bench.publish()
    bench.run(prove(generator, *written))
    bench.push()


def test_a_flipped_bit_is_refused_and_nothing_is_sampled_after_it(bench: Bench) -> None:
    """The last test: the generator is dead after it."""
    from actors.generate_request import GeneratorFailed

    update, _ = bench.publish()
    segment = bytearray(Path(update.segment).read_bytes())
    segment[len(segment) // 3] ^= 0b100
    Path(update.segment).write_bytes(segment)
    with pytest.raises(WeightsRejected, match="not those the learner digested"):
        bench.run(bench.generator.receive_weights(update))
    with pytest.raises((WeightsRejected, GeneratorFailed)):
        bench.generate(request("after-rejection"))
