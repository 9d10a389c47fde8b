"""Pictures of a run's TensorBoard for the user guide, taken in a headless Chromium.

python docs/screenshots.py runs/quickstart-5ecf7378 docs/figures
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.board_loading import hparams_listed, seconds_until, served
from tunebench.study.journal import read_trials
from tunebench.study.record import TENSORBOARD

_LOADED_MS = 4000
_HIDDEN = ("aux_beta1", "aux_beta2", "basis", "beta1", "beta2")
_SHOWN = ("workload", "optimizer", "stage", "learning_rate")


def hparams(page: Any, address: str) -> None:
    """The table of all configurations, with the columns that most people want."""
    page.goto(f"{address}/#hparams")
    for name in (*_HIDDEN, *_SHOWN):
        page.get_by_text(name, exact=True).first.click()


def arms(page: Any, address: str) -> None:
    """The charts that lay the arms over each other."""
    page.goto(f"{address}/#custom_scalars&regexInput=%5Earms/&_smoothingWeight=0")
    page.get_by_text("Matches (", exact=False).first.wait_for(state="visible")


def ranking(page: Any, address: str) -> None:
    """The pictures of the ranking."""
    page.goto(f"{address}/#images&regexInput=%5Earms$")
    page.get_by_text("Show actual image size").click()
    page.locator("tf-image-loader img").first.wait_for(state="visible")


PAGES: dict[str, tuple[Callable[[Any, str], None], int]] = {
    "tensorboard-hparams": (hparams, 800),
    "tensorboard-arms": (arms, 1080),
    "tensorboard-ranking": (ranking, 760),
}


def main() -> None:
    """Take every picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    browser_path = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser_path is None:
        sys.exit("screenshots: found no chromium, allowed: chromium or chromium-browser on the PATH")
    configurations = len({trial.key.trial_id.rpartition(".")[0] for trial in read_trials(arguments.run)})
    logdir = arguments.run / TENSORBOARD
    with served(logdir, data_server=True) as address, sync_playwright() as playwright:
        seconds_until(lambda: hparams_listed(address), configurations)
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        for name, (show, height) in PAGES.items():
            page = browser.new_page(viewport={"width": 1300, "height": height})
            show(page, address)
            page.wait_for_timeout(_LOADED_MS)  # lines are drawn after their legends
            page.screenshot(path=arguments.out / f"{name}.png")
            page.close()


if __name__ == "__main__":
    main()
