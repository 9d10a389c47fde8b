"""Trials that start from a trained model, in both engines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import get_class

from tests.engine.conftest import Reports
from tests.workloads.trained_files import model_section, write_checkpoint
from tunebench.engine.checkpoints import FINAL, checkpoint_folder
from tunebench.engine.cohort import Cohort
from tunebench.engine.lightning import run_trial
from tunebench.engine.modules import trial_module
from tunebench.engine.nequip_config import plain_nequip_config, training_module
from tunebench.engine.promise import check_arm
from tunebench.engine.task import Evaluation, Seeds, TrialTask
from tunebench.study.initial import Initial
from tunebench.study.record import Stage
from tunebench.study.search_space import SearchSpace
from tunebench.study.spec import Model
from tunebench.workloads.data import PreparedData, graphs_folder
from tunebench.workloads.errors import WorkloadError
from tunebench.workloads.starting_point import starting_point
from tunebench.workloads.trained_model import read_architecture, read_trained

BASE_TYPES = ("O", "N", "C", "H")
CONVOLUTIONS = ["layer*", "type_embed*"]
Engine = Callable[[TrialTask], Evaluation]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, prepared_ethanol: PreparedData) -> dict[str, Path]:
    """A checkpoint of each family."""
    folder = tmp_path_factory.mktemp("base")
    paths = {family: folder / f"{family}.ckpt" for family in ("nequip", "allegro")}
    for family, path in paths.items():
        write_checkpoint(path, model_section(Model(family=family, r_max_angstrom=4.0), BASE_TYPES), prepared_ethanol)
    return paths


@pytest.fixture
def fine_tuning(make_task, base: dict[str, Path]):
    """A trial that starts from the base model."""

    def make(optimizer: str = "adamw", *, family: str = "nequip", init: dict[str, Any] | None = None, **said: Any):
        task = make_task(optimizer, family=family, **said)
        workload = task.workload.model_copy(
            update={
                "init": Initial.model_validate({"path": str(base[family]), **(init or {})}),
                "model": read_architecture(base[family]).model,
                "clip_global_norm": 1.0,
            }
        )
        return replace(task, workload=workload)

    return make


def by_lightning(task: TrialTask) -> Evaluation:
    return run_trial(task, Reports())


def by_cohort(task: TrialTask) -> Evaluation:
    cohort = Cohort(task, 1, cache=graphs_folder(), compiled=False)
    cohort.join(task)
    last: Evaluation | None = None
    while reports := cohort.advance():
        ((name, last),) = reports
        if last.outcome is None:
            cohort.go_on(name)
    assert last is not None
    return last


def final_weights(task: TrialTask) -> dict[str, torch.Tensor]:
    """Raw and averaged weights of the checkpoint that a confirm trial ends with."""
    final = torch.load(checkpoint_folder(task.run, task.key.trial_id) / FINAL, weights_only=False)["state_dict"]
    return {name: tensor for name, tensor in final.items() if torch.is_tensor(tensor)}


def start_of(task: TrialTask) -> dict[str, torch.Tensor]:
    assert task.workload.init is not None
    tensors = starting_point(task.workload.init, task.workload.model, task.data).tensors
    return {f"model.sole_model.{name}": tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("family", ["nequip", "allegro"])
def test_all_seeds_start_from_the_same_weights_and_averages(family, fine_tuning):
    first = fine_tuning(family=family)
    other = replace(first, seeds=Seeds(init=11, order=12, labels=13))
    one, two = (trial_module(task, training_module(task)).model.state_dict() for task in (first, other))
    assert all(torch.equal(one[name], two[name]) for name in one)
    start = start_of(first)
    module = trial_module(first, training_module(first))
    for average, (name, weight) in zip(module.ema.ema_weights, module.model.named_parameters(), strict=True):
        assert torch.equal(average, weight)
        assert torch.equal(weight, start[f"model.{name}"])


@pytest.mark.parametrize(
    ("optimizer", "train"), [("adamw", by_lightning), ("schedule_free", by_lightning), ("soap", by_cohort)]
)
def test_weights_that_are_not_trained_do_not_move_by_a_bit(optimizer, train: Engine, fine_tuning):
    init = {"train": CONVOLUTIONS}
    task = fine_tuning(optimizer, init=init, stage=Stage.CONFIRM, weight_decay=0.1, steps=4, evaluation_steps=(4,))
    last = train(task)
    assert last.outcome == "FINISHED"
    found, start = final_weights(task), start_of(task)
    moved = {name for name in start.keys() & found.keys() if not torch.equal(found[name], start[name])}
    assert moved
    assert all("layer" in name or "type_embed" in name for name in moved)
    frozen = next(name for name in start if "readout" in name and name.endswith("0.weight"))
    assert torch.equal(found[frozen], start[frozen])
    trained = sum(tensor.numel() for name, tensor in start.items() if "layer" in name and name.endswith("weight"))
    assert 0 < sum(row["parameters"] for row in last.groups) <= trained + 3 * 16
    assert sum(row["share"] for row in last.groups) == pytest.approx(1.0)
    again = read_trained(checkpoint_folder(task.run, task.key.trial_id) / FINAL)
    assert torch.equal(dict(again.model.named_parameters())[frozen.removeprefix("model.sole_model.")], start[frozen])


@pytest.mark.parametrize(
    ("optimizer", "family", "init"),
    [
        ("adamw", "nequip", {}),
        ("schedule_free", "nequip", {"lr_factors": {"layer0*": 0.1, "*readout*": 2.0}}),
        ("soap", "allegro", {"train": ["allegro.*", "edge_readout.*"], "lr_factors": {"allegro.latents*": 0.1}}),
    ],
)
def test_both_engines_fine_tune_alike(optimizer, family, init, fine_tuning):
    task = fine_tuning(optimizer, family=family, init=init, learning_rate=1e-2)
    one, other = by_lightning(replace(task, run=task.run / "l")), by_cohort(replace(task, run=task.run / "c"))
    assert other.errors["val"]["raw"]["forces_mae"] == pytest.approx(one.errors["val"]["raw"]["forces_mae"], rel=1e-3)
    assert other.train_loss == pytest.approx(one.train_loss, rel=1e-3)


def test_an_exported_config_begins_where_the_trial_began(fine_tuning):
    task = fine_tuning("soap", init={"train": CONVOLUTIONS, "lr_factors": {"layer0*": 0.1}})
    starting_point(task.workload.init, task.workload.model, task.data)
    section = plain_nequip_config(task, evaluate_every=4)["training_module"]
    target = get_class(section.pop("_target_"))
    module = target(num_datasets={"train": 1, "val": 1, "test": 1, "predict": 0}, info_dict=None, **section)
    start, found = start_of(task), module.model.state_dict()
    assert all(torch.equal(found[name], start[f"model.{name}"]) for name in found if f"model.{name}" in start)
    (group,) = module.configure_optimizers()["optimizer"].param_groups
    assert all("layer" in name or "type_embed" in name for name in group["names"])
    assert set(group["lr_factors"]) == {0.1, 1.0}


def test_slots_of_a_cohort_start_alike_and_part_by_their_data_order(fine_tuning):
    task = fine_tuning(steps=2, evaluation_steps=(1, 2))
    tasks = [
        replace(task, key=replace(task.key, seed_index=index), seeds=Seeds(init=index, order=order, labels=0))
        for index, order in ((0, 5), (1, 5), (2, 6))
    ]
    cohort = Cohort(task, 3, cache=graphs_folder(), compiled=False)
    for each in tasks:
        cohort.join(each)
    states = [cohort.state(each.key.trial_id).weights for each in tasks]
    assert all(torch.equal(states[0][name], other[name]) for other in states[1:] for name in states[0])
    losses = dict(cohort.advance())
    same, alike, other = (losses[each.key.trial_id].train_loss for each in tasks)
    assert same == alike != other


def test_an_arm_without_a_matrix_to_treat_is_refused(fine_tuning):
    with pytest.raises(ValueError, match="found no matrix in this model"):
        check_arm(fine_tuning("muon", init={"train": "readout"}), SearchSpace.load("muon"))


def test_patterns_that_choose_nothing_are_named(fine_tuning):
    for init, line in (
        ({"train": ["layer7*"]}, r"init.train: found 'layer7\*', allowed: a pattern that matches one of type_embed"),
        ({"train": "readout", "lr_factors": {"layer0*": 0.1}}, r"init.lr_factors: found 'layer0\*'.*readout"),
        ({"lr_factors": {"layer0*": 0.1, "*sc.weight": 0.5, "*linear_1*": 2.0}}, r"another matches layer0.*linear_1"),
    ):
        task = fine_tuning(init=init)
        with pytest.raises(WorkloadError, match=line):
            trial_module(task, training_module(task))
