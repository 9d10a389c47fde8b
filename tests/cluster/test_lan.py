"""A real `ray up` and `ray submit` over hosts with addresses, disks and sshd of their own, one of which is cut off.

The hosts are namespaces of this machine (`tests/cluster/lan.py`); it takes root.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.cluster.deployment import Deployment, wait_for
from tests.cluster.lan import CHECKOUT, local_network, missing
from tests.tuning.test_kill import decisions, order_of_arms
from tunebench.study.record import Reason
from tunebench.tuning.trial_log import LOGS

pytestmark = pytest.mark.skipif(bool(missing()), reason=f"a network of namespaces: {missing()}")

CUT_OFF, LATE = "w1", "w2"
FIREWALL = CHECKOUT / "cluster" / "firewall.nft"
# Lost contact is noticed after 5 s, not after 75 s, and nobody answers a user here.
HASTE = {
    "RAY_health_check_period_ms=5000 RAY_health_check_timeout_ms=10000": "RAY_health_check_period_ms=1000 "
    "RAY_health_check_timeout_ms=1000",
    "RAY_health_check_failure_threshold=5": "RAY_health_check_failure_threshold=3",
    "RAY_gcs_rpc_server_reconnect_timeout_s=75": "RAY_gcs_rpc_server_reconnect_timeout_s=8",
}
_ENDS_S = 45.0
CLUSTER_PORTS = {*range(6379, 6386), 10001, *range(10002, 20000)}


@dataclass
class Story:
    """What was seen of a study on a cluster, from its launch to `ray down`."""

    deployment: Deployment
    first_said: str = ""
    second_start: str = ""
    uninvited_said: str = "CONNECTED"
    status: dict[str, object] = field(default_factory=dict)
    listening: set[tuple[str, int]] = field(default_factory=set)
    firewall: bool = False
    reaches_head: dict[str, bool] = field(default_factory=dict)
    left: dict[str, list[str]] = field(default_factory=dict)


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory, finished_study: Path) -> Iterator[Story]:
    """A study on head and w1; w1's cable is pulled, w2 is switched on, the laptop is closed; then `ray down`."""
    folder = tmp_path_factory.mktemp("lan")
    with local_network(folder, ["laptop", "head", CUT_OFF, LATE], on=["laptop", "head", CUT_OFF]) as lan:
        deployment = Deployment(lan, finished_study, HASTE)
        deployment.prepare(pace_s=0.1)
        told = Story(deployment)
        shut(told)
        deployment.up()
        submitted = launch(told)
        disturb(told)
        ask(told)
        lan.crash("laptop")
        told.first_said = submitted.communicate(timeout=30.0)[0]
        wait_for(deployment.finished, 600.0, "the study finishes")
        tear_down(told)
        yield told


def shut(told: Story) -> None:
    """Put the firewall of `cluster/` on all hosts that are on."""
    if shutil.which("nft", path="/usr/sbin:/sbin") is None:
        return
    lan = told.deployment.lan
    machines = [told.deployment.head, *told.deployment.workers]
    rules = FIREWALL.read_text().replace(
        "192.0.2.10, 192.0.2.11, 192.0.2.12", ", ".join(host.address for host in machines)
    )
    (lan.storage / "firewall.nft").write_text(rules)
    for host in machines:
        if host.init is not None:
            host.run("nft -f /srv/firewall.nft")
    told.firewall = True


def launch(told: Story) -> subprocess.Popen[str]:
    """Submit the study and wait until w1 trains; who then listens on the head, and who reaches it."""
    deployment = told.deployment
    submitted = deployment.submit()
    wait_for(lambda: deployment.steps_on(deployment.lan[CUT_OFF]), 240.0, "w1 trains")
    told.listening = deployment.head.listening()
    for host in (deployment.laptop, deployment.lan[CUT_OFF]):
        tried = host.run(f"timeout 2 bash -c '</dev/tcp/{deployment.head.address}/6379'", check=False)
        told.reaches_head[host.name] = tried.returncode == 0
    return submitted


def disturb(told: Story) -> None:
    """Pull w1's cable while it trains, and switch w2 on."""
    deployment, cut_off = told.deployment, told.deployment.lan[CUT_OFF]
    wait_for(deployment.checkpoints, 240.0, "a trial has something to lose")
    before = deployment.steps_on(cut_off)
    wait_for(lambda: deployment.steps_on(cut_off) > before, 240.0, "w1 trains again")
    deployment.lan.cable(CUT_OFF, plugged=False)
    deployment.lan.start(LATE)


def ask(told: Story) -> None:
    """Submit the study a second time, ask for its status, and try to connect without the token."""
    deployment = told.deployment
    connect = f"import ray; ray.init('{deployment.head.address}:6379'); print('CONNECTED')"
    uninvited = subprocess.Popen(
        deployment.lan[LATE].command(f'RAY_AUTH_MODE=disabled python -c "{connect}"'),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    told.second_start = deployment.submit().communicate(timeout=120.0)[0]
    told.status = json.loads(_json_in(deployment.tunebench("status --json")))
    told.uninvited_said = uninvited.communicate(timeout=120.0)[0]


def tear_down(told: Story) -> None:
    """`ray down` from a laptop that was opened again, to all hosts again; what then still runs after a moment."""
    deployment = told.deployment
    deployment.lan.cable(CUT_OFF, plugged=True)
    deployment.lan.start("laptop")
    deployment.down()
    hosts = [deployment.head, *deployment.workers]
    until = time.monotonic() + _ENDS_S
    while time.monotonic() < until:
        told.left = {host.name: list(host.processes().values()) for host in hosts}
        if not any(told.left.values()):
            return
        time.sleep(0.5)


def test_the_study_goes_on_when_the_laptop_is_closed(story: Story) -> None:
    assert "run directory: /srv/tunebench/runs/small-" in story.first_said
    assert story.deployment.finished()


def test_a_second_driver_on_the_run_is_refused_in_one_line(story: Story) -> None:
    (line,) = [line for line in story.second_start.splitlines() if line.startswith("tunebench:")]
    assert "found a driver at work on it, allowed: one at a time" in line


def test_its_status_can_be_asked_for_from_the_laptop(story: Story) -> None:
    assert story.status["finished"] is False
    assert {row["arm"] for row in story.status["arms"]} == {"ethanol/adamw", "ethanol/soap"}


def test_a_host_that_is_cut_off_loses_no_trial_and_one_that_joins_takes_part(story: Story) -> None:
    pool = (story.deployment.run / LOGS / "pool.log").read_text()
    assert len(set(re.findall(r"on node (\w+) ended: ", pool))) == 1  # w1
    assert {trial.reason for trial in story.deployment.trials()} == {Reason.FINISHED, Reason.STOPPED_ASHA}
    assert story.deployment.steps_on(story.deployment.lan[LATE]) > 0


def test_survivors_and_ranking_are_those_of_an_undisturbed_run(story: Story, finished_run: Path) -> None:
    def without_work(run: Path) -> dict[str, object]:
        return {trial: what[:4] + what[5:] for trial, what in decisions(run).items()}

    assert without_work(story.deployment.run) == without_work(finished_run)
    assert order_of_arms(story.deployment.run) == order_of_arms(finished_run)


def test_the_head_listens_at_the_ports_of_the_firewall_only(story: Story) -> None:
    own = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    assert {port for address, port in story.listening if address not in own} <= CLUSTER_PORTS


def test_the_firewall_lets_the_clusters_machines_in_and_nobody_else(story: Story) -> None:
    if not story.firewall:
        pytest.skip("no nft on this machine: apt-get install nftables")
    assert story.reaches_head == {"laptop": False, "w1": True}


def test_nobody_connects_without_the_clusters_token(story: Story) -> None:
    assert "InvalidAuthToken" in story.uninvited_said
    assert "CONNECTED" not in story.uninvited_said


def test_ray_down_leaves_no_process_on_any_host(story: Story) -> None:
    assert story.left == {"head": [], CUT_OFF: [], LATE: []}


def _json_in(text: str) -> str:
    """The JSON document in what a terminal showed."""
    return text[text.index("{") : text.rindex("}") + 1]
