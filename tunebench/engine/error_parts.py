"""Errors of the parts of a split: frames of one configuration type, and atoms of one element.

Sums are taken where the errors of the whole split are, in the same pass, so that they cost next to nothing. Finished
confirm trials write them to a file of their own, for they are of no use to a curve.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from nequip.data import AtomicDataDict

from tunebench.engine.errors import labelled_errors, metrics_of_sums, quantities, row_sums
from tunebench.study.files import replacing
from tunebench.study.record import ERROR_PARTS, PART_COLUMNS, Part
from tunebench.workloads.data import PreparedData

PartRow = tuple[str, str, str, str, str, float, int]
"""``PART_COLUMNS`` without the trial."""

_SCHEMA = pa.schema(
    [(name, {"value": pa.float64(), "labels": pa.int64()}.get(name, pa.string())) for name in PART_COLUMNS]
)


@dataclass(frozen=True, kw_only=True, eq=False)
class SplitParts:
    """How a split falls into parts.

    Attributes:
        split: its name.
        config_types: names that occur in it, empty text for frames without one; empty where no frame has one.
        elements: chemical symbols in the order of the model's types.
        of_frame: place of each frame's name in `config_types`, int64 (frames,).
        stress: whether errors of the stress are measured.
    """

    split: str
    config_types: tuple[str, ...]
    elements: tuple[str, ...]
    of_frame: torch.Tensor
    stress: bool

    @classmethod
    def of(cls, data: PreparedData, split: str, *, stress: bool) -> SplitParts:
        """The parts of a split of prepared data."""
        found = data.splits[split]
        names = sorted(set(found.config_types))
        place = {name: index for index, name in enumerate(names)}
        of_frame = [place[name] for name in found.config_types] or [0] * found.frames
        return cls(
            split=split,
            config_types=tuple(names),
            elements=data.type_names,
            of_frame=torch.tensor(of_frame, dtype=torch.int64),
            stress=stress,
        )

    @property
    def rows(self) -> int:
        """Rows of `sums`."""
        return len(self.config_types) * len(quantities(stress=self.stress)) + len(self.elements)

    def sums(
        self, output: Mapping[str, torch.Tensor], batch: Mapping[str, torch.Tensor], of_frame: torch.Tensor
    ) -> torch.Tensor:
        """Sums over the labelled values of one batch; works under `torch.vmap` and makes no host synchronisation.

        Args:
            output: predictions, NequIP's keys.
            batch: labels, NaN where there is none, as all labels of a ghost frame are.
            of_frame: what `of_frame` says of the frames of the batch, int64 (batch,); anything for a ghost.

        Returns:
            float64 (rows, 3): sum of absolute errors, of squared errors, number of values; for each quantity a row a
            configuration type, then a row an element, of the forces. Sums of batches add up.
        """
        errors = labelled_errors(output, batch, stress=self.stress)
        parts = []
        for quantity, error in errors.items() if self.config_types else ():
            group = of_frame[batch[AtomicDataDict.BATCH_KEY]] if quantity == "forces" else of_frame
            parts.append(_grouped(row_sums(error), group, len(self.config_types)))
        types = batch[AtomicDataDict.ATOM_TYPE_KEY].flatten()
        parts.append(_grouped(row_sums(errors["forces"]), types, len(self.elements)))
        return torch.cat(parts)

    def table(self, readout: str, sums: Sequence[Sequence[float]]) -> list[PartRow]:
        """MAE and RMSE from sums over the whole split; parts without labels have none."""
        named = [
            (Part.CONFIG_TYPE, name, quantity)
            for quantity in (quantities(stress=self.stress) if self.config_types else ())
            for name in self.config_types
        ]
        named += [(Part.ELEMENT, name, "forces") for name in self.elements]
        return [
            (self.split, readout, part.value, name, metric, value, int(row[2]))
            for (part, name, quantity), row in zip(named, sums, strict=True)
            for metric, value in metrics_of_sums({quantity: row}).items()
        ]


class RunningParts:
    """Adds up the parts of a split whose frames come batch after batch, in order."""

    def __init__(self, parts: SplitParts) -> None:
        self._parts, self._frames = parts, 0
        self._sums = torch.zeros((parts.rows, 3), dtype=torch.float64)

    def add(self, output: Mapping[str, torch.Tensor], batch: Mapping[str, torch.Tensor]) -> None:
        """Add the next batch."""
        frames = len(batch[AtomicDataDict.NUM_NODES_KEY])
        of_frame = self._parts.of_frame[self._frames : self._frames + frames]
        sums = self._parts.sums(output, batch, of_frame.to(output[AtomicDataDict.FORCE_KEY].device))
        self._sums += sums.to("cpu")
        self._frames += frames

    def table(self, readout: str) -> list[PartRow]:
        """As `SplitParts.table`."""
        return self._parts.table(readout, self._sums.tolist())


def write_parts(run: Path, trial_id: str, rows: Sequence[PartRow]) -> None:
    """Write the parts of a trial's errors; readers see the old file or the new one, never half of it."""
    columns = zip(*((trial_id, *row) for row in rows), strict=True)
    arrays = [pa.array(column, type=field.type) for column, field in zip(columns, _SCHEMA, strict=True)]
    with replacing(run / ERROR_PARTS / f"{trial_id}.parquet") as partial:
        pq.write_table(pa.Table.from_arrays(arrays, schema=_SCHEMA), partial)


def _grouped(values: torch.Tensor, group: torch.Tensor, groups: int) -> torch.Tensor:
    """Sums of rows by group: (rows, 3) and (rows,) give (groups, 3).

    Neither a scatter, which Inductor miscompiles under vmap, nor a product, in which 0 times infinity is NaN.
    """
    members = group == torch.arange(groups, dtype=group.dtype, device=group.device).unsqueeze(1)
    return torch.where(members.unsqueeze(-1), values, torch.zeros_like(values)).sum(1)
