"""A study on a local network, started as a user starts it: `tunebench cluster init`, `ray up`, `ray submit`.

Every step of a training waits a while without using the processor, and is counted: hosts that share two cores would
otherwise be at work for a moment only, and nothing could be injected in it.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.cluster.lan import CHECKOUT, Host, Lan
from tunebench.study.journal import read_trials
from tunebench.study.record import CHECKPOINTS, TrialRecord

SLOW_STEPS = """
import os, pathlib, time
from tunebench.engine import watchdog

def slow(self, beat=watchdog.Watchdog.beat):
    with pathlib.Path("/srv/steps-" + os.uname().nodename).open("a") as file:
        file.write(".")
    time.sleep({pace_s})
    beat(self)

watchdog.Watchdog.beat = slow
"""
STORAGE = Path("/srv/tunebench")  # as the hosts see it
_LAUNCHER = "export RAY_UP_enable_autoscaler_v2=0; cd {checkout};"


@dataclass
class Deployment:
    """A cluster of a network's head and workers, launched from its laptop.

    Attributes:
        lan: with hosts `laptop` and `head`; all others are workers.
        study: the file, below the checkout's or any folder that all hosts see.
        changes: what takes the place of what in the description, beyond the answers.
    """

    lan: Lan
    study: Path
    changes: Mapping[str, str] = field(default_factory=dict)
    description: str = "~/tunebench.yaml"

    @property
    def laptop(self) -> Host:
        return self.lan["laptop"]

    @property
    def head(self) -> Host:
        return self.lan["head"]

    @property
    def workers(self) -> list[Host]:
        return [host for name, host in self.lan.hosts.items() if name not in ("laptop", "head")]

    @property
    def run(self) -> Path:
        """The newest run directory as this machine sees it."""
        return max(self.runs(), key=lambda run: run.stat().st_ctime)

    def runs(self) -> list[Path]:
        """All run directories of the cluster that have begun."""
        return [file.parent for file in (self.lan.storage / "tunebench" / "runs").glob("*/journal.log")]

    def prepare(self, pace_s: float) -> None:
        """Put the key, the token and the cluster's description on the laptop; `pace_s` is a step's wait, seconds."""
        site = self.lan.storage / "site"
        site.mkdir(exist_ok=True)
        (site / "sitecustomize.py").write_text(SLOW_STEPS.format(pace_s=pace_s))
        studies = self.lan.storage / "studies"
        studies.mkdir(exist_ok=True)
        shutil.copy(self.study, studies / "study.yaml")
        key = self.laptop.folder / "root" / ".ssh" / "id_ed25519"
        shutil.copy(self.lan.key, key)
        key.chmod(0o600)
        answers = {
            "head": self.head.address,
            "workers": ",".join(host.address for host in self.workers),
            "user": "root",
            "storage": str(STORAGE),
            "source": str(CHECKOUT),
            "studies": "/srv/studies",
            "environment": sys.prefix,
        }
        given = " ".join(f"--answer {name}={value}" for name, value in answers.items())
        self.laptop.run(f"tunebench cluster init --kind onprem {given} --out {self.description} --json")
        file = self.laptop.folder / "root" / self.description.removeprefix("~/")
        text = file.read_text()
        for old, new in self.changes.items():
            assert old in text, old
            text = text.replace(old, new)
        file.write_text(text)
        self.laptop.run("ray get-auth-token --generate > /dev/null")

    def ray(self, verb: str, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command of Ray's launcher on the laptop."""
        line = [_LAUNCHER.format(checkout=CHECKOUT), "ray", verb, self.description, *words]
        return self.laptop.run(*line, timeout_s=300.0, check=check)

    def up(self) -> None:
        """`ray up`."""
        self.ray("up -y")

    def submit(self, *words: str) -> subprocess.Popen[str]:
        """`ray submit` of the study, whose output stays on the laptop's screen for as long as the laptop is open."""
        arguments = f"{CHECKOUT}/cluster/launch.py --study studies/study.yaml"
        line = [_LAUNCHER.format(checkout=CHECKOUT), "ray submit", self.description, arguments, *words]
        return subprocess.Popen(
            self.laptop.command(*line),
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def tunebench(self, *words: str) -> str:
        """A command of `tunebench` on the head, asked for from the laptop; its standard output."""
        return self.ray("exec", "'tunebench", *words, f"{STORAGE}/runs/*'").stdout

    def down(self) -> None:
        """`ray down`."""
        self.ray("down -y")

    def steps_on(self, host: Host) -> int:
        """Training steps and batches of evaluations that a host has made, of whatever trial."""
        file = self.lan.storage / f"steps-{host.name}"
        return file.stat().st_size if file.exists() else 0

    def checkpoints(self) -> dict[str, float]:
        """When each checkpoint of the run was written, by trial, seconds since the epoch."""
        files = (self.run / CHECKPOINTS).glob("*/last.pt")
        return {file.parent.name: file.stat().st_mtime for file in files if file.exists()}

    def trials(self) -> list[TrialRecord]:
        """All trials that the journal knows; none before there is one."""
        try:
            return read_trials(self.run)
        except (FileNotFoundError, ValueError):
            return []

    def finished(self) -> bool:
        """Whether the report of the finished study is there."""
        ranking = self.run / "report" / "ranking.json"
        return ranking.exists() and bool(json.loads(ranking.read_text())["finished"])


def wait_for(condition: Callable[[], object], timeout_s: float, what: str) -> float:
    """Wait until something is true; returns the seconds it took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < timeout_s, f"not within {timeout_s:.0f} s: {what}"
        time.sleep(0.2)
    return time.monotonic() - began
