"""The properties of a study: settings fixed and hashed with it, and what its plan says of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.properties.test_plan import OF_STUDY
from tests.study.broken_studies import quickstart
from tunebench.properties import of_study
from tunebench.properties.of_study import measurements, property_needs
from tunebench.study.resolve import ResolvedStudy, load_run, resolve
from tunebench.study.spec import Regime, StudyError
from tunebench.study.summary import plan_summary

COPPER = {"kind": "crystal", "formula": "Cu", "lattice": "fcc", "a_angstrom": 3.6}
CRYSTAL: dict[str, Any] = {
    "regime": "crystal",
    "workloads": ["ethanol-nequip"],
    "properties": {"eos": {"property": "equation_of_state", "structure": COPPER}},
    "reference": {"calculator": "emt"},
}
MOLECULE: dict[str, Any] = {
    "regime": "molecule",
    "properties": {"ir": {"property": "vibrations", "structure": {"kind": "molecule", "name": "water"}}},
}


def resolved(folder: Path, *sections: dict[str, Any], **changes: Any) -> ResolvedStudy:
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump({**quickstart(), "properties": list(sections), **changes}))
    return resolve(file)


def test_a_study_without_properties_has_the_hash_it_had_before_there_were_any(tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(quickstart()))
    assert resolved(tmp_path).hash == resolve(tmp_path / "study.yaml").hash
    assert resolved(tmp_path, MOLECULE).hash != resolved(tmp_path).hash


def test_a_tolerance_is_part_of_the_hash_and_its_default_means_the_same_spelled_out(tmp_path: Path) -> None:
    default = resolved(tmp_path, CRYSTAL)
    written = default.study.properties[0].properties["eos"]["fmax_ev_per_angstrom"]
    eos = CRYSTAL["properties"]["eos"]

    def with_tolerance(value: float) -> str:
        return resolved(tmp_path, {**CRYSTAL, "properties": {"eos": {**eos, "fmax_ev_per_angstrom": value}}}).hash

    assert with_tolerance(written) == default.hash
    assert with_tolerance(2.0 * written) != default.hash


def test_a_frozen_study_reads_back_as_it_was(tmp_path: Path) -> None:
    study = resolved(tmp_path, CRYSTAL, MOLECULE)
    study.write(tmp_path / "run")
    assert load_run(tmp_path / "run").hash == study.hash
    assert resolve(tmp_path / "run" / "study.yaml").hash == study.hash


def test_files_are_found_from_the_study_and_kept_by_their_absolute_paths(tmp_path: Path) -> None:
    (tmp_path / "stated.json").write_text('{"Cu": {"bulk_modulus": 140.0}}')
    stated = {"files": {"eos": {"path": "stated.json", "at": "Cu"}}}
    study = resolved(tmp_path, {**CRYSTAL, "reference": stated})
    assert study.study.properties[0].reference["files"]["eos"]["path"] == str((tmp_path / "stated.json").resolve())


@pytest.mark.parametrize(
    ("section", "line"),
    [
        (
            {**CRYSTAL, "properties": {"eos": {"property": "eos", "structure": COPPER}}},
            r"properties\[0\]\.properties\.eos\.property: found 'eos', allowed: .*equation_of_state",
        ),
        (
            {**CRYSTAL, "properties": {"eos": {**CRYSTAL["properties"]["eos"], "point": 3}}},
            r"properties\[0\]\.properties\.eos\.point: found an unknown key .*did you mean points\?",
        ),
        (
            {**CRYSTAL, "reference": {"values": {"eos": {"C11": 1.0}}}},
            r"properties\[0\]\.reference\.values\.eos: found 'C11', allowed: .*bulk_modulus",
        ),
        ({**CRYSTAL, "workloads": ["water"]}, r"properties\[0\]\.workloads: found 'water', allowed: ethanol-allegro"),
        ({**CRYSTAL, "regime": "gas"}, r"properties\[0\]\.regime: found 'gas', allowed: .*molecule"),
    ],
)
def test_what_is_wrong_is_one_line_with_the_study_s_own_key(tmp_path: Path, section: dict[str, Any], line: str) -> None:
    with pytest.raises(StudyError, match=line) as raised:
        resolved(tmp_path, section)
    assert "\n" not in str(raised.value)


def test_an_entry_that_two_sections_compute_of_one_workload_is_refused(tmp_path: Path) -> None:
    resolved(tmp_path, CRYSTAL, {**CRYSTAL, "workloads": ["ethanol-allegro"]})
    with pytest.raises(StudyError, match=r"properties\[1\]\.properties: found 'eos', allowed: each name once"):
        resolved(tmp_path, CRYSTAL, {**CRYSTAL, "workloads": []})


def test_models_that_are_deleted_cannot_be_measured(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="keep_checkpoints: found 'none', allowed: confirm or all"):
        resolved(tmp_path, CRYSTAL, keep_checkpoints="none")


def test_a_section_without_workloads_is_about_all_of_them(tmp_path: Path) -> None:
    study = resolved(tmp_path, CRYSTAL, MOLECULE).study
    assert [part.section for part in measurements(study, "ethanol-nequip")] == [0, 1]
    assert [part.section for part in measurements(study, "ethanol-allegro")] == [1]


def test_the_plan_says_how_many_models_and_what_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = resolved(tmp_path, CRYSTAL, MOLECULE)
    arms = plan_summary(study)["arms"]
    crystal, molecule = property_needs(study.study, arms)
    confirmed = sum(arm["confirm_trials"] for arm in arms)
    assert (crystal["models"], molecule["models"]) == (confirmed // 2, confirmed)
    assert "calculator emt; all libraries installed" in crystal["text"]
    monkeypatch.setattr(of_study, "missing_libraries", lambda: ["phonopy"])
    assert "reference: none; NOT installed: phonopy" in property_needs(study.study, arms)[1]["text"]


def test_the_section_in_the_documentation_is_valid(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "properties.md").read_text(encoding="utf-8")
    blocks = [block.split("```")[0] for block in text.split("```yaml\n")[1:]]
    (section,) = [block for block in blocks if block.startswith(OF_STUDY)]
    (written,) = yaml.safe_load(section)["properties"]
    assert resolved(tmp_path, {**written, "workloads": []}).study.properties[0].regime is Regime.CRYSTAL
