"""Holds GPUs of an autoscaling cluster for as long as a driver lives.

A study's cohorts take devices that are there, and nothing else would make a cluster grow from none. Run as
`python -m tunebench.cluster.demand --gpus N --address ADDRESS -- COMMAND`, in a process beside the driver, so that a
driver that is killed leaves no machines behind that nobody uses.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from tunebench.tuning.ray_environment import set_ray_environment


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command while the cluster is asked for GPUs.

    Returns:
        The command's exit code, 128 plus the signal's number where one ended it.
    """
    parser = argparse.ArgumentParser(prog="tunebench.cluster.demand", description=__doc__.splitlines()[0])
    parser.add_argument("--gpus", type=int, required=True, help="GPUs to hold")
    parser.add_argument("--address", required=True, help="Ray cluster")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- and what to run meanwhile")
    given = parser.parse_args(arguments)
    with _passing_signals() as driver_of, held_gpus(given.gpus, given.address):
        driver = subprocess.Popen(given.command[1:])
        driver_of.append(driver)
        code = driver.wait()
    return code if code >= 0 else 128 - code


@contextmanager
def held_gpus(count: int, address: str) -> Iterator[None]:
    """Ask a cluster's autoscaler for so many GPUs, and for none at the end: its idle time then begins.

    The wish is not tied to a process: without the second call machines would stay for good.
    """
    set_ray_environment(address)
    import ray
    from ray.autoscaler.sdk import request_resources

    ray.init(address=address, log_to_driver=False, configure_logging=False)
    try:
        request_resources(bundles=[{"GPU": 1}] * count)
        yield
    finally:
        request_resources(bundles=[])
        ray.shutdown()


@contextmanager
def _passing_signals() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Pass SIGTERM and SIGINT on to the processes of the list and wait for their end."""
    drivers: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        for driver in drivers:
            driver.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield drivers
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
