"""Properties and out-of-distribution errors as metrics, in a run whose truth is known."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from analysis import ranking as ranking_module
from analysis.json_form import to_json
from analysis.load import load
from analysis.metric_results import MetricResult
from analysis.model_metrics import About, entry_failures, pooled
from analysis.ranking import rank
from analysis.report import write_report
from analysis.verdict import Verdict
from tests.analysis.synthetic_run import OOD_PER_TEST, Plan, write_run
from tunebench.properties.rows import CurvePoint, PropertyRow, write_curves, write_rows
from tunebench.study.record import PROPERTIES, Reason, Stage, TrialRecord

COPPER = {"kind": "crystal", "formula": "Cu", "lattice": "fcc", "a_angstrom": 3.6}
SECTION = {
    "regime": "crystal",
    "properties": {
        "elastic": {"property": "elastic", "structure": COPPER},
        "melt": {"property": "time_to_failure", "structure": COPPER},
    },
    "reference": {"calculator": "emt"},
}
LEVELS = {"adamw": 0.050, "muon": 0.045, "radam": 0.055, "sgd": 0.080, "soap": 0.040}
SCATTER = (1.0, 1.02, 0.98, 1.01, 0.99)
ARMS = {name: [level * factor for factor in SCATTER] for name, level in LEVELS.items()}
ARMS["sgd"][1] = math.inf
LIFETIME = {"adamw": 3.0, "muon": 1.0, "radam": 2.0, "sgd": 9.0, "soap": 5.0}
"""Error of the lifetime by optimizer, in an order of its own."""
FAILED = ("radam", 2)
"""A model whose lifetime could not be computed."""


def row(trial: TrialRecord, entry: str, quantity: str, error: float | None, **changes: Any) -> PropertyRow:
    fields: dict[str, Any] = {
        "model": trial.key.trial_id,
        "entry": entry,
        "property": "elastic" if entry == "elastic" else "time_to_failure",
        "quantity": quantity,
        "value": None if error is None else 100.0 - error,
        "standard_error": None,
        "reference": 100.0,
        "reference_standard_error": None,
        "error": None if error is None else -error,
        "unit": "GPa",
        "failed": error is None,
        "reason": "" if error is not None else "atoms closer than 0.5",
        "settings_hash": "0",
    }
    return PropertyRow(**{**fields, **changes})


def rows_of(trial: TrialRecord) -> list[PropertyRow]:
    """Elastic constants as good as the forces, a lifetime with an order of its own."""
    optimizer, seed = trial.key.optimizer, trial.key.seed_index
    force = ARMS[optimizer][seed]
    lifetime = None if (optimizer, seed) == FAILED else LIFETIME[optimizer] * SCATTER[seed]
    return [
        row(trial, "elastic", "C11", 1000.0 * force),
        row(trial, "elastic", "X.1", 10.0 * force, unit="THz"),
        row(trial, "elastic", "X.2", 30.0 * force, unit="THz"),
        row(trial, "melt", "time", lifetime, unit="ps"),
    ]


def write_properties(run: Path, *, leave_out: str = "") -> None:
    for trial in load(run).trials:
        if trial.key.stage is not Stage.CONFIRM or trial.reason is not Reason.FINISHED:
            continue
        name = trial.key.trial_id
        if name == leave_out:
            continue
        rows = rows_of(trial)
        write_rows(run / PROPERTIES / f"{name}.parquet", rows)
        better = [replace(one, error=None if one.error is None else 0.5 * one.error) for one in rows]
        write_rows(run / PROPERTIES / f"{name}.refined.parquet", better)
        write_curves(run / PROPERTIES / f"{name}.curves.parquet", curve(name))
    write_curves(run / PROPERTIES / "reference-0.curves.parquet", curve("reference-0"))


def curve(model: str) -> list[CurvePoint]:
    of_curve: dict[str, Any] = {"model": model, "entry": "melt", "curve": "radial_distribution"}
    units = {"x_unit": "Å", "y_unit": "1"}
    points = [CurvePoint(**of_curve, **units, branch=b, mark="", x=float(x), y=x * 0.1) for b in (0, 1) for x in (1, 2)]
    return [*points, CurvePoint(**of_curve, **units, branch=-1, mark="shell", x=2.0, y=None)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = write_run(tmp_path_factory.mktemp("physics") / "run", Plan(arms=ARMS, properties=[SECTION]))
    write_properties(run)
    return run


@pytest.fixture(scope="module")
def metrics(run: Path) -> Mapping[str, MetricResult]:
    return {metric.name: metric for metric in rank(load(run)).workloads[0].metrics}


def test_metrics_are_other_distributions_and_quantities_with_a_reference(metrics: Mapping[str, MetricResult]) -> None:
    assert {name: (metric.about, metric.unit) for name, metric in metrics.items()} == {
        "ood:hot forces_mae": (About.OOD, "eV/Å"),
        "ood:hot energy_per_atom_mae": (About.OOD, "eV/atom"),
        "elastic C11": (About.CRYSTAL, "GPa"),
        "elastic modes": (About.CRYSTAL, "THz"),
        "melt time": (About.CRYSTAL, "ps"),
    }


@pytest.mark.parametrize(
    ("quantity", "metric"), [("X.1", "modes"), ("mode.12", "modes"), ("bands.rmse", "bands.rmse"), ("C11", "C11")]
)
def test_numbered_frequencies_are_one_metric(quantity: str, metric: str) -> None:
    assert pooled(quantity) == metric


def test_errors_are_absolute_means_over_seeds(metrics: Mapping[str, MetricResult]) -> None:
    soap = {name: next(arm for arm in metric.arms if arm.optimizer == "soap") for name, metric in metrics.items()}
    assert soap["elastic C11"].iqm == pytest.approx(40.0)
    assert soap["elastic modes"].iqm == pytest.approx(20.0 * 0.040)
    assert soap["ood:hot forces_mae"].iqm == pytest.approx(OOD_PER_TEST * 0.040)
    assert soap["elastic C11"].interval is not None


def test_what_orders_optimizers_as_the_force_error_does_adds_nothing(metrics: Mapping[str, MetricResult]) -> None:
    elastic, melt = metrics["elastic C11"].with_force, metrics["melt time"].with_force
    assert elastic is not None
    assert melt is not None
    assert (elastic.adds_nothing, elastic.spearman, elastic.optimizers) == (True, pytest.approx(1.0), 5)
    assert not melt.adds_nothing
    assert melt.spearman == pytest.approx(0.3)  # ranks 4 1 2 5 3 hold, against 2 3 4 5 1


def test_a_metric_has_a_winner_where_the_force_error_has_another(
    run: Path, metrics: Mapping[str, MetricResult]
) -> None:
    assert metrics["melt time"].winner == "muon"
    assert metrics["elastic C11"].winner == "soap"
    assert rank(load(run)).workloads[0].decision.winner == "soap"
    assert metrics["melt time"].p is not None
    assert metrics["melt time"].p >= max(c.p or 0.0 for c in metrics["melt time"].comparisons)


def test_the_front_holds_who_is_best_in_either(metrics: Mapping[str, MetricResult]) -> None:
    assert {arm.optimizer for arm in metrics["melt time"].arms if arm.on_front} == {"soap", "muon"}
    assert {arm.optimizer for arm in metrics["elastic C11"].arms if arm.on_front} == {"soap"}


def test_failed_properties_and_failed_trials_count_as_infinite(run: Path, metrics: Mapping[str, MetricResult]) -> None:
    failed = {name: {arm.optimizer: arm.n_failed for arm in metric.arms} for name, metric in metrics.items()}
    assert failed["melt time"] == {"adamw": 0, "muon": 0, "radam": 1, "sgd": 1, "soap": 0}
    assert failed["elastic C11"] == {"adamw": 0, "muon": 0, "radam": 0, "sgd": 1, "soap": 0}
    loaded = load(run)
    arms = rank(loaded).workloads[0].arms
    found = {(one.entry, one.optimizer): one for one in entry_failures(loaded, "ethanol-nequip", arms)}
    assert list(found["melt", "radam"].reasons.values()) == ["atoms closer than 0.5"]
    assert (found["elastic", "sgd"].failed, found["elastic", "sgd"].models) == (1, 5)
    assert "DIVERGED" in next(iter(found["elastic", "sgd"].reasons.values()))


def test_an_optimizer_whose_property_always_fails_has_the_worst_rank(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", Plan(arms=ARMS, properties=[SECTION]))
    write_properties(run)
    for trial in load(run).trials:
        file = run / PROPERTIES / f"{trial.key.trial_id}.parquet"
        if trial.key.optimizer == "soap" and file.exists():
            write_rows(file, [row(trial, "elastic", "C11", None), row(trial, "melt", "time", 1.0, unit="ps")])
    metric = next(m for m in rank(load(run)).workloads[0].metrics if m.name == "elastic C11")
    assert (metric.arms[-1].optimizer, metric.arms[-1].rank, metric.arms[-1].iqm) == ("soap", 5.0, math.inf)
    assert not metric.arms[-1].on_front


def test_refined_models_stand_beside_the_others(metrics: Mapping[str, MetricResult]) -> None:
    for arm in metrics["elastic C11"].arms:
        plain = 1000.0 * LEVELS[arm.optimizer]
        assert arm.refined == pytest.approx(0.5 * plain, rel=0.02)
    assert all(arm.refined is None for arm in metrics["ood:hot forces_mae"].arms)


def test_a_model_without_its_properties_leaves_them_without_a_verdict_and_the_ranking_as_it_is(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", Plan(arms=ARMS, properties=[SECTION]))
    write_properties(run, leave_out="ethanol-nequip.soap.confirm.c001.s0")
    workload = rank(load(run)).workloads[0]
    verdicts = {metric.name: metric.verdict for metric in workload.metrics}
    assert verdicts["elastic C11"] is verdicts["melt time"] is Verdict.UNRESOLVED
    assert verdicts["ood:hot forces_mae"] is Verdict.WINNER
    assert workload.decision.winner == "soap"


def test_the_ranking_with_metrics_follows_its_schema(run: Path) -> None:
    schema = Path(ranking_module.__file__).with_name("ranking.schema.json")
    content = json.loads(json.dumps(to_json(rank(load(run))), allow_nan=False))
    jsonschema.validate(content, json.loads(schema.read_text(encoding="utf-8")))


def test_the_report_has_a_section_a_regime_with_tables_curves_and_reasons(run: Path, tmp_path: Path) -> None:
    page = write_report(run, tmp_path / "report").page.read_text(encoding="utf-8")
    section = page.split('<h2 id="physics-crystal">')[1].split('<h2 id="all">')[0]
    for words in ("Errors of properties", "adds nothing", "muon wins", "Failed properties", "1 of 5", "✗ 1 of 5"):
        assert words in section, words
    assert "Before and after refinement" in section
    assert "ethanol-nequip.radam.confirm.c001.s2, melt: atoms closer than 0.5" in section
    assert "physics-liquid" not in page
    figure = tmp_path / "report" / "tables" / "figures" / "ethanol-nequip-crystal-melt-radial-distribution.csv"
    series = {line.split(",")[1] for line in figure.read_text().splitlines()[1:]}
    assert series == {*LEVELS, "reference"}


def test_rows_that_cannot_be_read_are_told_on_the_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", Plan(arms=ARMS, properties=[SECTION]))
    write_properties(run)
    (run / PROPERTIES / "ethanol-nequip.soap.confirm.c001.s0.parquet").write_bytes(b"PAR1")
    page = write_report(run, tmp_path / "report").page.read_text(encoding="utf-8")
    assert "soap.confirm.c001.s0.parquet: found" in page
    assert "Provisional, no verdict is given" in page
