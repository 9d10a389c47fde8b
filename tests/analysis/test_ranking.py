from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import trim_mean

from analysis.arm_result import ArmResult
from analysis.json_form import to_json
from analysis.load import load
from analysis.ranking import Ranking, WorkloadRanking, rank
from analysis.seed_intervals import seed_interval
from analysis.selection import POLICY
from analysis.verdict import Verdict
from tests.analysis.synthetic_run import ENERGY_PER_FORCE, OOD_PER_TEST, RAW_PER_AVERAGED, Plan, write_run
from tunebench.study.journal import read_trials
from tunebench.study.record import Metric, Reason, Stage

INF, NAN = math.inf, math.nan
ADAMW = (0.031, 0.030, 0.032, 0.033, 0.029)
SOAP = (0.021, 0.020, 0.022, 0.023, 0.019)


def ranked(folder: Path, plan: Plan) -> Ranking:
    return rank(load(write_run(folder / "run", plan)))


def only(ranking: Ranking) -> WorkloadRanking:
    (workload,) = ranking.workloads
    return workload


def arm(ranking: Ranking, optimizer: str) -> ArmResult:
    return next(result for result in only(ranking).arms if result.optimizer == optimizer)


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("plain") / "run", Plan(arms={"adamw": ADAMW, "soap": SOAP}, top_k=2))


@pytest.fixture(scope="module")
def plain(plain_run: Path) -> Ranking:
    return rank(load(plain_run))


def test_better_arm_comes_first_and_wins(plain: Ranking) -> None:
    workload = only(plain)
    assert plain.finished
    assert [(result.rank, result.optimizer) for result in workload.arms] == [(1, "soap"), (2, "adamw")]
    assert (workload.decision.verdict, workload.decision.winner) == (Verdict.WINNER, "soap")


def test_every_value_is_the_one_in_the_journal(plain_run: Path, plain: Ranking) -> None:
    """Trial by trial: the policy takes the averaged weights, which are better on validation."""
    confirm = [t for t in read_trials(plain_run) if t.key.stage is Stage.CONFIRM and t.key.config_index == 1]
    assert len(confirm) == 10
    for trial in confirm:
        result = arm(plain, trial.key.optimizer)
        for split in ("test", "ood:hot"):
            for metric in (Metric.FORCES_MAE, Metric.FORCES_RMSE, Metric.ENERGY_PER_ATOM_MAE):
                summary = result.summary(split, metric)
                assert summary is not None
                assert summary.values[trial.key.seed_index] == trial.result[split]["ema"][metric]


def test_statistics_of_an_arm_by_hand(plain: Ranking) -> None:
    summary = arm(plain, "soap").summary("test", Metric.FORCES_MAE)
    assert summary is not None
    assert summary.iqm == pytest.approx(trim_mean(SOAP, 0.25)) == pytest.approx(0.021)
    assert (summary.median, summary.mean) == pytest.approx((0.021, 0.021))
    assert summary.interval == seed_interval(np.array(SOAP))
    energy = arm(plain, "soap").summary("test", Metric.ENERGY_PER_ATOM_MAE)
    hot = arm(plain, "soap").summary("ood:hot", Metric.FORCES_MAE)
    raw = arm(plain, "soap").summary("test", Metric.FORCES_MAE, readout="raw")
    assert energy is not None
    assert hot is not None
    assert raw is not None
    assert (energy.iqm, hot.iqm, raw.iqm) == pytest.approx(
        (0.021 * ENERGY_PER_FORCE, 0.021 * OOD_PER_TEST, 0.021 * RAW_PER_AVERAGED)
    )


def test_paired_difference_by_hand(plain: Ranking) -> None:
    (comparison,) = only(plain).comparisons
    assert (comparison.first, comparison.second, comparison.n_pairs) == ("soap", "adamw", 5)
    assert comparison.difference == pytest.approx(-0.010)
    assert comparison.seeds_interval is not None
    assert (comparison.seeds_interval.low, comparison.seeds_interval.high) == pytest.approx((-0.010, -0.010))
    # The second configurations are 1.3 times worse, which other draws of the configurations would have selected.
    assert comparison.interval is not None
    assert comparison.interval.low < -0.010 < comparison.interval.high < 0.0
    assert comparison.search_error is not None
    assert comparison.search_error > 0.0


def test_configuration_is_chosen_among_all_that_were_confirmed(plain: Ranking) -> None:
    assert [(result.config_index, result.n_configs) for result in only(plain).arms] == [(1, 2), (1, 2)]


def test_selection_reads_validation_even_where_test_disagrees(plain_run: Path) -> None:
    """The second configuration gets the best test errors of all; it must not be chosen for them."""
    run = load(plain_run)
    trials = tuple(
        dataclasses.replace(
            trial,
            result={
                split: {readout: dict.fromkeys(metrics, 1e-06) for readout, metrics in readouts.items()}
                if split != "val"
                else readouts
                for split, readouts in trial.result.items()
            },
        )
        if trial.key.stage is Stage.CONFIRM and trial.key.config_index == 2
        else trial
        for trial in run.trials
    )
    ranking = rank(dataclasses.replace(run, trials=trials))
    assert [result.config_index for result in only(ranking).arms] == [1, 1]


def test_cost_search_and_targets_of_the_plain_run(plain: Ranking) -> None:
    workload = only(plain)
    assert [(p.optimizer, p.device_s, p.on_front) for p in workload.pareto] == [
        ("adamw", 4.8, True),
        ("soap", 12.0, True),
    ]
    search = arm(plain, "soap").search
    assert (search.failures.failed, search.failures.ended, search.censored) == (1, 6, 2)
    assert search.best_of_n is not None
    assert search.best_of_n.n == (1, 2, 3, 4, 5, 6)
    assert search.best_of_n.optimistic[-1] == search.best_of_n.pessimistic[-1]
    assert plain.targets.baseline == "adamw"
    assert plain.targets.steps is not None
    # soap is at adamw's last error after step 204 of 240, twelve steps apart: exp(2.5 (1 - s / 240)) 0.021 <= 0.031.
    assert plain.targets.workloads[0].reached["soap"].steps == 204.0
    assert plain.targets.steps.speedups["soap"] == pytest.approx(240.0 / 204.0)
    assert plain.targets.steps.scores["soap"] == 1.0
    assert workload.family_p is not None
    assert workload.family_p < 0.05
    assert plain.overall.winner == "soap"
    assert "nothing is claimed beyond it" in plain.overall.sentence


def test_realised_shares_of_rules(plain: Ranking) -> None:
    soap = arm(plain, "soap")
    assert (soap.own_share, soap.rule_shares) == (0.8, {"soap": 0.8, "adam": 0.2})
    assert arm(plain, "adamw").own_share == 1.0


def test_ranking_is_reproducible(plain_run: Path, plain: Ranking) -> None:
    assert rank(load(plain_run)) == plain


def test_order_of_the_trials_in_the_journal_does_not_matter(plain_run: Path, plain: Ranking) -> None:
    run = load(plain_run)
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(len(run.trials))
        shuffled = dataclasses.replace(run, trials=tuple(run.trials[place] for place in order))
        found = rank(shuffled)
        assert found.overall == plain.overall
        assert [w.comparisons for w in found.workloads] == [w.comparisons for w in plain.workloads]
        assert [[a.errors for a in w.arms] for w in found.workloads] == [
            [a.errors for a in w.arms] for w in plain.workloads
        ]


def test_raw_policy_ranks_the_raw_weights_of_every_arm(tmp_path: Path) -> None:
    ranking = ranked(tmp_path, Plan(arms={"adamw": ADAMW, "schedule_free": SOAP}, readout="raw"))
    for optimizer, values in (("adamw", ADAMW), ("schedule_free", SOAP)):
        summary = arm(ranking, optimizer).summary("test", Metric.FORCES_MAE, POLICY)
        assert summary is not None
        assert summary.iqm == pytest.approx(RAW_PER_AVERAGED * trim_mean(values, 0.25))


def test_averaged_policy_takes_each_arms_own_average(tmp_path: Path) -> None:
    ranking = ranked(tmp_path, Plan(arms={"adamw": ADAMW, "schedule_free": SOAP}, readout="averaged"))
    assert only(ranking).decision.winner == "schedule_free"
    for optimizer, readout in (("adamw", "ema"), ("schedule_free", "schedule_free")):
        policy = arm(ranking, optimizer).summary("test", Metric.FORCES_MAE)
        own = arm(ranking, optimizer).summary("test", Metric.FORCES_MAE, readout)
        assert policy is not None
        assert own is not None
        assert policy.values == own.values


def test_no_difference_has_no_winner(tmp_path: Path) -> None:
    noise = np.random.default_rng(5).normal(scale=0.002, size=(3, 5))
    arms = dict(zip(("adamw", "soap", "muon"), (0.03 + noise).tolist(), strict=True))
    workload = only(ranked(tmp_path, Plan(arms=arms)))
    assert workload.decision.verdict is Verdict.UNRESOLVED
    assert len(workload.comparisons) == 2


def test_diverged_seed_is_counted_never_dropped(tmp_path: Path) -> None:
    ranking = ranked(tmp_path, Plan(arms={"adamw": ADAMW, "soap": (0.021, INF, 0.022, 0.023, 0.019)}))
    soap = arm(ranking, "soap")
    summary = soap.summary("test", Metric.FORCES_MAE)
    assert summary is not None
    assert soap.failed_seeds == {1: "DIVERGED"}
    assert (soap.n_seeds, summary.values[1]) == (5, INF)
    assert summary.iqm == pytest.approx((0.021 + 0.022 + 0.023) / 3)
    assert summary.mean == INF
    assert soap.validation_objective == INF


def test_configuration_without_failures_is_preferred(tmp_path: Path) -> None:
    """Configuration 1 fails at one seed; configuration 2, worse elsewhere, does not."""
    run = load(write_run(tmp_path / "run", Plan(arms={"adamw": ADAMW, "soap": SOAP}, top_k=2)))
    trials = tuple(
        dataclasses.replace(trial, reason=Reason.DIVERGED, state="FAIL", value=None, result={})
        if (trial.key.trial_id) == "ethanol-nequip.soap.confirm.c001.s3"
        else trial
        for trial in run.trials
    )
    assert arm(rank(dataclasses.replace(run, trials=trials)), "soap").config_index == 2


def test_arm_that_diverged_entirely_in_the_confirm_stage_is_last(tmp_path: Path) -> None:
    ranking = ranked(tmp_path, Plan(arms={"muon": [INF] * 5, "adamw": ADAMW, "soap": SOAP}, crash=Reason.OOM))
    assert [result.optimizer for result in only(ranking).arms] == ["soap", "adamw", "muon"]
    assert arm(ranking, "muon").failed_seeds == dict.fromkeys(range(5), "OOM")
    assert only(ranking).decision.winner == "soap"


def test_arm_whose_search_found_nothing_is_last_not_absent(tmp_path: Path) -> None:
    ranking = ranked(tmp_path, Plan(arms={"sgd": SOAP, "adamw": ADAMW, "soap": SOAP}, hopeless=("sgd",)))
    sgd = arm(ranking, "sgd")
    assert ranking.finished
    assert (sgd.rank, sgd.left_no_candidate, sgd.config_index, sgd.tune.failed) == (3, True, None, 6)
    assert only(ranking).decision.winner == "soap"


def test_unfinished_run_is_ranked_provisionally(tmp_path: Path) -> None:
    ranking = ranked(tmp_path, Plan(arms={"adamw": ADAMW, "soap": (0.021, 0.020, 0.022, 0.023, NAN)}))
    workload = only(ranking)
    assert not ranking.finished
    assert workload.missing == ("ethanol-nequip/soap: 4 of 5 confirm trials have ended",)
    assert arm(ranking, "soap").missing_seeds == (4,)
    assert workload.decision.winner is None
    assert [result.rank for result in workload.arms] == [1, 2]


def test_arm_that_its_device_seconds_left_fewer_configurations_can_win(tmp_path: Path) -> None:
    run = load(write_run(tmp_path / "run", Plan(arms={"adamw": ADAMW, "soap": SOAP}, top_k=2, afforded={"soap": 4})))
    workload = only(rank(run))
    assert (workload.missing, workload.decision.winner) == ((), "soap")
    assert workload.decision.budget == "4 to 6 configurations per arm and 240 steps, the best 2 with 5 seeds"
    last = run.arm("ethanol-nequip", "soap", Stage.TUNE)[-1]
    without = dataclasses.replace(run, trials=tuple(trial for trial in run.trials if trial is not last))
    assert only(rank(without)).missing == ("ethanol-nequip/soap: 3 of 4 tune trials have ended",)


def test_single_seed_has_no_interval(tmp_path: Path) -> None:
    ranking = ranked(tmp_path, Plan(arms={"adamw": (0.03,), "soap": (0.02,)}))
    summary = arm(ranking, "soap").summary("test", Metric.FORCES_MAE)
    assert summary is not None
    assert summary.interval is None
    assert only(ranking).comparisons[0].interval is None
    assert only(ranking).decision.winner is None


def test_tpe_study_is_exploratory_and_has_no_order(tmp_path: Path) -> None:
    ranking = ranked(tmp_path, Plan(arms={"adamw": ADAMW, "soap": SOAP}, sampler="tpe"))
    workload = only(ranking)
    assert workload.decision.verdict is Verdict.EXPLORATORY
    assert [(result.optimizer, result.rank) for result in workload.arms] == [("adamw", None), ("soap", None)]


def test_json_is_strict_and_spells_failures_out(tmp_path: Path) -> None:
    ranking = ranked(tmp_path, Plan(arms={"adamw": ADAMW, "soap": (0.021, INF, INF, 0.023, INF)}))
    content = json.loads(json.dumps(to_json(ranking), allow_nan=False))
    soap = next(result for result in content["workloads"][0]["arms"] if result["optimizer"] == "soap")
    forces = next(
        e for e in soap["errors"] if (e["split"], e["readout"], e["metric"]) == ("test", "policy", "forces_mae")
    )
    assert content["schema_version"] == 4
    assert forces["values"] == {"0": 0.021, "1": "inf", "2": "inf", "3": 0.023, "4": "inf"}
    assert forces["iqm"] == "inf"


def test_nan_never_reaches_the_json() -> None:
    with pytest.raises(ValueError, match="found NaN"):
        to_json({"value": NAN})
