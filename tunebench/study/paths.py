"""Files that a study names: environment variables, the home folder, relative paths and slices of a file's frames."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


class NoSuchFileError(Exception):
    """A path that leads to no file; the text says what is allowed, for the error of whoever knows the key."""


@dataclass(frozen=True)
class FramesOfFile:
    """A structure file and those of its frames that a study takes, written as for `ase.io.read`.

    Attributes:
        path: absolute.
        part: what follows the last ``@``, START:STOP:STEP or one index; empty where all frames are taken.
    """

    path: Path
    part: str = ""

    def __str__(self) -> str:
        return f"{self.path}@{self.part}" if self.part else str(self.path)

    @property
    def name(self) -> str:
        """The file's name with the slice, for messages."""
        return Path(str(self)).name

    def indices(self, count: int) -> range:
        """Indices of the frames that are taken from a file of `count` frames, in their order."""
        return range(count)[_slice(self.part) if self.part else slice(None)]


def existing_file(text: str, folder: Path) -> Path:
    """The absolute path that `text` stands for: ``${VARIABLE}`` and ``~`` replaced, seen from `folder`.

    Raises:
        NoSuchFileError: a variable is not set, or the path leads to no file.
    """
    try:
        path = (folder / Path(_filled_in(text)).expanduser()).resolve()
        if path.is_file():
            return path
    except (OSError, ValueError, RuntimeError) as error:  # no path at all, an endless link, or a home nobody has
        raise NoSuchFileError(f"a path to a file ({getattr(error, 'strerror', None) or error})") from None
    raise NoSuchFileError(f"an existing file; {path} is none")


def frames_of_file(text: str, folder: Path) -> FramesOfFile:
    """The file and the frames that `text` stands for: ``FILE``, ``FILE@START:STOP:STEP`` or ``FILE@INDEX``.

    A file whose whole name is the text comes first, as a name may hold an ``@``.

    Raises:
        NoSuchFileError: as for `existing_file`, or what follows the ``@`` is neither a slice nor an index.
    """
    try:
        return FramesOfFile(existing_file(text, folder))
    except NoSuchFileError as error:
        name, at, part = _filled_in(text).rpartition("@")
        if not at or "/" in part:
            raise
        try:
            _slice(part)
        except ValueError:
            allowed = "START:STOP:STEP with a step other than 0 or one index, in whole numbers, may follow the '@'"
            raise NoSuchFileError(f"{error}; {allowed}") from None
    return FramesOfFile(existing_file(name, folder), part)


def _filled_in(text: str) -> str:
    try:
        return _VARIABLE.sub(lambda match: os.environ[match[1]], text)
    except KeyError as variable:
        raise NoSuchFileError(f"a set environment variable {variable.args[0]}") from None


def _slice(part: str) -> slice:
    """The slice that ASE makes of the text; an index is a slice of one frame."""
    numbers = [int(number) if number else None for number in part.split(":")]
    if len(numbers) == 1:
        index = int(part)
        return slice(index, index + 1 or None)
    if len(numbers) > 3 or numbers[2:] == [0]:
        raise ValueError(part)
    return slice(*numbers)
