from __future__ import annotations

import pytest
import torch
from hydra.utils import instantiate
from nequip.data.AtomicDataDict import batched_from_list
from nequip.utils.global_state import set_global_state

from tunebench.engine.errors import ErrorSums, split_errors
from tunebench.engine.loss import LossWeights, mean_square_of_labelled, weighted_loss
from tunebench.study.spec import Loss
from tunebench.study.training_sections import loss_section, metrics_section
from tunebench.workloads.frames import PreparedFrames


@pytest.fixture(autouse=True)
def nequips_global_state():
    """As both engines set it before anything else: torch's default dtype is float64."""
    set_global_state()


@pytest.fixture
def labels(prepared_ethanol):
    """Three of four training frames without forces."""
    frames = PreparedFrames(
        folder=str(prepared_ethanol.folder),
        split="train",
        r_max=4.0,
        type_names=["H", "C", "O"],
        force_fraction=0.3,
        label_seed=7,
    )
    return batched_from_list([frames[i] for i in range(len(frames))])


@pytest.fixture
def predictions(labels):
    generator = torch.Generator().manual_seed(0)
    return {
        key: torch.nan_to_num(labels[key]) + torch.randn(labels[key].shape, generator=generator, dtype=torch.float64)
        for key in ("total_energy", "forces")
    } | {key: labels[key] for key in ("num_atoms", "atom_types", "batch")}


@pytest.mark.parametrize("loss", [Loss(), Loss(energy_per_atom=3.0, forces=0.5), Loss(forces=0.0)])
def test_the_loss_is_nequips_loss_with_missing_labels_ignored(labels, predictions, loss: Loss):
    nequip = instantiate(loss_section(loss), type_names=["H", "C", "O"])
    expected = nequip(predictions, labels)["weighted_sum"]
    torch.testing.assert_close(weighted_loss(predictions, labels, LossWeights.of(loss)), expected, rtol=1e-14, atol=0)


def test_errors_are_nequips_metrics(labels, predictions):
    expected = instantiate(metrics_section(Loss()), type_names=["H", "C", "O"])(predictions, labels)

    class Oracle(torch.nn.Module):
        def forward(self, batch):
            return predictions

    found = split_errors(Oracle(), [labels], stress=False)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value == pytest.approx(expected[name].item(), rel=1e-14)


def test_the_force_term_averages_over_labelled_components_only():
    error = torch.tensor([[1.0, 2.0], [float("nan"), float("nan")]], dtype=torch.float64)
    assert mean_square_of_labelled(error, error).item() == 2.5


def test_a_batch_without_labelled_frames_has_a_finite_loss_and_gradient():
    error = torch.full((4, 3), float("nan"), dtype=torch.float64, requires_grad=True)
    loss = mean_square_of_labelled(error, error.detach())
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(error.grad, torch.zeros_like(error))


@pytest.mark.parametrize("key", ["total_energy", "forces"])
def test_a_prediction_that_is_nan_makes_the_loss_nan(labels, predictions, key: str):
    predictions[key] = torch.full_like(predictions[key], float("nan"))
    assert weighted_loss(predictions, labels, LossWeights.of(Loss())).isnan()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_prediction_that_is_not_finite_is_an_infinite_error_not_a_missing_label(labels, predictions, value: float):
    predictions["forces"] = torch.full_like(predictions["forces"], value)

    class Broken(torch.nn.Module):
        def forward(self, batch):
            return predictions

    assert split_errors(Broken(), [labels], stress=False)["forces_mae"] == float("inf")


def test_sums_over_batches_equal_sums_over_all_frames():
    error = torch.randn(10, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    whole, parts = ErrorSums(), ErrorSums()
    whole.add("forces", error)
    for part in error.split(3):
        parts.add("forces", part)
    assert parts.metrics() == pytest.approx(whole.metrics(), rel=1e-14)
