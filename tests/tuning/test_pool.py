"""The cohort engine in a real Ray: what survives which death, and what is left of it."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import OutOfMemoryError

from tests.tuning.conftest import STUDY, python_path, tunebench, write_study
from tests.tuning.driver import COHORT, RECEPTION, Driver
from tunebench.study.journal import read_trials
from tunebench.study.record import Reason, Stage
from tunebench.study.spec import Resources
from tunebench.tuning import pool as pool_module
from tunebench.tuning.devices import Device
from tunebench.tuning.pool import Fate, Pool
from tunebench.tuning.trial_log import LOGS

LONG = {**STUDY["workloads"][0], "max_steps": 120, "evaluate_every_steps": 12}
ONE_COHORT = {"slots": 4, "cpus_per_trial": os.cpu_count()}


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Driver]]:
    """Starts the small study, with sections replaced, on the cohort engine."""
    drivers: list[Driver] = []

    def start(*options: str, **changes: object) -> Driver:
        content = {
            "engine": "cohort",
            "workloads": [LONG],
            "optimizers": ["adamw"],
            "tune": {"trials_per_arm": 3, "asha": None},
            "resources": ONE_COHORT,
            **changes,
        }
        drivers.append(Driver(write_study(tmp_path, **content), tmp_path / "run", *options, site=tmp_path))
        return drivers[-1]

    yield start
    for driver in drivers:
        driver.end()


def test_tenants_import_neither_torch_nor_nequip_nor_tune() -> None:
    heavy = "{'torch', 'nequip', 'ase', 'ray.tune'}"
    script = f"import sys, tunebench.tuning.reception; sys.exit(bool({heavy} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", script], timeout=120).returncode == 0


def test_trials_of_a_cohort_that_is_killed_go_on_from_their_checkpoints(start: Callable[..., Driver]) -> None:
    driver = start()
    driver.wait(driver.saved)
    cohort, *_ = driver.processes(COHORT)
    (reception,) = driver.processes(RECEPTION)
    assert "libtorch" not in Path(f"/proc/{reception}/maps").read_text()
    os.kill(cohort, signal.SIGKILL)
    assert driver.finish()[0] == 0
    trials = read_trials(driver.run)
    assert {trial.reason for trial in trials} == {Reason.FINISHED}
    assert {trial.engine for trial in trials} == {"cohort"}
    tuned = [trial for trial in trials if trial.key.stage is Stage.TUNE]
    assert any(trial.ledger["attempts"] == 2 for trial in tuned)
    crashed = [log for log in (driver.run / LOGS).glob("*.tune.*.log") if "its cohort is gone" in log.read_text()]
    assert crashed


def test_the_death_of_all_tenants_costs_no_trial_an_attempt(start: Callable[..., Driver]) -> None:
    driver = start(resources={**ONE_COHORT, "max_failures": 0}, confirm={"top_k": 1, "seeds": 1})
    driver.wait(driver.saved)
    (reception,) = driver.processes(RECEPTION)
    os.kill(reception, signal.SIGKILL)
    assert driver.finish()[0] == 0
    trials = read_trials(driver.run)
    assert [trial.reason for trial in trials] == [Reason.FINISHED] * 4
    assert {trial.ledger["lost_steps"] for trial in trials} == {0}


def test_two_workloads_share_one_device_one_after_the_other(start: Callable[..., Driver]) -> None:
    short = {**LONG, "max_steps": 12}
    other = {**short, "name": "ethanol-nequip", "model": {"family": "nequip", "r_max_angstrom": 4.0}}
    stages = {"tune": {"trials_per_arm": 2, "asha": None}, "confirm": {"top_k": 1, "seeds": 1}}
    driver = start(workloads=[short, other], **stages)
    assert driver.finish()[0] == 0
    trials = read_trials(driver.run)
    assert [trial.reason for trial in trials] == [Reason.FINISHED] * 6
    (log,) = (driver.run / LOGS).glob("cohort-*.log")
    assert log.read_text().count("is open for ethanol-nequip") <= 2


def test_a_trial_that_always_kills_its_process_is_crashed_and_takes_no_other_with_it(
    start: Callable[..., Driver], tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if any('default_worker' in a for a in sys.argv):\n"
        "    import tunebench.engine.curves as curves\n"
        "    write = curves.write_curve\n"
        "    def die(run, trial_id, rows):\n"
        "        if trial_id.endswith('tune.c001.s0'): os._exit(1)\n"
        "        write(run, trial_id, rows)\n"
        "    curves.write_curve = die\n"
    )
    short = {**LONG, "max_steps": 12}
    driver = start(
        workloads=[short], resources={**ONE_COHORT, "max_failures": 1}, tune={"trials_per_arm": 3, "asha": None}
    )
    assert driver.finish()[0] == 0
    trials = {trial.key.trial_id: trial for trial in read_trials(driver.run)}
    crashed = trials.pop("ethanol.adamw.tune.c001.s0")
    assert crashed.reason is Reason.CRASHED
    assert "its cohort is gone" in crashed.detail["message"]
    assert {trial.reason for trial in trials.values()} == {Reason.FINISHED}


def test_a_workload_that_cannot_be_traced_trains_alone_beside_one_that_can(
    start: Callable[..., Driver], tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "if any(a.endswith('tunebench') for a in sys.argv):\n"
        "    import tunebench.tuning.traceability as traceability\n"
        "    why = traceability.why_untraceable\n"
        "    def refuse(task): return 'it draws numbers' if task.workload.name == 'other' else why(task)\n"
        "    traceability.why_untraceable = refuse\n"
    )
    short = {**LONG, "max_steps": 12}
    one = {"tune": {"trials_per_arm": 1, "asha": None}, "confirm": {"top_k": 1, "seeds": 1}}
    driver = start(engine="auto", workloads=[{**short, "name": "other"}, short], resources={"slots": 2}, **one)
    code, output = driver.finish()
    assert code == 0, output
    said = [line for line in output.splitlines() if "lightning" in line]
    assert said == ["other: lightning engine, because its model cannot be traced: it draws numbers"]
    trials = read_trials(driver.run)
    assert [trial.reason for trial in trials] == [Reason.FINISHED] * 4
    assert {trial.key.workload: trial.engine for trial in trials} == {"other": "lightning", "ethanol": "cohort"}
    assert {trial.device for trial in trials} == {""}, "of either engine's trials it is kept that Ray knows no kind"

    refused = tunebench(
        "run", write_study(tmp_path, engine="cohort", workloads=[{**short, "name": "other"}]), "--run",
        tmp_path / "refused", check=False, PYTHONPATH=python_path(tmp_path),
    )  # fmt: skip
    assert refused.returncode == 2
    assert "engine: found cohort, but the model of workload other cannot be traced" in refused.stderr


def test_the_pool_covers_all_nodes_and_outlives_one(
    start: Callable[..., Driver], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    from ray.cluster_utils import Cluster  # reads its environment when it is imported

    small = {"num_cpus": 1, "object_store_memory": 2**27, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=small)
    try:
        node = cluster.add_node(**small)
        driver = start(
            "--address",
            cluster.address,
            workloads=[{**LONG, "max_steps": 600}],  # the second cohort may open some seconds after the first
            resources={"slots": 2},
            tune={"trials_per_arm": 6, "asha": None},
            confirm={"top_k": 1, "seeds": 1},
        )
        driver.wait(lambda: len(driver.saved()) >= 4)  # each has two slots
        cluster.remove_node(node, allow_graceful=False)
        assert driver.finish()[0] == 0
    finally:
        cluster.shutdown()
    trials = read_trials(driver.run)
    assert [trial.reason for trial in trials] == [Reason.FINISHED] * 7
    assert {trial.ledger["attempts"] for trial in trials} == {1, 2}


def nodes(**kinds: str) -> list[dict[str, Any]]:
    """Nodes with one GPU each, of the kinds that are given by their names."""
    return [
        {"NodeID": n, "Resources": {"GPU": 1.0, "CPU": 4.0, f"accelerator_type:{k}": 1.0}} for n, k in kinds.items()
    ]


@pytest.mark.parametrize(
    ("kinds", "started"),
    [
        (None, {"one", "two", "three"}),  # the tune stage, or a study that waives F9
        ({}, {"two", "three"}),  # the kind of which there are most
        ({"w": "A100"}, {"one"}),  # that on which the stage has begun
        ({"w": "B200"}, set()),  # which is gone
    ],
)
def test_the_trials_of_a_stage_that_ranks_train_on_one_kind_of_device(
    kinds: dict[str, str] | None, started: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = SimpleNamespace(
        usable=lambda: nodes(one="A100", two="H200", three="H200"), newcomers=list, leaving=frozenset, is_settled=True
    )
    found: list[Device] = []
    monkeypatch.setattr(Pool, "_start", lambda pool, device: found.append(device))
    monkeypatch.setattr(pool_module, "NodeWatch", lambda standard, tell: cluster)
    monkeypatch.setattr(pool_module, "_LOOK_AT_CLUSTER_S", 0.01)

    async def stage() -> tuple[int, list[str]]:
        pool = Pool(Resources(gpus_per_trial=1, slots=2), tmp_path)
        tasks: Any = {f"{n}": SimpleNamespace(workload=SimpleNamespace(name="w", max_steps=1)) for n in range(8)}
        await pool.plan(tasks, others_wait=False, kinds=kinds)
        waits = asyncio.create_task(pool.place("0", None, "visit"))
        while not found and not (await pool.look(0))[1]:
            await asyncio.sleep(0.01)
        waits.cancel()
        return await pool.look(0)

    capacity, events = asyncio.run(stage())
    assert {device.node for device in found} == started
    assert capacity == 2 * max(len(started), 1)
    assert len(events) == (not started)
    assert all("w: its trials wait for a device of kind B200" in event for event in events)


def test_trials_without_a_cohort_that_wait_for_their_kind_of_device_are_told_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = SimpleNamespace(usable=lambda: nodes(one="A100"), newcomers=list, leaving=frozenset, is_settled=False)
    monkeypatch.setattr(pool_module, "NodeWatch", lambda standard, tell: cluster)
    monkeypatch.setattr(pool_module, "_LOOK_AT_CLUSTER_S", 0.01)

    async def stage() -> list[list[str]]:
        pool = Pool(Resources(gpus_per_trial=1), tmp_path)
        await pool.plan({}, others_wait=True, kinds={}, bound={"there": "A100", "gone": "B200"})
        told = []
        for settled in (False, True):  # before that nobody knows which nodes there are
            cluster.is_settled = settled
            await asyncio.sleep(0.1)
            told.append((await pool.look(0))[1])
        return told

    before, (event,) = asyncio.run(stage())
    assert before == []
    assert event.startswith("gone: its trials wait for a device of kind B200")


class FakeCohorts:
    """Cohorts that Ray ends as soon as they have a trial, for lack of memory, while they have more than `fit` slots."""

    def __init__(self, fit: int) -> None:
        self.fit, self.opened = fit, []

    def options(self, **options: Any) -> SimpleNamespace:
        return SimpleNamespace(remote=self.start)

    def start(self, *arguments: Any) -> SimpleNamespace:
        has_trial, slots = asyncio.Event(), []

        async def ready() -> None:
            pass

        async def join(*arguments: Any) -> None:
            has_trial.set()

        async def open_(task: Any, known: int, most: int) -> int:
            slots.append(known)
            self.opened.append(known)
            return known

        async def lives() -> None:
            await has_trial.wait()
            if slots[-1] > self.fit:
                raise OutOfMemoryError("5 worker(s) were killed due to the node running low on memory.")
            await asyncio.Event().wait()

        calls = {"__ray_ready__": ready, "join": join, "open": open_, "lives": lives, "expect": lambda more: None}
        return SimpleNamespace(**{name: SimpleNamespace(remote=call) for name, call in calls.items()})


@pytest.mark.parametrize(
    ("fit", "opened", "again"), [(2, [8, 4, 2], [True] * 2), (0, [8, 4, 2, 1, 1], [True] * 3 + [False])]
)
def test_a_cohort_that_is_ended_for_lack_of_memory_comes_again_with_half_its_slots_at_no_trials_cost(
    fit: int, opened: list[int], again: list[bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cohorts, here = FakeCohorts(fit), SimpleNamespace(current_actor=None)
    fake_ray = SimpleNamespace(remote=lambda actor: cohorts, get_runtime_context=lambda: here, kill=lambda actor: None)
    monkeypatch.setattr(pool_module, "ray", fake_ray)
    node = nodes(**{"ab" * 28: "H200"})
    cluster = SimpleNamespace(usable=lambda: node, newcomers=list, leaving=frozenset, is_settled=True)
    monkeypatch.setattr(pool_module, "NodeWatch", lambda standard, tell: cluster)

    async def train() -> list[Fate]:
        pool, fates = Pool(Resources(gpus_per_trial=1, slots=8), tmp_path), []
        tasks: Any = {"trial": SimpleNamespace(workload=SimpleNamespace(name="w", max_steps=1))}
        await pool.plan(tasks, others_wait=False)
        for visit in range(len(again)):
            cohort, _, _ = await pool.place("trial", None, f"{visit}")
            fates.append(await pool.fate(cohort, "trial"))
        await pool.place("trial", None, "last")
        return fates

    fates = asyncio.run(train())
    assert cohorts.opened == opened
    assert [fate.again for fate in fates] == again
    assert all("low on memory" in fate.message for fate in fates)
