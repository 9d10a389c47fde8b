"""Reading studies: a study file on its own, with all it refers to, or the one a run directory was started with."""

from __future__ import annotations

from pathlib import Path

from tunebench.study.resolve import ResolvedStudy, load_run, resolve
from tunebench.study.spec import Study

__all__ = ["ResolvedStudy", "load_run", "load_study", "resolve"]


def load_study(path: Path) -> Study:
    """The study of a file, checked against itself, its search spaces and the presence of its data files.

    Raises:
        StudyError: anything wrong, in one line that names file, key, value found and what is allowed.
    """
    return resolve(path).study
