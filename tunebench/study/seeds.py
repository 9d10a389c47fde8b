"""Named seeds: every random draw of a study comes from one of these."""

from __future__ import annotations

import hashlib


def named_seed(root: int, *names: str | int) -> int:
    """A seed in [0, 2**31) that depends on the study's root seed and the names alone.

    Arms share a seed by sharing its names: initial weights, data order and labels leave the optimizer's name out.
    """
    text = "\0".join([str(root), *map(str, names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1
