"""Errors of many slots on whole splits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch.func import vmap

from tunebench.engine.batches import task_frames
from tunebench.engine.errors import error_sums, metrics_of_sums, quantities
from tunebench.engine.resident import frame_labels
from tunebench.engine.slot_group import Flat
from tunebench.engine.slot_groups import SlotGroups
from tunebench.engine.slot_rows import Place, SlotRows
from tunebench.engine.task import Errors
from tunebench.engine.workload_functions import WorkloadFunctions
from tunebench.optim.packing import Tensors
from tunebench.study.record import Readout, Split


class SlotEvaluation:
    """Evaluates some slots at once, and fewer where memory does not suffice.

    Args:
        functions: the workload on its device.
        at_once: slots in one call at most.
    """

    def __init__(self, functions: WorkloadFunctions, at_once: int) -> None:
        self._functions, self._at_once = functions, at_once

    def errors(self, places: Sequence[Place], rows: SlotRows, groups: SlotGroups) -> list[Errors]:
        """Errors on the validation split, and at the horizon on the splits opened once.

        Args:
            places: who is evaluated.
            rows: the weights.
            groups: the rules, some of which average the weights themselves.

        Raises:
            torch.OutOfMemoryError: there is no memory to evaluate even one slot.
        """
        while True:
            try:
                return self._errors(places, rows, groups)
            except torch.OutOfMemoryError:
                if self._at_once == 1:
                    raise
            self._at_once //= 2  # outside of the handler, which keeps the memory of the frames it went through

    def _errors(self, places: Sequence[Place], rows: SlotRows, groups: SlotGroups) -> list[Errors]:
        found: list[Errors] = [{} for _ in places]
        for readout, weights in _readouts(places, rows, groups).items():
            for split in self._opened(places):
                chosen = [
                    index
                    for index, place in enumerate(places)
                    if readout in (Readout.RAW, place.tenant.task.averaged) and split in self._opened([place])
                ]
                measured = self._measured([places[index] for index in chosen], rows, weights, split)
                for index, metrics in zip(chosen, measured, strict=True):
                    found[index].setdefault(split, {})[readout.value] = metrics
        return found

    def _opened(self, places: Sequence[Place]) -> tuple[str, ...]:
        at_horizon = [place for place in places if place.step == self._functions.workload.max_steps]
        final = dict.fromkeys(split for place in at_horizon for split in place.tenant.task.final_splits)
        return (Split.VAL.value, *final)

    def _measured(self, places: Sequence[Place], rows: SlotRows, weights: Flat, split: str) -> list[dict[str, float]]:
        size = self._at_once
        found: list[dict[str, float]] = []
        for first in range(0, len(places), size):
            part = list(places[first : first + size])
            sums = self._sums(part + part[-1:] * (size - len(part)), rows, weights, split)
            names = quantities(stress=self._functions.has_stress)
            found += [metrics_of_sums(dict(zip(names, slot, strict=True))) for slot in sums.tolist()[: len(part)]]
        return found

    def _sums(self, places: Sequence[Place], rows: SlotRows, weights: Flat, split: str) -> torch.Tensor:
        """Error sums over a split, float64 (places, quantities, 3)."""
        device = self._functions.device
        chosen = torch.tensor([place.slot for place in places], dtype=torch.int64, device=device)
        stacked = rows.packing.split({dtype: matrix.index_select(0, chosen) for dtype, matrix in weights.items()})
        constants = {name: values.index_select(0, chosen) for name, values in rows.constants.items()}
        labelled = torch.stack(
            [torch.as_tensor(task_frames(place.tenant.task, split).labelled, device=device) for place in places]
        )
        batches = self._functions.batches(split)
        predict, keys = self._functions.prediction(split, stacked, constants)
        total = torch.zeros((), dtype=torch.float64, device=device)
        for position in range(len(batches)):
            batch = batches[position]
            with torch.no_grad():
                output = predict(stacked, constants, {key: batch[key] for key in keys})
                total = total + self._batch_sums(output, batch, labelled, batches.indices[position])
        return total

    def _batch_sums(
        self, output: Tensors, batch: Mapping[str, torch.Tensor], labelled: torch.Tensor, indices: torch.Tensor
    ) -> torch.Tensor:
        def sums(output: Tensors, labelled: torch.Tensor) -> torch.Tensor:
            stress = self._functions.has_stress
            return error_sums(output, batch, stress=stress, force_labels=frame_labels(labelled, indices))

        found: torch.Tensor = vmap(sums)(dict(output), labelled)
        return found


def _readouts(places: Sequence[Place], rows: SlotRows, groups: SlotGroups) -> dict[Readout, Flat]:
    """The weights that each readout sees, in the cohort's rows."""
    wanted = {place.tenant.task.averaged for place in places}
    readouts: dict[Readout, Flat] = {Readout.RAW: rows.weights}
    if Readout.EMA in wanted:
        readouts[Readout.EMA] = rows.averages
    if Readout.SCHEDULE_FREE in wanted:
        readouts[Readout.SCHEDULE_FREE] = groups.averaged([place.slot for place in places], rows.weights)
    return readouts
