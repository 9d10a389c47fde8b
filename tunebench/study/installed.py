"""Where the shipped search spaces and studies lie: inside an installed package, or at the root of a checkout."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent.parent


def shipped_folder(name: str) -> Path:
    """The folder ``search_spaces`` or ``studies`` that came with this copy of tunebench.

    A wheel carries them inside the package; a checkout has them beside it.

    Raises:
        FileNotFoundError: neither place has the folder, so the installation is incomplete.
    """
    places = (_PACKAGE / name, _PACKAGE.parent / name)
    for place in places:
        if place.is_dir():
            return place
    raise FileNotFoundError(f"tunebench is incomplete: no folder {name!r} at {places[0]} or {places[1]}; reinstall it")
