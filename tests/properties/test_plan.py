from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

from tunebench.properties import registry
from tunebench.properties.plan import load_plan, plan_schema
from tunebench.properties.registry import PROPERTIES
from tunebench.study.errors import RunError
from tunebench.study.spec import StudyError
from tunebench.study.strict_yaml import read_yaml

COPPER = "structure: {kind: crystal, formula: Cu, lattice: fcc, a_angstrom: 3.6}"


OF_STUDY = "properties:\n  - "  # sections of a study, whose own test is in test_of_study.py


def examples() -> list[str]:
    """The plans that docs/properties.md shows."""
    text = (Path(__file__).parents[2] / "docs" / "properties.md").read_text(encoding="utf-8")
    blocks = [block.split("```")[0] for block in text.split("```yaml\n")[1:]]
    return [block for block in blocks if not block.startswith(OF_STUDY)]


def test_the_plans_in_the_documentation_are_valid(tmp_path: Path):
    assert examples()
    for number, text in enumerate(examples()):
        plan = tmp_path / f"{number}.yaml"
        plan.write_text(text, encoding="utf-8")
        assert load_plan(plan).properties
        jsonschema.validate(read_yaml(plan), plan_schema())


def test_the_schema_describes_every_setting_of_every_property():
    definitions = plan_schema()["$defs"]
    for kind in PROPERTIES.values():
        described = definitions[kind.settings.__name__]["properties"]
        assert all(setting.get("description") for name, setting in described.items() if name != "property")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("properties: {}", "properties: found {}, allowed: "),
        ("properties: {e: {property: elastik}}", "properties.e.property: found 'elastik', allowed: elastic,"),
        (f"properties: {{e: {{property: elastic, fmax: 1, {COPPER}}}}}", "properties.e.fmax: found an unknown key"),
        (
            "properties: {e: {property: elastic, structure: {kind: file, path: none.xyz}}}",
            "properties.e.structure.path: found 'none.xyz', allowed: an existing file",
        ),
        (
            f"properties: {{e: {{property: elastic, normal_strains: [-0.01, 0.0], {COPPER}}}}}",
            "properties.e.normal_strains[1]: found 0.0, allowed: a strain other than 0",
        ),
        (
            "properties: {v: {property: vibrations, structure: {kind: molecule, name: ethanoll}}}",
            "properties.v.structure of molecule: found 'ethanoll'",
        ),
        (
            f"properties: {{e: {{property: elastic, {COPPER}}}}}\nreference: {{values: {{e: {{C13: 1.0}}}}}}",
            "reference.values.e: found 'C13', allowed: C11, C12, C44",
        ),
        (
            f"properties: {{e: {{property: elastic, {COPPER}}}}}\nreference: {{values: {{f: {{C11: 1.0}}}}}}",
            "reference.values: found 'f', allowed: e",
        ),
        (
            f"properties: {{e: {{property: elastic, {COPPER}}}}}\nreference: {{forces: {{e: {{path: plan.yaml}}}}}}",
            "reference.forces.e: found an entry of elastic, allowed: an entry of phonons",
        ),
    ],
)
def test_a_plan_that_is_wrong_says_where_in_one_line(tmp_path: Path, text: str, message: str):
    plan = tmp_path / "plan.yaml"
    plan.write_text(text, encoding="utf-8")
    with pytest.raises(StudyError) as caught:
        load_plan(plan)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_library_that_is_not_installed_is_no_failure_of_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(registry, "find_spec", lambda name: None if name == "matcalc" else True)
    with pytest.raises(
        RunError, match=r"found no matcalc, allowed: what pip install 'tunebench\[properties\]' installs"
    ):
        load_plan(tmp_path / "plan.yaml")


def test_settings_are_read_without_ray_hydra_torch_or_the_tools_themselves():
    heavy = "{'ray', 'hydra', 'torch', 'ase', 'matcalc', 'phonopy', 'pymatgen', 'nequip'}"
    code = f"import sys, tunebench.properties.evaluate, tunebench.properties.plan; print({heavy} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
