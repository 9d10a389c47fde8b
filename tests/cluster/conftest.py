"""The finished study of `tests/tuning`, which a cluster is to reproduce."""

from tests.tuning.conftest import finished_run, finished_study

__all__ = ["finished_run", "finished_study"]
