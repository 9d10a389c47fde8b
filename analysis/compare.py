"""Several runs, or results from elsewhere, as one study: the same workload's arms side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from analysis.comparison import Comparison, Contender
from analysis.confirm_table import ConfirmTable, load_source
from analysis.overall import Overall, WorkloadErrors, decide_overall
from analysis.pareto import ParetoPoint, pareto_front
from analysis.seed_intervals import seed_interval
from analysis.statistics import Interval, iqm
from analysis.verdict import Decision, decide
from tunebench.study.errors import RunError
from tunebench.study.seeds import named_seed

SEED = 0
"""Root seed of all draws of a joined comparison, which has no study of its own."""


@dataclass(frozen=True, kw_only=True)
class JoinedArm:
    """An arm of one source: IQM of the test force MAE over seeds, eV/Å, with its 95 % interval."""

    optimizer: str
    source: str
    iqm: float
    interval: Interval | None
    n_seeds: int


@dataclass(frozen=True, kw_only=True)
class JoinedWorkload:
    """All sources' arms of a workload, best first, and what may be said about them.

    Attributes:
        notes: what a reader must know about joining the sources.
    """

    workload: str
    decision: Decision
    comparisons: tuple[Comparison, ...]
    arms: tuple[JoinedArm, ...]
    pareto: tuple[ParetoPoint, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Joined:
    """Several sources as one study."""

    sources: tuple[str, ...]
    workloads: tuple[JoinedWorkload, ...]
    overall: Overall


def compare_sources(paths: Sequence[Path]) -> Joined:
    """Join run directories and tables, workload by workload.

    An optimizer that occurs in several sources on a workload is called ``OPTIMIZER@SOURCE``. Where seeds are not shared
    their pairing is arbitrary, which costs power and claims nothing false.

    Raises:
        RunError: fewer than two sources, one given twice, or one that cannot be read; two sources that mean different
            things by one workload.
        StudyError: a run's study is not valid.
    """
    tables = [load_source(path) for path in paths]
    names = [table.source for table in tables]
    doubled = [name for name, count in Counter(names).items() if count > 1]
    if len(tables) < 2 or doubled:
        found = f"{doubled[0]} twice" if doubled else f"{len(tables)} source"
        raise RunError(f"compare: found {found}, allowed: two run directories or tables or more, with different names")
    workloads = list(dict.fromkeys(workload for table in tables for workload in table.contenders))
    joined = tuple(_join(name, [table for table in tables if name in table.contenders]) for name in workloads)
    errors = [_errors(workload, contenders) for workload, contenders in joined]
    return Joined(
        sources=tuple(names),
        workloads=tuple(workload for workload, _ in joined),
        overall=decide_overall(errors, seed=named_seed(SEED, "bootstrap", "overall")),
    )


def _join(workload: str, tables: Sequence[ConfirmTable]) -> tuple[JoinedWorkload, dict[str, Contender]]:
    known = {table.source: table.identities[workload] for table in tables if table.identities[workload]}
    if len(set(known.values())) > 1:
        first, *others = known
        second = next(source for source in others if known[source] != known[first])
        raise RunError(
            f"{workload}: found other data, model or horizon in {second} than in {first}, allowed: one workload of "
            "that name; compare only what is alike"
        )
    contenders = _labelled(workload, tables)
    ordered = sorted(contenders.values(), key=lambda arm: (_iqm(arm), arm.optimizer))
    objections = tuple(f"{table.source}: {line}" for table in tables for line in table.objections[workload])
    decision, comparisons = decide(
        ordered,
        exploratory=False,
        missing=(),
        failed_checks=objections,
        seed=lambda first, second: named_seed(SEED, "bootstrap", workload, "difference", first, second),
    )
    sources = _sources(workload, tables)
    costs = {
        label: cost
        for label, (table, name) in sources.items()
        if (cost := table.device_s.get(workload, {}).get(name)) is not None
    }
    found = JoinedWorkload(
        workload=workload,
        decision=decision,
        comparisons=comparisons,
        arms=tuple(_arm(contender, sources[contender.optimizer][0].source) for contender in ordered),
        pareto=pareto_front({label: _iqm(contenders[label]) for label in costs}, costs, calibrated=False, alone=False),
        notes=_notes(workload, tables),
    )
    return found, contenders


def _sources(workload: str, tables: Sequence[ConfirmTable]) -> dict[str, tuple[ConfirmTable, str]]:
    """Label of every arm -> its table and its name there."""
    count = Counter(name for table in tables for name in table.contenders[workload])
    return {
        f"{name}@{table.source}" if count[name] > 1 else name: (table, name)
        for table in tables
        for name in table.contenders[workload]
    }


def _labelled(workload: str, tables: Sequence[ConfirmTable]) -> dict[str, Contender]:
    return {
        label: replace(table.contenders[workload][name], optimizer=label)
        for label, (table, name) in _sources(workload, tables).items()
    }


def _notes(workload: str, tables: Sequence[ConfirmTable]) -> tuple[str, ...]:
    notes = []
    if len(tables) > 1 and any(not table.identities[workload] for table in tables):
        names = [table.source for table in tables if not table.identities[workload]]
        notes.append(f"whether {', '.join(names)} has the same data, model and horizon cannot be checked")
    if len({table.seed_roots[workload] for table in tables}) > 1:
        notes.append("seeds are not known to be shared: across sources their pairing is arbitrary, which costs power")
    if len(tables) > 1:
        notes.append("searches of different sources drew their configurations independently")
    return tuple(notes)


def _arm(contender: Contender, source: str) -> JoinedArm:
    values = np.array(list(contender.values.values()), dtype=np.float64)
    return JoinedArm(
        optimizer=contender.optimizer,
        source=source,
        iqm=_iqm(contender),
        interval=seed_interval(values),
        n_seeds=len(values),
    )


def _iqm(contender: Contender) -> float:
    values = np.array(list(contender.values.values()), dtype=np.float64)
    return float(iqm(values)) if len(values) else float("inf")


def _errors(workload: JoinedWorkload, contenders: dict[str, Contender]) -> WorkloadErrors:
    runs = {
        name: np.array(list(contender.values.values()), dtype=np.float64)
        for name, contender in contenders.items()
        if contender.values
    }
    finite = {name: values[np.isfinite(values)] for name, values in runs.items()}
    return WorkloadErrors(
        workload=workload.workload,
        errors={name: float(iqm(values)) for name, values in runs.items()},
        runs=runs,
        deviation={name: float(v.std(ddof=1) / v.mean()) for name, v in finite.items() if len(v) > 1 and v.any()},
        decision=workload.decision,
    )
