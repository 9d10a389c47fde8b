from __future__ import annotations

from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
from ase.build import bulk
from ase.calculators.singlepoint import SinglePointCalculator
from torch.func import grad, vmap

from tunebench.engine import functional
from tunebench.engine.functional import OUTPUTS, FunctionalModel, Untraceable, functional_model
from tunebench.engine.loss import LossWeights, weighted_loss
from tunebench.engine.modules import build_module
from tunebench.engine.nequip_config import training_module
from tunebench.engine.padding import BatchShape
from tunebench.engine.resident import assemble, resident_frames
from tunebench.optim.matrix_view import trainable_parameters
from tunebench.study.record import Readout
from tunebench.study.spec import ExtxyzData, Model, SplitFrames
from tunebench.workloads.data import PreparedData, prepare
from tunebench.workloads.frames import prepared_frames
from tunebench.workloads.models import build_model, model_config
from tunebench.workloads.statistics import training_statistics

R_MAX = 4.0
ZBL = {"_target_": "nequip.nn.pair_potential.ZBL", "units": "metal"}
TRAINABLE_SCALES = {"per_type_energy_scales_trainable": True, "per_type_energy_shifts_trainable": True}
MODELS = [
    ("nequip", {}),
    ("nequip", {"pair_potential": ZBL, **TRAINABLE_SCALES}),
    ("nequip", {"l_max": 2, "parity": True, "bessel_trainable": True}),
    ("allegro", {}),
    ("allegro", {"l_max": 2, "parity": True, "tp_path_channel_coupling": True}),
]
STATISTICS = ("model.func.per_type_energy_scale_shift.scales", "model.func.per_type_energy_scale_shift.shifts")


@pytest.fixture(scope="module")
def silicon(tmp_path_factory) -> PreparedData:
    """Twenty rattled and strained crystals with stress labels."""
    rng = np.random.default_rng(4)
    frames = []
    for _ in range(20):
        frame = bulk("Si", cubic=True)
        frame.set_cell(frame.cell @ (np.eye(3) + rng.normal(scale=0.02, size=(3, 3))), scale_atoms=True)
        frame.positions += rng.normal(scale=0.1, size=frame.positions.shape)
        results = {"energy": float(rng.normal(-40.0)), "forces": rng.normal(size=(8, 3)), "stress": rng.normal(size=6)}
        frame.calc = SinglePointCalculator(frame, **results)
        frames.append(frame)
    path = Path(tmp_path_factory.mktemp("silicon")) / "silicon.xyz"
    ase.io.write(path, frames, format="extxyz")
    return prepare(ExtxyzData(source="extxyz", train=str(path), frames=SplitFrames(train=14, val=3, test=3)))


def build(data: PreparedData, family: str = "nequip", dtype: str = "float64", seed: int = 1, **arguments):
    model = Model(family=family, preset="tiny", r_max_angstrom=R_MAX, dtype=dtype, arguments=arguments)
    return build_model(model_config(model, data.type_names, training_statistics(data, R_MAX), seed))


def small(data: PreparedData, **arguments):
    """A model of one layer, which is traced in half the time."""
    return build(data, num_layers=1, **arguments)


def batches(data: PreparedData, count: int = 3, size: int = 3) -> list[dict[str, torch.Tensor]]:
    """Different batches of one shape, each with its ghost frame."""
    frames = prepared_frames(data, "train", R_MAX)
    resident = resident_frames(frames, R_MAX, "cpu")
    atoms = size * max(len(frame["pos"]) for frame in frames.frames)
    edges = size * max(frame["edge_index"].shape[1] for frame in frames.frames)
    shape = BatchShape(frames=size + 1, atoms=atoms + 2, edges=edges + 4)
    return [assemble(resident, torch.arange(size) + size * batch, shape) for batch in range(count)]


def perturbed(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.1 * noise.to(parameter.dtype))


def eager(model, batch):
    return model({key: value.clone() for key, value in batch.items()})


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    real = ~torch.isnan(expected)
    assert torch.equal(real, ~torch.isnan(found))
    return ((found - expected)[real].abs().max() / expected[real].abs().max()).item()


def assert_same_model(function: FunctionalModel, model, batch, loss_weights: LossWeights) -> None:
    """Outputs and the gradient of the loss equal those of NequIP's own model and autograd to rounding."""
    model.zero_grad()
    output = eager(model, batch)
    weighted_loss(output, batch, loss_weights).backward()
    parameters = trainable_parameters(model)
    weights = {name: parameter.detach() for name, parameter in parameters.items()}
    found = function(weights, {}, batch)
    for key in function.outputs:
        assert relative(found[key], output[key].detach()) < 1e-12
    gradient = grad(lambda weights: weighted_loss(function(weights, {}, batch), batch, loss_weights))(weights)
    largest = max(parameter.grad.abs().max() for parameter in parameters.values())
    for name, parameter in parameters.items():
        torch.testing.assert_close(gradient[name], parameter.grad, rtol=1e-9, atol=1e-13 * largest.item())


@pytest.mark.parametrize(("family", "arguments"), MODELS)
def test_a_traced_model_is_the_model_for_other_batches_and_other_weights(prepared_ethanol, family, arguments):
    model = build(prepared_ethanol, family, **arguments)
    first, *others = batches(prepared_ethanol)
    function = functional_model(model, first)
    for seed, batch in enumerate([first, *others]):
        assert_same_model(function, model, batch, LossWeights(energy_per_atom=0.4, forces=0.6, stress=0.0))
        perturbed(model, seed)


@pytest.mark.parametrize("family", ["nequip", "allegro"])
def test_stress_of_crystals_is_traced_too(silicon, family):
    model = build(silicon, family)
    first, *others = batches(silicon)
    function = functional_model(model, first, OUTPUTS)
    for seed, batch in enumerate(others):
        perturbed(model, seed)
        assert_same_model(function, model, batch, LossWeights(energy_per_atom=0.2, forces=0.5, stress=0.3))


@pytest.mark.parametrize("family", ["nequip", "allegro"])
def test_single_precision_agrees_to_its_rounding(prepared_ethanol, family):
    model = build(prepared_ethanol, family, dtype="float32")
    first, other, _ = batches(prepared_ethanol)
    function = functional_model(model, first)
    weights = {name: parameter.detach() for name, parameter in trainable_parameters(model).items()}
    found, expected = function(weights, {}, other), eager(model, other)
    for key in function.outputs:
        assert found[key].dtype == expected[key].dtype
        assert relative(found[key], expected[key].detach()) < 1e-5


def test_slots_have_their_own_weights_statistics_and_batch(prepared_ethanol):
    model = build(prepared_ethanol)
    each = batches(prepared_ethanol)
    function = functional_model(model, each[0])
    weights, constants = [], []
    for slot in range(3):
        perturbed(model, slot)
        weights.append({name: parameter.detach().clone() for name, parameter in trainable_parameters(model).items()})
        constants.append({name: function.held[name] * (1 + slot) for name in function.slot_constants})
    stacked = [{key: torch.stack([one[key] for one in many]) for key in many[0]} for many in (weights, constants)]
    together = vmap(function)(*stacked, {key: torch.stack([batch[key] for batch in each]) for key in function.fields})
    for slot in range(3):
        alone = function(weights[slot], constants[slot], each[slot])
        for key in function.outputs:
            torch.testing.assert_close(together[key][slot], alone[key], rtol=1e-11, atol=1e-11)
    energies = together["total_energy"][:, 0, 0]
    assert (energies.diff().abs() > 1).all()


@pytest.mark.parametrize("family", ["nequip", "allegro"])
def test_weights_are_the_trainable_parameters_and_constants_what_else_is_read(prepared_ethanol, family):
    model = build(prepared_ethanol, family)
    function = functional_model(model, batches(prepared_ethanol)[0])
    assert function.weight_names == tuple(trainable_parameters(model))
    assert set(function.constant_names) <= set(dict(model.named_buffers()))
    assert function.slot_constants == STATISTICS
    assert set(function.held) == set(function.constant_names)


def test_trainable_scales_are_weights_and_frozen_weights_are_constants(prepared_ethanol):
    model = build(prepared_ethanol, **TRAINABLE_SCALES)
    embedding = "model.func.type_embed.embed_module.weight"
    dict(model.named_parameters())[embedding].requires_grad_(False)
    function = functional_model(model, batches(prepared_ethanol)[0])
    assert set(STATISTICS) <= set(function.weight_names)
    assert function.slot_constants == ()
    assert embedding in function.constant_names


def test_the_module_of_a_training_module_is_traced_under_its_own_names(make_task):
    task = make_task()
    module = build_module(training_module(task), LossWeights.of(task.workload.loss), Readout.EMA)
    batch = batches(task.data)[1]
    function = functional_model(module.model, batches(task.data)[0])
    assert function.weight_names == tuple(trainable_parameters(module.model))
    assert all(name.startswith("sole_model.") for name in function.weight_names)
    weights = {name: parameter.detach() for name, parameter in trainable_parameters(module.model).items()}
    assert relative(function(weights, {}, batch)["forces"], module(dict(batch))["forces"].detach()) < 1e-5


@pytest.mark.parametrize("family", ["nequip", "allegro"])
def test_training_and_evaluation_mode_predict_the_same_and_the_trace_leaves_the_mode(prepared_ethanol, family):
    model = build(prepared_ethanol, family).eval()
    first, other, _ = batches(prepared_ethanol)
    function = functional_model(model, first)
    assert not any(module.training for module in model.modules())
    predicted = eager(model, other)
    trained = eager(model.train(), other)
    weights = {name: parameter.detach() for name, parameter in trainable_parameters(model).items()}
    found = function(weights, {}, other)
    for key in function.outputs:
        assert relative(trained[key].detach(), predicted[key]) < 1e-12
        assert relative(found[key], predicted[key].detach()) < 1e-12


def test_a_traced_model_does_not_follow_the_model_it_came_from(prepared_ethanol):
    model = build(prepared_ethanol)
    first, *_ = batches(prepared_ethanol)
    function = functional_model(model, first)
    weights = {name: parameter.detach().clone() for name, parameter in trainable_parameters(model).items()}
    before = function(weights, {}, first)["total_energy"]
    with torch.no_grad():
        model.get_buffer(STATISTICS[1]).add_(100.0)
    assert torch.equal(function(weights, {}, first)["total_energy"], before)


def test_equal_models_have_equal_descriptions_and_others_do_not(prepared_ethanol, silicon):
    batch = batches(prepared_ethanol)[0]
    described = functional_model(small(prepared_ethanol), batch).description
    assert functional_model(small(prepared_ethanol, seed=2), batch).description == described
    shorter = {**batch, "edge_index": batch["edge_index"][:, :-2], "edge_cell_shift": batch["edge_cell_shift"][:-2]}
    others = [
        functional_model(small(prepared_ethanol, avg_num_neighbors=3.0), batch),
        functional_model(small(prepared_ethanol, dtype="float32"), batch),
        functional_model(small(prepared_ethanol), shorter),
    ]
    assert len({described, *(other.description for other in others)}) == 4


def test_a_kept_graph_serves_every_model_of_its_kind_without_a_trace(prepared_ethanol, tmp_path, monkeypatch):
    first, other, _ = batches(prepared_ethanol)
    functional_model(build(prepared_ethanol), first, cache=tmp_path)
    monkeypatch.setattr(functional, "make_fx", lambda *_, **__: pytest.fail("traced again"))
    scales = {"per_type_energy_scales": 3.0, "per_type_energy_shifts": {"H": 1.0, "C": -2.0, "O": 0.5}}
    model = build(prepared_ethanol, seed=2, **scales)
    function = functional_model(model, first, cache=tmp_path)
    assert_same_model(function, model, other, LossWeights(energy_per_atom=0.4, forces=0.6, stress=0.0))


def test_models_of_another_kind_and_batches_of_another_shape_have_their_own_graphs(prepared_ethanol, tmp_path):
    (first,), (larger,) = batches(prepared_ethanol, count=1), batches(prepared_ethanol, count=1, size=4)
    kinds = [{}, {"polynomial_cutoff_p": 8}, {"parity": True}, {"dtype": "float32"}, TRAINABLE_SCALES]
    for arguments in kinds:
        functional_model(build(prepared_ethanol, **arguments), first, cache=tmp_path)
    functional_model(build(prepared_ethanol), larger, cache=tmp_path)
    assert len(list(tmp_path.glob("*.model"))) == len(kinds) + 1


def test_a_kept_graph_of_another_model_is_noticed_and_traced_anew(prepared_ethanol, tmp_path, caplog):
    first, other, _ = batches(prepared_ethanol)
    functional_model(small(prepared_ethanol, polynomial_cutoff_p=8), first, cache=tmp_path)
    (foreign,) = tmp_path.glob("*.model")
    content = foreign.read_bytes()
    model = small(prepared_ethanol)
    functional_model(model, first, cache=tmp_path)
    (own,) = set(tmp_path.glob("*.model")) - {foreign}
    own.write_bytes(content)
    function = functional_model(model, first, cache=tmp_path)
    assert "made anew, ValueError: relative difference" in caplog.text
    assert_same_model(function, model, other, LossWeights(energy_per_atom=0.4, forces=0.6, stress=0.0))


def test_a_perfect_crystal_whose_forces_are_rounding_is_traced(tmp_path):
    frame = bulk("Si", cubic=True)
    frame.calc = SinglePointCalculator(frame, energy=-40.0, forces=np.zeros((8, 3)))
    ase.io.write(tmp_path / "silicon.xyz", [frame] * 6, format="extxyz")
    counts = SplitFrames(train=4, val=1, test=1)
    path = str(tmp_path / "silicon.xyz")
    crystal = prepare(ExtxyzData(source="extxyz", train=path, frames=counts, allow_duplicates=True))
    (batch,) = batches(crystal, count=1, size=2)
    assert functional_model(build(crystal, dtype="float32"), batch).outputs == OUTPUTS[:2]


class Meddling(torch.nn.Module):
    """Does something to the positions, and then what the module in its place did."""

    def __init__(self, inner: torch.nn.Module, meddle) -> None:
        super().__init__()
        self.inner, self.meddle = inner, meddle
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, data):
        data["pos"] = self.meddle(self, data["pos"])
        return self.inner(data)


def decides_by_a_value(module, positions):
    return positions if positions.abs().max().item() < 1e6 else 2 * positions


def scales_by_a_value(module, positions):
    return positions * positions.abs().max().item()


def picks_by_a_value(module, positions):
    return positions + positions[positions > 0].sum()


def draws_noise(module, positions):
    return torch.nn.functional.dropout(positions, 0.5)


def counts_calls(module, positions):
    module.calls.add_(1)
    return positions


@pytest.mark.parametrize(
    ("meddle", "reason"),
    [
        (decides_by_a_value, "data-dependent"),
        (scales_by_a_value, "data-dependent"),
        (picks_by_a_value, "data-dependent|DynamicOutputShape"),
        (draws_noise, "random numbers"),
        (counts_calls, "changes a tensor"),
    ],
)
def test_a_model_that_is_no_pure_function_of_tensors_is_refused_in_one_line(prepared_ethanol, meddle, reason):
    model = build(prepared_ethanol)
    model.model.func = Meddling(model.model.func, meddle)
    with pytest.raises(Untraceable, match=reason) as refused:
        functional_model(model, batches(prepared_ethanol)[0])
    assert "\n" not in str(refused.value)


def test_several_models_in_one_module_and_modules_of_others_are_refused(prepared_ethanol):
    model = build(prepared_ethanol)
    batch = batches(prepared_ethanol)[0]
    with pytest.raises(Untraceable, match="found 2 models"):
        functional_model(torch.nn.ModuleDict({"a": model, "b": build(prepared_ethanol, seed=2)}), batch)
    with pytest.raises(Untraceable, match="found a Linear"):
        functional_model(torch.nn.Linear(2, 2), batch)
