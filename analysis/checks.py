"""Does a run directory agree with itself, and was every arm treated alike? A failed check forbids a winner."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from analysis.ledger import arm_ledger, spread
from analysis.load import Run
from analysis.selection import (
    best_candidate,
    chosen_readout,
    confirm_candidates,
    rule_shares,
)
from analysis.step_costs import untimed
from tunebench.study.edges import outer_side
from tunebench.study.objective import objective_value
from tunebench.study.record import CURVES, OOD_PREFIX, Metric, Reason, Split, Stage, TrialRecord

LARGEST_SPREAD = 1.05
"""Rule F2: largest over smallest share of an arm in the tune stage."""


class Status(StrEnum):
    """FAILED: the run contradicts itself, nobody may be called winner. WARNING: the reader must know."""

    PASSED = "passed"
    WARNING = "warning"
    FAILED = "failed"


@dataclass(frozen=True, kw_only=True)
class Check:
    """One statement about a run.

    Attributes:
        workload: the workload it concerns, ``None`` for the whole run.
        findings: one line per violation; empty when passed.
    """

    name: str
    status: Status
    workload: str | None
    findings: tuple[str, ...]

    def forbids_winner(self, workload: str) -> bool:
        """Whether this check failed for a workload, or for the whole run."""
        return self.status is Status.FAILED and self.workload in (None, workload)


def run_checks(run: Run) -> tuple[Check, ...]:
    """Every check of a run, those of the whole run first."""
    whole = (
        ("every file can be read", iter(run.damages)),
        ("the journal holds only arms of the study", _foreign_arms(run)),
        ("every trial is there once", _repeated_trials(run)),
        ("curve files belong to trials of the journal", _foreign_curves(run)),
    )
    checks = [checked(name, Status.FAILED, None, findings) for name, findings in whole]
    checks.append(checked("the study waives no rule of a fair comparison", Status.WARNING, None, _waivers(run)))
    checks.append(checked("steps were timed alone, as the run made them (F9)", Status.WARNING, None, untimed(run)))
    for workload in run.workloads:
        integrity = (
            ("the objective agrees with the errors it is made of", _objective(run, workload)),
            ("curves end where the journal says", _curve_ends(run, workload)),
            ("every trial was measured on the same data", _other_data(run, workload)),
            ("the test split was opened by the confirm stage only", _test_leaks(run, workload)),
            ("finished confirm trials have test errors", _no_test(run, workload)),
            ("arms share seeds (F9)", _unequal_seeds(run, workload)),
            ("every arm's own rule treats the weights it should (F10)", _other_weights(run, workload)),
        )
        protocol = (
            ("confirm trials trained on one kind of device (F9)", _unlike_devices(run, workload)),
            ("arms were given equal tuning budgets (F2)", _unequal_budget(run, workload)),
            ("best learning rates and weight decays are inside their ranges (F5)", _edges(run, workload)),
        )
        checks += [checked(name, Status.FAILED, workload, findings) for name, findings in integrity]
        checks += [checked(name, Status.WARNING, workload, findings) for name, findings in protocol]
    return tuple(checks)


def checked(name: str, severity: Status, workload: str | None, findings: Iterator[str]) -> Check:
    """A check with what it found; `severity` is its status where it found anything."""
    lines = tuple(findings)
    return Check(name=name, status=severity if lines else Status.PASSED, workload=workload, findings=lines)


def _waivers(run: Run) -> Iterator[str]:
    return (f"{rule}: {reason}" for rule, reason in sorted(run.study.waive.items()))


def _foreign_arms(run: Run) -> Iterator[str]:
    arms = {f"{workload}/{optimizer}" for workload in run.workloads for optimizer in run.optimizers}
    for arm in sorted({trial.key.arm for trial in run.trials} - arms):
        yield f"{arm} is not an arm of the study"


def _repeated_trials(run: Run) -> Iterator[str]:
    for trial_id, count in Counter(trial.key.trial_id for trial in run.trials).items():
        if count > 1:
            yield f"{trial_id} stands {count} times in the journal"


def _foreign_curves(run: Run) -> Iterator[str]:
    known = {f"{trial.key.trial_id}.parquet" for trial in run.trials}
    for file in sorted((run.path / CURVES).glob("*.parquet")):
        if file.name not in known:
            yield f"{CURVES}/{file.name} belongs to no trial"
    named = {trial.key.trial_id for trial in run.trials}
    for trial_id in sorted(set(run.curves["trial"].unique()) - named):
        yield f"curves name {trial_id!r}, which is no trial"


def _workload_trials(run: Run, workload: str) -> Iterator[TrialRecord]:
    return (trial for trial in run.trials if trial.key.workload == workload)


def _objective(run: Run, workload: str) -> Iterator[str]:
    for trial in _workload_trials(run, workload):
        readout = chosen_readout(trial, run.study.objective)
        if trial.reason is not Reason.FINISHED:
            continue
        if trial.value is None or readout is None:
            yield f"{trial.key.trial_id} is finished, but has no validation objective"
            continue
        expected = objective_value(trial.result[Split.VAL][readout], run.study.objective)
        if not math.isclose(trial.value, expected, rel_tol=1e-6):
            yield f"{trial.key.trial_id}: journal says {trial.value:.6g}, its validation errors say {expected:.6g}"


def _curve_ends(run: Run, workload: str) -> Iterator[str]:
    """The last validation force error of a curve is the one that the journal holds."""
    curves = run.curves
    last = curves[(curves["split"] == Split.VAL) & (curves["metric"] == Metric.FORCES_MAE)]
    last = last.sort_values("step").drop_duplicates(["trial", "readout"], keep="last")
    ends = dict(zip(zip(last["trial"], last["readout"], strict=True), last["value"].astype(float), strict=True))
    for trial in _workload_trials(run, workload):
        for readout, errors in trial.result.get(Split.VAL, {}).items():
            recorded, drawn = errors.get(Metric.FORCES_MAE), ends.get((trial.key.trial_id, readout))
            if trial.reason is not Reason.FINISHED or recorded is None:
                continue
            if drawn is None:
                yield f"{trial.key.trial_id}: no {readout} validation curve"
            elif not math.isclose(recorded, drawn, rel_tol=1e-5):
                yield f"{trial.key.trial_id}: {readout} curve ends at {drawn:.6g} eV/Å, journal says {recorded:.6g}"


def _other_data(run: Run, workload: str) -> Iterator[str]:
    """Trials whose data are not those of most; among equally many, the data planned first count as right."""
    known = [(trial.key.trial_id, trial.data_hash) for trial in _workload_trials(run, workload) if trial.data_hash]
    for most, count in Counter(data_hash for _, data_hash in known).most_common(1):
        for trial_id, data_hash in known:
            if data_hash != most:
                yield f"{trial_id}: data {data_hash[:12]}, but {count} of {len(known)} have {most[:12]}"


def _test_leaks(run: Run, workload: str) -> Iterator[str]:
    for trial in _workload_trials(run, workload):
        opened = [split for split in trial.result if split == Split.TEST or split.startswith(OOD_PREFIX)]
        if trial.key.stage is Stage.TUNE and opened:
            yield f"{trial.key.trial_id} of the tune stage has errors on {', '.join(sorted(opened))}"


def _no_test(run: Run, workload: str) -> Iterator[str]:
    for trial in _workload_trials(run, workload):
        finished = trial.key.stage is Stage.CONFIRM and trial.reason is Reason.FINISHED
        readout = chosen_readout(trial, run.study.objective)
        if finished and Metric.FORCES_MAE not in trial.result.get(Split.TEST, {}).get(readout or "", {}):
            yield f"{trial.key.trial_id} has no test force error for its readout {readout}"


def _unlike_devices(run: Run, workload: str) -> Iterator[str]:
    confirmed = [t for t in run.trials if t.key.workload == workload and t.key.stage is Stage.CONFIRM and t.device]
    kinds = Counter(trial.device for trial in confirmed)
    if len(kinds) > 1:
        yield ", ".join(f"{count} on {kind}" for kind, count in sorted(kinds.items()))


def _unequal_seeds(run: Run, workload: str) -> Iterator[str]:
    seen: dict[tuple[str, int], dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    for trial in _workload_trials(run, workload):
        if trial.key.stage is Stage.CONFIRM:
            for name, seed in trial.seeds.items():
                seen[name, trial.key.seed_index][trial.key.optimizer].add(seed)
    for (name, index), by_optimizer in sorted(seen.items()):
        if len(set().union(*by_optimizer.values())) > 1:
            yield f"seed {index}: arms differ in {name}"


def _other_weights(run: Run, workload: str) -> Iterator[str]:
    for trial in _workload_trials(run, workload):
        shares = rule_shares(trial)
        if trial.reason is Reason.MISMATCHED:
            yield f"{trial.key.trial_id}: {trial.detail.get('message')}"
        elif shares and shares.get(rule := run.rule_of(trial.key.optimizer), 0.0) <= 0.0:
            yield f"{trial.key.trial_id}: no weight is under {rule}, found {', '.join(sorted(shares))}"


def _unequal_budget(run: Run, workload: str) -> Iterator[str]:
    shares = {name: arm_ledger(run, workload, name, Stage.TUNE) for name in run.rivals}
    cap = run.study.tune.device_seconds_per_arm
    for name in shares:
        paid, wanted = run.planned(workload, name), run.study.trials_of(name)
        if cap is not None and paid < wanted:
            yield f"{cap:.0f} device-seconds paid for {paid} of {wanted} configurations of {name}"
    calibrated = [share.calibrated_s for share in shares.values() if share.calibrated_s is not None]
    seconds = {"calibrated device-seconds": calibrated}
    if len(calibrated) < len(shares):
        seconds = {"device-seconds": [share.device_s for share in shares.values()]}
    trials = {"trials": [float(share.trials) for share in shares.values()]} if cap is None else {}
    for unit, values in {**trials, **seconds}.items():
        ratio = spread(values)
        if ratio is None and any(values):
            yield f"an arm was given no {unit}"
        elif ratio is not None and ratio > LARGEST_SPREAD:
            yield f"largest over smallest share of {unit} in the tune stage is {ratio:.2f}, allowed: {LARGEST_SPREAD}"


def _edges(run: Run, workload: str) -> Iterator[str]:
    for optimizer in run.optimizers:
        best = best_candidate(confirm_candidates(run, workload, optimizer), run.study.objective)
        for name, parameter in run.resolved.spaces[optimizer].parameters.items():
            if best is not None and name in best.params and outer_side(parameter, best.params[name]):
                yield (
                    f"{optimizer}: best {name.replace('_', ' ')} {best.params[name]:.3g} is in the outer tenth of its "
                    "range; maybe unconverged, and `tunebench run --extend` widens the range"
                )
    for optimizer, ranges in run.widened.items():
        for name, (low, high) in ranges.items():
            yield f"{optimizer}: {name.replace('_', ' ')} was widened after the start to {low:g} to {high:g}"
