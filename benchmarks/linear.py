"""A learner's products of float32 matrices: torch's own (MKL) and oneDNN's, one thread each.

    python -m benchmarks.linear [--quick]

For layers of a small and of a 0.5B model, the three products of a linear layer on as many tokens as a
microbatch has: forward, the gradient of what came in, the gradient of the weights. Each pair in turn;
times: torch's seconds over oneDNN's, medians of 7. raylign takes oneDNN's where the processor is
AMD's and has AVX-512 (actors/onednn.py).

Then few tokens, as in a probe, through the matrices of a model that no cache holds: oneDNN's with the
matrix on the right, as torch has it, and on the left, and MKL's as a batch of its two halves. raylign
takes the left (actors/onednn.py); for one or two tokens the batch; and torch's own, if the processor is
Intel's and the tokens are three or less.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import work

SHAPES = ((256, 512), (512, 256), (896, 4864), (4864, 896))
TOKENS, OPERATIONS = 2048, 4e9
FEW_SHAPES = ((768, 2304), (768, 768), (768, 4096), (2048, 768)) * 8  # 227 MB
FEW_TOKENS = (1, 2, 3, 4, 8, 16, 32)


def onednn(a: Any, b: Any) -> Any:
    import torch

    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")


def pairs(k: int, n: int) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    import torch

    x, gradient, weight = torch.randn(TOKENS, k), torch.randn(TOKENS, n), torch.randn(n, k)
    return {
        "forward": (lambda: x @ weight.t(), lambda: onednn(x, weight)),
        "inputs' gradient": (lambda: gradient @ weight, lambda: onednn(gradient, weight.t())),
        "weights' gradient": (lambda: gradient.t() @ x, lambda: onednn(gradient.t(), x.t())),
    }


def few_rows(tokens: int, matrices: list[Any], repetitions: int) -> list[float]:
    """torch's seconds over those of oneDNN, the matrix on the right and on the left, and of a batch."""
    import torch

    from actors.onednn import batch

    given = {k: torch.randn(tokens, k) for k, _ in FEW_SHAPES}

    def once(multiply: Callable[[Any, Any], Any]) -> float:
        return seconds(lambda: [multiply(given[one.shape[1]], one) for one in matrices], 1)

    def flipped(multiply: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        return lambda x, weight: multiply(weight, x).t().contiguous()

    ways = (torch.nn.functional.linear, onednn, flipped(onednn), flipped(batch))
    rounds = [[once(way) for way in ways] for _ in range(1 + repetitions)]
    plain, *others = (work.median(column) for column in zip(*rounds[1:], strict=True))
    return [plain / other for other in others]


def seconds(product: Callable[[], Any], repetitions: int) -> float:
    started = time.perf_counter()
    for _ in range(repetitions):
        product()
    return time.perf_counter() - started


def main() -> None:
    options = work.parser(__doc__).parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    work.header()
    vendor = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if "vendor" in line]
    print(f"processor: {vendor[0].split()[-1]}, {torch.backends.cpu.get_cpu_capability()}")
    rows, times = [], []
    for k, n in SHAPES:
        repetitions = max(1, int(OPERATIONS / (2 * TOKENS * k * n)))
        row = []
        for plain, fast in pairs(k, n).values():
            seconds(plain, 1), seconds(fast, 1)
            row.append(
                work.median(
                    seconds(plain, repetitions) / seconds(fast, repetitions)
                    for _ in range(3 if options.quick else 7)
                )
            )
        times += row
        rows.append([f"{TOKENS} tokens, {k} to {n}", *row])
    work.table(["torch's seconds over oneDNN's", *pairs(8, 8)], rows)
    matrices = [torch.randn(n, k) for k, n in FEW_SHAPES]
    few = {tokens: few_rows(tokens, matrices, 3 if options.quick else 7) for tokens in FEW_TOKENS}
    work.table(
        ["torch's seconds over", "matrix right", "matrix left", "a batch"],
        [[f"{tokens} tokens", *times] for tokens, times in few.items()],
    )
    work.result(
        times_torch=work.median(times),
        times_torch_least=min(times),
        **{f"times_torch_{tokens}_tokens": left for tokens, (_, left, _) in few.items()},
        **{f"times_torch_{tokens}_tokens_batch": few[tokens][2] for tokens in (1, 2)},
    )


if __name__ == "__main__":
    main()
