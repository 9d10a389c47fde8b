"""Are the verdicts right? Simulated studies with a known truth, judged by `analysis` and in the usual ways.

    python benchmarks/verdict_calibration.py --studies 1000 --out docs/verdict_calibration.json --figure docs/figures

A simulated study has two arms (or four), 16 configurations per arm that both arms share, an optional early stop, three
confirmed configurations and 3 to 10 paired seeds. Errors are in units of the seed standard deviation. An arm's error is
a quadratic bowl over the unit cube with an optimum of its own, so that the arms differ by the luck of the search even
where none is better: its standard deviation is about 0.25 seed deviations per arm. The same arithmetic as in
`analysis.comparison` is applied to all studies at once; `tests/benchmarks/test_verdict_calibration.py` holds it against
`analysis.verdict.decide`, study by study.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

import numpy as np
from scipy import stats
from scipy.stats import qmc

from analysis.comparison import EQUIVALENCE
from analysis.overall import WorkloadErrors, decide_overall
from analysis.reselection import SEARCH_DEGREES, joint_places, luck_of_search
from analysis.seed_intervals import bounded_differences, bounds, ends, estimate, widened
from analysis.statistics import Floats, Indices, iqm, paired_differences
from analysis.verdict import MINIMUM_SEEDS, Decision, Verdict
from tunebench.study.power import paired_power

CONFIGURATIONS, DIMENSIONS, TOP_K = 16, 3, 3
LEVEL_ERROR = 20.0
"""Error of a well-tuned arm in seed standard deviations: a seed changes it by 5 %."""
BOWL = 12.0
WEIGHTS = np.array([1.0, 0.3, 0.1], dtype=np.float64)
SHARED = 0.5
"""Share of the seed variance that paired arms have in common."""
FAILURES = 0.05
"""Probability that a confirm seed diverges, where arms diverge."""
SCATTER = 2.0
"""Standard deviation over workloads of the difference, in seed deviations, where workloads disagree."""
BAYES_DRAWS = 1000
DIFFERENCES = {"tie": 0.0, "small": 0.5, "medium": 1.0, "large": 2.0}
SEEDS = (3, 5, 8, 10)
WORKLOADS = (2, 4, 8)


Ends = tuple[Floats, Floats]


class Noise(StrEnum):
    """NORMAL errors; HEAVY tails (Student's t with 3 degrees of freedom, unit variance); arms that DIVERGE at seeds."""

    NORMAL = "normal"
    HEAVY = "heavy"
    DIVERGING = "diverging"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One truth.

    Attributes:
        difference: how much lower the first arm's error is, in seed deviations; 0 is a tie.
        stopped: searches are stopped early by ASHA at a quarter of the horizon, one in three goes on.
        scatter: standard deviation of the difference over workloads; the mean stays `difference`.
    """

    difference: float
    noise: Noise
    stopped: bool
    seeds: int
    arms: int = 2
    scatter: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Studies:
    """Confirm stages of simulated workloads.

    Attributes:
        orders: configurations in the order of selection, shape (workloads, arms, configurations).
        errors: test errors of the confirmed ones in that order, shape (workloads, arms, TOP_K, seeds).
        best_tuned: best objective of each arm's search, shape (workloads, arms).
        found: true error of each arm's selected configuration, shape (workloads, arms).
        truth: true expected error of each arm over searches, up to a common constant, shape (workloads, arms).
    """

    orders: Indices
    errors: Floats
    best_tuned: Floats
    found: Floats
    truth: Floats


@dataclass(frozen=True, kw_only=True)
class Judged:
    """Verdicts of simulated workloads, arrays of shape (workloads,); -1 where there is no winner.

    Attributes:
        winner: by the rules of `analysis.verdict`.
        tie: whether a tie is claimed.
        covered: 95 % interval of first minus second arm holds the truth. covered_found: its part over seeds alone holds
            the difference of the configurations that were found. covered_percentile: the plain percentile bootstrap of
            seeds, on the same.
    """

    winner: Indices
    tie: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]
    covered: float
    covered_found: float
    covered_percentile: float


def simulate(cell: Cell, workloads: int, generator: np.random.Generator) -> Studies:
    """Simulate the search and the confirm stage of a number of workloads."""
    sobol = [qmc.Sobol(DIMENSIONS, rng=generator).random(CONFIGURATIONS) for _ in range(min(workloads, 256))]
    points = np.stack(sobol)[generator.integers(0, len(sobol), workloads)]
    optima = 0.5 + generator.uniform(-0.35, 0.35, size=(workloads, cell.arms, 1, DIMENSIONS))
    surface = BOWL * (WEIGHTS * np.square(points[:, None] - optima)).sum(axis=-1)
    shift = np.zeros((workloads, cell.arms), dtype=np.float64)
    shift[:, 0] = -cell.difference + cell.scatter * generator.normal(size=workloads)
    surface = LEVEL_ERROR + surface + shift[..., None]
    tuned = surface + generator.normal(size=surface.shape)
    preference = np.argsort(_stopped(tuned, surface, generator) if cell.stopped else tuned, axis=-1)
    top = preference[..., :TOP_K]
    true = np.take_along_axis(surface, top, axis=-1)
    errors = true[..., None] + _noise(cell, workloads, generator)
    selection = np.where(np.isinf(errors), np.inf, errors + 0.3 * generator.normal(size=errors.shape))
    place = _selection_order(selection)
    rest = preference[..., TOP_K:]
    return Studies(
        orders=np.concatenate([np.take_along_axis(top, place, axis=-1), rest], axis=-1),
        errors=np.take_along_axis(errors, place[..., None], axis=2),
        best_tuned=np.take_along_axis(tuned, top, axis=-1).min(axis=-1),
        found=np.take_along_axis(true, place[..., :1], axis=-1)[..., 0],
        truth=shift,
    )


def judge(studies: Studies, generator: np.random.Generator, *, minimum_seeds: int = MINIMUM_SEEDS) -> Judged:
    """Apply the rules of `analysis` to all workloads at once."""
    leading = iqm(studies.errors[:, :, 0])
    order = np.argsort(leading, axis=1, kind="stable")
    rows, seeds = np.arange(len(order)), studies.errors.shape[-1]
    beaten, alike = [], []
    for place in range(1, order.shape[1]):
        _, claim, (low, high) = _intervals(studies, rows, order[:, 0], order[:, place])
        rope = _rope(studies, rows, order[:, 0], order[:, place])
        beaten.append(claim[1] < 0.0)
        alike.append((-rope < low) & (high < rope))
    enough = seeds >= minimum_seeds
    wins = np.all(beaten, axis=0) & enough
    ties = np.all(np.array(beaten) | np.array(alike), axis=0) & ~wins & enough
    zero, one = np.zeros_like(rows), np.ones_like(rows)
    own, claim, _ = _intervals(studies, rows, zero, one)
    truth, found = (values[:, 0] - values[:, 1] for values in (studies.truth, studies.found))
    finite = np.isfinite(studies.errors[:, :2, 0]).all(axis=(1, 2))
    percentile = _percentile(studies.errors[finite, 0, 0] - studies.errors[finite, 1, 0], generator)
    return Judged(
        winner=np.where(wins, order[:, 0], -1),
        tie=ties,
        covered=_coverage(claim, truth),
        covered_found=_coverage(own, found),
        covered_percentile=_coverage(percentile, found[finite]),
    )


def usual_winners(studies: Studies) -> dict[str, Indices]:
    """What the usual ways call the winner of each workload; -1 where they name none."""
    finite = np.where(np.isfinite(studies.errors[:, :, 0]), studies.errors[:, :, 0], np.nan)
    p = stats.ttest_ind(finite[:, 0], finite[:, 1], axis=-1, equal_var=False, nan_policy="omit").pvalue
    better = np.nanmean(finite, axis=-1)[:, :2].argmin(axis=1)
    return {"best single trial": studies.best_tuned.argmin(axis=1), "Welch on seeds": np.where(p < 0.05, better, -1)}


def pooled_welch(studies: Studies, workloads: int) -> Indices:
    """Winner by Welch's t with the seeds of all workloads as data sets, by study; -1 where it names none."""
    errors = studies.errors[:, :2, 0].reshape(-1, workloads, 2, studies.errors.shape[-1])
    errors = np.where(np.isfinite(errors), errors, np.nan)
    scaled = errors / np.nanmean(errors, axis=(2, 3), keepdims=True)
    first, second = (scaled[:, :, arm].reshape(len(scaled), -1) for arm in (0, 1))
    p = stats.ttest_ind(first, second, axis=-1, equal_var=False, nan_policy="omit").pvalue
    return np.where(p < 0.05, (np.nanmean(first, axis=1) > np.nanmean(second, axis=1)).astype(np.intp), -1)


def overall_winners(studies: Studies, judged: Judged, workloads: int, seed: int) -> tuple[Indices, Indices]:
    """Winner and tie (1 or 0) of `analysis.overall` for every study of so many workloads; -1 for no winner."""
    names = [f"arm{arm}" for arm in range(studies.errors.shape[1])]
    winners, ties = [], []
    for start in range(0, len(judged.winner), workloads):
        parts = [_workload_errors(studies, judged, row, names) for row in range(start, start + workloads)]
        found = decide_overall(parts, seed=seed, draws=BAYES_DRAWS)
        winners.append(names.index(found.winner) if found.winner else -1)
        ties.append(int(found.verdict is Verdict.TIE))
    return np.array(winners, dtype=np.intp), np.array(ties, dtype=np.intp)


def cell_report(cell: Cell, studies: int, seed: int, *, overall: bool) -> dict[str, object]:
    """Rates of right and wrong claims in one cell, each over `studies` times 8 workloads, and over whole studies."""
    generator = np.random.default_rng([seed, *map(ord, repr(cell))])
    simulated = simulate(cell, studies * WORKLOADS[-1], generator)
    judged = judge(simulated, generator)
    report: dict[str, object] = {
        **asdict(cell),
        "workloads": len(judged.winner),
        "search_deviation": float((simulated.found - simulated.truth)[:, 0].std()),
        "winner_right": _rates(judged.winner, simulated.truth)[0],
        "winner_wrong": _rates(judged.winner, simulated.truth)[1],
        "tie_claimed": float(judged.tie.mean()),
        "coverage": judged.covered,
        "coverage_found": judged.covered_found,
        "coverage_percentile": judged.covered_percentile,
        "power_limit": _limit(cell),
        "power_limit_search": _limit_with_search(cell, simulated),
    }
    for name, winner in usual_winners(simulated).items():
        report[f"{name}: right"], report[f"{name}: wrong"] = _rates(winner, simulated.truth)
    if overall:
        report["overall"] = [_overall_row(simulated, judged, cell, count, studies, seed) for count in WORKLOADS]
    return report


def cells() -> Iterator[tuple[Cell, bool]]:
    """Every cell, and whether whole studies are judged in it too."""
    for difference in DIFFERENCES.values():
        for noise in Noise:
            for stopped in (False, True):
                for seeds in SEEDS:
                    yield Cell(difference=difference, noise=noise, stopped=stopped, seeds=seeds), seeds == MINIMUM_SEEDS
    for noise in Noise:
        yield Cell(difference=0.0, noise=noise, stopped=False, seeds=5, arms=4), False
        yield Cell(difference=0.0, noise=noise, stopped=False, seeds=5, scatter=SCATTER), True


def table(reports: list[dict[str, object]]) -> str:
    """The cells as Markdown."""
    columns = {
        "difference": "difference",
        "noise": "noise",
        "ASHA": "stopped",
        "arms": "arms",
        "seeds": "seeds",
        "right winner": "winner_right",
        "limit": "power_limit",
        "limit with search": "power_limit_search",
        "wrong winner": "winner_wrong",
        "tie": "tie_claimed",
        "coverage": "coverage",
        "seeds alone": "coverage_found",
        "percentile": "coverage_percentile",
        "best trial: wrong": "best single trial: wrong",
        "Welch: wrong": "Welch on seeds: wrong",
    }
    lines = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    rows = ([_word(report[name]) for name in columns.values()] for report in reports if not report["scatter"])
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def overall_table(reports: list[dict[str, object]]) -> str:
    """Whole studies as Markdown."""
    columns = ("difference", "scatter", "noise", "ASHA", "workloads", "right winner", "wrong winner", "tie")
    lines = [f"| {' | '.join([*columns, 'Welch on seeds: wrong'])} |", f"|{' --- |' * 9}"]
    for report in reports:
        start = [_word(report[name]) for name in ("difference", "scatter", "noise", "stopped")]
        rows = report.get("overall", [])
        assert isinstance(rows, list)
        lines += [f"| {' | '.join([*start, *map(_word, row.values())])} |" for row in rows]
    return "\n".join(lines)


def figure(reports: list[dict[str, object]], file: Path) -> None:
    """Draw false claims under a tie and power against its limit, by number of seeds."""
    from matplotlib.figure import Figure

    from analysis.figure_style import figure_style

    with figure_style():
        drawn = Figure(figsize=(7.0, 2.9), layout="constrained")
        left, right = drawn.subplots(1, 2)
        usual = [r for r in reports if r["noise"] == Noise.NORMAL and not r["stopped"]]
        plain = [r for r in usual if r["arms"] == 2 and not r["scatter"]]
        tie = [r for r in plain if r["difference"] == 0.0]
        seeds = [r["seeds"] for r in tie]
        for name, label in (
            ("best single trial: wrong", "best single trial"),
            ("Welch on seeds: wrong", "Welch on seeds"),
            ("winner_wrong", "tunebench"),
        ):
            left.plot(seeds, [r[name] for r in tie], "o-", label=label)
        left.axhline(0.05, color="black", linewidth=0.8, linestyle=":")
        left.set_ylim(-0.03, 1.08)
        left.set_xlabel("seeds")
        left.set_ylabel("winner claimed in a tie")
        left.legend()
        for name, difference in list(DIFFERENCES.items())[1:]:
            rows = [r for r in plain if r["difference"] == difference]
            (line,) = right.plot(seeds, [r["winner_right"] for r in rows], "o-", label=name)
            right.plot(seeds, [r["power_limit"] for r in rows], ":", color=line.get_color())
            right.plot(seeds, [r["power_limit_search"] for r in rows], "--", color=line.get_color())
        right.set_xlabel("seeds")
        right.set_ylabel("right winner claimed")
        right.legend()
        file.parent.mkdir(parents=True, exist_ok=True)
        drawn.savefig(file, dpi=200)


def main(arguments: list[str] | None = None) -> int:
    """Simulate all cells; print both tables, write JSON and figure where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=1000, help="studies per cell, of 8 workloads each")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON file of all rates")
    parser.add_argument("--figure", type=Path, metavar="FOLDER", help="write verdict-calibration.png here")
    options = parser.parse_args(arguments)
    reports = []
    for cell, overall in cells():
        reports.append(cell_report(cell, options.studies, options.seed, overall=overall))
        print(".", end="", file=sys.stderr, flush=True)
    print(f"\n{table(reports)}\n\n{overall_table(reports)}")
    if options.out:
        content = {"studies": options.studies, "seed": options.seed, "cells": reports}
        options.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if options.figure:
        figure(reports, options.figure / "verdict-calibration.png")
    return 0


def _stopped(tuned: Floats, surface: Floats, generator: np.random.Generator) -> Floats:
    """Objectives by which trials are preferred: one in three survives a noisy rung, the stopped ones come last."""
    rung = surface + 2.0 * generator.normal(size=surface.shape)
    survivors = -(-CONFIGURATIONS // 3)
    cutoff = np.sort(rung, axis=-1)[..., survivors - 1 : survivors]
    return np.asarray(np.where(rung <= cutoff, tuned, 1e6 + rung), dtype=np.float64)


def _noise(cell: Cell, workloads: int, generator: np.random.Generator) -> Floats:
    """Seed noise of unit variance, paired between arms, shape (workloads, arms, TOP_K, seeds)."""
    shape = (workloads, cell.arms, TOP_K, cell.seeds)
    common = (workloads, 1, 1, cell.seeds)
    if cell.noise is Noise.HEAVY:
        draws = [generator.standard_t(3, size=size) / np.sqrt(3.0) for size in (common, shape)]
    else:
        draws = [generator.normal(size=size) for size in (common, shape)]
    noise = np.sqrt(SHARED) * draws[0] + np.sqrt(1.0 - SHARED) * draws[1]
    if cell.noise is Noise.DIVERGING:
        noise = np.where(generator.random(shape) < FAILURES, np.inf, noise)
    return np.asarray(noise, dtype=np.float64)


def _selection_order(validation: Floats) -> Indices:
    """Places of the confirmed configurations: fewest failures, then lowest mean of the finite seeds."""
    failed = np.isinf(validation)
    mean = np.where(failed, 0.0, validation).sum(axis=-1) / np.maximum((~failed).sum(axis=-1), 1)
    return np.argsort(1e6 * failed.sum(axis=-1) + mean, axis=-1, kind="stable")


def _intervals(studies: Studies, rows: Indices, first: Indices, second: Indices) -> tuple[Ends, Ends, Ends]:
    """95 % ends over seeds alone, over seeds and search, and the equivalence ends, of first minus second arm."""
    ours, theirs = studies.errors[rows, first], studies.errors[rows, second]
    differences = paired_differences(ours[:, 0], theirs[:, 0])
    own, safe = estimate(differences), estimate(bounded_differences(ours[:, 0], theirs[:, 0]))
    weights = joint_places(studies.orders[rows, first], studies.orders[rows, second], CONFIGURATIONS, TOP_K)
    both = np.concatenate([ours, theirs], axis=1)
    worst = np.where(np.isfinite(both), both, -np.inf).max(axis=(1, 2))[:, None, None]
    clipped = (np.minimum(ours, worst)[:, :, None], np.minimum(theirs, worst)[:, None])
    variance = luck_of_search(clipped[0] - clipped[1], weights, np.isinf(both).any(axis=(1, 2)))
    usable = np.isfinite(own.centre) & np.isfinite(own.error)
    claim = widened(own, np.where(usable, variance, 0.0), SEARCH_DEGREES)
    wider = widened(safe, variance, SEARCH_DEGREES)
    return ends(own, differences, safe), ends(claim, differences, wider), bounds(claim, EQUIVALENCE)


def _rope(studies: Studies, rows: Indices, first: Indices, second: Indices) -> Floats:
    variances = []
    for arm in (first, second):
        values = studies.errors[rows, arm, 0]
        finite = np.where(np.isfinite(values), values, np.nan)
        enough = np.isfinite(values).sum(axis=-1) >= 3
        variances.append(np.where(enough, np.nanvar(finite, axis=-1, ddof=1), 0.0))
    return np.asarray(np.sqrt(np.mean(variances, axis=0)) * np.all(np.array(variances) > 0.0, axis=0), dtype=np.float64)


def _percentile(differences: Floats, generator: np.random.Generator) -> tuple[Floats, Floats]:
    """Percentile bootstrap over seeds of the IQM of the differences, 400 draws."""
    seeds = differences.shape[-1]
    drawn = generator.integers(0, seeds, size=(400, seeds), dtype=np.intp)
    values = np.stack([iqm(differences[:, row]) for row in drawn])
    low, high = np.quantile(values, [0.025, 0.975], axis=0)
    return low, high


def _coverage(ends: tuple[Floats, Floats], truth: Floats) -> float:
    return float(((ends[0] <= truth) & (truth <= ends[1])).mean())


def _rates(winner: Indices, truth: Floats) -> tuple[float, float]:
    """Shares of workloads with a right and with a wrong winner; among equally good arms every winner is wrong."""
    named, best = winner >= 0, truth.min(axis=1)
    right = named & (truth[np.arange(len(winner)), winner] == best) & (truth.max(axis=1) > best)
    return float(right.mean()), float((named & ~right).mean())


def _limit(cell: Cell) -> float:
    """Power of the paired t test at these seeds, had all searches found the same configuration; 0 in a tie."""
    if cell.difference == 0.0 or cell.seeds < MINIMUM_SEEDS:
        return 0.0
    return paired_power(cell.difference, float(np.sqrt(2.0 * (1.0 - SHARED))), cell.seeds)


def _limit_with_search(cell: Cell, studies: Studies) -> float:
    """Power of a normal test that knows the variances of seeds and search exactly; 0 in a tie."""
    if cell.difference == 0.0 or cell.seeds < MINIMUM_SEEDS:
        return 0.0
    luck = (studies.found - studies.truth)[:, 0] - (studies.found - studies.truth)[:, 1]
    error = np.sqrt(2.0 * (1.0 - SHARED) / cell.seeds + luck.var())
    return float(stats.norm.sf(stats.norm.ppf(0.975) - cell.difference / error))


def _workload_errors(studies: Studies, judged: Judged, row: int, names: list[str]) -> WorkloadErrors:
    runs = dict(zip(names, studies.errors[row, :, 0], strict=True))
    winner = names[judged.winner[row]] if judged.winner[row] >= 0 else None
    verdict = Verdict.WINNER if winner else Verdict.TIE if judged.tie[row] else Verdict.UNRESOLVED
    decision = Decision(
        verdict=verdict,
        winner=winner,
        tied=tuple(names) if verdict is Verdict.TIE else (),
        sentence="",
        budget="",
        resolve=(),
        barred=False,
        smallest_n=studies.errors.shape[-1],
    )
    finite = {name: values[np.isfinite(values)] for name, values in runs.items()}
    return WorkloadErrors(
        workload=str(row),
        errors={name: float(iqm(values)) for name, values in runs.items()},
        runs=runs,
        deviation={name: float(v.std(ddof=1) / v.mean()) for name, v in finite.items() if len(v) > 1},
        decision=decision,
    )


def _overall_row(
    studies: Studies, judged: Judged, cell: Cell, workloads: int, count: int, seed: int
) -> dict[str, float]:
    rows = np.arange(count * workloads)
    part = Studies(**{name: values[rows] for name, values in vars(studies).items()})
    own = Judged(**{**vars(judged), "winner": judged.winner[rows], "tie": judged.tie[rows]})
    winner, tie = overall_winners(part, own, workloads, seed)
    usual, wrong = pooled_welch(part, workloads), 0 if cell.difference == 0.0 else 1
    return {
        "workloads": workloads,
        "right": 0.0 if cell.difference == 0.0 else float((winner == 0).mean()),
        "wrong": float((winner >= wrong).mean()),
        "tie": float(tie.mean()),
        "welch_wrong": float((usual >= wrong).mean()),
    }


def _word(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
