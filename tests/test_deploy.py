"""What is offered for a cluster agrees with the project: versions, keys, GPUs, graces, metrics."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster import grafana
from cluster.config import RunConfig
from cluster.config_file import load_config
from cluster.gpus import gpus_of
from cluster.metrics import METRICS, gauge_name
from cluster.stop import ENDING_S
from cluster.submit import EXCLUDES

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "cluster/deploy"


@pytest.fixture(scope="module")
def job() -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / "kuberay.yaml").read_text())["spec"]


@pytest.fixture(scope="module")
def pods(job: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = job["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


@pytest.fixture(scope="module")
def config(job: dict[str, Any]) -> RunConfig:
    """Of the command that the job runs, on an example's file."""
    _, _, command = shlex.split(job["entrypoint"])
    overrides = [word for word in command.split() if re.fullmatch(r"[\w.]+=\w+", word)]
    assert len(overrides) == 3
    return load_config(ROOT / "examples/support_replies/ppo.yaml", overrides, RunConfig)


def test_the_job_runs_a_command_there_is(job: dict[str, Any]) -> None:
    from typer.main import get_command

    from cluster.cli import app

    train = get_command(app).commands["train"]  # type: ignore[attr-defined]
    options = {option for parameter in train.params for option in parameter.opts}
    assert set(re.findall(r"--[\w-]+", job["entrypoint"])) <= options


def test_the_image_has_no_more_of_the_folder_than_a_job_is_sent() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    ignored = {line.removeprefix("**/") for line in lines}
    assert {".git", *(name.rstrip("/") for name in EXCLUDES)} <= ignored
    for line in (ROOT / ".gitignore").read_text().splitlines():
        assert line.rstrip("/") in ignored, line


def test_the_cluster_has_the_gpus_that_the_job_asks_for(
    job: dict[str, Any], config: RunConfig
) -> None:
    (group,) = job["rayClusterSpec"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    offered = group["replicas"] * int(container["resources"]["limits"]["nvidia.com/gpu"])
    assert sum(gpus_of(config).values()) == offered


def test_pods_and_job_are_given_the_time_that_a_stop_takes(
    job: dict[str, Any], pods: list[dict[str, Any]], config: RunConfig
) -> None:
    needed = config.stop_grace_s + ENDING_S
    variables = yaml.safe_load(job["runtimeEnvYAML"])["env_vars"]
    assert float(variables["RAY_JOB_STOP_WAIT_TIME_S"]) >= needed
    assert all(pod["terminationGracePeriodSeconds"] >= needed for pod in pods)


def test_every_pod_sees_the_runs_folder_and_has_shared_memory(
    job: dict[str, Any], pods: list[dict[str, Any]]
) -> None:
    home = yaml.safe_load(job["runtimeEnvYAML"])["env_vars"]["RAYLIGN_HOME"]
    for pod in pods:
        (container,) = pod["containers"]
        assert {home, "/dev/shm"} == {mount["mountPath"] for mount in container["volumeMounts"]}
        assert {"dashboard", "metrics"} == {port["name"] for port in container["ports"]}


def test_the_cluster_runs_the_locked_ray(job: dict[str, Any]) -> None:
    locked = (ROOT / "requirements/gpu.txt").read_text()
    assert f"\nray=={job['rayClusterSpec']['rayVersion']}\n" in locked


def test_prometheus_finds_the_port_by_the_name_it_has(pods: list[dict[str, Any]]) -> None:
    monitor = yaml.safe_load((DEPLOY / "podmonitor.yaml").read_text())
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert endpoint["port"] == "metrics"
    (scraped,) = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"]
    assert scraped["file_sd_configs"][0]["files"] == [
        "/tmp/ray/prom_metrics_service_discovery.json"
    ]


def test_the_dashboard_that_is_offered_is_the_one_that_is_made() -> None:
    assert json.loads(grafana.FILE.read_text()) == grafana.dashboard()


def test_every_panel_of_it_shows_metrics_there_are_and_covers_no_other() -> None:
    exported = {f"ray_{gauge_name(name)}" for name in METRICS}
    panels = grafana.dashboard()["panels"]
    drawn = [target["expr"] for panel in panels for target in panel.get("targets", ())]
    assert len(drawn) > 20
    for expression in drawn:
        name, _, labels = expression.partition("{")
        assert name in exported
        assert labels == 'run=~"$run"}'
    covered = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(covered) == len(set(covered))
    assert max(x for x, _ in covered) < 24
