"""A real Ray cluster with two kinds of device: each is timed, and trials that are bound to one train there."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.study.test_step_times import solo_step, table
from tests.tuning.conftest import python_path, write_study
from tunebench.study.resolve import load_run
from tunebench.study.step_times import read_calibration

SMALL: dict[str, Any] = {"object_store_memory": 2**27, "include_dashboard": False}

# In the processes that measure: no step is timed, and the table says where it was made.
MEASURED = """
import sys, types
from pathlib import Path
if any("default_worker" in a for a in sys.argv):
    def solo_steps(resolved, data, searched, plan, say):
        import ray
        from tunebench.study.step_times import DeviceTimes
        table = DeviceTimes.model_validate_json(Path({folder!r}, "table.json").read_bytes())
        node = ray.get_runtime_context().get_node_id()
        return table.model_copy(update={{"accelerator": plan["accelerator"], "environment": {{"node": node}}}})
    solo = types.ModuleType("tunebench.engine.solo")
    solo.SoloPlan, solo.solo_steps = dict, solo_steps
    sys.modules["tunebench.engine.solo"] = solo
"""

DRIVER = """
import json, sys
from pathlib import Path
from types import SimpleNamespace
from rich.console import Console
from tunebench.cli import run_command
from tunebench.tuning.ray_environment import set_ray_environment

address, study, run = sys.argv[1:]
assert run_command(["calibrate", study, "--run", run, "--address", address]) == 0
set_ray_environment(address)
import ray
from tunebench.study.errors import RunError
from tunebench.study.spec import Resources
from tunebench.tuning.devices import share_of_kind
from tunebench.tuning.shares import Shares
from tunebench.tuning.stage import _bound
from tunebench.tuning.errand import Errand
from tunebench.tuning.step_measurement import measured_kinds
from tunebench.tuning.trainable import _kind_here

ray.init(address=address, log_to_driver=False)
tasks = {name: SimpleNamespace(workload=SimpleNamespace(name=name)) for name in ("new", "begun")}
bound = _bound(tasks, {"begun": "EPYC"}, Resources())
shares = Shares({"CPU": 1}, bound)
nodes = {}
for name in tasks:
    group = shares({"trial": name})()
    ray.get(group.ready())
    (nodes[name],) = ray.util.placement_group_table(group)["bundles_to_node_id"].values()
    ray.util.remove_placement_group(group)
asked = ray.remote(num_cpus=1)(lambda: _kind_here("cpu"))
here = {name: ray.get(asked.options(resources=share_of_kind(kind)).remote()) for name, kind in bound.items()}

large = SimpleNamespace(study=SimpleNamespace(resources=Resources(cpus_per_trial=64)))
errand = Errand(resolved=large, data={}, searched={}, run=Path(run))
try:
    list(measured_kinds(errand, address, Console(file=sys.stderr)))
except RunError as error:
    print(json.dumps([bound, nodes, here, str(error)]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kinds")
    (folder / "table.json").write_text(table(solo_step("adamw", [1.0]), kind="cpu", device="any").model_dump_json())
    (folder / "sitecustomize.py").write_text(MEASURED.format(folder=str(folder)))
    return folder


@pytest.fixture(scope="module")
def cluster(folder: Path) -> Iterator[Any]:
    """One core of a kind, and two of another."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_AUTH_MODE", "disabled")
        environment.setenv("PYTHONPATH", python_path(folder))
        from ray.cluster_utils import Cluster  # reads its environment when it is imported

        head = {**SMALL, "num_cpus": 1, "resources": {"accelerator_type:EPYC": 1}}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        cluster.add_node(**SMALL, num_cpus=2, resources={"accelerator_type:Xeon": 1})
        yield cluster
        cluster.shutdown()


def node_of(cluster: Any, kind: str) -> str:
    return str({"EPYC": cluster.head_node, "Xeon": cluster.worker_nodes.copy().pop()}[kind].node_id)


@dataclass(frozen=True)
class Done:
    """What a driver found on the cluster.

    Attributes:
        bound: kind of device by workload, of which one has begun on the kind of which there are fewer.
        nodes: Ray's ids of the nodes that their trials were given. here: kinds as those nodes know them.
        refused: why a study whose trials need more cores than any node has cannot be timed.
        said: what calibrating said.
    """

    bound: dict[str, str]
    nodes: dict[str, str]
    here: dict[str, str]
    refused: str
    said: list[str]


@pytest.fixture(scope="module")
def done(cluster: Any, folder: Path) -> Done:
    study = write_study(folder, resources={"cpus_per_trial": 1})
    command = [sys.executable, "-c", DRIVER, cluster.address, str(study), str(folder / "run")]
    process = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert process.returncode == 0, process.stderr
    return Done(*json.loads(process.stdout.splitlines()[-1]), process.stderr.splitlines())


def test_every_kind_of_device_gets_its_table_by_one_command(cluster: Any, folder: Path, done: Done) -> None:
    measuring = [line.split("; ")[0] for line in done.said if line.startswith("measuring")]
    assert measuring == [f"measuring steps on a device of kind {kind} of the cluster" for kind in ("Xeon", "EPYC")]
    found = read_calibration(folder / "run", load_run(folder / "run").hash)
    assert found is not None
    kinds = {times.accelerator or "": times.environment["node"] for times in found.tables}
    assert kinds == {kind: node_of(cluster, kind) for kind in ("Xeon", "EPYC")}
    assert list(kinds) == ["Xeon", "EPYC"], "that of which there are most comes first"


def test_trials_of_the_lightning_engine_train_on_the_kind_that_their_stage_is_bound_to(
    cluster: Any, done: Done
) -> None:
    assert done.bound == done.here == {"new": "Xeon", "begun": "EPYC"}
    assert done.nodes == {name: node_of(cluster, kind) for name, kind in done.bound.items()}


def test_a_cluster_without_a_device_for_the_study_is_refused_in_one_line(cluster: Any, done: Done) -> None:
    allowed = "a cluster with the cores (resources.cpus_per_trial) for one cohort"
    assert done.refused == f"{cluster.address}: found no device to measure on, allowed: {allowed}"
