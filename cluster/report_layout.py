"""What the report shows, in which order, and how it looks."""

from __future__ import annotations

from typing import NamedTuple

# section -> title of a chart -> the metrics it draws
SECTIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "Progress": {
        "Reward score": ("reward/score_mean",),
        "KL to the reference": ("learner/kl_to_ref", "evaluation/kl_to_ref"),
        "Win rate, held-out": ("evaluation/win_rate",),
        "Judge score, held-out": ("evaluation/judge_mean",),
        "Reward score, held-out": ("evaluation/reward_mean",),
        "Completion length": ("rollout/completion_tokens_mean",),
        "Truncated completions": ("rollout/truncated_fraction",),
        "Loss": ("sft/loss", "sft/held_out_loss"),
        "Pairwise loss": ("reward_model/loss",),
        "Accuracy": ("reward_model/accuracy",),
    },
    "PPO": {
        "Clip fraction": ("learner/clip_fraction",),
        "approx_kl": ("learner/approx_kl",),
        "Explained variance": ("learner/explained_variance",),
        "Entropy": ("learner/entropy",),
        "Policy loss": ("learner/policy_loss",),
        "Value loss": ("learner/value_loss",),
        "Gradient norm": ("learner/grad_norm_policy", "learner/grad_norm_value"),
        "Generator against learner": (
            "learner/behavior_difference_mean",
            "learner/behavior_difference_max",
        ),
    },
    "System": {
        "Staleness": ("staleness/mean", "staleness/max"),
        "Tokens a second": ("rollout/tokens_per_s", "learner/tokens_per_s", "sft/tokens_per_s"),
        "Seconds a step": ("time/step_s", "time/rollout_wait_s", "time/update_s"),
        "Generators": ("rollout/generators",),
        "Generators busy": ("rollout/generator_busy_share",),
        "Weight push": ("weights/push_s",),
    },
}
BANDS = {"reward/score_mean": "reward/score_sd"}  # metric -> the half-width drawn around it


class Tile(NamedTuple):
    label: str
    metric: str  # for a run that has no summary, and where the summary has no such figure; or ""
    before: str = "start"  # key of the summary; "" where the start says nothing
    after: str = "end"
    format: str = "{:.3g}"
    note: str = "first and last step"


TILES = (
    Tile("Win rate", "evaluation/win_rate", "win_rate_before", "win_rate", "{:.0%}", "held-out"),
    Tile("Judge score", "evaluation/judge_mean", "judge_before", "judge_after", note="held-out"),
    Tile("Reward score", "evaluation/reward_mean", "score_before", "score_after", note="held-out"),
    Tile("Reward score", "reward/score_mean", note="training"),
    Tile("KL to reference", "learner/kl_to_ref", "", "kl_to_ref", note="nats a completion"),
    Tile("Loss", "sft/loss"),
    Tile("Pairwise loss", "reward_model/loss"),
    Tile("Accuracy", "", "", "held_out_accuracy", "{:.0%}", "held-out pairs, at the end"),
    Tile("Accuracy", "reward_model/accuracy", format="{:.0%}"),
)

# The events that are marked in the table of them: what was lost, refused or given up.
ALARMS = {
    "checkpoint_failed", "generator_lost", "learner_lost", "reward_lost", "scale_failed",
    "step_refused", "warning",
}  # fmt: skip

STYLE = """
:root{color-scheme:light dark;--bg:#f6f7f9;--card:#fff;--ink:#1b2330;--muted:#667085;--rule:#e4e7ec;
--c0:#2f6fde;--c1:#e07b39;--c2:#2a9d78;--c3:#9a5fc9;--c4:#c9a227;--c5:#8a94a6;
--good:#1a7f4e;--bad:#c0362c;--wait:#9a6700}
@media(prefers-color-scheme:dark){:root{--bg:#12161d;--card:#1a202a;--ink:#e6eaf0;--muted:#97a3b6;
--rule:#2b3442;--c0:#6ea3ff;--c1:#f2a065;--c2:#56c9a2;--c3:#c493ee;--c4:#e3c35a;--c5:#7f8a9c;
--good:#4cc38a;--bad:#ff7b72;--wait:#e3b341}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main{max-width:1360px;margin:0 auto;padding:32px 24px 64px}
header{display:flex;flex-wrap:wrap;align-items:baseline;gap:6px 14px;margin-bottom:20px}
h1{font-size:28px;line-height:1.2;margin:0;overflow-wrap:anywhere}
h2{font-size:19px;margin:40px 0 12px}
header p{margin:0;color:var(--muted)}
.state{font-size:13px;font-weight:600;padding:2px 10px;border-radius:99px;
border:1px solid currentColor;color:var(--wait)}
.state.finished{color:var(--good)}.state.failed,.state.died{color:var(--bad)}
.error{border-left:4px solid var(--bad);padding:8px 14px;background:var(--card);
white-space:pre-wrap;overflow-wrap:anywhere}
.card,.tile{background:var(--card);border:1px solid var(--rule);border-radius:10px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(170px,1fr));gap:12px}
.tile{padding:14px 16px}
.tile span{display:block;color:var(--muted);font-size:13px}
.tile b{display:block;font-size:24px;line-height:1.35;font-variant-numeric:tabular-nums}
.tile b em{font-style:normal;font-weight:400;font-size:17px;color:var(--muted)}
.tile small{color:var(--muted)}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(380px,100%),1fr));gap:14px}
.pad{padding:16px}
.sample{margin-bottom:14px;overflow:hidden}
.sample h3{margin:0;padding:10px 16px;font-size:13px;color:var(--muted);
border-bottom:1px solid var(--rule)}
.sample .prompt{padding:10px 16px;border-bottom:1px solid var(--rule);font-weight:600}
.pair{display:grid;grid-template-columns:1fr 1fr}
.pair>div{padding:10px 16px 14px;min-width:0}.pair>div+div{border-left:1px solid var(--rule)}
.pair h4{display:flex;justify-content:space-between;margin:0 0 4px;font-size:13px;
color:var(--muted)}
.text{white-space:pre-wrap;overflow-wrap:anywhere;max-height:18em;overflow:auto}
@media(max-width:700px){.pair{grid-template-columns:1fr}.pair>div+div{border-left:0;
border-top:1px solid var(--rule)}}
.scroll{overflow:auto;max-height:30em}
table{border-collapse:collapse;width:100%;font-size:14px}
th,td{text-align:left;padding:6px 12px;border-bottom:1px solid var(--rule);vertical-align:top}
th{color:var(--muted);font-weight:600;position:sticky;top:0;background:var(--card)}
td{font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
td:not(:last-child){white-space:nowrap}
details{margin-top:12px}summary{cursor:pointer;padding:10px 16px;font-weight:600}
pre{margin:0;padding:0 16px 16px;overflow:auto;font-size:13px}
.card>p{margin:10px 0 0}.scroll>p{margin:0}
.two svg{max-width:480px;margin:0 auto}
.two{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(440px,100%),1fr));gap:14px}
.none{color:var(--muted)}
@media print{.card,.tile{break-inside:avoid}}
"""
STYLE += ",".join(f"tr.{event} td" for event in sorted(ALARMS)) + "{color:var(--bad)}\n"
