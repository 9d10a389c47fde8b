# mypy: allow-untyped-calls
"""Leaks: structures that two splits share.

Structures are compared by interatomic distances, so a copy that was moved, rotated, mirrored or renumbered is still
found, with a tolerance in place of rounding, so that the last digits of a text file do not hide it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from ase import Atoms
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from tunebench.workloads.errors import WorkloadError

Array = NDArray[np.float64]

TOLERANCE_ANGSTROM = 1e-4
RANGE_ANGSTROM = 8.0
NEIGHBOURS = 12
_SUMMARY_BLOCKS = 6


@dataclass(frozen=True, eq=False)
class Fingerprint:
    """What is left of a structure without its place, orientation and atom order.

    Attributes:
        kind: chemical formula and periodicity; only equal kinds can be the same structure.
        distances: for each ordered pair of species, the sorted distances from every atom of the first to its nearest
            atoms of the second, Å, cut at `RANGE_ANGSTROM`. Equal kinds have equal lengths, and no entry moves further
            than twice the largest displacement of an atom.
    """

    kind: str
    distances: Array


def fingerprints(frames: Sequence[Atoms]) -> list[Fingerprint]:
    """The fingerprint of each frame."""
    return [_fingerprint(frame) for frame in frames]


def fingerprints_hash(prints: Sequence[Fingerprint]) -> str:
    """One sha256 for the structures of a split in any order, rounded to 0.001 Å; for display, not for comparison."""
    single = sorted(
        hashlib.sha256(f"{item.kind} {np.round(item.distances, 3).tolist()}".encode()).hexdigest() for item in prints
    )
    return hashlib.sha256("".join(single).encode()).hexdigest()


def shared_frames(first: Sequence[Fingerprint], second: Sequence[Fingerprint]) -> list[tuple[int, int]]:
    """Pairs of frames, one of each list, that are the same structure within `TOLERANCE_ANGSTROM`."""
    second_by_kind = _by_kind(second)
    pairs = []
    for kind, indices in _by_kind(first).items():
        others = second_by_kind.get(kind, [])
        if others:
            pairs += _shared_of_kind(first, indices, second, others)
    return sorted(pairs)


def check_leaks(prints: Mapping[str, Sequence[Fingerprint]]) -> None:
    """Refuse splits that share structures.

    Raises:
        WorkloadError: names the two splits and counts the frames of each that also occur in the other.
    """
    for first, second in combinations(prints, 2):
        pairs = shared_frames(prints[first], prints[second])
        if pairs:
            here, there = len({a for a, _ in pairs}), len({b for _, b in pairs})
            example = f"frame {pairs[0][0]} of {first} is frame {pairs[0][1]} of {second}"
            found = f"{here} of {len(prints[first])} {first} frames among the {second} frames ({there}); {example}"
            raise WorkloadError("data", found, "splits without common structures, or `allow_duplicates: true`")


def _by_kind(prints: Iterable[Fingerprint]) -> dict[str, list[int]]:
    kinds: dict[str, list[int]] = {}
    for index, item in enumerate(prints):
        kinds.setdefault(item.kind, []).append(index)
    return kinds


def _shared_of_kind(
    first: Sequence[Fingerprint], indices: list[int], second: Sequence[Fingerprint], others: list[int]
) -> list[tuple[int, int]]:
    # Means over blocks of the sorted distances move no further than the largest distance does, so a search among the
    # few means finds every candidate.
    here = cKDTree(np.stack([_summary(first[index].distances) for index in indices]))
    there = cKDTree(np.stack([_summary(second[index].distances) for index in others]))
    candidates = here.query_ball_tree(there, r=TOLERANCE_ANGSTROM, p=np.inf)
    return [
        (indices[a], others[b])
        for a, matches in enumerate(candidates)
        for b in matches
        if _same(first[indices[a]].distances, second[others[b]].distances)
    ]


def _summary(distances: Array) -> Array:
    blocks = np.array_split(distances, _SUMMARY_BLOCKS)
    return np.array([block.mean() if block.size else 0.0 for block in blocks], dtype=np.float64)


def _same(first: Array, second: Array) -> bool:
    return bool(np.all(np.abs(first - second) <= TOLERANCE_ANGSTROM))


def _fingerprint(frame: Atoms) -> Fingerprint:
    periodicity = "".join("T" if periodic else "F" for periodic in frame.pbc)
    positions, shifts = _wrapped(frame), _shifts(frame)
    numbers = np.asarray(frame.numbers)
    species = np.unique(numbers)
    parts = []
    for other in species:
        images = (positions[numbers == other][:, None, :] + shifts[None, :, :]).reshape(-1, 3)
        tree = cKDTree(images)
        for centre in species:
            # One more than wanted, as an atom of the same species meets itself at distance zero. Where there are fewer
            # atoms the tree answers infinity, which the range cuts.
            found, _ = tree.query(positions[numbers == centre], k=np.arange(1, NEIGHBOURS + 2))
            parts.append(np.sort(np.minimum(found, RANGE_ANGSTROM), axis=None))
    return Fingerprint(f"{frame.symbols.formula.format('hill')} {periodicity}", np.concatenate(parts))


def _wrapped(frame: Atoms) -> Array:
    positions: Array = frame.get_positions(wrap=bool(frame.pbc.any()))
    return positions


def _shifts(frame: Atoms) -> Array:
    """Lattice vectors to every image cell that can hold an atom within range, shape (images, 3), Å."""
    cell = frame.cell.array
    repeats = [0, 0, 0]
    for axis in np.flatnonzero(frame.pbc):
        normal = np.cross(cell[(axis + 1) % 3], cell[(axis + 2) % 3])
        length = np.linalg.norm(normal)
        height = abs(cell[axis] @ normal) / length if length else np.linalg.norm(cell[axis])
        repeats[axis] = int(np.ceil(RANGE_ANGSTROM / height))
    grids = np.meshgrid(*[np.arange(-count, count + 1) for count in repeats], indexing="ij")
    shifts: Array = np.stack(grids, axis=-1).reshape(-1, 3).astype(np.float64) @ cell
    return shifts
