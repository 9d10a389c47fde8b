"""The one error a workload raises when its description or its data cannot be used."""

from __future__ import annotations


class WorkloadError(Exception):
    """Bad data or a bad model section: one line that names the key, what was found and what is allowed.

    ``key`` is relative to the workload, for example ``data.frames.train``; the caller puts the study file and the
    workload's name in front of it.
    """

    def __init__(self, key: str, found: object, allowed: str) -> None:
        self.key, self.found, self.allowed = key, found, allowed
        text = f"{key}: found {found!r}, allowed: {allowed}"
        super().__init__(" ".join(text.split()))

    def __reduce__(self) -> tuple[type[WorkloadError], tuple[str, object, str]]:
        """Pickle by the three arguments, so the error survives the way out of a worker process."""
        return type(self), (self.key, self.found, self.allowed)
