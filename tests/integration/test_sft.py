"""`raylign sft` as a person runs it: it learns, tells the loss of held-out rows, and leaves a model."""

from __future__ import annotations

import json

import yaml

from tests.integration.runs import Workshop


def test_it_tells_the_loss_of_rows_that_it_does_not_train_on(workshop: Workshop) -> None:
    data = workshop.folder / "data"
    config = {
        "stage": "sft",
        "name": "sft",
        "runs_dir": str(workshop.runs),
        "model": str(data / "model"),
        "num_steps": 12,
        "sft": {
            "data": str(data / "sft.parquet"),
            "held_out_data": str(data / "reference.parquet"),
            "batch_size": 32,
            "optimizer": {"lr": 3e-3, "warmup_steps": 2},
        },
    }
    path = workshop.folder / "sft.yaml"
    path.write_text(yaml.safe_dump(config))
    done = workshop.command("sft", str(path), "--in-process")
    assert done.returncode == 0, done.stderr
    run = workshop.runs / "sft"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    told = {line["step"]: line.get("sft/held_out_loss") for line in lines}
    assert len(told) == 12
    assert told[12] < 0.9 * told[1]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["held_out_loss"] == told[12]
    assert (run / "model/model.safetensors").is_file()
