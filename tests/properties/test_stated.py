from __future__ import annotations

import json
from pathlib import Path

import pytest
from ase.build import bulk

from tunebench.properties.crystals import ElasticSettings, elastic_units
from tunebench.properties.stated import StatedFile, stated_values
from tunebench.properties.structures import BuiltCrystal
from tunebench.workloads.errors import WorkloadError

UNITS = {"C11": "GPa", "C12": "GPa", "X.1": "THz", "X.2": "THz", "bulk_modulus_vrh": "GPa"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    stated = {"values": {"Cu": {"C11": 168, "c12": 140.1, "note": "fitted", "X": [7.3, 5.1], "bands": [[1.0], [2.0]]}}}
    (tmp_path / "stated.json").write_text(json.dumps(stated), encoding="utf-8")
    copper = bulk("Cu")
    copper.info["bulk_modulus_vrh"] = 137.0
    copper.write(tmp_path / "stated.xyz", format="extxyz")
    return tmp_path


def test_a_json_file_states_numbers_and_branches_at_its_place(folder: Path):
    place = StatedFile(path="stated.json", at="values.Cu", names={"C12": "c12"})
    assert stated_values(place, UNITS, folder) == {"C11": 168.0, "C12": 140.1, "X.1": 5.1, "X.2": 7.3}


def test_a_structure_file_states_what_stands_beside_its_structure(folder: Path):
    assert stated_values(StatedFile(path="stated.xyz"), UNITS, folder) == {"bulk_modulus_vrh": 137.0}


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"path": "stated.json", "at": "values.Ni"}, r"at: found 'values\.Ni', allowed: a place .* of Ni: Cu"),
        ({"path": "stated.json", "at": "values.Cu.C11"}, "allowed: a mapping of quantities to numbers"),
        ({"path": "stated.json"}, "allowed: C11, C12, X.1, X.2, bulk_modulus_vrh"),
        ({"path": "stated.xyz", "index": 1}, "index: found 1, allowed: less than 1"),
        ({"path": "nothing.json"}, "path: found 'nothing.json', allowed: an existing file"),
    ],
)
def test_what_states_nothing_says_where_it_looked(folder: Path, stated: dict, message: str):
    with pytest.raises(WorkloadError, match=message):
        stated_values(StatedFile(**stated), UNITS, folder)


def test_the_reference_data_state_elastic_constants(reference_data: Path):
    silicon = BuiltCrystal(kind="crystal", formula="Si", lattice="diamond", a_angstrom=5.46)
    units, folder = elastic_units(ElasticSettings(structure=silicon)), reference_data / "property_refs"
    names = {name: f"diamond_{name.lower()}" for name in ("C11", "C12", "C44")}
    castep = StatedFile(path=str(folder / "silicon_castep_pw91.json"), at="bulk_diamond", names=names)
    assert stated_values(castep, units) == pytest.approx({"C11": 153.3, "C12": 56.3, "C44": 72.2}, abs=0.1)
    fitted = StatedFile(path=str(folder / "elastic_from_dft_data.json"), at="values.Mo")
    assert stated_values(fitted, units) == {"C11": 483.0, "C12": 155.3, "C44": 105.8}
    binary = StatedFile(path=str(folder / "mp_binary_elasticity.xyz.xz"), index=3)
    assert stated_values(binary, units).keys() == {"bulk_modulus_vrh", "shear_modulus_vrh"}
