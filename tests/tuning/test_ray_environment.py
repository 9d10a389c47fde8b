from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import os, signal, sys, time
from tunebench.tuning.ray_environment import terminate_like_interrupt
signal.signal(signal.SIGINT, {on_interrupt})
terminate_like_interrupt()
try:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(5)
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.parametrize("on_interrupt", ["signal.default_int_handler", "signal.SIG_IGN"])
def test_a_termination_interrupts_also_where_a_shell_made_the_process_ignore_interrupts(on_interrupt: str) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT.format(on_interrupt=on_interrupt)], timeout=60)
    assert done.returncode == 130


def test_a_termination_goes_to_whoever_handles_interrupts() -> None:
    handler = "lambda number, frame: sys.exit(7 if number == signal.SIGINT else 8)"
    done = subprocess.run([sys.executable, "-c", SCRIPT.format(on_interrupt=handler)], timeout=60)
    assert done.returncode == 7
