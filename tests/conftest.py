from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tunebench.study.spec import SplitFrames, XtbData
from tunebench.workloads.data import CACHE_VARIABLE, PreparedData, prepare

DATA_VARIABLE = "TUNEBENCH_DATA"

# Whole files are given to workers in this order: what takes longest comes first, and no worker is left alone with it.
LONGEST_FIRST = (
    "tests/tuning/test_kill.py",
    "tests/cluster/test_lan.py",
    "tests/tuning/test_pool.py",
    "tests/tuning/test_shards.py",
    "tests/tuning/test_run.py",
    "tests/engine/test_fused.py",
    "tests/engine/test_cohort_and_lightning.py",
    "tests/tuning/test_control.py",
    "tests/tuning/test_tensorboard.py",
    "tests/engine/test_cohort.py",
    "tests/engine/test_functional.py",
    "tests/engine/test_nequip_train.py",
)

# Equal examples at every run, however busy the machine is.
settings.register_profile("tunebench", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tunebench")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files that take longest first; all else keeps its place."""
    rank = {file: index for index, file in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: rank.get(item.nodeid.partition("::")[0], len(rank)))


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all workers of pytest-xdist, where they share what takes long to make."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session", autouse=True)
def session_cache(shared_folder: Path):
    """One cache of prepared data and graphs for all tests and workers, away from the user's."""
    cache = shared_folder / "cache"
    cache.mkdir(exist_ok=True)
    before = os.environ.get(CACHE_VARIABLE)
    os.environ[CACHE_VARIABLE] = str(cache)
    yield cache
    if before is None:
        del os.environ[CACHE_VARIABLE]
    else:
        os.environ[CACHE_VARIABLE] = before


@pytest.fixture(scope="session")
def reference_data() -> Path:
    """Folder of the reference data; tests that need it are skipped where it is absent."""
    named = os.environ.get(DATA_VARIABLE)
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no reference data: {folder} is not a folder; set {DATA_VARIABLE}")
    return folder


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A headless browser of this machine as Playwright drives it; without one, tests that need it are skipped.

    One per module: Playwright runs an event loop in the thread for as long as it is open, and a later test could then
    run none of its own.
    """
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        pytest.skip("no chromium on this machine: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def tiny_ethanol() -> XtbData:
    """Ethanol at 300 K with a hot split, a few frames each: made in about a second."""
    return XtbData(
        source="xtb",
        system="ethanol",
        ood_temperature_kelvin=600.0,
        equilibration_fs=25.0,
        interval_fs=10.0,
        frames=SplitFrames(train=10, val=4, test=4, ood=3),
    )


@pytest.fixture(scope="session")
def prepared_ethanol(tiny_ethanol: XtbData, session_cache: Path) -> PreparedData:
    """The prepared data set of `tiny_ethanol`."""
    return prepare(tiny_ethanol)
