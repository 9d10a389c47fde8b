"""The loss over a fixed set of frames at once."""

from __future__ import annotations

import math

import pytest
import torch
from nequip.data import AtomicDataDict
from nequip.utils.global_state import set_global_state

from tests.engine.test_cohort import CrystalTrials, crystal_trials
from tunebench.engine.batches import task_frames
from tunebench.engine.full_batch import FullBatch, full_batch, model_in
from tunebench.engine.loss import LossWeights, weighted_loss
from tunebench.engine.tenant import ModuleShelf, Tenant


@pytest.fixture(scope="module", autouse=True)
def nequips_global_state() -> None:
    """As both engines set it before anything else: torch's default dtype is float64."""
    set_global_state()


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> CrystalTrials:
    return crystal_trials(tmp_path_factory.mktemp("crystals"))


@pytest.fixture(scope="module")
def model(trials: CrystalTrials) -> torch.nn.Module:
    task = trials.task()
    return model_in(task, torch.float64, Tenant(task, ModuleShelf()).model)


@pytest.mark.parametrize("chunk_frames", [1, 4, 13])
def test_however_it_is_cut_the_loss_is_that_of_one_batch_of_all_frames(
    trials: CrystalTrials, model: torch.nn.Module, chunk_frames: int
) -> None:
    task = trials.task()
    frames = task_frames(task, "train")
    batch = AtomicDataDict.batched_from_list([frames[index] for index in range(len(frames))])
    (inner,) = model.values()
    inner.train()
    expected = weighted_loss(inner(dict(batch)), batch, LossWeights.of(task.workload.loss))
    gradients = torch.autograd.grad(expected, list(inner.parameters()))
    loss, gradient = full_batch(task, model, "train", chunk_frames=chunk_frames).loss_and_gradient()
    assert float(loss) == pytest.approx(float(expected.detach()), rel=1e-12)
    for found, exact in zip(gradient.values(), gradients, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-8, atol=1e-12)


def test_a_chunk_without_force_labels_adds_nothing_to_the_force_term(
    trials: CrystalTrials, model: torch.nn.Module
) -> None:
    frames = [dict(frame) for frame in task_frames(trials.task(), "train")]
    for frame in frames[:2]:
        frame["forces"] = torch.full_like(frame["forces"], math.nan)
    frames[2]["total_energy"] = torch.full_like(frames[2]["total_energy"], math.nan)
    weights = LossWeights(energy_per_atom=0.3, forces=0.7, stress=0.0)
    cut, whole = (FullBatch(model, frames, weights, chunk_frames=size).loss_and_gradient()[0] for size in (1, 13))
    assert float(cut) == pytest.approx(float(whole), rel=1e-12)


def test_a_draw_of_frames_is_the_same_for_the_same_seed(trials: CrystalTrials, model: torch.nn.Module) -> None:
    def drawn(seed: int) -> float:
        return float(
            full_batch(trials.task(), model, "train", chunk_frames=4, most=5, seed=seed).loss_and_gradient()[0]
        )

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
    assert full_batch(trials.task(), model, "train", chunk_frames=4, most=50).frames == 13


def test_a_model_in_another_precision_computes_the_same_function(trials: CrystalTrials) -> None:
    task = trials.task()
    own = Tenant(task, ModuleShelf()).model
    losses = [
        full_batch(task, model_in(task, dtype, own), "train", chunk_frames=4).loss_and_gradient()[0]
        for dtype in (torch.float32, torch.float64)
    ]
    assert float(losses[0]) == pytest.approx(float(losses[1]), rel=1e-4)
    assert float(losses[0]) != float(losses[1])


def test_no_frame_is_refused(model: torch.nn.Module) -> None:
    with pytest.raises(ValueError, match="found 0 frames in chunks of 4, allowed: at least 1"):
        FullBatch(model, [], LossWeights(energy_per_atom=1.0, forces=0.0, stress=0.0), chunk_frames=4)
