"""The methods section of a paper about a run, in words with citations; every number is that of the run."""

from __future__ import annotations

from dataclasses import dataclass

from analysis.best_of_n import BAND
from analysis.load import Run
from analysis.ranking import Ranking
from analysis.reselection import SEARCH_DEGREES
from analysis.statistics import DRAWS
from analysis.verdict import MINIMUM_SEEDS
from analysis.wording import listed, percent
from analysis.workload_tests import MINIMUM_WORKLOADS
from tunebench.study.spec import Sampler

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
    """What was done, in the past tense of a paper."""
    return Methods(paragraphs=(_search(run), _ranking(run), _evidence(ranking)), references=_REFERENCES)


def _search(run: Run) -> str:
    study = run.study
    steps = listed(dict.fromkeys(str(workload.max_steps) for workload in study.workloads))
    sampling = (
        "one scrambled Sobol sequence shared by the arms of a workload"
        if study.tune.sampler is Sampler.SOBOL
        else "a tree-structured Parzen estimator, which adapts to results, so that nothing is ranked"
    )
    asha = study.tune.asha
    stopping = (
        "No trial was stopped early."
        if asha is None
        else f"Successive halving [2] inside each arm ({asha.form}, {asha.order}, reduction factor "
        f"{asha.reduction_factor}) stopped poor trials; sentinels chosen before the start ran to the horizon whatever "
        "the rungs said, and tell how often it erred."
    )
    arms = f"{_counted(len(run.optimizers), 'optimizer')} ({listed(run.optimizers)})"
    workloads = f"{_counted(len(run.workloads), 'workload')} ({listed(run.workloads)})"
    return (
        f"{arms} trained interatomic potentials [1] on {workloads} to a horizon of {steps} steps. Each arm, a pair of "
        f"workload and optimizer, was given {_counted(study.tune.trials_per_arm, 'configuration')}, drawn from "
        f"{sampling}. {stopping}"
    )


def _ranking(run: Run) -> str:
    confirm = run.study.confirm
    one = confirm.top_k == 1
    best = "The best configuration" if one else f"The {confirm.top_k} best configurations"
    return (
        f"{best} of each arm by validation error {'was' if one else 'were'} trained again to the full horizon with "
        f"{_counted(confirm.seeds, 'fresh seed')}, the same for all arms: equal initial weights, data order and "
        "labels. The configuration with the lowest mean validation objective speaks for its arm. Arms are ranked by "
        "the interquartile mean over seeds of the force error on a test split that nothing else had seen; a failed "
        "seed counts as infinitely bad and is never dropped."
    )


def _evidence(ranking: Ranking) -> str:
    stable = "did not change" if ranking.overall.stable else "changed"
    return (
        "Intervals are studentized over paired seeds (with failures those of the trimmed mean [4]) and hold the luck "
        f"of the search, by re-selection among redrawn configurations counted with {SEARCH_DEGREES} degrees of "
        f"freedom; a nested bootstrap of {DRAWS} draws is shown beside them. A winner needs {MINIMUM_SEEDS} paired "
        "seeds and a 95 % interval below zero against every other arm, a tie a 90 % interval inside one seed standard "
        f"deviation. Over workloads, Wilcoxon's signed-rank test with Holm's correction [7] from {MINIMUM_WORKLOADS} "
        "workloads on, and a Bayesian signed-rank test with a region of practical equivalence [6]. Time to target is "
        "scored by performance profiles [8, 3]; the expected best of n configurations is a U-statistic [5] with "
        f"{percent(BAND)} bands; failure and false-stop rates have exact intervals [9]; tunability follows [10], "
        f"importance [11]. The order of the optimizers {stable} when any one of them was left out."
    )


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number != 1 else ''}"
