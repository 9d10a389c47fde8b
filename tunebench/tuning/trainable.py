"""One Tune trial of the `lightning` engine, in its own process.

Actors are reused: a process imports NequIP once and then trains trial after trial; whatever a trial depends on is set
from its task, and the engine leaves no state that the next trial would see.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

import ray
from ray import tune

from tunebench.engine.watchdog import Watchdog
from tunebench.tuning.devices import kind_of_node
from tunebench.tuning.node_checks import alive_nodes
from tunebench.tuning.node_copy import task_here
from tunebench.tuning.tenancy import DEVICE, for_tune
from tunebench.tuning.trial_log import log_to, stall_file, trial_log

if TYPE_CHECKING:
    from tunebench.engine.task import Evaluation, TrialTask


def train_trial(config: Mapping[str, Any], tasks: Mapping[str, TrialTask]) -> None:
    """Tune's function trainable; `config["trial"]` names the trial.

    Args:
        config: Tune's configuration.
        tasks: trials of the `lightning` engine.
    """
    task = tasks[config["trial"]]
    _train_alone(task, _kind_here(task.device))


def _train_alone(task: TrialTask, kind: str) -> None:
    from tunebench.engine.book import REPEATABLE, crashed  # imports torch and NequIP in the trial's process only
    from tunebench.engine.lightning import run_trial
    from tunebench.engine.trial_files import TrialFiles

    name, task = task.key.trial_id, task_here(task)
    files = TrialFiles(task.storage, task.run, name)
    files.fetch()
    with Watchdog(task.stalled_after_s, stall_file(task.run, name)) as watchdog:

        def report(evaluation: Evaluation) -> None:
            watchdog.rest()  # the driver may take its time
            _report(evaluation, kind)
            watchdog.beat()

        watchdog.prepare()
        try:
            with log_to(trial_log(task.run, name)):
                run_trial(task, report, watchdog.beat)
        except REPEATABLE as error:  # reported, not raised: Tune would start the trial again
            report(crashed(task, error))
        finally:
            files.forget()


def _report(evaluation: Evaluation, kind: str) -> None:
    """Report to Tune, which raises SystemExit here where the scheduler stops the trial."""
    tune.report({**for_tune(evaluation.to_plain()), DEVICE: kind})


@cache
def _kind_here(device: str) -> str:
    """Kind of this node's devices."""
    own = ray.get_runtime_context().get_node_id()
    return next(kind_of_node(node["Resources"], device) for node in alive_nodes() if node["NodeID"] == own)
