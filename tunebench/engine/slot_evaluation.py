"""Errors of many slots on whole splits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch.func import vmap

from tunebench.engine.batches import task_frames
from tunebench.engine.error_parts import PartRow
from tunebench.engine.errors import error_sums, metrics_of_sums, quantities
from tunebench.engine.graphs import Replayed
from tunebench.engine.resident import frame_labels
from tunebench.engine.slot_group import Flat
from tunebench.engine.slot_groups import SlotGroups
from tunebench.engine.slot_rows import Place, SlotRows
from tunebench.engine.task import Errors
from tunebench.engine.workload_functions import WorkloadFunctions
from tunebench.optim.packing import Tensors
from tunebench.study.record import Readout, Split


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What an evaluation found of a slot.

    Attributes:
        errors: on whole splits.
        parts: of the parts of the splits that are opened once.
    """

    errors: Errors = field(default_factory=dict)
    parts: list[PartRow] = field(default_factory=list)


class SlotEvaluation:
    """Evaluates some slots at once, and fewer where memory does not suffice.

    Args:
        functions: the workload on its device.
        at_once: slots in one call at most.
        beat: called after every batch.
    """

    def __init__(self, functions: WorkloadFunctions, at_once: int, beat: Callable[[], None] = lambda: None) -> None:
        self._functions, self._at_once, self._beat = functions, at_once, beat
        self._programs: dict[str, _BatchErrors] = {}
        self._labels: dict[tuple[str, int], torch.Tensor] = {}

    def measured(self, places: Sequence[Place], rows: SlotRows, groups: SlotGroups) -> list[Measured]:
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
                return self._of_all(places, rows, groups)
            except torch.OutOfMemoryError:
                if self._at_once == 1:
                    raise
            self._programs.clear()  # outside of the handler, which keeps the memory of the frames it went through
            self._at_once //= 2

    def _of_all(self, places: Sequence[Place], rows: SlotRows, groups: SlotGroups) -> list[Measured]:
        found = [Measured() for _ in places]
        for readout, weights in _readouts(places, rows, groups).items():
            for split in self._opened(places):
                chosen = [
                    index
                    for index, place in enumerate(places)
                    if readout in (Readout.RAW, place.tenant.task.averaged) and split in self._opened([place])
                ]
                sums = self._split_sums([places[index] for index in chosen], rows, weights, split)
                for index, of_slot in zip(chosen, sums, strict=True):
                    self._add(found[index], split, readout, of_slot)
        return found

    def _add(self, found: Measured, split: str, readout: Readout, sums: list[list[float]]) -> None:
        names = quantities(stress=self._functions.has_stress)
        whole, parts = sums[: len(names)], sums[len(names) :]
        found.errors.setdefault(split, {})[readout.value] = metrics_of_sums(dict(zip(names, whole, strict=True)))
        if parts:
            found.parts.extend(self._functions.parts(split).table(readout.value, parts))

    def _opened(self, places: Sequence[Place]) -> tuple[str, ...]:
        at_horizon = [place for place in places if place.step == self._functions.workload.max_steps]
        final = dict.fromkeys(split for place in at_horizon for split in place.tenant.task.final_splits)
        return (Split.VAL.value, *final)

    def _split_sums(
        self, places: Sequence[Place], rows: SlotRows, weights: Flat, split: str
    ) -> list[list[list[float]]]:
        """Rows of sums of each place: those of the whole split, then those of its parts."""
        size = self._at_once
        sums: list[torch.Tensor] = []
        for first in range(0, len(places), size):
            part = list(places[first : first + size])
            sums += self._sums(part + part[-1:] * (size - len(part)), rows, weights, split)[: len(part)]
        found: list[list[list[float]]] = torch.stack(sums).tolist() if sums else []
        return found

    def _sums(self, places: Sequence[Place], rows: SlotRows, weights: Flat, split: str) -> torch.Tensor:
        """Error sums over a split, float64 (places, rows, 3)."""
        device = self._functions.device
        chosen = torch.tensor([place.slot for place in places], dtype=torch.int64, device=device)
        if split not in self._programs:
            self._programs[split] = _BatchErrors(self._functions, rows, split, len(places))
        program = self._programs[split]
        for dtype, matrix in weights.items():
            torch.index_select(matrix, 0, chosen, out=program.weights[dtype])
        for name, values in rows.constants.items():
            torch.index_select(values, 0, chosen, out=program.constants[name])
        torch.stack([self._labelled(place, split) for place in places], out=program.labelled)
        return program.over_split(self._beat)

    def _labelled(self, place: Place, split: str) -> torch.Tensor:
        """Frames of a split whose forces a trial knows, bool (frames,)."""
        task = place.tenant.task
        key = split, task.seeds.labels
        if key not in self._labels:
            self._labels[key] = torch.as_tensor(task_frames(task, split).labelled, device=self._functions.device)
        return self._labels[key]


class _BatchErrors:
    """Error sums of some slots, batch after batch of one split; a captured graph on CUDA.

    Args:
        functions: the workload on its device.
        rows: has the layout of the weights.
        split: whose batches.
        slots: how many.

    Attributes:
        weights, constants: of the slots, to be filled before `over_split`.
        labelled: frames of the split whose forces each slot knows, bool (slots, frames), likewise.
    """

    def __init__(self, functions: WorkloadFunctions, rows: SlotRows, split: str, slots: int) -> None:
        self._stress = functions.has_stress
        self._batches = functions.batches(split)
        self.weights = {dtype: matrix[:1].repeat(slots, 1) for dtype, matrix in rows.weights.items()}
        self.constants = {
            name: values[:1].repeat(slots, *[1] * (values.ndim - 1)) for name, values in rows.constants.items()
        }
        self.labelled = torch.ones(slots, len(functions.frames(split)), dtype=torch.bool, device=functions.device)
        self._stacked = rows.packing.split(self.weights)
        self._predict, self._keys = functions.prediction(split, self._stacked, self.constants)
        self._batch = {key: values.clone() for key, values in self._batches[0].items()}
        self._indices = self._batches.indices[0].clone()
        self._parts = None if split == Split.VAL else functions.parts(split)
        of_frame = self._parts.of_frame if self._parts else torch.zeros(1, dtype=torch.int64)
        self._of_frame = torch.cat([of_frame, of_frame[:1]]).to(functions.device)
        shape = slots, len(quantities(stress=self._stress)) + (self._parts.rows if self._parts else 0), 3
        self._sums = torch.zeros(shape, dtype=torch.float64, device=functions.device)
        self._add_batch = Replayed(self._add, functions.device)

    def over_split(self, beat: Callable[[], None]) -> torch.Tensor:
        """Sums over the whole split, float64 (slots, rows, 3); `beat` is called after every batch."""
        self._sums.zero_()
        for position in range(len(self._batches)):
            for key, values in self._batches[position].items():
                self._batch[key].copy_(values)
            self._indices.copy_(self._batches.indices[position])
            self._add_batch()
            beat()
        return self._sums.clone()

    def _add(self) -> None:
        """Add the errors of the batch at hand."""

        def sums(output: Tensors, labelled: torch.Tensor) -> torch.Tensor:
            labels = frame_labels(labelled, self._indices)
            whole = error_sums(output, self._batch, stress=self._stress, force_labels=labels)
            if self._parts is None:
                return whole
            # The ghost, and what fills up the last batch, have no labels and so no part.
            of_frame = torch.cat([self._of_frame[self._indices], self._of_frame[:1]])
            return torch.cat([whole, self._parts.sums(output, self._batch, of_frame)])

        with torch.no_grad():
            output = self._predict(self._stacked, self.constants, {key: self._batch[key] for key in self._keys})
            self._sums.add_(vmap(sums)(dict(output), self.labelled))


def _readouts(places: Sequence[Place], rows: SlotRows, groups: SlotGroups) -> dict[Readout, Flat]:
    """The weights that each readout sees, in the cohort's rows."""
    wanted = {place.tenant.task.averaged for place in places}
    readouts: dict[Readout, Flat] = {Readout.RAW: rows.weights}
    if Readout.EMA in wanted:
        readouts[Readout.EMA] = rows.averages
    if Readout.SCHEDULE_FREE in wanted:
        readouts[Readout.SCHEDULE_FREE] = groups.averaged([place.slot for place in places], rows.weights)
    return readouts
