from __future__ import annotations

import numpy as np
import pytest
from ase.calculators.emt import EMT
from matcalc import ElasticityCalc, EOSCalc, RelaxCalc

from tests.properties.conftest import Altered
from tunebench.properties.crystals import ElasticSettings, EquationOfStateSettings, elastic, equation_of_state
from tunebench.properties.measured import PropertyFailure
from tunebench.properties.structures import BuiltCrystal, atoms_of


def test_elastic_constants_of_copper_equal_matcalc_called_directly(copper: BuiltCrystal):
    settings = ElasticSettings(structure=copper, fmax_ev_per_angstrom=1e-5)
    relaxed = RelaxCalc(EMT(), fmax=1e-5).calc(atoms_of(copper))["final_structure"]
    direct = ElasticityCalc(
        EMT(),
        norm_strains=settings.normal_strains,
        shear_strains=settings.shear_strains,
        fmax=1e-5,
        relax_structure=False,
        units_GPa=True,
        r2_min=-1,
    ).calc(relaxed)
    found = elastic(EMT(), settings).values
    tensor = direct["elastic_tensor"].voigt
    for name, value in {"C11": tensor[0, 0], "C12": tensor[0, 1], "C44": tensor[3, 3]}.items():
        assert found[name].value == pytest.approx(value, abs=1e-3)
        assert found[name].unit == "GPa"
    assert found["bulk_modulus_vrh"].value == pytest.approx(direct["bulk_modulus_vrh"], abs=1e-3)
    assert found["shear_modulus_vrh"].value == pytest.approx(direct["shear_modulus_vrh"], abs=1e-3)


def test_copper_is_as_stiff_as_emt_is_known_to_make_it(copper: BuiltCrystal):
    constants = {name: value.value for name, value in elastic(EMT(), ElasticSettings(structure=copper)).values.items()}
    # ASE's documentation: a = 3.59 Å, B = 134 to 135 GPa; measured on copper: 168, 121 and 75 GPa.
    assert constants["C11"] == pytest.approx(172.6, abs=0.2)
    assert constants["C12"] == pytest.approx(115.5, abs=0.2)
    assert constants["C44"] == pytest.approx(90.1, abs=0.2)
    assert constants["bulk_modulus_vrh"] == pytest.approx((constants["C11"] + 2 * constants["C12"]) / 3, rel=1e-6)


def test_the_equation_of_state_equals_matcalcs_and_agrees_with_the_elastic_constants(copper: BuiltCrystal):
    found = equation_of_state(EMT(), EquationOfStateSettings(structure=copper))
    direct = EOSCalc(EMT(), max_abs_strain=0.02, fmax=1e-4, relax_structure=True).calc(atoms_of(copper))
    assert found.values["bulk_modulus"].value == pytest.approx(direct["bulk_modulus_bm"], abs=0.05)
    assert found.values["bulk_modulus"].value == pytest.approx(134.4, abs=0.3)
    assert found.values["a"].value == pytest.approx(3.5898, abs=1e-3)
    curve = found.curves["energy_of_volume"]
    assert curve.y.min() == 0
    assert curve.x[curve.y.argmin()] == pytest.approx(1.0, abs=1e-6)


def test_all_components_of_a_cubic_tensor_obey_its_symmetry(copper: BuiltCrystal):
    found = elastic(EMT(), ElasticSettings(structure=copper, cubic=False)).values
    assert len(found) == 21 + 2
    assert found["C22"].value == pytest.approx(found["C11"].value, abs=1e-3)
    assert found["C14"].value == pytest.approx(0.0, abs=1e-3)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"max_steps": 2}, "no convergence to 0.0001 eV/Å in 2 steps"),
        ({"structure": {"kind": "crystal", "formula": "Cu", "lattice": "bcc", "a_angstrom": 2.9}}, "unstable"),
        ({"largest_misfit": 1e-9}, "stress is not linear in strain"),
    ],
)
def test_what_is_no_crystal_at_rest_has_no_elastic_constants(copper: BuiltCrystal, changes: dict, reason: str):
    settings = ElasticSettings.model_validate({"structure": copper.model_dump(), **changes})
    with pytest.raises(PropertyFailure, match=reason):
        elastic(EMT(), settings)


def test_stress_that_remains_in_a_cell_is_no_convergence_although_no_atom_feels_a_force(copper: BuiltCrystal):
    atoms = atoms_of(copper)
    atoms.calc = EMT()
    assert np.abs(atoms.get_forces()).max() < 1e-12
    with pytest.raises(PropertyFailure, match="no convergence"):
        equation_of_state(EMT(), EquationOfStateSettings(structure=copper, max_steps=1))


def test_forces_that_are_not_finite_end_the_relaxation(copper: BuiltCrystal):
    broken = Altered(lambda atoms, forces: np.full_like(forces, np.nan))
    with pytest.raises(PropertyFailure):
        elastic(broken, ElasticSettings(structure=copper, max_steps=20))
