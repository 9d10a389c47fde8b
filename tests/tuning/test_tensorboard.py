from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tunebench.study.journal import read_trials
from tunebench.study.record import TENSORBOARD, Reason, Stage

pytestmark = pytest.mark.timeout(300)

ARMS_RUNS = {"arms", "arms/ethanol.adamw", "arms/ethanol.soap"}


class Server:
    """A real TensorBoard over a run, read through its HTTP interface."""

    def __init__(self, port: int) -> None:
        self.address = f"http://127.0.0.1:{port}"

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"{self.address}/data/{path}", timeout=30) as answer:
            return json.load(answer)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            f"{self.address}/data/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def ready(self, runs: int) -> bool:
        try:
            return len(self.get("runs")) >= runs
        except OSError:
            return False


@pytest.fixture(scope="module")
def server(finished_run: Path) -> Iterator[Server]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(finished_run / TENSORBOARD)]
    process = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port), "--load_fast", "false"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        server, began = Server(port), time.monotonic()
        while not server.ready(len(read_trials(finished_run)) + len(ARMS_RUNS) + 1):
            assert process.poll() is None, "TensorBoard ended"
            assert time.monotonic() - began < 120, "TensorBoard did not show every trial"
            time.sleep(0.5)
        yield server
    finally:
        process.terminate()
        process.wait(timeout=30)


def test_scalars_stand_on_the_true_step_axis(server: Server, finished_run: Path):
    trial = next(t for t in read_trials(finished_run) if t.key.stage is Stage.CONFIRM)
    points = server.get(f"plugin/scalars/scalars?run={trial.key.trial_id}&tag=val/forces_mae/raw")
    assert [step for _, step, _ in points] == [6, 12, 18, 24]
    assert points[-1][2] == pytest.approx(trial.result["val"]["raw"]["forces_mae"], rel=1e-6)


def test_the_hparams_tab_compares_all_trials(server: Server, finished_run: Path):
    trials = {trial.key.trial_id: trial for trial in read_trials(finished_run)}
    sessions = hparams_sessions(server)
    assert sessions.keys() == trials.keys()
    for trial_id, session in sessions.items():
        trial = trials[trial_id]
        assert session["hparams"]["learning_rate"] == pytest.approx(trial.params["learning_rate"], rel=1e-6)
        assert session["hparams"]["optimizer"] == trial.key.optimizer
        assert session["hparams"]["stage"] == trial.key.stage.value
        assert session["metrics"]["final/objective"] == pytest.approx(trial.value, rel=1e-6)
        assert session["step"] == (24 if trial.reason is Reason.FINISHED else max(trial.rungs))


def test_the_hparams_tab_lists_the_parameters_of_every_arm(server: Server, finished_run: Path):
    columns = {info["name"] for info in server.post("plugin/hparams/experiment", {})["hparamInfos"]}
    searched = {name for trial in read_trials(finished_run) for name in trial.params}
    assert searched | {"workload", "optimizer", "stage", "seed_index"} <= columns
    assert "precondition_frequency" in columns


def test_every_arm_is_a_run_beside_the_trials(server: Server, finished_run: Path):
    trials = {trial.key.trial_id for trial in read_trials(finished_run)}
    assert set(server.get("runs")) == {".", *ARMS_RUNS, *trials}
    searched = [trial for trial in read_trials(finished_run) if trial.key.stage is Stage.TUNE]
    for arm in ("adamw", "soap"):
        found = {t.key.trial_id: t for t in searched if t.key.optimizer == arm}
        path = f"plugin/scalars/scalars?run=arms/ethanol.{arm}&tag=ethanol"
        _, ended, seconds = server.get(f"{path}/device_seconds_by_trials_ended")[-1]
        assert (ended, seconds) == (3, pytest.approx(sum(t.ledger["device_s"] for t in found.values())))
        _, spent, best = server.get(f"{path}/best_objective_by_steps_spent")[-1]
        assert spent == sum(t.ledger["steps"] for t in found.values())
        assert best == pytest.approx(min(min(t.value, *t.rungs.values()) for t in found.values()))
        left = {rung: sum(trial.ledger["steps"] > rung for trial in found.values()) for rung in (6, 12)}
        assert 0 < left[12] <= left[6] < 3
        arrived = sum(trial.reason is Reason.FINISHED for trial in found.values())
        shown = [(step, count) for _, step, count in server.get(f"{path}/survivors_by_step")]
        assert shown == [(0, 3), *left.items(), (24, arrived)]


def test_a_browser_shows_every_trial_in_hparams(server: Server, finished_run: Path, chromium: Any):
    page = chromium.new_page(viewport={"width": 1500, "height": 1200})
    page.goto(f"{server.address}/#hparams")
    configurations = {trial.key.trial_id.rpartition(".")[0] for trial in read_trials(finished_run)}
    for configuration in configurations:  # seeds of one configuration share a row
        page.get_by_text(configuration, exact=True).first.wait_for(state="visible", timeout=60_000)
    assert len(configurations) == 2 * 3 + 2 * 1
    page.close()


def test_a_browser_lays_the_arms_over_each_other(server: Server, chromium: Any):
    page = chromium.new_page(viewport={"width": 1500, "height": 1200})
    page.goto(f"{server.address}/#custom_scalars&regexInput=%5Earms/")
    for title in ("best objective over optimizer steps of all trials", "trials that train beyond a step, over steps"):
        page.get_by_text(title, exact=True).wait_for(state="visible", timeout=60_000)
    page.get_by_text("Matches (2)", exact=True).nth(4).wait_for(state="visible", timeout=60_000)  # 2 arms in 5 charts
    page.close()


def test_a_browser_shows_the_picture_of_the_ranking(server: Server, chromium: Any):
    page = chromium.new_page(viewport={"width": 1500, "height": 1200})
    page.goto(f"{server.address}/#images")
    page.get_by_text("ranking/ethanol", exact=True).wait_for(state="visible", timeout=60_000)
    picture = page.locator("tf-image-loader img")
    picture.wait_for(state="visible", timeout=60_000)
    assert picture.evaluate("image => image.naturalWidth") > 800
    page.close()


def hparams_sessions(server: Server) -> dict[str, dict[str, Any]]:
    """Hyperparameters and last metrics of every session by trial id."""
    request = {"startIndex": 0, "sliceSize": 1000, "aggregationType": "AGGREGATION_AVG"}
    request["allowedStatuses"] = ["STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING", "STATUS_UNKNOWN"]
    groups = server.post("plugin/hparams/session_groups", request)["sessionGroups"]
    found = {}
    for group in groups:
        for session in group["sessions"]:
            metrics = {m["name"]["tag"]: m for m in session["metricValues"]}
            found[session["name"]] = {
                "hparams": group["hparams"],
                "metrics": {tag: metric["value"] for tag, metric in metrics.items()},
                "step": metrics["final/objective"]["trainingStep"],
            }
    return found
