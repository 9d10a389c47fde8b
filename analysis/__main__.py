"""``python -m analysis RUN``: rank a run and write its report."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from analysis.checks import Status
from analysis.load import load
from analysis.ranking import Ranking, rank, to_json
from analysis.report import write_pages
from tunebench.study.errors import RunError
from tunebench.study.record import REPORT
from tunebench.study.spec import StudyError

DONE, CHECK_FAILED, BAD_INPUT = 0, 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Analyse one run; returns 0 when done, 1 when a check failed, 2 on bad input with one line on stderr."""
    options = _parser().parse_args(arguments)
    try:
        run = load(options.run)
        ranking = rank(run)
        report = write_pages(run, ranking, options.out or options.run / REPORT)
    except (RunError, StudyError, OSError) as error:
        print(" ".join(f"analysis: {error}".split()), file=sys.stderr)
        return BAD_INPUT
    if options.json:
        print(json.dumps(to_json(ranking), ensure_ascii=False, allow_nan=False))
    else:
        print(_summary(ranking, report.page))
    return CHECK_FAILED if report.failed_checks else DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m analysis", description="Rank a run's optimizers and write its report.", allow_abbrev=False
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory, finished or not")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the report; left out, RUN/report")
    parser.add_argument("--json", action="store_true", help="print ranking.json instead of a summary")
    return parser


def _summary(ranking: Ranking, page: Path) -> str:
    lines = [f"{ranking.study}: {'finished' if ranking.finished else 'unfinished'}"]
    lines += [f"{workload.workload}: {workload.decision.sentence}" for workload in ranking.workloads]
    lines += [
        f"{check.status}: {check.name}: {finding}"
        for check in ranking.checks
        if check.status is Status.FAILED
        for finding in check.findings[:3]
    ]
    return "\n".join([*lines, f"report: {page}"])


if __name__ == "__main__":
    sys.exit(main())
