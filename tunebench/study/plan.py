"""What a study will do, before it does it: arms, rungs, trials, evaluation steps."""

from __future__ import annotations

from dataclasses import dataclass

from tunebench.study.record import Readout, Stage, TrialKey
from tunebench.study.resolve import ResolvedStudy
from tunebench.study.search_space import SearchSpace
from tunebench.study.seeds import named_seed
from tunebench.study.sentinels import sentinel_count
from tunebench.study.spec import Asha, AshaForm, Fidelity, Schedule, Tune, Workload

_EVALUATIONS = 20  # per horizon, where the study does not say


@dataclass(frozen=True, kw_only=True)
class ArmPlan:
    """One arm: a workload and an optimizer with its search space, schedule and rungs.

    Attributes:
        optimizer: name of the optimizer's entry in the study. rule: the optimizer itself, which may have two entries.
        trials: configurations of the tune stage.
        rungs: steps at which ASHA compares the arm's trials. evaluation_steps: steps with validation errors.
        fidelity: TRUNCATE or RESCALE, what trials have done at a rung.
        averaged: the averaged readout, EMA or SCHEDULE_FREE.
    """

    workload: Workload
    optimizer: str
    rule: str
    trials: int
    space: SearchSpace
    schedule: Schedule
    averaged: Readout
    rungs: tuple[int, ...]
    fidelity: Fidelity
    evaluation_steps: tuple[int, ...]

    @property
    def horizons(self) -> tuple[int, ...]:
        """Lengths of the schedules that a trial of the tune stage may train through, the workload's horizon last."""
        shorter = self.rungs if self.fidelity is Fidelity.RESCALE else ()
        return (*shorter, self.workload.max_steps)

    @property
    def name(self) -> str:
        """``WORKLOAD/OPTIMIZER``."""
        return f"{self.workload.name}/{self.optimizer}"

    def key(self, stage: Stage, config_index: int, seed_index: int) -> TrialKey:
        """Key of one of the arm's trials."""
        return TrialKey(
            workload=self.workload.name,
            optimizer=self.optimizer,
            stage=stage,
            config_index=config_index,
            seed_index=seed_index,
        )


def plan_arms(resolved: ResolvedStudy) -> list[ArmPlan]:
    """All arms, workload by workload in the order of the study file."""
    return [
        ArmPlan(
            workload=workload,
            optimizer=arm.name,
            rule=arm.rule,
            trials=resolved.study.trials_of(arm.name),
            space=resolved.spaces[arm.name],
            schedule=resolved.schedules[arm.name],
            averaged=Readout(resolved.spaces[arm.name].readout),
            rungs=(rungs := rung_steps(resolved.study.tune.asha, workload.max_steps)),
            fidelity=(resolved.study.tune.asha or Asha()).fidelity.under(resolved.schedules[arm.name]),
            evaluation_steps=evaluation_steps(workload, rungs),
        )
        for workload in resolved.study.workloads
        for arm in resolved.study.optimizers
    ]


def rung_steps(asha: Asha | None, horizon: int) -> tuple[int, ...]:
    """Steps below the horizon at which trials of an arm are compared: grace, grace x factor, grace x factor² ..."""
    if asha is None:
        return ()
    steps = []
    step = asha.grace_steps or max(horizon // 4, 1)
    while step < horizon:
        steps.append(step)
        step *= asha.reduction_factor
    return tuple(steps)


def evaluation_steps(workload: Workload, rungs: tuple[int, ...]) -> tuple[int, ...]:
    """Ascending steps with validation errors: a regular grid, every rung, the horizon."""
    every = workload.evaluate_every_steps or max(workload.max_steps // _EVALUATIONS, 1)
    return tuple(sorted({*range(every, workload.max_steps + 1, every), *rungs, workload.max_steps}))


def survivors(tune: Tune, rungs: tuple[int, ...], fewest: int = 1) -> list[int]:
    """Trials of an arm expected to train beyond each rung, rounded: those that go on, and sentinels.

    In the promotion form one in `reduction_factor` goes on, at least `fewest`; in asynchronous order a few more, who
    were among the best when they came, which is left out here. In the stopping form the i-th trial to arrive goes on if
    it is among the best max(i // reduction factor, 1) of the i seen so far, so early arrivals are judged mildly.
    """
    if tune.asha is None:
        return [tune.trials_per_arm for _ in rungs]
    factor, trials = tune.asha.reduction_factor, tune.trials_per_arm
    sentinels = sentinel_count(tune.asha, trials)
    counts, competing = [], trials
    for _ in rungs:
        if tune.asha.form is AshaForm.PROMOTION:
            competing = promoted(tune.asha, competing, fewest)
        else:
            competing = round(sum(max(seen // factor, 1) / seen for seen in range(1, competing + 1)))
        counts.append(round(competing + sentinels * (1.0 - competing / trials)))
    return counts


def promoted(asha: Asha, competing: int, fewest: int) -> int:
    """Trials that a rung of the promotion form lets go on, of so many that compete there."""
    return min(max(competing // asha.reduction_factor, fewest), competing)


def trial_seeds(root: int, workload: str, stage: Stage, seed_index: int) -> dict[str, int]:
    """Named seeds of a trial. The optimizer has no part in them: arms are paired by seed index."""
    return {name: named_seed(root, name, workload, stage.value, seed_index) for name in ("init", "order", "labels")}


def tune_steps(
    tune: Tune, rungs: tuple[int, ...], horizon: int, fewest: int = 1, fidelity: Fidelity = Fidelity.TRUNCATE
) -> int:
    """Steps expected of an arm's tune stage, without failures; `fewest` as in `survivors`."""
    alive = [tune.trials_per_arm, *survivors(tune, rungs, fewest)]
    return sum(count * leg for count, leg in zip(alive, legs(rungs, horizon, fidelity), strict=True))


def legs(rungs: tuple[int, ...], horizon: int, fidelity: Fidelity) -> list[int]:
    """Steps that a trial pays for to reach each rung from the one before, and at last the horizon."""
    ends = [*rungs, horizon]
    starts = [0, *rungs] if fidelity is Fidelity.TRUNCATE else [0] * len(ends)
    return [end - start for start, end in zip(starts, ends, strict=True)]
