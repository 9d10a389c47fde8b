from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import yaml
from nequip.data import AtomicDataDict

from tunebench.study.spec import Family, Model
from tunebench.workloads.errors import WorkloadError
from tunebench.workloads.frames import prepared_frames
from tunebench.workloads.model_arguments import SET_BY_TUNEBENCH
from tunebench.workloads.models import build_model, known_arguments, model_config
from tunebench.workloads.presets import PRESETS
from tunebench.workloads.statistics import TrainingStatistics, training_statistics

WATER = ("H", "O")
SOLID_ACID = ("H", "O", "P", "Cs")


def statistics_for(types: tuple[str, ...]) -> TrainingStatistics:
    return TrainingStatistics(
        per_type_energy_shifts=tuple(-float(index) for index in range(len(types))),
        degenerate=False,
        force_rms=1.5,
        avg_num_neighbors=12.0,
        labelled_frames=1,
        note="",
    )


def config_of(types: tuple[str, ...] = WATER, seed: int = 0, **fields: object) -> dict:
    return model_config(Model(**{"family": "nequip", **fields}), types, statistics_for(types), seed)


def parameters(config: dict) -> int:
    return sum(parameter.numel() for parameter in build_model(config).parameters())


@pytest.mark.parametrize(
    ("family", "preset", "types", "count"),
    [
        ("nequip", "tiny", ("H", "C", "O"), 8768),
        ("allegro", "tiny", ("H", "C", "O"), 7126),
        # Table 3 of arXiv:2607.02499: 781 412 for water; 108 974 for the solid acid, and a scale and a shift per type.
        ("nequip", "paper", WATER, 781_412),
        ("allegro", "paper", SOLID_ACID, 108_974 + 8),
    ],
)
def test_presets_have_the_size_they_claim(family: str, preset: str, types: tuple[str, ...], count: int) -> None:
    assert parameters(config_of(types, family=family, preset=preset)) == count


@pytest.mark.parametrize(
    ("family", "preset"), [(family, preset) for family in PRESETS for preset in ("tiny", "small", "paper")]
)
def test_every_preset_predicts_energy_and_forces(prepared_ethanol, family: str, preset: str) -> None:
    statistics = training_statistics(prepared_ethanol, 3.0)
    chosen = Model(family=family, preset=preset, r_max_angstrom=3.0)
    model = build_model(model_config(chosen, prepared_ethanol.type_names, statistics, seed=0))
    dataset = prepared_frames(prepared_ethanol, "train", 3.0)
    out = model(AtomicDataDict.batched_from_list([dataset[0], dataset[1]]))
    assert out["total_energy"].shape == (2, 1)
    assert bool(torch.isfinite(out["forces"]).all())
    # Energies stay float64 in a float32 model: total energies of -1e4 eV would lose 1e-3 eV otherwise.
    assert out["total_energy"].dtype is torch.float64


def test_nequips_own_presets_are_built_by_nequip() -> None:
    config = config_of(preset="S")
    assert config["_target_"] == "nequip.model.PresetNequIPGNNModel"
    assert config["preset"] == "S"
    assert parameters(config) > 500_000


def test_the_seed_decides_the_weights() -> None:
    first, again, other = (build_model(config_of(seed=seed)).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_building_leaves_the_global_generator_alone() -> None:
    build_model(config_of())
    before = torch.get_rng_state()
    build_model(config_of(seed=9))
    assert torch.equal(before, torch.get_rng_state())


def test_a_config_survives_yaml() -> None:
    config = config_of(preset="paper")
    assert yaml.safe_load(yaml.safe_dump(config)) == config


def test_statistics_reach_the_model_and_arguments_win() -> None:
    config = config_of(arguments={"avg_num_neighbors": 3.0, "num_features": 8})
    assert config["per_type_energy_shifts"] == {"H": 0.0, "O": -1.0}
    assert config["per_type_energy_scales"] == 1.5
    assert (config["avg_num_neighbors"], config["num_features"]) == (3.0, 8)


def test_the_pair_potential_of_the_paper_knows_the_species_and_can_be_left_out() -> None:
    assert config_of(preset="paper")["pair_potential"]["chemical_species"] == ["H", "O"]
    assert config_of(preset="paper", arguments={"pair_potential": None})["pair_potential"] is None


def test_presets_are_not_changed_by_use() -> None:
    before = repr(PRESETS)
    config_of(preset="paper", arguments={"num_features": 4})
    config_of(SOLID_ACID, family="allegro")["radial_chemical_embed"]["num_bessels"] = 99
    assert repr(PRESETS) == before


def test_an_unknown_preset_is_answered_with_the_known_ones() -> None:
    with pytest.raises(WorkloadError, match=r"^model\.preset: found 'XL', allowed: tiny, small, paper$"):
        config_of(family="allegro", preset="XL")


def test_an_unknown_argument_is_answered_with_the_nearest() -> None:
    with pytest.raises(WorkloadError, match=r"^model\.arguments: found 'num_feature', .*did you mean num_features\?$"):
        config_of(arguments={"num_feature": 8})


@pytest.mark.parametrize("name", [*SET_BY_TUNEBENCH, "_target_"])
def test_what_the_study_sets_cannot_be_an_argument(name: str) -> None:
    with pytest.raises(WorkloadError, match=rf"^model\.arguments\.{name}: found .*, allowed: left out: "):
        config_of(arguments={name: 1})


@pytest.mark.parametrize("arguments", [{"num_layers": "two"}, {"num_features": [8]}, {"num_layers": 0}])
def test_values_the_builder_refuses_end_in_one_line(arguments: dict) -> None:
    with pytest.raises(WorkloadError, match=r"^model\.arguments: found ") as caught:
        build_model(config_of(arguments=arguments))
    assert "\n" not in str(caught.value)


def test_every_known_argument_belongs_to_a_builder() -> None:
    for family in Family:
        assert "num_layers" in known_arguments(family)
        assert not {"seed", "kwargs", "irreps_edge_sh"} & set(known_arguments(family))


def test_presets_are_read_without_torch() -> None:
    code = "import sys, tunebench.workloads.presets; assert not {'torch', 'nequip', 'ase'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
