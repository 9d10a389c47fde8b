"""Files that a study names: environment variables, the home folder and relative paths."""

from __future__ import annotations

import os
import re
from pathlib import Path

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


class NoSuchFileError(Exception):
    """A path that leads to no file; the text says what is allowed, for the error of whoever knows the key."""


def existing_file(text: str, folder: Path) -> Path:
    """The absolute path that `text` stands for: ``${VARIABLE}`` and ``~`` replaced, seen from `folder`.

    Raises:
        NoSuchFileError: a variable is not set, or the path leads to no file.
    """
    try:
        path = (folder / Path(_VARIABLE.sub(lambda match: os.environ[match[1]], text)).expanduser()).resolve()
        if path.is_file():
            return path
    except KeyError as variable:
        raise NoSuchFileError(f"a set environment variable {variable.args[0]}") from None
    except (OSError, ValueError, RuntimeError) as error:  # no path at all, an endless link, or a home nobody has
        raise NoSuchFileError(f"a path to a file ({getattr(error, 'strerror', None) or error})") from None
    raise NoSuchFileError(f"an existing file; {path} is none")
