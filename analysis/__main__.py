"""``python -m analysis RUN``: rank a run and write its report; its other verbs are compare, watch and algoperf."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from analysis.algoperf import Submission, score_folder
from analysis.checks import Status
from analysis.compare import Joined, JoinedArm, compare_sources
from analysis.json_form import to_json
from analysis.load import load
from analysis.ranking import Ranking, rank
from analysis.report import write_pages
from analysis.watch import EVERY_S, watch
from analysis.wording import milli, milli_interval
from tunebench.study.errors import RunError
from tunebench.study.record import REPORT
from tunebench.study.spec import StudyError

DONE, CHECK_FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Analyse one run, or do what a verb says; returns 0 when done, 1 when a check failed, 2 on bad input.

    Bad input is one line on stderr.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if given and given[0] in _VERBS:
            return _VERBS[given[0]](given[1:])
        return _report(given)
    except (RunError, StudyError, OSError) as error:
        print(" ".join(f"analysis: {error}".split()), file=sys.stderr)
        return BAD_INPUT


def _report(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(arguments)
    run = load(options.run)
    ranking = rank(run)
    report = write_pages(run, ranking, options.out or options.run / REPORT)
    if options.json:
        print(json.dumps(to_json(ranking), ensure_ascii=False, allow_nan=False))
    else:
        print(_summary(ranking, report.page))
    return CHECK_FAILED if report.failed_checks else DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m analysis",
        description="Rank a run's optimizers and write its report.",
        epilog="other verbs: `python -m analysis compare RUN RUN ...` joins runs and tables; `python -m analysis "
        "watch RUN` writes the report anew while a run goes on; `python -m analysis algoperf DIR` scores evaluation "
        "logs of AlgoPerf. A run directory of such a name is written ./compare.",
        allow_abbrev=False,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory, finished or not")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the report; left out, RUN/report")
    parser.add_argument("--json", action="store_true", help="print ranking.json instead of a summary")
    return parser


def _summary(ranking: Ranking, page: Path) -> str:
    lines = [f"{ranking.study}: {'finished' if ranking.finished else 'unfinished'}"]
    lines += [f"{workload.workload}: {workload.decision.sentence}" for workload in ranking.workloads]
    if len(ranking.workloads) > 1:
        lines.append(f"overall: {ranking.overall.sentence}")
    lines += [
        f"{check.status}: {check.name}: {finding}"
        for check in ranking.checks
        if check.status is Status.FAILED
        for finding in check.findings[:3]
    ]
    return "\n".join([*lines, f"report: {page}"])


def _algoperf(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m analysis algoperf",
        description="Score evaluation logs by the rules of AlgoPerf's external tuning.",
        allow_abbrev=False,
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder with evals.parquet and targets.json")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(arguments)
    found = score_folder(options.folder)
    print(json.dumps(to_json(found), allow_nan=False) if options.json else _score_lines(found))
    return DONE


def _score_lines(found: Sequence[Submission]) -> str:
    width = max((len(one.submission) for one in found), default=0)
    return "\n".join(
        f"{one.submission:<{width}}  {one.score:.4f}  "
        f"{sum(math.isfinite(seconds) for seconds in one.seconds.values())} of {len(one.seconds)} targets reached"
        for one in found
    )


def _compare(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m analysis compare",
        description="Join runs and tables of results from elsewhere, workload by workload.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "sources",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="run directory, or a .csv or .parquet file of confirm results",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of sentences")
    options = parser.parse_args(arguments)
    joined = compare_sources(options.sources)
    print(json.dumps(to_json(joined), ensure_ascii=False, allow_nan=False) if options.json else _joined_lines(joined))
    return DONE


def _joined_lines(joined: Joined) -> str:
    lines = []
    for workload in joined.workloads:
        lines.append(f"{workload.workload}: {workload.decision.sentence}")
        lines += [f"  {_arm_words(arm)}" for arm in workload.arms]
        lines += [f"  note: {note}" for note in workload.notes]
        lines += [f"  {advice}" for advice in workload.decision.resolve]
    return "\n".join([*lines, f"overall: {joined.overall.sentence}"])


def _arm_words(arm: JoinedArm) -> str:
    return f"{arm.optimizer} ({arm.source}) {milli(arm.iqm)} {milli_interval(arm.interval)} meV/Å, {arm.n_seeds} seeds"


def _watch(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m analysis watch",
        description="Write a run's report anew whenever its journal has grown, until it is finished or Ctrl-C is hit.",
        allow_abbrev=False,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the report; left out, RUN/report")
    parser.add_argument("--every", type=_seconds, default=EVERY_S, metavar="SECONDS", help=f"left out, {EVERY_S}")
    options = parser.parse_args(arguments)
    try:
        for ranking, page in watch(options.run, options.out, options.every):
            print(_summary(ranking, page), flush=True)
    except KeyboardInterrupt:
        return INTERRUPTED
    return DONE


def _seconds(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, allowed: a whole number of seconds from 1 on")
    return int(text)


_VERBS: dict[str, Callable[[Sequence[str]], int]] = {"algoperf": _algoperf, "compare": _compare, "watch": _watch}


if __name__ == "__main__":
    sys.exit(main())
