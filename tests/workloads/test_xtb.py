from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from ase import units

from tunebench.study.spec import SplitFrames, XtbData
from tunebench.workloads.data import PreparedData
from tunebench.workloads.errors import WorkloadError
from tunebench.workloads.structure_files import read_prepared
from tunebench.workloads.trajectory import trajectory, water_box
from tunebench.workloads.xtb import xtb_frames

# A water box that takes minutes: five lines of progress a split, the first after a few snapshots.
LONG = """
import signal, sys
from tunebench.study.spec import SplitFrames, XtbData
from tunebench.workloads.data import prepare

signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job begins with it ignored
frames = SplitFrames(train=5, val=400, test=400)
data = XtbData(source="xtb", system="water-box", molecules=2, equilibration_fs=0.0, interval_fs=1.0, frames=frames)
prepare(data, progress=lambda line: print(line, flush=True))
"""
LONGEST_END_S = 15.0


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
    with pytest.raises(WorkloadError, match=r"^data\.system: found 'unobtainium', allowed: .*ethanol, .*water-box"):
        xtb_frames(data(system="unobtainium"), lambda line: None)


@pytest.mark.parametrize(
    ("kelvin", "count", "line"),
    [
        (600.0, 0, r"^data\.frames\.ood: found 0, allowed: 1 or more"),
        (None, 2, r"^data\.ood_temperature_kelvin: found nothing, allowed: a value"),
    ],
)
def test_a_hot_split_needs_a_temperature_and_frames(kelvin: float | None, count: int, line: str) -> None:
    frames = SplitFrames(train=2, val=1, test=1, ood=count)
    with pytest.raises(WorkloadError, match=line):
        xtb_frames(data(ood_temperature_kelvin=kelvin, frames=frames), lambda line: None)


def test_a_density_belongs_to_the_water_box() -> None:
    with pytest.raises(WorkloadError, match=r"^data\.density_g_cm3: found 0\.8, allowed: left out unless"):
        xtb_frames(data(density_g_cm3=0.8), lambda line: None)


def test_snapshots_closer_than_the_time_step_are_refused() -> None:
    with pytest.raises(WorkloadError, match=r"^data\.interval_fs: found 0\.1"):
        xtb_frames(data(interval_fs=0.1), lambda line: None)


def test_a_trajectory_that_explodes_ends_in_one_line() -> None:
    with pytest.raises(WorkloadError, match=r"^data\.system: found 'ethanol at 300.0 K, split train: ") as caught:
        xtb_frames(data(timestep_fs=60.0, equilibration_fs=12000.0, interval_fs=60.0), lambda line: None)
    assert "\n" not in str(caught.value)


@pytest.fixture
def long_preparation(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process of its own that prepares data, at the moment of its first line of progress."""
    (tmp_path / "scratch").mkdir()
    places = {"TUNEBENCH_CACHE": str(tmp_path / "cache"), "TMPDIR": str(tmp_path / "scratch")}
    process = subprocess.Popen(
        [sys.executable, "-c", LONG],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **places},
        start_new_session=True,  # so that a signal reaches it alone, and what it leaves behind can be counted
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("water-box train: 1/5")
        yield process
    finally:
        if members(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def members(group: int) -> list[str]:
    """Command lines of the live processes of a process group."""
    listed = subprocess.run(["ps", "-eo", "pgid=,stat=,args="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(maxsplit=2) for line in listed.splitlines()]
    return [row[-1] for row in rows if int(row[0]) == group and not row[1].startswith("Z")]


@pytest.mark.parametrize(
    ("number", "ending", "code"),
    [(signal.SIGINT, "KeyboardInterrupt", -signal.SIGINT), (signal.SIGTERM, "", 143)],
    ids=["interrupt", "termination"],
)
def test_a_signal_ends_the_trajectories_and_leaves_nothing(
    long_preparation: subprocess.Popen[str], tmp_path: Path, number: int, ending: str, code: int
) -> None:
    assert any("workloads.trajectory" in command for command in members(long_preparation.pid))
    sent = time.monotonic()
    long_preparation.send_signal(number)
    _, errors = long_preparation.communicate(timeout=LONGEST_END_S)
    assert time.monotonic() - sent < LONGEST_END_S
    assert (long_preparation.returncode, errors.strip().splitlines()[-1:]) == (code, [ending] if ending else [])
    assert members(long_preparation.pid) == []
    assert list((tmp_path / "cache").iterdir()) == []
    assert list((tmp_path / "scratch").glob("tunebench-*")) == []
