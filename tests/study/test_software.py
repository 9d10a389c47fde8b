from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from tunebench.study.software import Software, differences, software

DRIVER = Software(
    python="3.11.7",
    packages={"tunebench": "0.1.0", "torch": "2.13.0+cu130", "e3nn": "0.6.0", "numpy": "2.4.6", "tblite": None},
    source="a" * 64,
    cuda="13.0",
)


def with_packages(**versions: str | None) -> Software:
    return replace(DRIVER, packages={**DRIVER.packages, **versions})


def found(node: Software, driver: Software = DRIVER, *, trains_on_gpu: bool = True) -> list[tuple[str, bool]]:
    told = differences(node, driver, trains_on_gpu=trains_on_gpu)
    return [(difference.package, difference.strict) for difference in told]


def test_this_process_tells_what_it_runs_without_importing_torch_or_ray() -> None:
    here = software()
    assert here.packages["torch"] == torch.__version__
    assert here.cuda == torch.version.cuda
    script = (
        "import sys, tunebench.study.software as s; s.software(); sys.exit(bool({'torch', 'ray'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=120).returncode == 0


def test_equal_nodes_do_not_differ() -> None:
    assert found(DRIVER) == []


@pytest.mark.parametrize(
    ("node", "package", "strict"),
    [
        (with_packages(e3nn="0.5.9"), "e3nn", True),
        (with_packages(e3nn=None), "e3nn", True),
        (with_packages(torch="2.12.1+cu130"), "torch", True),
        (with_packages(numpy="2.4.5"), "numpy", False),
        (with_packages(tblite="0.8.0"), "tblite", False),
        (replace(DRIVER, source="b" * 64), "tunebench", True),
        (replace(DRIVER, python="3.12.7"), "python", True),
        (replace(DRIVER, python="3.11.9"), "python", False),
        (replace(DRIVER, cuda="12.8"), "torch", False),
        (replace(DRIVER, cuda=None), "torch", True),
    ],
)
def test_what_changes_results_is_strict_and_the_rest_is_told(node: Software, package: str, strict: bool) -> None:
    assert found(node) == [(package, strict)]


def test_a_head_without_gpu_may_have_a_torch_without_cuda() -> None:
    head = replace(with_packages(torch="2.13.0+cpu"), cuda=None)
    assert found(head, trains_on_gpu=False) == []
    assert found(DRIVER, head) == []


def test_what_is_strict_is_told_first() -> None:
    assert found(replace(with_packages(numpy="2", e3nn="0.5"), python="3.11.9")) == [
        ("e3nn", True),
        ("python", False),
        ("numpy", False),
    ]
