"""A study as jobs of a real Slurm on hosts of its own: told to end, lost with a node, requeued, finished.

The hosts are namespaces of this machine (`tests/cluster/slurm.py`); it takes root, and Slurm 22.05 or newer.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.cluster.deployment import wait_for
from tests.cluster.faults import write_study
from tests.cluster.slurm import Slurm, missing, slurm_cluster
from tests.cluster.test_lan import HASTE
from tunebench.study.journal import read_trials
from tunebench.study.record import CHECKPOINTS, Reason, TrialRecord

pytestmark = [
    pytest.mark.skipif(not os.environ.get("TUNEBENCH_SLURM"), reason="takes minutes: TUNEBENCH_SLURM=1 runs it"),
    pytest.mark.skipif(bool(missing()), reason=f"a Slurm of namespaces: {missing()}"),
]

LOST, SPARE = "n2", "n3"
RUNG_STEPS = 10
_PATIENCE_S = 180.0


@dataclass
class Story:
    """What was seen of a study whose first job was told to end and whose second one lost a node."""

    slurm: Slurm
    token_modes: list[int] = field(default_factory=list)
    second: dict[str, str] = field(default_factory=dict)
    second_said: str = ""
    told: dict[str, str] = field(default_factory=dict)
    told_said: str = ""
    told_left: dict[str, list[str]] = field(default_factory=dict)
    ended_s: float = 0.0
    finished: dict[str, str] = field(default_factory=dict)
    finished_said: str = ""
    finished_left: dict[str, list[str]] = field(default_factory=dict)
    tokens: list[Path] = field(default_factory=list)
    trials: list[TrialRecord] = field(default_factory=list)


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    """A study on n1 and n2 that is told to end, goes on, loses n2 and finishes."""
    with slurm_cluster(tmp_path_factory.mktemp("slurm"), ["n1", LOST, SPARE], pace_s=0.15) as slurm:
        told = Story(slurm)
        write_study(slurm.folder / "study.yaml", seed=0, max_steps=30)
        script = slurm.describe(nodes=2, cpus=os.cpu_count() or 1)
        script.write_text(hastened(script.read_text()))
        tell_to_end(told)
        lose_a_node(told)
        yield told


def hastened(text: str) -> str:
    """A job's script in which Ray notices a lost node before Slurm does, as it would by their defaults."""
    for setting, shorter in HASTE.items():
        assert setting in text, setting
        text = text.replace(setting, shorter)
    return text


def tell_to_end(told: Story) -> None:
    """Start the study, start it a second time, and send its job what its time limit would send."""
    slurm = told.slurm
    job = slurm.submit("job.sbatch study.yaml")
    wait_for(lambda: trains_on(slurm, "n1", LOST), _PATIENCE_S, f"both nodes train: {slurm.log(job)}")
    told.token_modes = [stat.S_IMODE(token.stat().st_mode) for token in tokens(slurm)]
    second = slurm.submit("--nodes=1 job.sbatch study.yaml")
    wait_for(lambda: checkpoints(slurm), _PATIENCE_S, "a trial has something to lose")
    wait_for(lambda: slurm.over(second), _PATIENCE_S, "the second job ends")
    told.second, told.second_said = slurm.job(second), slurm.log(second)
    slurm.login.run(f"scancel --signal=TERM --batch {job}")
    told.ended_s = wait_for(lambda: slurm.over(job), _PATIENCE_S, "the job ends")
    told.told, told.told_said, told.told_left = slurm.job(job), slurm.log(job), slurm.left(5.0)


def lose_a_node(told: Story) -> None:
    """Start the study again, switch one of its nodes off, and let it go on with another."""
    slurm = told.slurm
    before = time.time()
    job = slurm.submit("--nodelist=n1,n2 job.sbatch study.yaml")
    wait_for(lambda: newest(slurm) > before, _PATIENCE_S, f"the study goes on: {slurm.log(job)}")
    slurm.lan.crash(LOST)
    wait_for(lambda: slurm.state(job) == "PENDING", _PATIENCE_S, f"the job is requeued: {slurm.job(job)}")
    # Slurm holds a requeued job back for two minutes, and the job asks for the lost node
    slurm.login.run(f"scontrol update JobId={job} StartTime=now NodeList=")
    wait_for(lambda: slurm.over(job), _PATIENCE_S, f"the job ends: {slurm.log(job)}")
    told.finished, told.finished_said, told.finished_left = slurm.job(job), slurm.log(job), slurm.left(5.0)
    told.tokens, told.trials = tokens(slurm), read_trials(run_of(slurm))


def run_of(slurm: Slurm) -> Path:
    """The study's run directory."""
    (run,) = (slurm.lan.storage / "tunebench" / "runs").glob("faults-*")
    return run


def tokens(slurm: Slurm) -> list[Path]:
    """Files of tokens that are there."""
    return list((slurm.lan.storage / "tunebench").glob(".token-*"))


def checkpoints(slurm: Slurm) -> list[float]:
    """When each was written, seconds since the epoch."""
    return [file.stat().st_mtime for file in run_of(slurm).glob(f"{CHECKPOINTS}/*/last.pt")]


def newest(slurm: Slurm) -> float:
    return max(checkpoints(slurm))


def trains_on(slurm: Slurm, *nodes: str) -> bool:
    """Whether steps were made on all of these nodes."""
    return all((slurm.lan.storage / f"steps-{node}").exists() for node in nodes)


def test_only_its_user_can_read_a_jobs_token_which_goes_with_the_job(story: Story) -> None:
    assert story.token_modes == [0o600]
    assert story.tokens == []


def test_a_second_job_for_the_study_is_refused_in_one_line(story: Story) -> None:
    assert (story.second["JobState"], story.second["ExitCode"]) == ("FAILED", "2:0")
    (line,) = story.second_said.splitlines()
    assert line.startswith("tunebench: /srv/tunebench/runs/faults-")
    assert "found a driver at work on it, allowed: one at a time" in line


def test_a_job_that_is_told_to_end_does_so_within_its_two_minutes_and_says_so(story: Story) -> None:
    assert (story.told["JobState"], story.told["ExitCode"]) == ("FAILED", "130:0")
    assert story.ended_s < 60.0
    assert "was told to end, and goes on when it is started again" in story.told_said
    assert "trials of the tune stage have not ended" in story.told_said.splitlines()[-1]


def test_the_log_is_the_drivers(story: Story) -> None:
    assert "the driver ends with job" in story.told_said
    assert not [line for line in story.told_said.splitlines() if len(line) > 200 or "Ray" in line]


def test_no_process_is_left_on_any_node(story: Story) -> None:
    assert story.told_left == {"n1": [], LOST: [], SPARE: []}
    assert story.finished_left == {"n1": [], SPARE: []}


def test_a_job_that_loses_a_node_is_requeued_and_finishes_the_study(story: Story) -> None:
    assert (story.finished["JobState"], story.finished["ExitCode"]) == ("COMPLETED", "0:0")
    assert story.finished["Restarts"] == "1"
    assert trains_on(story.slurm, SPARE)
    assert {trial.reason for trial in story.trials} == {Reason.FINISHED}
    assert len(story.trials) == 4


def test_the_log_of_a_requeued_job_tells_of_both_starts(story: Story) -> None:
    assert story.finished_said.count("the driver ends with job") == 2
    assert "DUE TO NODE FAILURE" in story.finished_said
    assert story.finished_said.splitlines()[-1].startswith("report: ")


def test_a_trial_loses_at_most_a_rung_at_each_end_of_a_job(story: Story) -> None:
    assert all(trial.ledger["lost_steps"] <= 2 * RUNG_STEPS for trial in story.trials)
