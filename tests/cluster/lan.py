"""A local network of hosts on one Linux machine, out of namespaces: each has its own address, processes, disk and sshd.

Nothing of it touches the machine's own network: the switch between the hosts has a namespace of its own, too. Needs
root, iproute2, util-linux, openssh-server and rsync.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

_INIT = Path(__file__).with_name("host-init.sh")
CHECKOUT = Path(__file__).resolve().parents[2]
_NEEDED = {"ip": "iproute2", "unshare": "util-linux", "nsenter": "util-linux", "sshd": "openssh-server"} | {
    "rsync": "rsync",
    "ssh-keygen": "openssh-client",
}
_READY_S = 20.0


def missing() -> str:
    """What keeps this machine from being a network, in one line; empty where nothing does."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "namespaces need root on Linux"
    path = os.environ.get("PATH", "") + os.pathsep + "/usr/sbin:/sbin"
    packages = sorted({package for name, package in _NEEDED.items() if not shutil.which(name, path=path)})
    if packages:
        return f"apt-get install {' '.join(packages)}"
    tried = subprocess.run(["unshare", "-n", "-m", "-p", "--fork", "true"], capture_output=True, text=True)
    return "" if tried.returncode == 0 else f"no namespaces: {tried.stderr.strip()}"


@dataclass
class Host:
    """One host of the network.

    Attributes:
        name: its host name. address: its IPv4 address.
        init: process, as the machine sees it, whose end is the host's; None while the host is off.
    """

    name: str
    address: str
    folder: Path
    init: int | None = None

    def command(self, *words: str) -> list[str]:
        """A command line of the machine that runs a shell command line in a login shell of this host."""
        enter = ["nsenter", "-t", str(self.init), "-a", "env", "-i", "HOME=/root", "TERM=xterm", "LANG=C.UTF-8"]
        return [*enter, "bash", "--login", "-c", " ".join(words)]

    def run(self, *words: str, timeout_s: float = 120.0, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a shell command line on this host to its end."""
        done = subprocess.run(
            self.command(*words), capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL
        )
        assert not check or done.returncode == 0, f"{self.name}: {words}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
        return done

    def processes(self) -> dict[int, str]:
        """Command lines by process id, as the host counts, without what came with it: its first process and sshd."""
        found = {}
        for line in self.run("ps -eo pid=,args=").stdout.splitlines():
            process, _, command = line.strip().partition(" ")
            own = int(process) == 1 or command.startswith(("sshd:", "sleep 1", "ps -eo", "bash --login -c ps"))
            if not own:
                found[int(process)] = command
        return found

    def listening(self) -> set[tuple[str, int]]:
        """Address and port of every TCP socket that listens, without sshd's."""
        lines = self.run("ss -Htln").stdout.splitlines()
        ends = (line.split()[3].rpartition(":") for line in lines)
        return {(address.strip("[]"), int(port)) for address, _, port in ends if port != "22"}


@dataclass
class Lan:
    """Hosts behind one switch.

    Attributes:
        folder: of keys, the hosts' disks, and `storage`, which every host sees as /srv.
        shared: folders that every host sees unchanged, read-only where they lie in /root or /tmp.
        environment: variables of every login shell.
    """

    folder: Path
    names: Iterable[str]
    shared: Iterable[Path]
    environment: Mapping[str, str]
    subnet: str = "10.77.0"
    hosts: dict[str, Host] = field(init=False)

    def __post_init__(self) -> None:
        self._tag = f"tb{uuid.uuid4().hex[:5]}"
        self.hosts = {
            name: Host(name, f"{self.subnet}.{10 + number}", self.folder / name)
            for number, name in enumerate(self.names)
        }
        self.storage = self.folder / "storage"
        self.key = self.folder / "id_ed25519"

    def __getitem__(self, name: str) -> Host:
        return self.hosts[name]

    def up(self, *names: str) -> None:
        """Make the switch and put hosts on."""
        self.storage.mkdir(parents=True)
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.key)
        _run("ip", "netns", "add", self._tag)
        _run("ip", "-n", self._tag, "link", "add", "switch", "type", "bridge")
        _run("ip", "-n", self._tag, "link", "set", "switch", "up")
        for name in names:
            self.start(name)

    def start(self, name: str) -> None:
        """Put a host on: for the first time, or again after `crash` with the disk that it had."""
        host = self.hosts[name]
        self._furnish(host)
        self._wire(host)
        wrap = ["unshare", "-m", "-p", "-u", "-i", "--fork", "--kill-child", "--mount-proc", "--propagation", "private"]
        folders = [str(host.folder), str(self.storage), *map(str, self.shared)]
        log = (host.folder / "init.log").open("ab")
        starter = subprocess.Popen(
            ["ip", "netns", "exec", self._namespace(host), *wrap, "bash", str(_INIT), host.name, *folders],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env={"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "TERM": "xterm"},
        )
        log.close()
        until = time.monotonic() + _READY_S
        while not (host.folder / "run" / "ready").exists():
            said = (host.folder / "init.log").read_text()
            assert starter.poll() is None, f"{name} does not start: {said[-2000:]}"
            assert time.monotonic() < until, f"{name} does not start in {_READY_S:.0f} s: {said[-2000:]}"
            time.sleep(0.05)
        host.init = _first_child(starter.pid)

    def crash(self, name: str) -> None:
        """End all processes of a host at once, as a power cut does; its disk is kept."""
        host = self.hosts[name]
        if host.init is not None:
            with suppress(ProcessLookupError):
                os.kill(host.init, signal.SIGKILL)
            host.init = None

    def cable(self, name: str, *, plugged: bool) -> None:
        """Pull a host's network cable, or plug it in again."""
        _run("ip", "-n", self._tag, "link", "set", f"to-{name}", "up" if plugged else "down")

    def down(self) -> None:
        """Take all of it away; nothing is left of it but `folder`."""
        for name, host in self.hosts.items():
            self.crash(name)
            subprocess.run(["ip", "netns", "del", self._namespace(host)], capture_output=True)
        subprocess.run(["ip", "netns", "del", self._tag], capture_output=True)

    def _namespace(self, host: Host) -> str:
        return f"{self._tag}-{host.name}"

    def _wire(self, host: Host) -> None:
        space = self._namespace(host)
        if space in subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout:
            return
        _run("ip", "netns", "add", space)
        _run("ip", "-n", self._tag, "link", "add", f"to-{host.name}", "type", "veth", "peer", "eth0", "netns", space)
        _run("ip", "-n", self._tag, "link", "set", f"to-{host.name}", "master", "switch", "up")
        _run("ip", "-n", space, "link", "set", "lo", "up")
        _run("ip", "-n", space, "addr", "add", f"{host.address}/24", "dev", "eth0")
        _run("ip", "-n", space, "link", "set", "eth0", "up")

    def _furnish(self, host: Host) -> None:
        """The host's own disk: home folder with the network's key, name service, keys of its sshd."""
        own = host.folder
        for folder, mode in {"root/.ssh": 0o700, "tmp": 0o1777, "run/sshd": 0o755, "etc": 0o755}.items():
            (own / folder).mkdir(parents=True, exist_ok=True)
            (own / folder).chmod(mode)
        (own / "root").chmod(0o700)
        (own / "run" / "ready").unlink(missing_ok=True)
        authorized = own / "root" / ".ssh" / "authorized_keys"
        authorized.write_text(self.key.with_suffix(".pub").read_text())
        authorized.chmod(0o600)
        if not (own / "run" / "host_key").exists():
            _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", own / "run" / "host_key")
        names = "".join(f"{each.address} {each.name}\n" for each in self.hosts.values())
        (own / "etc" / "hosts").write_text(f"127.0.0.1 localhost\n0.0.0.0 any-addr\n{names}")
        (own / "etc" / "resolv.conf").write_text("")
        (own / "etc" / "nsswitch.conf").write_text("hosts: files\n")
        if not (own / "root" / ".bashrc").exists():
            lines = [f"export {name}='{value}'\n" for name, value in self.environment.items()]
            (own / "root" / ".bashrc").write_text("".join(lines))
            (own / "root" / ".profile").write_text(". ~/.bashrc\n")


@contextmanager
def local_network(folder: Path, names: Iterable[str], on: Iterable[str], **variables: str) -> Iterator[Lan]:
    """A network whose hosts see this checkout and this Python at their own places; `on` are put on at once.

    `variables` come to the environment of every login shell.
    """
    shared = dict.fromkeys(map(Path, (sys.base_prefix, sys.prefix, CHECKOUT)))
    system = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    environment = {
        "PATH": f"{sys.prefix}/bin:{system}",
        "PYTHONPATH": f"/srv/site:{CHECKOUT}",
        "PYTHONDONTWRITEBYTECODE": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",  # otherwise whatever else this machine does comes before all trials
        **variables,
    }
    lan = Lan(folder, list(names), list(shared), environment)
    try:
        lan.up(*on)
        yield lan
    finally:
        lan.down()


def _first_child(process: int) -> int:
    """The first process of a new process namespace, as the machine counts: the child of `unshare`."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return int(children[0])


def _run(*words: str | Path) -> None:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    assert done.returncode == 0, f"{words}: {done.stderr}"
