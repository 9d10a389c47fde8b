from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator


@pytest.fixture
def rattled() -> Callable[..., list[Atoms]]:
    """Makes labelled frames that are cheap and all different: a molecule or crystal with random displacements."""

    def make(name: str, count: int, seed: int, *, stress: bool = False) -> list[Atoms]:
        rng = np.random.default_rng(seed)
        frames = []
        for _ in range(count):
            frame = bulk("Si", cubic=True) if name == "Si" else molecule(name)
            frame.positions += rng.normal(scale=0.1, size=frame.positions.shape)
            results = {"energy": float(rng.normal(-5.0) * len(frame)), "forces": rng.normal(size=(len(frame), 3))}
            if stress:
                results["stress"] = rng.normal(size=6)
            frame.calc = SinglePointCalculator(frame, **results)
            frames.append(frame)
        return frames

    return make


@pytest.fixture
def ethanol_file(tmp_path: Path, rattled: Callable[..., list[Atoms]]) -> Path:
    """Twenty labelled frames of rattled ethanol."""
    path = tmp_path / "ethanol.xyz"
    ase.io.write(path, rattled("CH3CH2OH", 20, seed=1), format="extxyz")
    return path
