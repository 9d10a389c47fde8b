"""The configuration that a run recommends, as a complete `nequip-train` config that NequIP accepts."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra.utils import get_class, instantiate
from lightning import Trainer
from nequip.data.datamodule import NequIPDataModule
from nequip.utils.global_state import set_global_state
from omegaconf import OmegaConf

from analysis.arm_result import ArmResult
from analysis.choice import Choice, choose
from analysis.load import Run, load
from analysis.nequip_text import kept_readout, repeated_trial
from analysis.ranking import Ranking, WorkloadRanking, rank
from analysis.selection import chosen_readout, finished_trials
from analysis.wording import milli, milli_interval, params
from tunebench.engine.nequip_config import plain_nequip_config
from tunebench.engine.task import TrialTask, trial_task
from tunebench.study.errors import RunError
from tunebench.study.plan import plan_arms
from tunebench.study.problems import one_of
from tunebench.study.record import Metric, Readout, Split, TrialRecord
from tunebench.workloads.data import prepare
from tunebench.workloads.errors import WorkloadError

_CHECKPOINTS = {
    "_target_": "lightning.pytorch.callbacks.ModelCheckpoint",
    "dirpath": "${hydra:runtime.output_dir}",
    "filename": "last",
    "every_n_epochs": 1,
    # Between epochs NequIP's averaged weights are not in the place where a checkpoint of them can be read back.
    "save_on_train_epoch_end": True,
}


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A config and what it is.

    Attributes:
        choice: workload, arm, configuration, and how well the choice is founded.
        seed_index: of the confirm trial whose initial weights, data order and labels the config repeats.
        text: YAML with a comment on top.
    """

    choice: Choice
    seed_index: int
    text: str


def export(run_folder: Path, workload: str | None = None, arm: str | None = None) -> Exported:
    """Write the config of a run's choice as text, after NequIP has built data, trainer, model and optimizer from it.

    Args:
        run_folder: a run, finished or not.
        workload: name of the workload; left out, the only one.
        arm: ``OPTIMIZER`` or ``WORKLOAD/OPTIMIZER``; left out, what `analysis.choice` recommends.

    Raises:
        RunError: nothing can be exported, in one line that says why.
        StudyError: the run's study is not valid.
    """
    run = load(run_folder)
    workload, optimizer = _asked(run, workload, arm)
    ranking = rank(run)
    of_workload = next(found for found in ranking.workloads if found.workload == workload)
    choice = choose(of_workload, optimizer)
    if choice is None:
        found = f"no confirmed configuration of {optimizer or 'any arm'} that reached the horizon on {workload}"
        raise RunError(f"{run_folder}: found {found}, allowed: an arm with a finished confirm trial")
    trial = repeated_trial(run, choice)
    config = _config(_task(run, choice, trial), kept_readout(run, trial))
    text = f"{_comment(run, ranking, of_workload, choice, trial)}{_yaml(config)}"
    accepted_by_nequip(text, f"{run_folder}: {choice.workload}/{choice.optimizer}")
    return Exported(choice=choice, seed_index=trial.key.seed_index, text=text)


def accepted_by_nequip(text: str, where: str) -> None:
    """Build everything that `nequip-train` builds from a config before its first step.

    Args:
        text: the config.
        where: what it is, for the message.

    Raises:
        RunError: something cannot be built; the message holds NequIP's reason.
    """
    set_global_state()
    config = yaml.safe_load(text)
    config["trainer"]["callbacks"] = []  # their folder is known to Hydra alone, and only while it runs
    config["trainer"] |= {"accelerator": "cpu", "logger": False}
    with _refusals(where, "data"):
        data = instantiate(OmegaConf.create(config["data"]), _recursive_=False)
        assert isinstance(data, NequIPDataModule), f"{type(data).__name__} is no NequIPDataModule"
        data.prepare_data()
        data.setup("fit")
    with _refusals(where, "trainer"), _quiet_lightning():
        assert isinstance(instantiate(config["trainer"], inference_mode=False), Trainer)
    with _refusals(where, "training_module"):
        module = dict(config["training_module"])
        target = get_class(module.pop("_target_"))
        target(num_datasets=data.num_datasets, info_dict=None, **module).configure_optimizers()


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Without Lightning's lines on the devices of this machine, which is not the one that will train."""
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextmanager
def _refusals(where: str, section: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # foreign code of every kind: whatever it raises means that the config is refused
        reason = " ".join(f"{type(error).__name__}: {error.__cause__ or error}".split())
        raise RunError(f"{where}: {section}: found {reason[:400]}, allowed: what NequIP accepts") from error


def _asked(run: Run, workload: str | None, arm: str | None) -> tuple[str, str | None]:
    named, _, optimizer = (arm or "").rpartition("/")
    if named and workload not in (None, named):
        raise RunError(f"--arm: found {arm}, allowed: an arm of {workload}, the workload that --workload names")
    workload = workload or named or (run.workloads[0] if len(run.workloads) == 1 else None)
    if workload not in run.workloads:
        found = "nothing" if workload is None else workload
        raise RunError(f"{run.path}: --workload: found {found}, allowed: {one_of(run.workloads, workload or '')}")
    if optimizer and optimizer not in run.optimizers:
        raise RunError(f"{run.path}: --arm: found {optimizer}, allowed: {one_of(run.optimizers, optimizer)}")
    return workload, optimizer or None


def _task(run: Run, choice: Choice, trial: TrialRecord) -> TrialTask:
    arm = next(arm for arm in plan_arms(run.resolved) if arm.name == trial.key.arm)
    try:
        data = prepare(arm.workload.data, base=run.resolved.file.parent)
    except WorkloadError as error:
        raise RunError(
            f"{run.path}: {choice.workload}: {error.key}: found {error.found}, allowed: {error.allowed}"
        ) from error
    if trial.data_hash not in (None, data.hash):
        raise RunError(
            f"{run.path}: {choice.workload}: found data {data.hash[:12]}, allowed: {str(trial.data_hash)[:12]}, the "
            "data the run was measured on"
        )
    return trial_task(run.resolved, arm, data, trial.key, params=trial.params, seeds=trial.seeds, run=run.path)


def _config(task: TrialTask, readout: Readout) -> dict[str, Any]:
    """The trial's own config, with checkpoints, a progress bar and a test run at the end."""
    every = task.evaluation_steps[0]
    config = plain_nequip_config(task, evaluate_every=every, readout=readout)
    config["run"] = ["train", "test"]
    config["trainer"] |= {"enable_checkpointing": True, "enable_progress_bar": True, "callbacks": [_CHECKPOINTS]}
    return config


def _yaml(config: dict[str, Any]) -> str:
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=100)


def _comment(run: Run, ranking: Ranking, workload: WorkloadRanking, choice: Choice, trial: TrialRecord) -> str:
    arm = next(found for found in workload.arms if found.optimizer == choice.optimizer)
    error = arm.summary(Split.TEST, Metric.FORCES_MAE)
    measured = "" if error is None else f"{milli(error.iqm)} meV/Å, 95 % {milli_interval(error.interval)}, "
    lines = [
        f"{choice.why}.",
        workload.decision.sentence,
        f"Test force MAE: {measured}{arm.n_seeds} seeds, {len(arm.failed_seeds)} failed, {_counted_by(run, choice)}.",
        *_readout_lines(run, arm, trial),
        f"Study {ranking.study} ({ranking.study_hash[:12]}){'' if workload.finished else ', unfinished'}; "
        f"configuration {choice.config_index} of {choice.optimizer}: {params(choice.params) or 'defaults'}.",
        f"Seeds are those of confirm trial {trial.key.trial_id}. Data: {run.path.name}'s prepared files, by their path "
        "on this machine.",
        "Run it in its folder: nequip-train -cp $PWD -cn NAME_OF_THIS_FILE",
    ]
    return "".join(f"# {' '.join(line.split())}\n" for line in lines)


_WEIGHTS = {
    Readout.RAW: "raw weights",
    Readout.EMA: "averaged weights (EMA)",
    Readout.SCHEDULE_FREE: "averaged weights (schedule-free)",
}


def _counted_by(run: Run, choice: Choice) -> str:
    """The weights by which the seeds of a choice count; the study may leave each seed the better ones."""
    own = finished_trials(run, choice.workload, choice.optimizer, choice.config_index)
    found = sorted({Readout(readout) for t in own if (readout := chosen_readout(t, run.study.objective))})
    return "of " + " or ".join(_WEIGHTS[readout] for readout in found) + (", seed by seed" if len(found) > 1 else "")


def _readout_lines(run: Run, arm: ArmResult, trial: TrialRecord) -> list[str]:
    """Which weights the config keeps; for a schedule-free optimizer that may not be those that count."""
    kept = kept_readout(run, trial)
    if chosen_readout(trial, run.study.objective) == kept:
        return [f"This config measures and keeps {_WEIGHTS[kept]}, by which its trial counts."]
    error = arm.summary(Split.TEST, Metric.FORCES_MAE, kept)
    measured = "" if error is None else f"; their test force MAE was {milli(error.iqm)} meV/Å"
    return [
        f"Its trial counts by raw weights, which NequIP cannot keep of a schedule-free optimizer: this config measures "
        f"and keeps {_WEIGHTS[kept]}{measured}."
    ]
