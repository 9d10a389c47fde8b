"""A Slurm cluster over the hosts of a local network: `slurmctld` on a login host, `slurmd` on the others.

Configuration, keys, state and spools lie on the hosts' own disks and on the disk that the hosts share; nothing of it is
the machine's. Needs what `tests/cluster/lan.py` needs, and slurmctld, slurmd, slurm-client and munge.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.cluster import lan as network
from tests.cluster.deployment import SLOW_STEPS, wait_for
from tests.cluster.lan import CHECKOUT, Host, Lan, local_network

LOGIN = "login"
_NEEDED = {"slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client", "munged": "munge"}
# A lost node is noticed within some twenty seconds, not after five minutes.
_CONFIGURATION = """\
ClusterName=namespaces
SlurmctldHost={login}({address})
SlurmUser=root
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket=/run/munge.socket
StateSaveLocation=/tmp/slurmctld
SlurmdSpoolDir=/tmp/slurmd
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile=/tmp/slurmctld.log
SlurmdLogFile=/tmp/slurmd.log
ProctrackType={tracking}
TaskPlugin=task/affinity
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
SlurmdTimeout={slurmd_timeout_s}
KillWait=30
MessageTimeout=5
TCPTimeout=1
SchedulerParameters=batch_sched_delay=0,sched_interval=2
{nodes}
PartitionName=batch Nodes=ALL Default=YES State=UP OverTimeLimit=0
"""
# A branch of the machine's freezer cgroups in the place of the whole tree, and its end.
_OWN_CGROUPS = """\
mkdir -p /run/cgroup/freezer /run/cgroup/all && mount -t cgroup -o freezer cgroup /run/cgroup/all &&
mkdir -p /run/cgroup/all/{name} && mount --bind /run/cgroup/all/{name} /run/cgroup/freezer"""
_NO_CGROUPS = "test ! -e /run/cgroup/all/{name} || find /run/cgroup/all/{name} -depth -type d -exec rmdir {{}} \\;"


def missing() -> str:
    """What keeps this machine from being a Slurm cluster, in one line; empty where nothing does."""
    path = os.environ.get("PATH", "") + os.pathsep + "/usr/sbin:/sbin"
    packages = sorted({package for name, package in _NEEDED.items() if not shutil.which(name, path=path)})
    return f"apt-get install {' '.join(packages)}" if packages else network.missing()


@dataclass(frozen=True)
class Slurm:
    """A Slurm cluster and a user at its login host, in a folder that all hosts share.

    Attributes:
        lan: with a host `login`; all others are compute nodes.
        slurmd_timeout_s: after which a node that does not answer is lost.
    """

    lan: Lan
    slurmd_timeout_s: int = 5

    @property
    def login(self) -> Host:
        return self.lan[LOGIN]

    @property
    def nodes(self) -> list[Host]:
        return [host for name, host in self.lan.hosts.items() if name != LOGIN]

    @property
    def folder(self) -> Path:
        """The user's checkout as this machine sees it; /srv/checkout on the hosts."""
        return self.lan.storage / "checkout"

    def up(self, pace_s: float) -> None:
        """Start the daemons and furnish the user's checkout; `pace_s` is the wait of a step, seconds."""
        shared = self.lan.storage
        (shared / "site").mkdir()
        (shared / "site" / "sitecustomize.py").write_text(SLOW_STEPS.format(pace_s=pace_s))
        (shared / "munge.key").write_bytes(secrets.token_bytes(64))
        (shared / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupMountpoint=/run/cgroup\n")
        # what most sites have; it needs the first version of cgroups
        by_cgroup = self._own_cgroups(self.login)
        cores = os.cpu_count()
        nodes = "\n".join(
            f"NodeName={host.name} NodeAddr={host.address} CPUs={cores} RealMemory=1000 State=UNKNOWN"
            for host in self.nodes
        )
        text = _CONFIGURATION.format(
            login=LOGIN,
            address=self.login.address,
            tracking="proctrack/cgroup" if by_cgroup else "proctrack/linuxproc",
            slurmd_timeout_s=self.slurmd_timeout_s,
            nodes=nodes,
        )
        (shared / "slurm.conf").write_text(text)
        self.folder.mkdir()
        (self.folder / "cluster").symlink_to(CHECKOUT / "cluster")
        (self.folder / ".venv").symlink_to(sys.prefix)
        self.start(self.login)
        for host in self.nodes:
            self.start(host)
        wait_for(lambda: self.idle() == len(self.nodes), 30.0, "all nodes are idle")

    def start(self, host: Host) -> None:
        """Start Slurm's daemons on a host that is on."""
        host.run("install -m 600 /srv/munge.key /run/munge.key")
        files = " ".join(f"--{name}-file=/run/munged.{name}" for name in ("pid", "seed", "log"))
        host.run(f"munged --force --key-file=/run/munge.key --socket=/run/munge.socket {files}")
        self._own_cgroups(host)
        daemon = "slurmctld" if host is self.login else f"slurmd -f /srv/slurm.conf -N {host.name}"
        host.run(f"mkdir -p /tmp/slurmctld /tmp/slurmd && {daemon}")

    def down(self) -> None:
        """End the compute nodes and take away what they have left in the machine's cgroups."""
        for host in self.nodes:
            self.lan.crash(host.name)
        if self.login.init is not None:
            for host in self.lan.hosts.values():
                leave = _NO_CGROUPS.format(name=self._branch(host))
                wait_for(lambda leave=leave: self.login.run(leave, check=False).returncode == 0, 10.0, leave)

    def _own_cgroups(self, host: Host) -> bool:
        """Whether a host has a branch of the machine's cgroups for its jobs, made where it is not there."""
        return host.run(_OWN_CGROUPS.format(name=self._branch(host)), check=False).returncode == 0

    def _branch(self, host: Host) -> str:
        return f"slurm-{self.lan.folder.name}-{host.name}"

    def idle(self) -> int:
        """Nodes that wait for a job."""
        return int(self.login.run("sinfo -h -t idle -o %D", check=False).stdout.strip() or 0)

    def describe(self, nodes: int, cpus: int) -> Path:
        """Write `job.sbatch` into the checkout as a user does; the file as this machine sees it."""
        answers = {"partition": "batch", "nodes": nodes, "gpus": 0, "cpus": cpus, "storage": "/srv/tunebench"}
        given = " ".join(f"--answer {name}={value}" for name, value in answers.items())
        self.login.run(f"cd /srv/checkout && tunebench cluster init --kind slurm {given} --out job.sbatch --json")
        return self.folder / "job.sbatch"

    def submit(self, *words: str) -> int:
        """`sbatch` in the user's checkout; the job's number."""
        said = self.login.run("cd /srv/checkout && sbatch --parsable", *words).stdout
        return int(said.strip().splitlines()[-1])

    def job(self, number: int) -> dict[str, str]:
        """What `scontrol show job` says: `JobState`, `ExitCode`, `Restarts` and more."""
        said = self.login.run(f"scontrol show job {number}").stdout
        return dict(re.findall(r"(\w+)=(\S*)", said))

    def state(self, number: int) -> str:
        return self.job(number)["JobState"]

    def over(self, number: int) -> bool:
        """Whether a job has ended and its nodes are free."""
        return self.state(number) not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED")

    def log(self, number: int) -> str:
        """What a job has written for its user."""
        file = self.folder / f"tunebench-{number}.log"
        return file.read_text() if file.exists() else ""

    def processes(self) -> dict[str, list[str]]:
        """Command lines on the nodes that are on, by node, without Slurm's own."""
        own = re.compile(r"(/usr/s?bin/)?(munged|slurmd|slurmctld|slurmstepd:)\b|sleep 1$")
        return {
            host.name: [line for line in host.processes().values() if not own.match(line)]
            for host in self.nodes
            if host.init is not None
        }

    def left(self, patience_s: float) -> dict[str, list[str]]:
        """What still runs on the nodes when nothing should, at the latest after some seconds."""
        until = time.monotonic() + patience_s
        while any(self.processes().values()) and time.monotonic() < until:
            time.sleep(0.5)
        return self.processes()


@contextmanager
def slurm_cluster(folder: Path, nodes: Iterable[str], pace_s: float) -> Iterator[Slurm]:
    """A Slurm cluster with these compute nodes, whose study's steps wait a while each, seconds."""
    names = [LOGIN, *nodes]
    with local_network(folder, names, on=names, SLURM_CONF="/srv/slurm.conf") as lan:
        slurm = Slurm(lan)
        try:
            slurm.up(pace_s)
            yield slurm
        finally:
            slurm.down()
