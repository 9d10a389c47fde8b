"""Starts a study's driver on the head of a cluster so that it outlives whoever started it.

`ray submit` and `ray job submit` run `cluster/launch.py`, which is this module. The driver is a session of its own: a
closed laptop, a lost ssh connection or Ctrl-C end the watching, not the study.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from tunebench.study.errors import RunError
from tunebench.study.lock import is_held
from tunebench.study.resolve import load_run, resolve
from tunebench.study.spec import StudyError
from tunebench.study.storage import is_address
from tunebench.tuning.run_folder import default_run_folder
from tunebench.tuning.trial_log import LOGS
from tunebench.workloads.data import CACHE_VARIABLE

STORAGE_VARIABLE = "TUNEBENCH_STORAGE"
DRIVER_OUTPUT = "launch.log"
_BAD_INPUT = 2
_LOOK_EVERY_S = 0.5


class _Left(Exception):
    """Whoever watches has gone; the driver has not."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Start or resume a study and show what its driver says, until it ends or nobody watches any more.

    Returns:
        The driver's exit code; 0 where the watching ended before it; 2 for bad input, said in one line.
    """
    given = _parser().parse_args(arguments)
    try:
        os.environ.update(_variable(pair) for pair in given.set)
        run = run_folder(given.study, given.storage, given.run)
        address = given.storage if given.storage and is_address(given.storage) else None
        refuse_second_driver(run)
        output = _output_of(run)
    except (RunError, StudyError) as error:
        return _complain(str(error))
    except OSError as error:
        return _complain(f"{error.filename}: found {error.strerror}, allowed: a place that can be read and written")
    if given.storage and not address:
        os.environ.setdefault(CACHE_VARIABLE, str(Path(given.storage) / "cache"))
    begins = output.stat().st_size
    driver = start_driver(driver_command(given.study, run, given.address, given.gpus, address, given.drivers), output)
    print(_how_to_go_on(run, output), flush=True)
    return follow(driver, output, begins) if given.follow else 0


def run_folder(study: Path, storage: str | None, run: Path | None = None) -> Path:
    """The run directory of a study: the one given, the study itself where it is one, or STORAGE/runs/NAME-HASH.

    Where the storage is an address, the run directory is runs/NAME-HASH on the head.

    Raises:
        RunError: nothing says where runs lie.
        StudyError: the study is faulty.
    """
    if run is not None:
        return run
    if study.is_dir():
        load_run(study)
        return study
    if storage is None:
        raise RunError(
            f"--storage: found nothing, nor {STORAGE_VARIABLE}, allowed: a folder that all nodes share, or an address"
        )
    parent = Path() if is_address(storage) else Path(storage)
    return default_run_folder(resolve(study), parent / "runs")


def refuse_second_driver(run: Path) -> None:
    """Look for a driver at work on a run.

    Raises:
        RunError: there is one.
    """
    if is_held(run):
        raise RunError(
            f"{run}: found a driver at work on it, allowed: one at a time; `tunebench watch {run}` shows it, "
            f"`tunebench drain {run}` ends it"
        )


def _output_of(run: Path) -> Path:
    """The file that a driver's output goes to, made where it is not there."""
    output = run / LOGS / DRIVER_OUTPUT
    output.parent.mkdir(parents=True, exist_ok=True)
    output.touch()
    return output


def driver_command(
    study: Path, run: Path, address: str, gpus: int, storage: str | None = None, drivers: int = 1
) -> list[str]:
    """The command line of a study's driver, and of what holds so many GPUs of an autoscaling cluster for it."""
    driver = [sys.executable, "-m", "tunebench", "run", str(study), "--run", str(run), "--address", address]
    driver += ["--storage", storage] if storage else []
    driver += ["--drivers", str(drivers)] if drivers != 1 else []
    if not gpus:
        return driver
    return [sys.executable, "-m", "tunebench.cluster.demand", "--gpus", str(gpus), "--address", address, "--", *driver]


def start_driver(command: Sequence[str], output: Path) -> subprocess.Popen[bytes]:
    """Start a driver as a session of its own, whose output goes to the end of a file."""
    with output.open("ab") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )


def follow(driver: subprocess.Popen[bytes], output: Path, begins: int) -> int:
    """Show what a driver says until it ends; SIGTERM, as `ray job stop` sends it, is passed on to it.

    Args:
        driver: the process.
        output: where it writes.
        begins: first byte of this start's output.

    Returns:
        Its exit code, 128 plus the signal's number where one ended it; 0 where the watching ended before.
    """
    try:
        with _signals(driver), output.open("rb") as said:
            said.seek(begins)
            while driver.poll() is None:
                _show(said.read())
                time.sleep(_LOOK_EVERY_S)
            _show(said.read())
    except (_Left, KeyboardInterrupt, BrokenPipeError):
        return 0
    code = driver.returncode
    return code if code >= 0 else 128 - code


@contextmanager
def _signals(driver: subprocess.Popen[bytes]) -> Iterator[None]:
    def leave(number: int, frame: FrameType | None) -> None:
        raise _Left

    def pass_on(number: int, frame: FrameType | None) -> None:
        driver.send_signal(number)

    before = {
        signal.SIGHUP: signal.signal(signal.SIGHUP, leave),
        signal.SIGTERM: signal.signal(signal.SIGTERM, pass_on),
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _complain(line: str) -> int:
    print(f"tunebench: {line}", file=sys.stderr)
    return _BAD_INPUT


def _show(text: bytes) -> None:
    sys.stdout.write(text.decode(errors="replace"))
    sys.stdout.flush()


def _variable(pair: str) -> tuple[str, str]:
    name, equals, value = pair.partition("=")
    if not equals or not name.isidentifier():
        raise RunError(f"--set: found {pair!r}, allowed: NAME=VALUE")
    return name, value


def _how_to_go_on(run: Path, output: Path) -> str:
    if job := os.environ.get("SLURM_JOB_ID"):
        return (
            f"run directory: {run}\n"
            f"the driver ends with job {job}; its output is in {output}\n"
            f"from a machine that sees it: tunebench status {run}, likewise watch, pause, drain, cancel"
        )
    return (
        f"run directory: {run}\n"
        f"the driver goes on by itself; its output is in {output}\n"
        f"from your machine: ray exec CLUSTER.yaml 'tunebench status {run}', likewise watch, pause, drain, cancel"
    )


def _parser() -> argparse.ArgumentParser:
    known = os.environ.get(STORAGE_VARIABLE)
    parser = argparse.ArgumentParser(prog="launch.py", description="Start or resume a study on a Ray cluster's head.")
    parser.add_argument("--study", type=Path, required=True, help="study file on the head, or a run directory")
    parser.add_argument(
        "--storage",
        default=known,
        help=f"folder that all nodes share, for runs/ and cache/, or an address (s3://...), with which "
        f"the run directory is on the head (default: ${STORAGE_VARIABLE})",
    )
    parser.add_argument("--run", type=Path, help="run directory (default: STORAGE/runs/NAME-HASH)")
    parser.add_argument("--address", default="auto", help="Ray cluster (default: the one of this node)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="variable for ${NAME} in the study; repeatable"
    )
    parser.add_argument(
        "--gpus",
        type=int,
        default=0,
        help="GPUs to ask an autoscaling cluster for meanwhile (default: none)",
    )
    parser.add_argument(
        "--drivers",
        type=int,
        default=1,
        help="processes on the head that share the arms, where one cannot take in the reports of all trials",
    )
    parser.add_argument(
        "--no-follow", dest="follow", action="store_false", help="return as soon as the driver has been started"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
