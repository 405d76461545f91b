"""New weights in a real vLLM engine: it computes what transformers computes from the same numbers,
by whichever way they got there. One engine, with untied embeddings and biases, serves all tests."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors import weight_delta, weight_receiver, weight_swap
from actors.config import GeneratorsConfig
from actors.vllm_engine import CPU_ENGINE_ENV, make_engine, probe_params, set_num_threads
from actors.weight_segment import SegmentInUse, WrittenSegment
from actors.weight_update import (
    NeedsAll,
    Probe,
    Refused,
    WeightLayout,
    WeightsRejected,
    WeightUpdate,
    digest_buckets,
)

PROBE = Probe(tuple(range(3, 20)), tuple(range(20, 43)))


@dataclass
class Bench:
    """An engine, the same model in transformers, and two segments between them."""

    engine: Any
    model: Any
    layout: WeightLayout
    segments: tuple[WrittenSegment, ...]
    first: dict[str, Any]
    version: int = 0

    def receiver(self, method: str, *given: Any) -> Any:
        answer = self.engine.collective_rpc(method, args=given)[0]
        if isinstance(answer, Refused):
            raise answer.error
        return answer

    def image(self) -> np.ndarray:
        """New weights in transformers' model; its bytes by the layout."""
        import torch

        self.version += 1
        torch.manual_seed(self.version)
        image = np.zeros(self.layout.total_bytes, np.uint8)
        parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            for spec in self.layout.tensors:
                parameter = parameters[spec.name]
                parameter.copy_(self.first[spec.name] + 0.1 * torch.randn_like(parameter))
                piece = parameter.numpy().reshape(-1).view(np.uint8)
                image[spec.offset : spec.offset + spec.num_bytes] = piece
        return image

    def update(self, image: np.ndarray, **how: Any) -> WeightUpdate:
        digests = digest_buckets(self.layout, image)
        return WeightUpdate(self.version, self.layout.id, digests, PROBE, **how)

    def written(self) -> WeightUpdate:
        image, segment = self.image(), self.segments[self.version % 2]
        with segment.locked(wait_s=0):
            segment.data[:] = image
        return self.update(image, segment=segment.path)

    def error(self) -> float:
        """max |vLLM's logprob - transformers'| over the probe."""
        import torch

        name = f"ids-{self.version}"
        self.engine.reset_prefix_cache()
        prompt = {"prompt_token_ids": list(PROBE.prompt_ids)}
        self.engine.add_request(name, prompt, probe_params(PROBE))
        outputs: list[Any] = []
        while self.engine.has_unfinished_requests():
            outputs += self.engine.step()
        answer = outputs[-1].outputs[0].logprobs[0]
        found = [answer[token].logprob for token in PROBE.next_ids]
        with torch.no_grad():
            logits = self.model(torch.tensor([PROBE.prompt_ids]), use_cache=False).logits[0, -1]
        expected = torch.log_softmax(logits, -1)[list(PROBE.next_ids)]
        return float(np.abs(np.array(found) - expected.numpy()).max())


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    os.environ.update(CPU_ENGINE_ENV)
    from transformers import AutoModelForCausalLM

    from tests.learner_cases import write_qwen2

    folder = tmp_path_factory.mktemp("untied")
    path = write_qwen2(folder / "model", tie_word_embeddings=False)
    config = GeneratorsConfig(max_model_len=64, max_num_seqs=2, kv_cache_bytes=1 << 24)
    engine = make_engine(config, path)
    model = AutoModelForCausalLM.from_pretrained(path)
    layout = WeightLayout.of(((n, tuple(p.shape)) for n, p in model.named_parameters()), "float32")
    segments = tuple(
        WrittenSegment(str(folder / f"segment-{turn}"), layout.total_bytes, create=True)
        for turn in (0, 1)
    )
    first = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return Bench(engine, model, layout, segments, first)


def in_pieces(layout: WeightLayout, image: np.ndarray) -> tuple[np.ndarray, ...]:
    return tuple(image[start:end] for start, end in layout.buckets)


def not_planned(*_: Any, **__: Any) -> None:
    return None


# In this order, a way at a time: an engine that computes on a segment stays with it.
@pytest.fixture(scope="module", params=["reloaded", "packed", "shared"])
def way(request: pytest.FixtureRequest, bench: Bench) -> str:
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "reloaded":
            patch.setattr(weight_receiver, "_plan", not_planned)
        bench.receiver("agree_layout", bench.layout, request.param == "shared", True)
    return request.param


def test_every_update_is_what_transformers_computes(bench: Bench, way: str) -> None:
    for _ in range(3):
        spent = bench.receiver("receive_weights", bench.written())
        assert spent.keys() == {"verify_s", "apply_s"}
        assert bench.error() < 2e-5
    way_back = bench.update(bench.image(), payload=())
    with pytest.raises(WeightsRejected):
        bench.receiver("receive_weights", replace(way_back, segment=bench.segments[0].path))


def test_large_weights_are_packed_side_by_side_each_by_as_many_threads_as_the_engine_has(
    bench: Bench, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from vllm.model_executor.layers import utils

    (swap,) = bench.engine.collective_rpc(lambda worker: worker._receiver._swap)
    if way == "packed":
        assert swap._num_threads == 1  # these are small
        monkeypatch.setattr(swap, "_num_threads", 3)
    plain, packers, sizes = utils.dispatch_cpu_unquantized_gemm, set(), set()
    at_once = {"reloaded": 1, "packed": 3, "shared": 0}[way]
    together = threading.Barrier(max(1, at_once), timeout=5.0)

    def pack(module: Any, *, remove_weight: bool) -> None:
        if threading.get_ident() not in packers:
            packers.add(threading.get_ident())
            together.wait()
        sizes.add(torch.get_num_threads())
        plain(module, remove_weight=remove_weight)

    monkeypatch.setattr(utils, "dispatch_cpu_unquantized_gemm", pack)
    image = bench.image()
    bench.receiver("receive_weights", bench.update(image, payload=in_pieces(bench.layout, image)))
    assert bench.error() < 2e-5
    assert len(packers) == at_once
    assert sizes == ({torch.get_num_threads()} if at_once else set())


def test_a_thread_that_packs_counts_as_many_as_the_one_that_asked(bench: Bench) -> None:
    import torch

    usual = torch.get_num_threads()
    set_num_threads(usual + 2)
    try:
        with ThreadPoolExecutor(1, initializer=weight_swap._threads_as_here()) as threads:
            assert threads.submit(torch.get_num_threads).result(5.0) == usual + 2
    finally:
        set_num_threads(usual)


def test_deltas_are_exact_and_need_their_base(bench: Bench, way: str) -> None:
    with pytest.raises(NeedsAll, match=r"delta to -5.*send it in full"):
        bench.receiver("receive_weights", bench.update(bench.image(), payload=(), base=-5))
    before = bench.image()
    bench.receiver("receive_weights", bench.update(before, payload=in_pieces(bench.layout, before)))
    for _ in range(2):
        base, now = bench.version, bench.image()
        delta = weight_delta.encode(bench.layout, before, now)
        bench.receiver("receive_weights", bench.update(now, payload=delta, base=base))
        assert bench.error() < 2e-5
        before = now
    wrong = weight_delta.encode(bench.layout, bench.image(), bench.image())
    with pytest.raises(WeightsRejected, match="not those the learner digested"):
        bench.receiver("receive_weights", bench.update(before, payload=wrong, base=base + 1))


def test_a_segment_that_an_engine_computes_on_cannot_be_written(bench: Bench) -> None:
    """After the last way, shared. What the engine has left can be written."""
    for _ in range(2):
        bench.receiver("receive_weights", bench.written())
    in_use, left = bench.segments[bench.version % 2], bench.segments[(bench.version + 1) % 2]
    with pytest.raises(SegmentInUse, match="still reads"), in_use.locked(wait_s=0):
        pass
    with left.locked(wait_s=0), pytest.raises(SegmentInUse, match="being written"):
        bench.receiver("receive_weights", bench.update(left.data, segment=left.path))


def test_segments_that_are_gone_stay_with_those_who_compute_on_them(bench: Bench) -> None:
    bench.receiver("receive_weights", bench.written())
    for segment in bench.segments:
        segment.remove()
    assert not list(Path(bench.segments[0].path).parent.glob("segment-*"))
    assert bench.error() < 2e-5
