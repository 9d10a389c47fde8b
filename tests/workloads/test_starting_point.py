from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nequip.data import AtomicDataDict

from tests.workloads.trained_files import model_section, write_checkpoint, write_package
from tunebench.study.initial import Initial
from tunebench.study.record import Split
from tunebench.study.spec import ExtxyzData, Model, SplitFrames
from tunebench.workloads import starting_point as starting_points
from tunebench.workloads import type_rows
from tunebench.workloads.data import CACHE_VARIABLE, PreparedData, prepare
from tunebench.workloads.errors import WorkloadError
from tunebench.workloads.frames import prepared_frames
from tunebench.workloads.models import build_model, model_config
from tunebench.workloads.starting_point import StartingPoint, forget, starting_point
from tunebench.workloads.statistics import training_statistics
from tunebench.workloads.trained_model import read_architecture, read_trained

R_MAX = 4.0
SUPERSET = ("O", "N", "C", "H")  # of ethanol's types, in another order than its own

SPLINE = {"_target_": "allegro.nn.TwoBodySplineScalarEmbed", "num_splines": 6, "spline_span": 4}
ZBL = {"_target_": "nequip.nn.pair_potential.ZBL", "units": "metal"}
SIGMA = [[0.5 + 0.1 * (i + j) for j in range(4)] for i in range(4)]
CUTOFFS = {"H": 3.0, "C": {"H": 3.5, "C": 4.0, "O": 3.8, "N": 3.9}, "O": 4.0, "N": 3.7}
VARIANTS: dict[str, dict[str, Any]] = {
    "nequip": {},
    "allegro": {},
    "nequip neighbours by type": {"avg_num_neighbors": {"O": 5.0, "N": 6.0, "C": 7.0, "H": 8.0}},
    "nequip scales by type": {"per_type_energy_scales": {"O": 1.0, "N": 2.0, "C": 3.0, "H": 4.0}},
    "nequip trained shifts": {"per_type_energy_shifts_trainable": True},
    "nequip cutoffs by pair": {"per_edge_type_cutoff": CUTOFFS},
    "nequip zbl": {"pair_potential": {**ZBL, "chemical_species": list(SUPERSET)}},
    "allegro splines by pair": {"radial_chemical_embed": SPLINE},
    "allegro cutoffs by pair": {"per_edge_type_cutoff": CUTOFFS},
}


@pytest.fixture(scope="module")
def write_base(tmp_path_factory: pytest.TempPathFactory, prepared_ethanol: PreparedData):
    """Writes a checkpoint of a small model and returns its path and the model."""
    folder = tmp_path_factory.mktemp("base")

    def write(variant: str = "nequip", types: tuple[str, ...] = SUPERSET) -> tuple[Path, torch.nn.Module]:
        path = folder / f"{variant.replace(' ', '-')}-{''.join(types)}.ckpt"
        section = model_section(Model(family=variant.split()[0], r_max_angstrom=R_MAX), types)
        return path, write_checkpoint(path, section | VARIANTS[variant], prepared_ethanol)

    return write


def start_of(path: Path, data: PreparedData, **said: Any) -> StartingPoint:
    return starting_point(Initial(path=str(path), **said), read_architecture(path).model, data)


def built(path: Path, data: PreparedData, start: StartingPoint) -> torch.nn.Module:
    """The model as an engine builds it."""
    section = read_architecture(path).model
    statistics = training_statistics(data, R_MAX)
    model = build_model({**model_config(section, data.type_names, statistics, seed=0), **start.constants})
    start.put_into(model)
    return model.eval()


def predicted(model: torch.nn.Module, data: PreparedData, types: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Energies and forces of the training frames, by a model that has these types."""
    frames = prepared_frames(data, Split.TRAIN, R_MAX).frames
    rows = torch.tensor([types.index(name) for name in data.type_names])
    batch = AtomicDataDict.batched_from_list(
        [{k: v.clone() for k, v in frame.items()} | {"atom_types": rows[frame["atom_types"]]} for frame in frames]
    )
    out = model(batch)
    return (
        out["total_energy"].detach().to(torch.float64).numpy().reshape(-1),
        out["forces"].detach().to(torch.float64).numpy(),
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_model_with_fewer_types_in_another_order_predicts_what_the_file_predicts(
    variant, write_base, prepared_ethanol
):
    path, base = write_base(variant)
    start = start_of(path, prepared_ethanol, energies="keep")
    own_energy, own_forces = predicted(
        built(path, prepared_ethanol, start), prepared_ethanol, prepared_ethanol.type_names
    )
    energy, forces = predicted(base, prepared_ethanol, SUPERSET)
    assert own_energy == pytest.approx(energy, rel=1e-6)
    assert own_forces == pytest.approx(forces, abs=1e-4 * np.abs(forces).max())


def test_rows_that_go_to_the_wrong_types_are_noticed(write_base, prepared_ethanol, monkeypatch):
    path, _ = write_base(types=("O", "C", "H"))
    monkeypatch.setitem(type_rows._PUT, ("Embedding", "type"), type_rows._whole)
    monkeypatch.setenv(CACHE_VARIABLE, str(path.parent / "broken"))
    with pytest.raises(WorkloadError, match=r"init.path: found .*differs by .* from one built anew with its weights"):
        start_of(path, prepared_ethanol)


def test_a_package_starts_where_its_checkpoint_starts(write_base, prepared_ethanol, tmp_path):
    for family in ("nequip", "allegro"):
        path, _ = write_base(family)
        package = tmp_path / f"{family}.nequip.zip"
        write_package(package, path)
        found, expected = (start_of(file, prepared_ethanol) for file in (package, path))
        assert found.digest == expected.digest
        assert found.about["sha256"] != expected.about["sha256"]


def test_energies_are_corrected_by_least_squares_of_what_the_model_leaves_over(write_base, prepared_ethanol):
    path, base = write_base()
    start = start_of(path, prepared_ethanol)
    labels = np.array([float(f["total_energy"]) for f in prepared_frames(prepared_ethanol, Split.TRAIN, R_MAX).frames])
    energy, _ = predicted(base, prepared_ethanol, SUPERSET)
    corrected, _ = predicted(built(path, prepared_ethanol, start), prepared_ethanol, prepared_ethanol.type_names)
    # Ethanol has one composition, so the correction shifts all frames alike and leaves no mean error.
    assert corrected - energy == pytest.approx(np.mean(labels - energy), rel=1e-6)
    assert start.about["energy_rmse_ev_per_atom"] == pytest.approx(np.std(labels - energy) / 9, rel=1e-4)
    assert start.about["energy_rmse_before_ev_per_atom"] > 10.0
    assert start.about["note"].startswith("1 independent compositions for 3 species")


def test_large_structures_are_predicted_one_by_one_for_want_of_memory(write_base, prepared_ethanol, monkeypatch):
    path, _ = write_base()
    together = start_of(path, prepared_ethanol)
    monkeypatch.setattr(starting_points, "_BATCH_EDGES", 1)
    monkeypatch.setenv(CACHE_VARIABLE, str(path.parent / "another cache"))
    forget()
    begun: list[int] = []
    batched = starting_points._batched
    monkeypatch.setattr(starting_points, "_batched", lambda frames: begun.append(len(frames)) or batched(frames))
    alone = start_of(path, prepared_ethanol)
    assert set(begun) == {1}
    assert len(begun) > prepared_ethanol.splits[Split.TRAIN].frames
    assert alone.about["energy_rmse_ev_per_atom"] == pytest.approx(together.about["energy_rmse_ev_per_atom"], rel=1e-4)


def test_new_species_are_refused_unless_their_weights_may_be_random(write_base, prepared_ethanol):
    path, base = write_base(types=("C", "H"))
    with pytest.raises(WorkloadError, match=r"init.new_types: found O in the data, .*among C, H; or `random`"):
        start_of(path, prepared_ethanol)
    with pytest.raises(WorkloadError, match=r"init.energies: found 'keep', allowed: reestimate, because .* for O"):
        start_of(path, prepared_ethanol, new_types="random", energies="keep")
    start, again = (start_of(path, prepared_ethanol, new_types="random", seed=3) for _ in range(2))
    other = start_of(path, prepared_ethanol, new_types="random", seed=4)
    name = "model.func.type_embed.embed_module.weight"
    weights = dict(base.named_parameters())[name].detach()
    assert prepared_ethanol.type_names == ("H", "C", "O")
    assert torch.equal(start.tensors[name][:2], weights[[1, 0]])
    assert start.digest == again.digest != other.digest
    assert not torch.equal(start.tensors[name][2], other.tensors[name][2])
    assert start.about["new_types"] == ["O"]


def test_a_file_without_any_of_the_species_is_refused(write_base, prepared_ethanol):
    path, _ = write_base(types=("Cu", "Si"))
    with pytest.raises(WorkloadError, match=r"init.path: found a model of Cu, Si, allowed: .* one of H, C, O"):
        start_of(path, prepared_ethanol, new_types="random")


def test_a_file_that_changed_or_is_none_is_refused(write_base, prepared_ethanol, tmp_path):
    path, _ = write_base()
    with pytest.raises(WorkloadError, match=r"init.path: found .* with SHA-256 .*allowed: SHA-256 000000000000, of"):
        start_of(path, prepared_ethanol, sha256=64 * "0")
    wrong = tmp_path / "wrong.ckpt"
    wrong.write_bytes(b"no checkpoint")
    for file, line in (
        (wrong, r"init.path: found .*wrong.ckpt \(.*allowed: a checkpoint or package that NequIP can read"),
        (tmp_path / "weights.pt", r"init.path: found .*allowed: a checkpoint \(.ckpt\) or a packaged model"),
    ):
        with pytest.raises(WorkloadError, match=line):
            read_architecture(file)


def test_a_model_of_another_shape_is_named_with_its_tensor(write_base, prepared_ethanol):
    path, _ = write_base()
    trained = read_trained(path)
    types = type_rows.TypeMap(own=prepared_ethanol.type_names, others=SUPERSET)
    section = model_section(Model(family="nequip", r_max_angstrom=R_MAX, arguments={"num_features": 8}), types.own)
    with pytest.raises(WorkloadError, match=r"found shape \(4, 16\) for 4 types for .*embed_module.weight, allowed"):
        type_rows.mapped_tensors(build_model(section), trained.model, types)
    deeper = model_section(
        Model(family="nequip", r_max_angstrom=R_MAX, arguments={"readout_mlp_hidden_layers_depth": 1}), types.own
    )
    with pytest.raises(WorkloadError, match=r"found (shape|no such tensor).* for model.func.per_atom_energy_readout"):
        type_rows.mapped_tensors(build_model(deeper), trained.model, types)


def test_the_starting_point_comes_from_the_cache_and_a_damaged_one_is_made_anew(
    write_base, prepared_ethanol, tmp_path, monkeypatch
):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    path, _ = write_base()
    first = start_of(path, prepared_ethanol)
    (kept,) = (tmp_path / "initial").iterdir()
    kept.write_bytes(kept.read_bytes()[:-100])
    forget()
    assert start_of(path, prepared_ethanol).digest == first.digest
    assert torch.load(kept, weights_only=True)["digest"] == first.digest


def test_a_lennard_jones_term_keeps_its_pairs(write_base, prepared_ethanol, tmp_path):
    pair = {"_target_": "nequip.nn.pair_potential.LennardJones", "lj_sigma": 0.7, "lj_epsilon": 0.2}
    section = model_section(Model(family="nequip", r_max_angstrom=R_MAX), SUPERSET, pair_potential=pair)
    path = tmp_path / "lj.ckpt"
    write_checkpoint(path, section, prepared_ethanol)
    trained = read_trained(path)
    with torch.no_grad():
        dict(trained.model.named_parameters())["model.func.pair_potential.sigma"].copy_(torch.tensor(SIGMA).triu())
    own = build_model(model_section(Model(family="nequip", r_max_angstrom=R_MAX), ("H", "C", "O"), pair_potential=pair))
    types = type_rows.TypeMap(own=("H", "C", "O"), others=SUPERSET)
    mapped = type_rows.mapped_tensors(own, trained.model, types)["model.func.pair_potential.sigma"]
    rows = [SUPERSET.index(name) for name in types.own]
    assert torch.equal(mapped, torch.tensor(SIGMA)[rows][:, rows].triu().to(mapped.dtype))


def test_the_same_frames_with_other_energies_need_no_other_file(write_base, reference_data):
    """Copper of a PBE set from a model of four elements: real labels, a species in another row."""
    data = prepare(
        ExtxyzData(
            source="extxyz",
            train=str(reference_data / "mlearn" / "Cu_train.xyz.xz"),
            frames=SplitFrames(train=4, val=2, test=2),
        )
    )
    path, _ = write_base(types=("O", "Cu", "H"))
    start = start_of(path, data)
    assert start.about["left_out_types"] == ["O", "H"]
    assert start.about["note"] == ""
    assert start.about["energy_rmse_ev_per_atom"] < start.about["energy_rmse_before_ev_per_atom"]
