from __future__ import annotations

import numpy as np
import pytest
from ase import units

from tunebench.study.spec import SplitFrames, XtbData
from tunebench.workloads.data import PreparedData
from tunebench.workloads.errors import WorkloadError
from tunebench.workloads.structure_files import read_prepared
from tunebench.workloads.trajectory import trajectory, water_box
from tunebench.workloads.xtb import xtb_frames


def data(**fields: object) -> XtbData:
    frames = SplitFrames(train=2, val=1, test=1)
    short = {"equilibration_fs": 2.0, "interval_fs": 2.0, "frames": frames}
    return XtbData(**{"source": "xtb", "system": "ethanol", **short, **fields})


def same(first, second) -> bool:
    return all(
        a.get_potential_energy() == b.get_potential_energy()
        and np.array_equal(a.positions, b.positions)
        and np.array_equal(a.get_forces(), b.get_forces())
        for a, b in zip(first, second, strict=True)
    )


def test_the_seed_decides_every_bit() -> None:
    first, again = (xtb_frames(data(seed=3), lambda line: None) for _ in range(2))
    assert all(same(first[split], again[split]) for split in first)
    other = xtb_frames(data(seed=4), lambda line: None)
    assert not same(first["train"], other["train"])


def test_the_callers_threads_do_not_change_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    first = xtb_frames(data(), lambda line: None)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert same(first["train"], xtb_frames(data(), lambda line: None)["train"])


def test_each_split_follows_its_own_trajectory() -> None:
    train, val = trajectory(data(), "train", 1, 300.0), trajectory(data(), "val", 1, 300.0)
    assert np.abs(train[0].positions - val[0].positions).max() > 1e-3


def test_a_longer_trajectory_begins_like_a_shorter_one() -> None:
    short, long = (data(frames=SplitFrames(train=train, val=1, test=1)) for train in (2, 3))
    first, longer = (xtb_frames(item, lambda line: None)["train"] for item in (short, long))
    assert same(first, longer[:2])


def test_forces_are_the_slope_of_the_energy(prepared_ethanol: PreparedData) -> None:
    from tblite.ase import TBLite

    frame = read_prepared(prepared_ethanol.splits["train"].path)[0]
    moved = []
    for sign in (1, -1):
        copy = frame.copy()
        copy.positions[2, 1] += sign * 1e-3
        copy.calc = TBLite(method="GFN2-xTB", accuracy=0.01, verbosity=0)
        moved.append(copy.get_potential_energy())
    assert -(moved[0] - moved[1]) / 2e-3 == pytest.approx(frame.get_forces()[2, 1], abs=1e-3)


def test_the_hot_split_is_hotter(prepared_ethanol: PreparedData) -> None:
    def spread(split: str) -> float:
        forces = [frame.get_forces() for frame in read_prepared(prepared_ethanol.splits[split].path)]
        return float(np.sqrt(np.mean(np.square(forces))))

    assert spread("ood:hot") > spread("train")


def test_a_water_box_has_the_density_asked() -> None:
    box = water_box(8, 0.997, np.random.default_rng(0))
    grams = box.get_masses().sum() * units._amu * 1e3
    assert grams / (box.get_volume() * 1e-24) == pytest.approx(0.997, rel=1e-12)
    assert box.symbols.formula.count() == {"H": 16, "O": 8}
    oxygens = box.positions[box.numbers == 8]
    bonds = np.linalg.norm(box.positions[box.numbers == 1].reshape(8, 2, 3) - oxygens[:, None, :], axis=2)
    np.testing.assert_allclose(bonds, bonds[0, 0], atol=1e-9)


def test_water_is_periodic_and_its_stress_is_the_slope_of_the_energy() -> None:
    from tblite.ase import TBLite

    frame = trajectory(data(system="water-box", molecules=2), "train", 1, 300.0)[0]
    assert frame.pbc.all()
    strained = []
    for sign in (1, -1):
        copy = frame.copy()
        copy.set_cell(frame.cell.array * (1 + sign * 1e-4), scale_atoms=True)
        copy.calc = TBLite(method="GFN2-xTB", accuracy=0.01, verbosity=0)
        strained.append(copy.get_potential_energy())
    slope = (strained[0] - strained[1]) / 2e-4 / frame.get_volume()
    assert frame.get_stress()[:3].sum() == pytest.approx(slope, rel=1e-3)


def test_an_unknown_molecule_is_answered_with_the_known_ones() -> None:
    with pytest.raises(WorkloadError, match=r"^data\.system: found 'unobtainium', allowed: water-box, .*ethanol"):
        xtb_frames(data(system="unobtainium"), lambda line: None)


@pytest.mark.parametrize(("kelvin", "count"), [(600.0, 0), (None, 2)])
def test_a_hot_split_needs_a_temperature_and_frames(kelvin: float | None, count: int) -> None:
    frames = SplitFrames(train=2, val=1, test=1, ood=count)
    with pytest.raises(WorkloadError, match=rf"^data\.frames\.ood: found {count}"):
        xtb_frames(data(ood_temperature_kelvin=kelvin, frames=frames), lambda line: None)


def test_snapshots_closer_than_the_time_step_are_refused() -> None:
    with pytest.raises(WorkloadError, match=r"^data\.interval_fs: found 0\.1"):
        xtb_frames(data(interval_fs=0.1), lambda line: None)


def test_a_trajectory_that_explodes_ends_in_one_line() -> None:
    with pytest.raises(WorkloadError, match=r"^data\.system: found 'ethanol at 300.0 K, split train: ") as caught:
        xtb_frames(data(timestep_fs=60.0, equilibration_fs=12000.0, interval_fs=60.0), lambda line: None)
    assert "\n" not in str(caught.value)
