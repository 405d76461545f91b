"""Draws benchmarks/results/shares.svg from the committed results: what raylign gets of what the machine
gives, where 1 is the bare thing measured in the same run; and of what its peers get, beside it.

    python -m benchmarks.plot
"""

from __future__ import annotations

import json
from html import escape

from benchmarks import work

RESULTS = work.ROOT / "benchmarks/results"
# (what is shown, the result's file, its key)
BARS = (
    ("generators, of raw vLLM", "generator", "share_of_raw_vllm"),
    ("the same, new weights every 2 s", "generator", "share_of_raw_vllm_with_pushes"),
    ("PPO update, of a bare loop, 2.66M", "learner", "share_of_bare_loop"),
    ("PPO update, of a bare loop, 40M", "learner", "share_of_bare_loop_40m"),
    ("synchronous PPO, of the ideal", "end_to_end", "share_of_ideal_sync"),
    ("asynchronous PPO, of the ideal", "end_to_end", "share_of_ideal"),
    ("... with the generator's logprobs", "end_to_end", "share_behavior_anchor"),
    ("... with a shared critic", "end_to_end", "share_shared_trunk"),
    ("... with a bfloat16 learner", "end_to_end", "share_bfloat16"),
    ("GRPO, times TRL's with vLLM", "peers", "times_trl_grpo"),
    ("PPO, shared critic, times TRL's", "peers", "times_trl_ppo"),
)
LEFT, WIDTH, ROW, TOP = 250, 640, 26, 14


def figures(name: str) -> dict[str, float]:
    """The JSON line that ends a result; {} if there is none."""
    path = RESULTS / f"{name}.txt"
    if not path.exists():
        return {}
    found: dict[str, float] = json.loads(path.read_text().splitlines()[-1])
    return found


def svg(bars: list[tuple[str, float]]) -> str:
    bottom, most = TOP + ROW * len(bars), max(share for _, share in bars)

    def x(share: float) -> float:
        return round(LEFT + share / most * (WIDTH - LEFT - 50), 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + 30}" '
        'font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{bottom + 30}" fill="#fff"/>',
    ]
    for row, (label, share) in enumerate(bars):
        y = TOP + ROW * row
        color = "#2f6db5" if row % 2 == 0 else "#5b93d3"
        parts.append(
            f'<text x="{LEFT - 10}" y="{y + 15}" text-anchor="end">{escape(label)}</text>'
            f'<rect x="{LEFT}" y="{y + 3}" width="{x(share) - LEFT:.1f}" height="{ROW - 8}" '
            f'fill="{color}"/><text x="{x(share) + 6}" y="{y + 15}">{share:.2f}</text>'
        )
    for share in (quarter / 4 for quarter in range(int(4 * most) + 1)):
        dash = "" if share == 1 else ' stroke-dasharray="2 4"'
        parts.append(
            f'<line x1="{x(share)}" x2="{x(share)}" y1="{TOP - 6}" y2="{bottom + 4}" '
            f'stroke="#888"{dash}/>'
            f'<text x="{x(share)}" y="{bottom + 20}" text-anchor="middle">{share:g}</text>'
        )
    return "\n".join([*parts, "</svg>\n"])


def main() -> None:
    bars = [(label, found[key]) for label, name, key in BARS if key in (found := figures(name))]
    (RESULTS / "shares.svg").write_text(svg(bars))
    print(f"{len(bars)} bars in {RESULTS / 'shares.svg'}")


if __name__ == "__main__":
    main()
