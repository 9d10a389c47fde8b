# mypy: allow-untyped-calls
"""What a model's blocks are, whether a gradient ever reaches them, and how much of the model a matrix rule sees."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from allegro.model import MuonParamGroups as allegro_groups
from nequip.data import AtomicDataDict
from nequip.model import MuonParamGroups as nequip_groups

from tunebench.optim.blocks import Block, View
from tunebench.optim.matrix_view import FctpView, matrix_view, trainable_parameters
from tunebench.optim.trained import freeze_others
from tunebench.study.plan import trial_seeds
from tunebench.study.record import Split, Stage
from tunebench.study.resolve import ResolvedStudy
from tunebench.study.spec import StudyError, Workload
from tunebench.workloads.data import PreparedData
from tunebench.workloads.errors import WorkloadError
from tunebench.workloads.frames import prepared_frames
from tunebench.workloads.models import build_model, model_config
from tunebench.workloads.order import batch_order
from tunebench.workloads.starting_point import starting_point
from tunebench.workloads.statistics import training_statistics

Batch = dict[str, Any]
Touched = Mapping[str, torch.Tensor]
_BATCHES = 2


@dataclass(frozen=True, kw_only=True)
class BlockRow:
    """One block of a model.

    Attributes:
        tensor, path: where it lies.
        shape: as stored: (in, out), (u, v, w), or that of a vector's tensor.
        view: how an update rule reads it.
        rule: `matrix` or `auxiliary`.
        parameters: number of elements.
        share: of the model's trainable parameters.
        live_share: of its elements, those that ever had a gradient other than zero; 0 is dead. None where no gradient
            was taken.
    """

    tensor: str
    path: str
    shape: tuple[int, ...]
    view: View
    rule: str
    parameters: int
    share: float
    live_share: float | None


@dataclass(frozen=True, kw_only=True)
class Reach:
    """How much of a model one way of choosing matrices puts under the matrix rule.

    Attributes:
        chosen_by: a view of tunebench, or the rule of somebody else.
        parameters: elements under the matrix rule.
        share: of all trainable parameters.
        share_of_live: live elements under the matrix rule, of all live elements.
    """

    chosen_by: str
    parameters: int
    share: float
    share_of_live: float


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """A workload's model in blocks.

    Attributes:
        workload: its name in the study.
        parameters: trainable parameters.
        live_parameters: those that ever had a gradient other than zero, counted one by one.
        blocks: in the model's order.
        reach: tunebench's views, and other groupings of the same model.
        evidence: how dead blocks were told from live ones.
    """

    workload: str
    parameters: int
    live_parameters: int
    blocks: tuple[BlockRow, ...]
    reach: tuple[Reach, ...]
    evidence: str

    def to_plain(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        plain = asdict(self)
        return plain | {"blocks": [{**row, "view": row["view"].value} for row in plain["blocks"]]}


def chosen_workloads(resolved: ResolvedStudy, name: str | None = None) -> list[int]:
    """Positions of a study's workloads: all, or the one of this name.

    Raises:
        StudyError: no workload has the name.
    """
    names = [workload.name for workload in resolved.study.workloads]
    if name is not None and name not in names:
        raise StudyError(resolved.file, "workloads", name, ", ".join(names))
    return [index for index, each in enumerate(names) if name in (None, each)]


def inspect_workload(
    resolved: ResolvedStudy,
    index: int,
    data: Mapping[str, PreparedData],
    *,
    fctp_view: FctpView = FctpView.MERGED,
    split_heads: bool = False,
) -> Inspection:
    """A study's model of one workload in blocks, and which of them are live; views as for `matrix_view`.

    Args:
        resolved: the study.
        index: position of the workload.
        data: prepared data by name of the workload.
        fctp_view: how weights of FullyConnectedTensorProducts are read.
        split_heads: whether fused last layers are cut.

    Raises:
        StudyError: arguments that the model's builder refuses, or a tensor of unknown meaning.
    """
    workload = resolved.study.workloads[index]
    key = f"workloads[{index}]"
    try:
        model, batches = _model_and_batches(workload, data[workload.name], resolved.study.seed)
    except WorkloadError as error:
        raise StudyError(resolved.file, f"{key}.{error.key}", error.found, error.allowed) from error
    try:
        blocks = matrix_view(model, fctp_view=fctp_view, split_heads=split_heads)
    except ValueError as error:
        raise StudyError(resolved.file, f"{key}.model", str(workload.model.family), str(error)) from error
    return _inspection(workload, model, batches, blocks)


def inspect_blocks(blocks: Sequence[Block], touched: Touched | None = None) -> list[BlockRow]:
    """One row per block of a model; `touched`, from `touched_by_gradient`, tells dead blocks from live ones."""
    total = sum(block.numel for block in blocks)
    return [
        BlockRow(
            tensor=block.parameter,
            path=block.path,
            shape=block.shape,
            view=block.view,
            rule="matrix" if block.is_matrix else "auxiliary",
            parameters=block.numel,
            share=block.numel / total,
            live_share=None if touched is None else _count(touched, block) / block.numel,
        )
        for block in blocks
    ]


def touched_by_gradient(model: torch.nn.Module, batches: Iterable[Batch], seed: int = 0) -> Touched:
    """Which elements of each trainable parameter ever get a gradient, as booleans of the parameter's shape.

    The gradient is that of a random linear function of all energies and force components, which is what a squared
    error against random labels has. An element that it leaves at exactly zero has no way to the output at all, or
    belongs to a species that is in none of the frames.

    Args:
        model: NequIP's or Allegro's; called in training mode, so that forces keep their graph.
        batches: real frames, on the model's device.
        seed: of the random function.
    """
    parameters = trainable_parameters(model)
    touched = {name: torch.zeros(parameter.shape, dtype=torch.bool) for name, parameter in parameters.items()}
    generator = torch.Generator().manual_seed(seed)
    was_training = model.training
    model.train()
    try:
        for batch in batches:
            for name, gradient in _random_gradients(model, parameters, batch, generator).items():
                touched[name] |= (gradient != 0).cpu()
    finally:
        model.train(was_training)
    return touched


def matrix_reach(model: torch.nn.Module, touched: Touched) -> list[Reach]:
    """What each way of choosing matrices reaches: the views here, tensors with two axes, NequIP's and Allegro's groups.

    A grouping that selects nothing in this model reaches 0.

    Args:
        model: any model that `matrix_view` knows.
        touched: from `touched_by_gradient`.
    """
    chosen: dict[str, Sequence[Block]] = {f"fctp_view {v}": matrix_view(model, fctp_view=v) for v in FctpView}
    chosen |= _other_groupings(model)
    total, total_live = _totals(touched)
    reach = []
    for name, blocks in chosen.items():
        matrices = [block for block in blocks if block.is_matrix]
        parameters = sum(block.numel for block in matrices)
        of_live = sum(_count(touched, block) for block in matrices) / max(total_live, 1)
        reach.append(Reach(chosen_by=name, parameters=parameters, share=parameters / total, share_of_live=of_live))
    return reach


def _random_gradients(
    model: torch.nn.Module, parameters: Mapping[str, torch.Tensor], batch: Batch, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Gradients of a random linear function of energies and forces; parameters outside the graph are left out."""
    predicted = model(dict(batch))
    outputs = [predicted[key] for key in (AtomicDataDict.TOTAL_ENERGY_KEY, AtomicDataDict.FORCE_KEY)]
    weights = [torch.randn(out.shape, generator=generator, dtype=out.dtype).to(out.device) for out in outputs]
    gradients = torch.autograd.grad(outputs, list(parameters.values()), weights, allow_unused=True)
    return {name: grad for name, grad in zip(parameters, gradients, strict=True) if grad is not None}


def _model_and_batches(workload: Workload, data: PreparedData, seed: int) -> tuple[torch.nn.Module, list[Batch]]:
    """The model of the first tuning trial and its first batches."""
    seeds = trial_seeds(seed, workload.name, Stage.TUNE, 0)
    cutoff = workload.model.r_max_angstrom
    statistics = training_statistics(data, cutoff, workload.labels.force_fraction, seeds["labels"])
    config = model_config(workload.model, data.type_names, statistics, seeds["init"])
    start = starting_point(workload.init, workload.model, data) if workload.init else None
    model = build_model({**config, **(start.constants if start else {}), "compile_mode": "eager"})
    if start and workload.init:
        start.put_into(model)
        freeze_others(model, workload.init.train)
    frames = prepared_frames(data, Split.TRAIN, cutoff)
    order = batch_order(len(frames), workload.batch_size, _BATCHES, seeds["order"])
    return model, [AtomicDataDict.batched_from_list(frames.__getitems__(indices)) for indices in order]


def _inspection(
    workload: Workload, model: torch.nn.Module, batches: list[Batch], blocks: Sequence[Block]
) -> Inspection:
    touched = touched_by_gradient(model, batches)
    parameters, live = _totals(touched)
    return Inspection(
        workload=workload.name,
        parameters=parameters,
        live_parameters=live,
        blocks=tuple(inspect_blocks(blocks, touched)),
        reach=tuple(matrix_reach(model, touched)),
        evidence=(
            "dead: the gradient of a random linear function of energies and forces is exactly zero, element by "
            f"element, on {len(batches)} training batches of {workload.batch_size} frames"
        ),
    )


def _other_groupings(model: torch.nn.Module) -> dict[str, Sequence[Block]]:
    """Whole tensors that other rules treat as matrices, as blocks of one row for counting."""
    parameters = trainable_parameters(model)
    picked = {
        "tensors with two axes": [parameter for parameter in parameters.values() if parameter.ndim == 2],
        "nequip.model.MuonParamGroups": nequip_groups(model, muon={}, adam={})[0]["params"],
        "allegro.model.MuonParamGroups": allegro_groups(model, muon={}, adam={})[0]["params"],
    }
    identities = {chosen_by: {id(parameter) for parameter in chosen} for chosen_by, chosen in picked.items()}
    return {
        chosen_by: [
            Block.whole(name, (1, parameter.numel()), View.MATRIX)
            for name, parameter in parameters.items()
            if id(parameter) in chosen
        ]
        for chosen_by, chosen in identities.items()
    }


def _count(touched: Touched, block: Block) -> int:
    """Elements of a block that ever had a gradient."""
    return int(touched[block.parameter].reshape(-1)[block.index()].sum())


def _totals(touched: Touched) -> tuple[int, int]:
    """All elements, and those that ever had a gradient."""
    return sum(mask.numel() for mask in touched.values()), sum(int(mask.sum()) for mask in touched.values())
