"""What a run has done so far, told from its journal, and from what its driver has posted, without touching Ray."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tunebench.study.control import asked
from tunebench.study.errors import RunError
from tunebench.study.false_stops import false_stops
from tunebench.study.journal import read_trials
from tunebench.study.lock import is_held
from tunebench.study.notice import posted
from tunebench.study.record import STUDY, Reason, Stage, TrialRecord

_GOOD = (Reason.FINISHED, Reason.STOPPED_ASHA)


def run_status(run: Path) -> dict[str, Any]:
    """Counts by arm and stage, and whether everything planned has ended.

    ``properties`` is None until the training is over, and for a study that asks for none; then what
    `tunebench.properties.models_of_run.PropertyProgress` says, and whether a ``driver`` is at work.

    Raises:
        FileNotFoundError: the run has no journal.
        StudyError: the run's study was edited.
    """
    trials = read_trials(run)
    arms = list(dict.fromkeys((trial.key.arm, trial.key.stage) for trial in trials))
    stops = {found.arm: found for found in false_stops(trials)}
    trained = training_is_over(trials)
    properties = _properties(run, trials) if trained else None
    return {
        "run": str(run),
        "finished": trained and (properties is None or properties["complete"] == properties["models"]),
        "properties": properties,
        "asked": asked(run).value,
        "notice": posted(run),
        "trials": len(trials),
        "device_s": sum(trial.ledger.get("device_s", 0.0) for trial in trials),
        "arms": [
            _counts([t for t in trials if (t.key.arm, t.key.stage) == (arm, stage)])
            | {"false_stops": stops[arm].to_plain() if stage is Stage.TUNE and stops[arm].sentinels else None}
            for arm, stage in arms
        ],
    }


def training_is_over(trials: Sequence[TrialRecord]) -> bool:
    """Whether all trials have ended and there are, or can be, no further ones."""
    confirmed = any(trial.key.stage is Stage.CONFIRM for trial in trials)
    hopeless = bool(trials) and not any(trial.reason is None or trial.reason in _GOOD for trial in trials)
    return (confirmed or hopeless) and all(trial.reason is not None for trial in trials)


def explain_trial(run: Path, name: str) -> dict[str, Any]:
    """One trial's configuration, rungs and end, with a sentence that says why.

    Raises:
        RunError: no trial, or several, of that name.
    """
    trials = read_trials(run)
    named = [t for t in trials if t.key.trial_id == name] or [t for t in trials if t.key.trial_id.startswith(name)]
    if len(named) != 1:
        some = ", ".join(t.key.trial_id for t in (named or trials)[:4])
        raise RunError(f"{run}: trial {name!r} names {len(named)} trials, allowed: one trial id, such as {some}")
    trial = named[0]
    return {
        "trial": trial.key.trial_id,
        "state": trial.state,
        "reason": trial.reason,
        "detail": trial.detail,
        "params": trial.params,
        "rungs": trial.rungs,
        "decisions": trial.decisions,
        "sentinel": trial.sentinel,
        "objective": trial.value,
        "ledger": trial.ledger,
        "groups": trial.groups,
        "engine": trial.engine,
        "text": "\n".join([*_sentences(trial), *_about_its_arm(trial, trials)]),
    }


def _properties(run: Path, trials: Sequence[TrialRecord]) -> dict[str, Any] | None:
    """How far the properties of a trained run have come."""
    if not (run / STUDY).is_file():
        return None
    from tunebench.study.resolve import load_run  # imports what reads studies

    study = load_run(run).study
    if not study.properties:
        return None
    from tunebench.properties.models_of_run import property_progress  # imports what computes them

    return {**property_progress(study, trials, run).to_plain(), "driver": is_held(run)}


def waits_at_rung(trial: TrialRecord) -> bool:
    """Whether a trial has reached a rung that has not decided about it."""
    decided = {decision["rung"] for decision in trial.decisions}
    return trial.reason is None and not trial.sentinel and bool(trial.rungs) and max(trial.rungs) not in decided


def _counts(trials: list[TrialRecord]) -> dict[str, Any]:
    values = [trial.value for trial in trials if trial.value is not None]  # failed ones have none
    return {
        "arm": trials[0].key.arm,
        "stage": trials[0].key.stage.value,
        "engine": ", ".join(dict.fromkeys(trial.engine for trial in trials if trial.engine)),
        "planned": len(trials),
        "waiting": sum(trial.state == "WAITING" for trial in trials),
        "running": sum(trial.state == "RUNNING" and not waits_at_rung(trial) for trial in trials),
        "at_rung": sum(waits_at_rung(trial) for trial in trials),
        **{reason.value: sum(trial.reason is reason for trial in trials) for reason in Reason},
        "failed": sum(trial.reason is not None and trial.reason not in _GOOD for trial in trials),
        "best_objective": min(values, default=None),
    }


def _sentences(trial: TrialRecord) -> list[str]:
    settings = ", ".join(f"{name} = {_short(value)}" for name, value in trial.params.items())
    lines = [f"{trial.key.trial_id}: {_why(trial)}", f"configuration: {settings}"]
    if trial.sentinel:
        lines.append("sentinel: chosen before the start, never stopped; its rungs say what would have become of it")
    decided = {decision["rung"]: decision for decision in trial.decisions}
    for step, value in sorted(trial.rungs.items()):
        lines.append(f"rung {step}: objective {value:.5g}{_at_rung(decided.get(step))}")
    if trial.groups:
        lines.append(f"update rules: {_rules(trial)}")
    if trial.ledger:
        lines.append(
            f"work: {trial.ledger['steps']:.0f} steps{_lost(trial)}, {trial.ledger['device_s']:.1f} device-seconds, "
            f"{trial.ledger['attempts']:.0f} attempt(s)" + (f", {trial.engine} engine" if trial.engine else "")
        )
    return lines


def _about_its_arm(trial: TrialRecord, trials: list[TrialRecord]) -> list[str]:
    """How far the rungs of a trial's arm can be trusted, where its sentinels tell."""
    found = next((each for each in false_stops(trials) if each.arm == trial.key.arm), None)
    if trial.key.stage is not Stage.TUNE or found is None or not found.sentinels:
        return []
    return [
        f"false stops of its arm: {found.wrongly} of {found.sentinels} sentinels, "
        f"{100 * found.low:.0f} to {100 * found.high:.0f} % with 95 % confidence"
    ]


def _lost(trial: TrialRecord) -> str:
    lost = trial.ledger.get("lost_steps", 0)
    return f" and {lost:.0f} that a kill or a crash took" if lost else ""


def _at_rung(decision: dict[str, Any] | None) -> str:
    if decision is None:
        return ", not decided"
    said = "among the best" if decision["goes_on"] else "not among the best"
    return f", {said} of {decision['competitors']} trials of its arm, cutoff {decision['cutoff']:.5g}"


def _rules(trial: TrialRecord) -> str:
    """Share of the weights by rule, and how the rule reads them."""
    rules: dict[str, tuple[float, list[str]]] = {}
    for group in trial.groups:
        share, views = rules.setdefault(group["rule"], (0.0, []))
        rules[group["rule"]] = share + group["share"], [*views, group.get("view", "vector")]
    words = []
    for rule, (share, views) in rules.items():
        matrices = dict.fromkeys(view for view in views if view != "vector")
        read = f" ({', '.join(matrices)})" if matrices else ""
        words.append(f"{rule} {100 * share:.1f} % of the weights{read}")
    return ", ".join(words)


def _why(trial: TrialRecord) -> str:
    detail = trial.detail
    match trial.reason:
        case None:
            if waits_at_rung(trial):
                return f"has not ended; it waits at rung {max(trial.rungs)} for the other trials of its arm"
            return "has not ended; it waits" if trial.state == "WAITING" else "has not ended; it runs"
        case Reason.FINISHED:
            objective = "an objective that is not finite" if trial.value is None else f"objective {trial.value:.5g}"
            return f"finished its horizon with {objective}"
        case Reason.STOPPED_ASHA if not {"rung", "cutoff", "value", "recorded"} <= detail.keys():
            return "stopped at a rung that the journal does not name"
        case Reason.STOPPED_ASHA:
            if not math.isfinite(detail["value"]):
                return f"stopped at rung {detail['rung']}: its objective {detail['value']} is not finite"
            return (
                f"stopped at rung {detail['rung']}: objective {detail['value']:.5g} is above the cutoff "
                f"{detail['cutoff']:.5g} of the {detail['recorded']} trials of its arm seen there"
            )
        case reason:
            return f"ended as {reason}: {detail.get('message', 'no message')}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
