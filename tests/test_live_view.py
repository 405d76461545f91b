"""The terminal view: a line a step without a terminal, no secrets, no control, any width."""

from __future__ import annotations

import io
import re

import pytest
from rich.cells import cell_len
from rich.console import Console

from cluster.live_view import LiveView, figures, printable

PPO = {
    "reward/score_mean": 0.5314,
    "learner/kl_to_ref": 1.934,
    "staleness/mean": 0.0,
    "rollout/samples_per_s": 41.25,
    "time/step_s": 3.0,
}
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def _attended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)


def screen(*, terminal: bool, width: int = 100) -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(file=text, force_terminal=terminal, width=width, highlight=False), text


def test_without_a_terminal_a_step_is_one_plain_line() -> None:
    console, text = screen(terminal=False, width=20)
    clock = Clock()
    shown = "score 0.531 | kl to ref 1.93 | staleness 0.0 | samples/s 41.2 | took 3.00 s"
    with LiveView("demo", 4, console=console, clock=clock) as view:
        view.stage("training")
        view.stage("training")
        view.roles({"generator 0": "41 running"})
        for step in (1, 2):
            clock.now += 30
            view.step({"step": step, "time": 0.0, **PPO})
        view.note("checkpoint of step 2")
    assert text.getvalue().splitlines() == [
        "demo: training",
        f"step 1/4 | {shown}",
        f"step 2/4 | 1:00 left | {shown}",
        "checkpoint of step 2",
    ]


def test_a_run_that_went_back_to_a_checkpoint_counts_its_pace_anew() -> None:
    console, text = screen(terminal=False)
    clock = Clock()
    with LiveView("demo", 4, console=console, clock=clock) as view:
        for step in (1, 2, 1, 2):
            clock.now += 30
            view.step({"step": step, "time": 0.0})
    left = [line.split(" | ")[1:] for line in text.getvalue().splitlines()]
    assert left == [[], ["1:00 left"], [], ["1:00 left"]]


@pytest.mark.parametrize("variable", ["CI", "RAY_JOB_CONFIG_JSON_ENV_VAR"])
def test_in_ci_and_in_a_ray_job_output_is_plain(
    monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "1")
    console, text = screen(terminal=True)
    with LiveView("demo", 4, console=console) as view:
        view.step({"step": 1, **PPO})
    assert ESCAPES.sub("", text.getvalue()) == text.getvalue()
    assert text.getvalue().count("\n") == 1


@pytest.mark.parametrize("width", [10, 24, 40, 80, 200])
def test_no_line_of_the_live_view_is_wider_than_the_terminal(width: int) -> None:
    console, text = screen(terminal=True, width=width)
    with LiveView("a-run-with-quite-a-long-name", 400, console=console) as view:
        view.stage("publishing weights")
        view.roles(
            {f"generator {i}": f"{i} running 文字" for i in range(30)} | {"learner": "update"}
        )
        view.step({"step": 7, **PPO})
    frame = ESCAPES.sub("", text.getvalue()).replace("\r", "")
    assert max(cell_len(line) for line in frame.splitlines()) <= width
    assert "learner" in frame
    if width >= 80:
        assert "step 7/400" in frame
        assert "19 more" in frame


@pytest.mark.parametrize(
    ("metrics", "shown"),
    [
        ({"sft/loss": 1.25, "sft/tokens_per_s": 8200.0}, "loss 1.2500 | tokens/s 8,200"),
        ({"reward_model/accuracy": 0.75}, "accuracy 75.0%"),
        ({}, "step 1/9"),
    ],
)
def test_each_stage_shows_the_figures_it_has(metrics: dict[str, float], shown: str) -> None:
    console, text = screen(terminal=False)
    LiveView("demo", 9, console=console).step({"step": 1, **metrics})
    assert text.getvalue().rstrip().endswith(shown)


def test_secrets_are_never_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh")
    monkeypatch.setenv("JUDGE_API_KEY", "key-12345678")
    for terminal in (False, True):
        console, text = screen(terminal=terminal)
        with LiveView("demo", 4, console=console) as view:
            view.stage("with hf_abcdefgh")
            view.roles({"reward": "key-12345678"})
            view.note(
                "GET https://me:hunter2@judge/score Authorization: Bearer xyz.123 hf_abcdefgh"
            )
        for secret in ("hf_abcdefgh", "key-12345678", "hunter2", "xyz.123"):
            assert secret not in text.getvalue()
        assert "https://***@judge/score" in text.getvalue()


def test_text_of_a_model_steers_neither_terminal_nor_markup() -> None:
    assert printable("a\x1b[2Jb\x07\x9bc\rd\ne") == "a[2Jbcd\ne"
    console, text = screen(terminal=False)
    LiveView("demo", 4, console=console).note("[bold]x[/bold] \x1b]0;title\x07")
    assert text.getvalue() == "[bold]x[/bold] ]0;title\n"


def test_the_view_can_be_closed_twice_and_survives_an_error() -> None:
    console, text = screen(terminal=True)
    view = LiveView("demo", 4, console=console)
    with pytest.raises(RuntimeError, match="boom"), view:
        raise RuntimeError("boom")
    view.close()
    view.note("after the end")
    assert "after the end" in text.getvalue()
    assert text.getvalue().count("\x1b[?25h") >= 1, "the cursor is hidden no longer"


def test_figures_come_in_one_order() -> None:
    assert [label for label, _ in figures(dict(reversed(PPO.items())))] == [
        "score", "kl to ref", "staleness", "samples/s", "took",
    ]  # fmt: skip
