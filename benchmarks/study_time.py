"""Wall-clock of one whole study, ASHA and confirm stage included, its report not, by each engine.

The study is run once per engine in a folder of its own, one after the other, with the data made before. Engines differ
in the order in which trials reach their rungs, so the number of training steps may differ too: both the wall-clock and
the trial-steps per second are compared.

    python benchmarks/study_time.py studies/quickstart.yaml [--engines cohort lightning] [--gpus 1] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.whole_study import failures, prepare_data, read_study, run_changed, trial_steps
from tunebench.study.journal import read_trials


@dataclass(frozen=True)
class StudyTime:
    """One run of the study.

    Attributes:
        wall_s: from the start of `tunebench run` to its end.
        trials: that ended. failed: those of them that diverged, crashed or ran out of memory or time.
        trial_steps: training steps of all trials.
    """

    engine: str
    wall_s: float
    trials: int
    failed: int
    trial_steps: int

    @property
    def rate(self) -> float:
        """Trial-steps per second of wall-clock."""
        return self.trial_steps / self.wall_s


def main() -> None:
    """Run the study with each engine and print a table and the ratios to the last engine."""
    arguments = _parser().parse_args()
    prepare_data(arguments.study)
    found = []
    for engine in arguments.engines:
        found.append(timed(arguments, engine))
        print(_row(found[-1]), flush=True)
    last = found[-1]
    ratios = {f"{one.engine}_vs_{last.engine}": last.wall_s / one.wall_s for one in found[:-1]}
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.2f} times as fast")
    if arguments.json:
        arguments.json.write_text(json.dumps({"runs": [asdict(one) for one in found], "ratios": ratios}, indent=2))


def timed(arguments: argparse.Namespace, engine: str) -> StudyTime:
    """Run the study with one engine in a new folder.

    Raises:
        subprocess.CalledProcessError: the run failed; what it printed is on the screen.
    """
    study = read_study(arguments.study) | {"engine": engine}
    if arguments.gpus is not None:
        study["resources"] = study.get("resources", {}) | {"gpus_per_trial": arguments.gpus}
    with tempfile.TemporaryDirectory(prefix="tunebench-study-time-") as folder:
        run = Path(folder) / "run"
        wall_s = run_changed(arguments.study, study, run)
        records = read_trials(run)
    return StudyTime(engine, wall_s, len(records), failures(records), trial_steps(records))


def _row(one: StudyTime) -> str:
    return (
        f"{one.engine:>10}: {one.wall_s:8.1f} s, {one.trials} trials ({one.failed} failed), "
        f"{one.trial_steps} trial-steps, {one.rate:.1f} per second"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--engines", nargs="+", default=["cohort", "lightning"], help="the last is the reference")
    parser.add_argument("--gpus", type=float, help="gpus_per_trial; left out, the study's")
    parser.add_argument("--json", type=Path, help="file for times and ratios")
    return parser


if __name__ == "__main__":
    main()
