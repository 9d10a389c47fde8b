"""Lines on the screen."""

from __future__ import annotations

from rich.console import Console


def say(console: Console, line: str) -> None:
    """Print a line as it is, however long: names and brackets in it mean nothing to the console."""
    console.print(line, highlight=False, soft_wrap=True, markup=False)
