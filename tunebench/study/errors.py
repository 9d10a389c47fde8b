"""Why a run cannot start or stops before its end."""

from __future__ import annotations


class RunError(Exception):
    """A run directory that cannot be used: one line with what was found and what is allowed."""


class Interrupted(Exception):
    """The run was interrupted; its state is kept and `tunebench run` goes on."""


class RunStopped(Exception):
    """The run broke off for a reason outside the study; its state is kept and `tunebench run` goes on."""
