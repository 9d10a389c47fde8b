from __future__ import annotations

import subprocess
import sys

from tunebench.study.seeds import named_seed


def test_a_seed_depends_on_the_root_and_on_every_name() -> None:
    seeds = {
        named_seed(root, *names)
        for root in (0, 1, 2**31 - 1)
        for names in ((), ("init",), ("order",), ("init", "ethanol"), ("init", 0), ("init", 1), ("ethanol", "init"))
    }
    assert len(seeds) == 3 * 7


def test_names_do_not_run_into_one_another() -> None:
    assert named_seed(1, "a", "bc") != named_seed(1, "ab", "c")
    assert named_seed(1, "2") != named_seed(12)


def test_seeds_fit_every_generator() -> None:
    assert all(0 <= named_seed(root, "init") < 2**31 for root in range(2000))


def test_a_seed_is_the_same_in_every_process_and_release() -> None:
    assert named_seed(2026, "init", "ethanol", "tune", 0) == 2_049_043_906
    code = "from tunebench.study.seeds import named_seed; print(named_seed(2026, 'init', 'ethanol', 'tune', 0))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert int(done.stdout) == 2_049_043_906
