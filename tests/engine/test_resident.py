from __future__ import annotations

import dataclasses
import math
import warnings
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from hypothesis import given, settings
from hypothesis import strategies as st
from nequip.data.AtomicDataDict import batched_from_list
from torch.fx.experimental.proxy_tensor import make_fx

from tunebench.engine.errors import error_sums, metrics_of_sums, quantities, split_errors
from tunebench.engine.loss import LossWeights, weighted_loss
from tunebench.engine.padding import BatchShape, batch_shape, smallest_shape
from tunebench.engine.resident import ResidentFrames, assemble, frame_labels, resident_frames, static_batches
from tunebench.study.spec import ExtxyzData, Model, SplitFrames
from tunebench.workloads.data import PreparedData, prepare
from tunebench.workloads.frames import PreparedFrames, prepared_frames
from tunebench.workloads.models import build_model, model_config
from tunebench.workloads.statistics import training_statistics

R_MAX = 4.0
LABELS = ("total_energy", "forces", "stress")
WEIGHTS = LossWeights(energy_per_atom=0.3, forces=0.5, stress=0.2)
ZBL = {"_target_": "nequip.nn.pair_potential.ZBL", "units": "metal"}
MODELS = [("nequip", {}), ("nequip", {"pair_potential": ZBL}), ("allegro", {})]


def labelled(frame: Atoms, rng: np.random.Generator) -> Atoms:
    frame.positions += rng.normal(scale=0.1, size=frame.positions.shape)
    results = {"energy": float(rng.normal(-5.0) * len(frame)), "forces": rng.normal(size=(len(frame), 3))}
    if frame.pbc.any():
        results["stress"] = rng.normal(scale=0.1, size=6)
    frame.calc = SinglePointCalculator(frame, **results)
    return frame


def prepared_from(folder: Path, frames: list[Atoms]) -> PreparedData:
    rng = np.random.default_rng(0)
    path = folder / "frames.xyz"
    ase.io.write(path, [labelled(frame, rng) for frame in frames], format="extxyz")
    counts = SplitFrames(train=12, val=len(frames) - 15, test=3)
    # One lone atom is like the other.
    return prepare(ExtxyzData(source="extxyz", train=str(path), frames=counts, allow_duplicates=True))


@pytest.fixture(scope="module")
def molecules(tmp_path_factory) -> PreparedData:
    """Molecules of 1 to 12 atoms, the lone atom without an edge."""
    names = ["H", "H2O", "CH4", "CH3CH2OH", "C6H6"] * 4
    return prepared_from(tmp_path_factory.mktemp("molecules"), [molecule(name) for name in names])


@pytest.fixture(scope="module")
def crystals(tmp_path_factory) -> PreparedData:
    """Silicon cells of 2 to 16 atoms with stress, and a molecule without a cell among them."""
    cells = [bulk("Si"), bulk("Si", cubic=True), bulk("Si", cubic=True).repeat((2, 1, 1)), molecule("SiH4")]
    return prepared_from(tmp_path_factory.mktemp("crystals"), [cell.copy() for cell in cells * 5])


@pytest.fixture(scope="module", params=["ethanol", "molecules", "crystals"])
def prepared(request, prepared_ethanol: PreparedData) -> PreparedData:
    return prepared_ethanol if request.param == "ethanol" else request.getfixturevalue(request.param)


def collated(frames: PreparedFrames, indices) -> dict[str, torch.Tensor]:
    return batched_from_list([frames[int(index)] for index in indices])


def model_of(prepared: PreparedData, family: str, arguments: dict) -> torch.nn.Module:
    section = Model(family=family, r_max_angstrom=R_MAX, dtype="float64", arguments=arguments)
    return build_model(model_config(section, prepared.type_names, training_statistics(prepared, R_MAX), seed=1))


def shape_with_room(resident: ResidentFrames, indices, atoms: int, edges: int) -> BatchShape:
    tight = smallest_shape(resident.sizes, np.array([indices], dtype=np.int64))
    return BatchShape(frames=tight.frames, atoms=tight.atoms + atoms, edges=tight.edges + edges)


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@settings(max_examples=40)
@given(data=st.data(), room=st.tuples(st.integers(0, 7), st.integers(0, 40)))
@pytest.mark.parametrize("force_fraction", [1.0, 0.4])
def test_a_padded_batch_is_nequips_collation_and_then_ghosts(prepared: PreparedData, force_fraction, data, room):
    frames = prepared_frames(prepared, "train", R_MAX, force_fraction, label_seed=5)
    resident = resident_frames(frames, R_MAX, "cpu")
    indices = data.draw(st.lists(st.integers(0, len(frames) - 1), min_size=1, max_size=6))
    shape = shape_with_room(resident, indices, *room)
    expected = collated(frames, indices)
    batch = assemble(resident, torch.tensor(indices, dtype=torch.int64), shape)

    assert batch.keys() == expected.keys()
    atoms, edges = expected["pos"].shape[0], expected["edge_index"].shape[1]
    real = {"edge_index": (slice(None), slice(edges)), "edge_cell_shift": slice(edges)}
    real |= dict.fromkeys(("pos", "forces", "atom_types", "atomic_numbers", "batch"), slice(atoms))
    for key, value in batch.items():
        assert_same(value[real.get(key, slice(len(indices)))], expected[key])

    assert (batch["pos"].shape[0], batch["edge_index"].shape[1]) == (shape.atoms, shape.edges)
    assert batch["batch"][atoms:].unique().tolist() == [len(indices)]
    assert batch["num_atoms"].tolist() == torch.bincount(batch["batch"]).tolist()
    ends = batch["edge_index"][:, edges:]
    assert bool((ends >= atoms).all() and (ends < shape.atoms).all())
    assert bool((batch["edge_index"][0].diff() >= 0).all()) == bool((expected["edge_index"][0].diff() >= 0).all())


def test_ghosts_are_beyond_each_others_cutoff_and_carry_no_label(prepared: PreparedData):
    resident = resident_frames(prepared_frames(prepared, "train", R_MAX), R_MAX, "cpu")
    indices = [1, 0]
    batch = assemble(resident, torch.tensor(indices), shape_with_room(resident, indices, 5, 30))
    ghosts = batch["batch"] == 2
    assert ghosts.sum() == 7
    distances = torch.pdist(batch["pos"][ghosts])
    assert distances.min() > R_MAX
    assert not batch["pbc"][2].any()
    assert torch.linalg.det(batch["cell"][2]) > 0
    padding = ghosts[batch["edge_index"][0]]
    assert padding.sum() == 30 + (resident.sizes.of_batches([indices])[1] == 0)
    start, end = batch["edge_index"][:, padding]
    assert bool((start != end).all())
    assert start.unique().numel() == 6  # three pairs share the padding
    assert not batch["edge_cell_shift"][padding].any()
    for key in set(LABELS) & batch.keys():
        assert torch.isnan(batch[key][ghosts if key == "forces" else 2]).all()


@pytest.mark.parametrize(("family", "arguments"), MODELS)
@pytest.mark.parametrize("room", [(0, 0), (9, 50)])
def test_padding_changes_no_prediction_and_no_gradient(prepared: PreparedData, family: str, arguments: dict, room):
    model = model_of(prepared, family, arguments)
    frames = prepared_frames(prepared, "train", R_MAX, 0.6, label_seed=2)
    resident = resident_frames(frames, R_MAX, "cpu")
    indices = [4, 0, 7]
    plain = collated(frames, indices)
    padded = assemble(resident, torch.tensor(indices), shape_with_room(resident, indices, *room))
    weights = WEIGHTS if prepared.has_stress else LossWeights(energy_per_atom=0.4, forces=0.6, stress=0.0)

    outputs, gradients = [], []
    for batch in (plain, padded):
        model.zero_grad()
        target = dict(batch)
        outputs.append(model(dict(batch)))
        weighted_loss(outputs[-1], target, weights).backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    atoms = plain["pos"].shape[0]
    for key in LABELS:
        if key in outputs[0]:
            expected = outputs[0][key]
            found = outputs[1][key][: atoms if key == "forces" else 3]
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12, equal_nan=True)
    assert len(gradients[0]) == len(gradients[1])
    for found, expected in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert torch.equal(outputs[1]["forces"][atoms:], torch.zeros_like(outputs[1]["forces"][atoms:]))


@pytest.mark.parametrize(("family", "arguments"), MODELS)
def test_a_batch_without_frames_has_no_loss_and_no_gradient(crystals: PreparedData, family: str, arguments: dict):
    model = model_of(crystals, family, arguments)
    resident = resident_frames(prepared_frames(crystals, "train", R_MAX), R_MAX, "cpu")
    batch = assemble(resident, torch.full((3,), len(resident)), batch_shape(resident.sizes, 3))
    loss = weighted_loss(model(dict(batch)), batch, WEIGHTS)
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is None or torch.equal(p.grad, torch.zeros_like(p.grad)) for p in model.parameters())


def test_slots_gather_their_own_frames_and_labels_in_one_vmapped_call(prepared: PreparedData):
    frames = prepared_frames(prepared, "train", R_MAX)
    resident = resident_frames(frames, R_MAX, "cpu")
    generator = torch.Generator().manual_seed(0)
    indices = torch.stack([torch.randperm(len(frames), generator=generator)[:4] for _ in range(5)])
    masks = torch.rand((5, len(frames)), generator=generator, dtype=torch.float64) < 0.5
    shape = batch_shape(resident.sizes, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns where it falls back to a loop over the slots
        stacked = torch.vmap(lambda index, mask: assemble(resident, index, shape, mask))(indices, masks)
    for slot in range(5):
        alone = assemble(resident, indices[slot], shape, masks[slot])
        for key, values in stacked.items():
            assert_same(values[slot], alone[key])
        kept = ~torch.isnan(alone["forces"]).any(dim=-1)
        assert torch.equal(kept, frame_labels(masks[slot], indices[slot])[alone["batch"]])


def test_a_slots_mask_is_the_mask_of_its_label_seed(prepared: PreparedData):
    shared = resident_frames(prepared_frames(prepared, "train", R_MAX), R_MAX, "cpu")
    own = resident_frames(prepared_frames(prepared, "train", R_MAX, 0.5, label_seed=9), R_MAX, "cpu")
    indices, shape = torch.arange(4), batch_shape(shared.sizes, 4)
    by_mask = assemble(shared, indices, shape, own.labelled)
    assert torch.isnan(by_mask["forces"][: shape.atoms - 2]).sum() > 0
    for key, values in assemble(own, indices, shape).items():
        assert_same(by_mask[key], values)


def test_assembling_never_reads_the_device(crystals: PreparedData):
    """Fake tensors have no numbers: whatever needs one on the host cannot be traced with them."""
    resident = resident_frames(prepared_frames(crystals, "train", R_MAX), R_MAX, "cpu")
    shape = batch_shape(resident.sizes, 2)
    batched = torch.vmap(lambda index, mask: assemble(resident, index, shape, mask))
    arguments = (torch.tensor([[0, 1], [2, 3]]), torch.ones((2, len(resident)), dtype=torch.bool))
    traced = make_fx(batched, tracing_mode="fake", _allow_non_fake_inputs=True)(*arguments)
    other = (torch.tensor([[5, 4], [3, 9]]), torch.zeros((2, len(resident)), dtype=torch.bool))
    expected = batched(*other)
    for key, values in traced(*other).items():
        assert_same(values, expected[key])


def test_fields_nobody_reads_can_stay_away(prepared_ethanol: PreparedData):
    frames = prepared_frames(prepared_ethanol, "train", R_MAX)
    whole = resident_frames(frames, R_MAX, "cpu")
    lean = resident_frames(frames, R_MAX, "cpu", leave_out=("atomic_numbers", "pbc"))
    assert lean.nbytes < whole.nbytes
    shape = batch_shape(whole.sizes, 2)
    missing = assemble(whole, torch.arange(2), shape).keys() - assemble(lean, torch.arange(2), shape).keys()
    assert missing == {"atomic_numbers", "pbc"}


def test_a_field_without_a_ghost_value_is_refused(prepared_ethanol: PreparedData):
    frames = prepared_frames(prepared_ethanol, "train", R_MAX)
    charged = [{**frame, "charge": torch.zeros((1, 1), dtype=torch.float64)} for frame in frames.frames]
    frames.frames = tuple(charged)
    with pytest.raises(ValueError, match=r"fields of a frame: found charge, allowed: pos, forces"):
        resident_frames(frames, R_MAX, "cpu")


def test_ghosts_need_a_cutoff_to_be_apart(prepared_ethanol: PreparedData):
    with pytest.raises(ValueError, match=r"r_max_angstrom: found 0.0, allowed: above 0"):
        resident_frames(prepared_frames(prepared_ethanol, "train", R_MAX), 0.0, "cpu")


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
@pytest.mark.parametrize("split", ["train", "val"])
def test_static_batches_hold_every_frame_once_in_order(prepared: PreparedData, split: str, batch_size: int):
    frames = prepared_frames(prepared, split, R_MAX, 0.5, label_seed=1)
    resident = resident_frames(frames, R_MAX, "cpu")
    static = static_batches(resident, batch_size)
    indices = static.indices.flatten()
    assert torch.equal(indices[: len(frames)], torch.arange(len(frames)))
    assert bool((indices[len(frames) :] == len(frames)).all())
    seen = {"pos": [], "forces": []}
    for position in range(len(static)):
        batch = static[position]
        assert (batch["pos"].shape[0], batch["edge_index"].shape[1]) == (static.shape.atoms, static.shape.edges)
        real = (~torch.isnan(batch["total_energy"]).flatten())[batch["batch"]]
        for key, values in seen.items():
            values.append(batch[key][real])
    whole = collated(frames, range(len(frames)))
    for key, values in seen.items():
        assert_same(torch.cat(values), whole[key])


def test_a_split_takes_the_usual_shape_where_that_makes_little_more_to_compute(prepared: PreparedData):
    train, val = (resident_frames(prepared_frames(prepared, s, R_MAX), R_MAX, "cpu") for s in ("train", "val"))
    own = static_batches(val, 2)
    usual = static_batches(train, 2).shape
    shared = static_batches(val, 2, usual=usual)
    assert shared.shape == usual != own.shape
    assert torch.equal(shared.indices[shared.indices < len(val)], torch.arange(len(val)))
    wasteful = dataclasses.replace(usual, edges=100 * usual.edges)
    narrow = dataclasses.replace(usual, atoms=4)
    for refused in (wasteful, narrow):
        assert static_batches(val, 2, usual=refused).shape == own.shape


@pytest.mark.parametrize(("family", "arguments"), MODELS[1:])
def test_error_sums_of_padded_batches_are_the_split_errors(prepared: PreparedData, family: str, arguments: dict):
    model = model_of(prepared, family, arguments).eval()
    stress = prepared.has_stress
    frames = prepared_frames(prepared, "train", R_MAX, 0.5, label_seed=4)
    expected = split_errors(model, [collated(frames, range(start, len(frames), 2)) for start in (0, 1)], stress=stress)
    resident = resident_frames(frames, R_MAX, "cpu")
    static = static_batches(resident, 5)
    unmasked = static_batches(resident, 5, masked=False)
    with_masked, with_slot_mask = [], []
    for position in range(len(static)):
        batch = static[position]
        output = {key: value.detach() for key, value in model(dict(batch)).items() if key in LABELS}
        with_masked.append(error_sums(output, batch, stress=stress))
        mask = frame_labels(resident.labelled, static.indices[position])
        with_slot_mask.append(error_sums(output, unmasked[position], stress=stress, force_labels=mask))
    for sums in (with_masked, with_slot_mask):
        total = torch.stack(sums).sum(0)
        assert total.dtype is torch.float64
        found = metrics_of_sums(dict(zip(quantities(stress=stress), total.tolist(), strict=True)))
        assert found.keys() == expected.keys()
        assert found == pytest.approx(expected, rel=1e-11)


def random_output(batch: dict[str, torch.Tensor], slots: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    keys = [key for key in LABELS if key in batch]
    return {key: torch.randn((slots, *batch[key].shape), generator=generator, dtype=torch.float64) for key in keys}


def test_error_sums_of_slots_are_theirs_alone(crystals: PreparedData):
    resident = resident_frames(prepared_frames(crystals, "val", R_MAX), R_MAX, "cpu")
    static = static_batches(resident, 3, masked=False)
    batch, output = static[1], random_output(static[1], slots=4)
    masks = torch.tensor([[True] * 3, [False] * 3, [True, False, True], [False, True, False]])
    masks = torch.cat([masks, torch.zeros((4, 1), dtype=torch.bool)], dim=1)

    def sums(output, mask):
        return error_sums(output, batch, stress=True, force_labels=mask)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stacked = torch.vmap(sums)(output, masks)
    assert stacked.shape == (4, 3, 3)
    for slot in range(4):
        assert_same(stacked[slot], sums({key: value[slot] for key, value in output.items()}, masks[slot]))
    assert stacked[1, 1].tolist() == [0.0, 0.0, 0.0]
    counted = dict(zip(quantities(stress=True), stacked[1].tolist(), strict=True))
    assert "forces_mae" not in metrics_of_sums(counted)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("key", LABELS)
def test_a_broken_prediction_counts_on_a_real_frame_only(crystals: PreparedData, key: str, value: float):
    resident = resident_frames(prepared_frames(crystals, "train", R_MAX), R_MAX, "cpu")
    batch = static_batches(resident, 5)[2]  # two frames and three that are not there
    row = LABELS.index(key)
    finite = {name: values[0] for name, values in random_output(batch, slots=1).items()}
    has_label = ~torch.isnan(batch[key])
    on_ghosts = {**finite, key: finite[key].masked_fill(~has_label, value)}
    assert_same(error_sums(on_ghosts, batch, stress=True), error_sums(finite, batch, stress=True))
    everywhere = {**finite, key: torch.full_like(finite[key], value)}
    broken = error_sums(everywhere, batch, stress=True)
    assert broken[row, :2].tolist() == [math.inf, math.inf]
    assert bool(torch.isfinite(broken[[other for other in range(3) if other != row]]).all())
