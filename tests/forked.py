"""Processes that need not import NequIP and Inductor again: a server that has imported them once forks them."""

from __future__ import annotations

import os
import sys
from importlib.metadata import entry_points
from multiprocessing import get_context
from pathlib import Path

PROCESSES = get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["nequip.scripts.train", "nequip.scripts.package", "allegro.model", "torch._inductor.compile_fx"]
)


def nequip_command(name: str, *arguments: str, folder: Path) -> None:
    """Run one of NequIP's own commands, as it is installed, in a folder to its end, which has to be a good one."""
    process = PROCESSES.Process(target=_run, args=(name, arguments, folder))
    process.start()
    process.join(timeout=600)
    assert process.exitcode == 0, (folder / f"{name}.log").read_text()[-3000:]


def _run(name: str, arguments: tuple[str, ...], folder: Path) -> None:
    os.chdir(folder)
    with (folder / f"{name}.log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    sys.argv = [name, *arguments]
    (command,) = entry_points(group="console_scripts", name=name)
    sys.exit(command.load()())
