"""The methods section of a paper about a run, in words with citations; every number is that of the run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from analysis.best_of_n import BAND
from analysis.comparison import Comparison
from analysis.load import Run
from analysis.ranking import Ranking
from analysis.reselection import SEARCH_DEGREES
from analysis.statistics import DRAWS
from analysis.verdict import MINIMUM_SEEDS
from analysis.wording import counted, listed, percent
from analysis.workload_tests import MINIMUM_WORKLOADS
from tunebench.study.spec import Fidelity, Sampler

_REFERENCES = (
    "S. Batzner et al., E(3)-equivariant graph neural networks for data-efficient and accurate interatomic potentials, "
    "Nat. Commun. 13, 2453 (2022), doi:10.1038/s41467-022-29939-5.",
    "L. Li et al., A system for massively parallel hyperparameter tuning, MLSys 2 (2020), arXiv:1810.05934.",
    "G. E. Dahl et al., Benchmarking neural network training algorithms, arXiv:2306.07179 (2023).",
    "J. W. Tukey, D. H. McLaughlin, Less vulnerable confidence and significance procedures for location based on a "
    "single sample, Sankhya A 25, 331 (1963).",
    "J. Dodge et al., Show your work: improved reporting of experimental results, EMNLP (2019), arXiv:1909.03004; "
    "R. Tang et al., Showing your work doesn't always work, ACL (2020).",
    "A. Benavoli, G. Corani, J. Demšar, M. Zaffalon, Time for a change: a tutorial for comparing multiple classifiers "
    "through Bayesian analysis, JMLR 18(77), 1 (2017).",
    "S. Holm, A simple sequentially rejective multiple test procedure, Scand. J. Stat. 6, 65 (1979).",
    "E. D. Dolan, J. J. Moré, Benchmarking optimization software with performance profiles, Math. Program. 91, 201 "
    "(2002), doi:10.1007/s101070100263.",
    "C. J. Clopper, E. S. Pearson, The use of confidence or fiducial limits illustrated in the case of the binomial, "
    "Biometrika 26, 404 (1934).",
    "P. Probst, A.-L. Boulesteix, B. Bischl, Tunability: importance of hyperparameters of machine learning algorithms, "
    "JMLR 20(53), 1 (2019), arXiv:1802.09596.",
    "F. Hutter, H. Hoos, K. Leyton-Brown, An efficient approach for assessing hyperparameter importance, ICML (2014); "
    "S. Watanabe, A. Bansal, F. Hutter, PED-ANOVA, IJCAI (2023), arXiv:2304.10255.",
)


@dataclass(frozen=True, kw_only=True)
class Methods:
    """Paragraphs that cite references by their number in brackets."""

    paragraphs: tuple[str, ...]
    references: tuple[str, ...]


def methods(run: Run, ranking: Ranking) -> Methods:
    """What was done, in the past tense of a paper; of what the run did not do there is no word, or that it did not."""
    paragraphs = (
        (_arms(run), *_budgets(run), _stopping(run)),
        (_confirming(run), _ordering(run)),
        (*_intervals(ranking), *_over_workloads(ranking), _further(run), *_left_out(ranking)),
    )
    return Methods(paragraphs=tuple(" ".join(sentences) for sentences in paragraphs), references=_REFERENCES)


def _arms(run: Run) -> str:
    study = run.study
    steps = listed(dict.fromkeys(str(workload.max_steps) for workload in study.workloads))
    sampling = (
        "one scrambled Sobol sequence shared by the arms of a workload"
        if study.tune.sampler is Sampler.SOBOL
        else "a tree-structured Parzen estimator, which adapts to results, so that nothing is ranked"
    )
    arms = f"{counted(len(run.optimizers), 'optimizer')} ({listed(run.optimizers)})"
    workloads = f"{counted(len(run.workloads), 'workload')} ({listed(run.workloads)})"
    who = "Each arm" if run.rivals == run.optimizers else "Each arm that competes"
    return (
        f"{arms} trained interatomic potentials [1] on {workloads} to a horizon of {steps} steps. {who}, a pair of "
        f"workload and optimizer, was given {counted(study.tune.trials_per_arm, 'configuration')}, drawn from "
        f"{sampling}."
    )


def _budgets(run: Run) -> Iterator[str]:
    """Arms that were given other numbers of configurations."""
    for arm in run.study.optimizers:
        if arm.untuned:
            yield f"{arm.name} was not tuned: one configuration with every default."
        elif arm.budget > 1:
            yield f"{arm.name}, an audit, was given {counted(run.study.trials_of(arm.name), 'configuration')}."
    cap = run.study.tune.device_seconds_per_arm
    fewer = [
        f"{workload}/{name} {planned} of {wanted}"
        for workload in run.workloads
        for name in run.optimizers
        if (planned := run.planned(workload, name)) < (wanted := run.study.trials_of(name))
    ]
    if cap is not None:
        left = f" It paid for fewer configurations in part: {listed(fewer)}." if fewer else " It paid for all of them."
        yield f"The search of an arm could cost {cap:.0f} device-seconds of steps timed alone.{left}"


def _stopping(run: Run) -> str:
    asha = run.study.tune.asha
    if asha is None:
        return "No trial was stopped early."
    sentinels = sum(trial.sentinel for trial in run.trials)
    exempt = (
        f"{counted(sentinels, 'sentinel')} chosen before the start ran to the horizon whatever the rungs said, and "
        f"tell how often it erred{_of_each_arm(run)}."
        if sentinels
        else "No trial was exempt from it, so how often it erred is not known."
    )
    return (
        f"Successive halving [2] inside each arm ({asha.form}, {asha.order}, reduction factor {asha.reduction_factor}) "
        f"decided which trials went on. {_fidelity(run)} {exempt}"
    )


def _of_each_arm(run: Run) -> str:
    """How many sentinels each competing arm has: a cap on device-seconds leaves a dearer arm fewer configurations."""
    counts = Counter((trial.key.workload, trial.key.optimizer) for trial in run.trials if trial.sentinel)
    numbers = sorted({counts[workload, name] for workload in run.workloads for name in run.rivals})
    if not numbers:
        return ""
    ends = " to ".join(map(str, dict.fromkeys((numbers[0], numbers[-1]))))
    return f"; each competing arm had {ends} of them"


def _fidelity(run: Run) -> str:
    """What a trial had done at a rung, by arms where they differ."""
    words = {
        Fidelity.RESCALE: "ended a complete schedule of its own length, and who went on started anew with a longer one",
        Fidelity.TRUNCATE: "cut the schedule of the full horizon",
    }
    found = {kind: [name for name in run.optimizers if run.fidelity(name) is kind] for kind in words}
    used = [kind for kind, names in found.items() if names]
    return " ".join(f"Each rung{f' of {listed(found[kind])}' if len(used) > 1 else ''} {words[kind]}." for kind in used)


def _confirming(run: Run) -> str:
    confirm = run.study.confirm
    one = confirm.top_k == 1
    best = "The best configuration" if one else f"The {confirm.top_k} best configurations"
    return (
        f"{best} of each arm by validation error {'was' if one else 'were'} trained again to the full horizon with "
        f"{counted(confirm.seeds, 'fresh seed')}, the same for all arms: equal initial weights, data order and "
        "labels. The configuration with the lowest mean validation objective speaks for its arm."
    )


def _ordering(run: Run) -> str:
    exploratory = run.study.tune.sampler is Sampler.TPE
    ordered = "Arms are not ranked; they are described" if exploratory else "Arms are ranked"
    return (
        f"{ordered} by the interquartile mean over seeds of the force error on a test split that nothing else had "
        "seen; a failed seed counts as infinitely bad and is never dropped."
    )


def _intervals(ranking: Ranking) -> Iterator[str]:
    """How two arms of a workload were compared."""
    comparisons = [comparison for workload in ranking.workloads for comparison in workload.comparisons]
    failures = "(with failures those of the trimmed mean [4])"
    if not comparisons:
        yield f"Intervals are studentized over seeds {failures}. No arms were compared."
        return
    yield f"Intervals are studentized over paired seeds {failures}{_luck(comparisons)}"
    if any(comparison.redrawn is not None for comparison in comparisons):
        yield f"A nested bootstrap of {DRAWS} draws is shown beside them."
    yield (
        f"A winner needs {MINIMUM_SEEDS} paired seeds and a 95 % interval below zero against every other arm, a tie a "
        "90 % interval inside one seed standard deviation."
    )


def _luck(comparisons: Sequence[Comparison]) -> str:
    """Whether the intervals hold the luck of the search, as the end of a sentence."""
    known = sum(comparison.search_error is not None for comparison in comparisons)
    if not known:
        return "; the luck of the search is not in them, for no other confirmed configurations were there to re-select."
    where = "" if known == len(comparisons) else f" in {known} of {len(comparisons)} comparisons"
    return (
        f" and hold{where} the luck of the search, by re-selection among redrawn configurations counted with "
        f"{SEARCH_DEGREES} degrees of freedom."
    )


def _over_workloads(ranking: Ranking) -> Iterator[str]:
    number, compared = ranking.overall.n_workloads, ranking.overall.comparisons
    if number < 2 or not compared:
        return
    bayes = "a Bayesian signed-rank test with a region of practical equivalence [6]"
    if number >= MINIMUM_WORKLOADS:
        yield f"Over workloads, Wilcoxon's signed-rank test with Holm's correction [7] and {bayes} were made."
    else:
        yield f"Over {number} workloads, too few for a significance test, {bayes} was made."


def _further(run: Run) -> str:
    stops = "failure and false-stop rates have" if any(trial.sentinel for trial in run.trials) else "failure rates have"
    return (
        "Time to target is scored by performance profiles [8, 3]; the expected best of n configurations is a "
        f"U-statistic [5] with {percent(BAND)} bands; {stops} exact intervals [9]; tunability follows [10], "
        "importance [11]."
    )


def _left_out(ranking: Ranking) -> Iterator[str]:
    if ranking.overall.left_out:
        stable = "did not change" if ranking.overall.stable else "changed"
        yield f"The order of the optimizers {stable} when any one of them was left out."
