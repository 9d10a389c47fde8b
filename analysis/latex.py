"""The report's tables for a paper: LaTeX with booktabs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from analysis.arm_result import ArmResult
from analysis.comparison import Comparison
from analysis.ranking import Ranking, WorkloadRanking
from analysis.statistics import Interval
from analysis.wording import NO_INTERVAL, milli, milli_interval, number
from tunebench.study.record import Metric, Split

_ESCAPES = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "%": r"\%",
    "_": r"\_",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "\N{MINUS SIGN}": "$-$",
    "\N{EN DASH}": "--",
    "Å": r"\AA{}",
    "∞": r"$\infty$",
    "<": "$<$",
    ">": "$>$",
}


def write_latex(ranking: Ranking, folder: Path) -> None:
    """Write arms-WORKLOAD.tex and comparisons-WORKLOAD.tex for every workload, and overall.tex where it has rows.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for workload in ranking.workloads:
        (folder / f"arms-{workload.workload}.tex").write_text(_arms(workload), encoding="utf-8")
        if workload.comparisons:
            (folder / f"comparisons-{workload.workload}.tex").write_text(_comparisons(workload), encoding="utf-8")
    if ranking.overall.comparisons:
        (folder / "overall.tex").write_text(_overall(ranking), encoding="utf-8")


def escaped(text: str) -> str:
    """Text that LaTeX typesets as it is, in one line."""
    return "".join(_ESCAPES.get(character, character) for character in " ".join(text.split()))


def tabular(columns: Sequence[str], alignment: str, rows: Iterable[Sequence[str]], caption: str) -> str:
    """A `table` with booktabs rules.

    Args:
        columns: plain text.
        alignment: one letter per column.
        rows: cells of plain text.
        caption: plain text.
    """
    lines = [r"\begin{table}", r"\centering", rf"\caption{{{escaped(caption)}}}", rf"\begin{{tabular}}{{{alignment}}}"]
    lines += [r"\toprule", _row(columns), r"\midrule", *map(_row, rows), r"\bottomrule"]
    return "\n".join(["% needs \\usepackage{booktabs}", *lines, r"\end{tabular}", r"\end{table}"]) + "\n"


def _row(cells: Sequence[str]) -> str:
    return " & ".join(map(escaped, cells)) + r" \\"


def _arms(workload: WorkloadRanking) -> str:
    splits = list(dict.fromkeys(s.split for arm in workload.arms for s in arm.errors)) or [Split.TEST.value]
    columns = (
        "rank",
        "optimizer",
        *(cell for split in splits for cell in (f"{split}, meV/Å", "95 %")),
        "seeds",
        "failed",
    )
    return tabular(
        columns,
        "rl" + "rr" * len(splits) + "rr",
        (_arm_row(arm, splits) for arm in workload.arms),
        f"Force MAE on {workload.workload}: interquartile mean over seeds of each arm's best configuration with its "
        f"studentized interval. {workload.decision.sentence}",
    )


def _arm_row(arm: ArmResult, splits: Sequence[str]) -> list[str]:
    cells = [number(arm.rank), arm.optimizer]
    for split in splits:
        found = arm.summary(split, Metric.FORCES_MAE)
        cells += ["–", "–"] if found is None else [milli(found.iqm), milli_interval(found.interval)]  # noqa: RUF001
    return [*cells, str(arm.n_seeds), str(len(arm.failed_seeds))]


def _comparisons(workload: WorkloadRanking) -> str:
    return tabular(
        ("against", "pairs", "difference, meV/Å", "95 %, seeds and search", "95 %, seeds", "p"),
        "lrrrrr",
        map(_comparison_row, workload.comparisons),
        f"{workload.comparisons[0].first} minus every other arm on {workload.workload}, test force MAE over paired "
        "seeds; negative is better.",
    )


def _comparison_row(comparison: Comparison) -> tuple[str, ...]:
    return (
        comparison.second,
        str(comparison.n_pairs),
        milli(comparison.difference),
        milli_interval(comparison.interval),
        milli_interval(comparison.seeds_interval),
        number(comparison.p, 2),
    )


def _overall(ranking: Ranking) -> str:
    overall = ranking.overall
    return tabular(
        ("against", "error ratio", "95 %", "Wilcoxon-Holm p", "P(better)", "P(alike)", "P(worse)"),
        "lrrrrrr",
        (
            (
                one.second,
                number(one.ratio, 3),
                _plain(one.interval),
                number(one.holm_p, 2),
                *(number(share, 2) for share in (one.bayes.first_better, one.bayes.alike, one.bayes.second_better)),
            )
            for one in overall.comparisons
        ),
        f"{overall.comparisons[0].first} over {overall.n_workloads} workloads: geometric mean of the ratio of test "
        f"force MAEs, below 1 is better. {overall.sentence}",
    )


def _plain(interval: Interval | None) -> str:
    return NO_INTERVAL if interval is None else f"[{number(interval.low, 3)}, {number(interval.high, 3)}]"
