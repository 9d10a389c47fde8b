from __future__ import annotations

import json

import numpy as np
import pytest

from tunebench.workloads.data import PreparedData
from tunebench.workloads.inspection import inspect
from tunebench.workloads.structure_files import read_prepared


def test_the_numbers_are_those_of_the_frames(prepared_ethanol: PreparedData) -> None:
    report = inspect(prepared_ethanol, r_max=3.0)
    frames = read_prepared(prepared_ethanol.splits["val"].path)
    val = report["splits"]["val"]
    assert val["frames"] == len(frames)
    assert val["formulas"] == 1
    assert val["energy_per_atom"]["min"] == min(frame.get_potential_energy() / 9 for frame in frames)
    rms = np.sqrt(np.mean([np.square(frame.get_forces()) for frame in frames]))
    assert val["forces"]["rms"] == pytest.approx(rms, rel=1e-12)
    assert val["forces"]["max_net"] < 1e-10
    distances = np.concatenate([frame.get_all_distances() for frame in frames])
    assert val["neighbours"]["mean"] == pytest.approx(np.mean(np.sum((distances > 0) & (distances < 3.0), axis=1)))


def test_it_says_what_to_watch_out_for(prepared_ethanol: PreparedData) -> None:
    report = inspect(prepared_ethanol, r_max=3.0)
    assert report["species"] == ["H", "C", "O"]
    assert report["shifts"]["degenerate"]
    assert report["unseen_in_training"] == []
    assert report["splits"]["train"]["stress"] is None


def test_it_is_plain_json(prepared_ethanol: PreparedData) -> None:
    report = inspect(prepared_ethanol, r_max=3.0)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
