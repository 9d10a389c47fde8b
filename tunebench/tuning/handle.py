"""What an actor is to those who call it; imports nothing, as a pool or a cohort needs nothing of Tune."""

from __future__ import annotations

from typing import Any

Handle = Any
"""An actor; Ray knows its methods only at run time."""
