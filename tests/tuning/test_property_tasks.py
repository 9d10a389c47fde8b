"""Properties of the confirm stage's models as the installed command computes them, on a study whose training is done.

`measured_run` is the finished run of all tests under a study that also asks for properties, measured as on another
machine, without its data.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import yaml
from filelock import FileLock
from rich.console import Console

from analysis.properties import load_properties
from tests.tuning.conftest import tunebench
from tunebench.cli import run_command
from tunebench.engine.checkpoints import FINAL, LAST, REFINED, checkpoint_folder
from tunebench.properties.calculators import calculator_from
from tunebench.properties.model_record import read_reference, rows_file
from tunebench.properties.models_of_run import ranking_readout
from tunebench.properties.rows import PropertyRow
from tunebench.study.errors import RunError
from tunebench.study.journal import JournalWriter, read_trials
from tunebench.study.record import PROPERTIES, Readout, Stage, TrialKey, TrialRecord
from tunebench.study.resolve import load_run, resolve
from tunebench.study.status import run_status
from tunebench.tuning import property_tasks
from tunebench.workloads.data import prepare
from tunebench.workloads.structure_files import read_prepared

ETHANOL = {"kind": "molecule", "name": "ethanol"}
SECTION: dict[str, Any] = {
    "regime": "molecule",
    "properties": {
        "life": {
            "property": "time_to_failure",
            "structure": ETHANOL,
            "temperature_kelvin": 100.0,
            "equilibration_ps": 0.0,
            "duration_ps": 0.02,
        },
        "vibrations": {"property": "vibrations", "structure": ETHANOL, "max_steps": 2},
    },
    "reference": {"calculator": "gfn2-xtb"},
}


@pytest.fixture(scope="session")
def measured_run(shared_folder: Path, finished_study: Path, finished_run: Path) -> Path:
    """A copy of the finished run whose study asks for two properties.

    One trial also has refined weights, and the model of another cannot be opened.
    """
    folder = shared_folder / "measured"
    run = folder / "run"
    with FileLock(shared_folder / "measured.lock"):
        if not (run / "report" / "ranking.json").exists():
            shutil.copytree(finished_run, run, ignore=shutil.ignore_patterns("report", "study.*"))
            study = {**yaml.safe_load(finished_study.read_text()), "properties": [SECTION]}
            (folder / "study.yaml").write_text(yaml.safe_dump(study))
            resolve(folder / "study.yaml").write(run)
            first, *_, last = confirmed(run)
            refine(first, run)
            (checkpoint_folder(run, last.key.trial_id) / FINAL).write_bytes(b"")  # as a failing disk leaves it
            done = tunebench("properties", run, TUNEBENCH_CACHE=str(folder / "no-data"))
            (folder / "first.log").write_text(done.stdout)
            tunebench("report", run)
    return run


def confirmed(run: Path) -> list[TrialRecord]:
    return [trial for trial in read_trials(run) if trial.key.stage is Stage.CONFIRM]


def refine(trial: TrialRecord, run: Path) -> None:
    """Leave refined weights: the raw ones, a little larger."""
    folder = checkpoint_folder(run, trial.key.trial_id)
    module = torch.load(folder / LAST, weights_only=True)["module"]
    weights = {
        name.removeprefix("model."): 1.01 * weight.double()
        for name, weight in module.items()
        if name.startswith("model.") and weight.is_floating_point()
    }
    torch.save({"weights": weights, "refinement": {}}, folder / REFINED)


@pytest.fixture
def rows(measured_run: Path) -> dict[str, tuple[PropertyRow, ...]]:
    models = [trial.key.trial_id for trial in confirmed(measured_run)]
    models.append(f"{models[0]}.{Readout.REFINED}")
    return {model: load_properties(rows_file(measured_run, model)) for model in models}


def test_every_model_of_the_confirm_stage_has_every_entry_and_failures_are_among_them(
    measured_run: Path, rows: dict[str, tuple[PropertyRow, ...]]
) -> None:
    lost = confirmed(measured_run)[-1].key.trial_id
    written = {file.name for file in (measured_run / PROPERTIES).glob("*.parquet")}
    assert written == {
        *(f"{model}.parquet" for model in rows),
        *(f"{model}.curves.parquet" for model in [*rows, "reference-0"]),
    }
    for model, own in rows.items():
        assert {row.entry for row in own} == set(SECTION["properties"])
        assert {row.model for row in own} == {model}
        assert all(row.failed and "converge" in row.reason for row in own if row.entry == "vibrations") or model == lost
        assert all(not row.failed and row.error is not None for row in own if row.entry == "life") or model == lost
    assert set(read_reference(measured_run, 0)) == set(SECTION["properties"])


def test_a_model_that_cannot_be_opened_is_counted_and_costs_no_other(
    measured_run: Path, rows: dict[str, tuple[PropertyRow, ...]]
) -> None:
    own = rows[confirmed(measured_run)[-1].key.trial_id]
    assert {row.entry for row in own if row.failed} == set(SECTION["properties"])
    assert all("a model that NequIP can load" in row.reason for row in own)


def test_properties_take_neither_the_data_nor_the_study_file(measured_run: Path) -> None:
    said = (measured_run.parent / "first.log").read_text()
    assert "5 of 5 models done" in said
    assert said.splitlines()[-1] == "properties: 5 of 5 models complete, 10 of 10 entries, 6 failed"
    assert not (measured_run.parent / "no-data").exists()


def test_a_run_computes_what_is_not_there_and_nothing_again(
    measured_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def stamps() -> dict[str, int]:
        return {file.name: file.stat().st_mtime_ns for file in (measured_run / PROPERTIES).iterdir()}

    lost = rows_file(measured_run, confirmed(measured_run)[1].key.trial_id)
    rows, before = load_properties(lost), stamps()
    lost.unlink()
    status = run_status(measured_run)
    assert not status["finished"]
    assert {name: status["properties"][name] for name in ("models", "complete", "entries", "done", "failed")} == {
        "models": 5,
        "complete": 4,
        "entries": 10,
        "done": 8,
        "failed": 5,
    }
    assert run_command(["watch", str(measured_run)]) == 0  # it does not wait for a driver that is not there
    assert f"no driver computes them: tunebench properties {measured_run}" in " ".join(capsys.readouterr().out.split())
    assert "properties" not in tunebench("run", measured_run, "--no-properties", "--no-report").stdout
    assert not lost.exists()
    done = tunebench("run", measured_run, "--no-report")
    assert "properties: 4 of 5 models done" in done.stdout
    assert load_properties(lost) == rows
    assert run_status(measured_run)["finished"]
    assert {name for name, stamp in stamps().items() if before[name] != stamp} == {
        lost.name,
        f"{lost.stem}.curves.parquet",
    }


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["RUN", "--readout", "ema"], "--readout: found ema, allowed: none of one model, for .* is a run directory"),
        (["emt", "--address", "auto"], "--address: found auto, allowed: it for a run directory, not for emt"),
        (["emt"], "--settings: found none, allowed: the property plan of emt, or a run directory instead"),
    ],
)
def test_options_of_a_model_and_of_a_run_do_not_mix(
    measured_run: Path, arguments: list[str], line: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["properties", *[str(measured_run) if one == "RUN" else one for one in arguments]]) == 2
    assert re.search(line, capfd.readouterr().err)


def test_only_a_run_whose_training_is_over_is_measured(
    measured_run: Path, finished_run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    resolve(measured_run.parent / "study.yaml").write(tmp_path)
    journal = JournalWriter(tmp_path)
    journal.add_arm("ethanol/soap", {})
    key = TrialKey(workload="ethanol", optimizer="soap", stage=Stage.CONFIRM, config_index=0, seed_index=0)
    journal.plan(key, {}, {}, {})
    assert run_command(["properties", str(tmp_path)]) == 2
    assert "found 1 trials that have not ended, allowed: a run whose training is over" in capfd.readouterr().err
    assert run_command(["properties", str(finished_run)]) == 2
    assert "found a study without properties" in capfd.readouterr().err


def test_the_weights_that_are_measured_are_those_that_rank(measured_run: Path) -> None:
    """A calculator's force error on the test split is what the trial measured with the same readout."""
    study = load_run(measured_run).study
    frames = read_prepared(prepare(study.workloads[0].data).splits["test"].path)
    for trial in (confirmed(measured_run)[0], confirmed(measured_run)[2]):  # one of each optimizer
        file = checkpoint_folder(measured_run, trial.key.trial_id) / FINAL
        assert ranking_readout(study, trial) in (Readout.RAW, Readout.EMA)
        for readout, errors in trial.result["test"].items():
            calculator = calculator_from(file, readout=Readout(readout))
            found = [np.abs(forces_of(frame, calculator) - frame.get_forces()).mean() for frame in frames]
            assert np.mean(found) == pytest.approx(errors["forces_mae"], rel=1e-5), readout


def forces_of(frame: Any, calculator: Any) -> Any:
    copied = frame.copy()
    copied.calc = calculator
    return copied.get_forces()


def test_refined_weights_are_taken_in_their_own_precision_and_named(measured_run: Path, tmp_path: Path) -> None:
    trial = confirmed(measured_run)[0]
    folder = checkpoint_folder(measured_run, trial.key.trial_id)
    parameters = dict(calculator_from(folder / REFINED).model.named_parameters())
    weights = torch.load(folder / REFINED, weights_only=True)["weights"]
    name, parameter = next(item for item in parameters.items() if item[1].numel() > 8)
    assert torch.equal(parameter.detach(), weights[f"sole_model.{name}"])
    assert not torch.equal(parameter.detach().float().double(), parameter.detach())


@pytest.mark.parametrize(
    ("trial", "readout", "line"),
    [
        (1, Readout.REFINED, r"refined\.pt: found No such file .*allowed: what a finished confirm trial leaves there"),
        (0, Readout.SCHEDULE_FREE, "readout: found schedule_free, allowed: ema, raw"),
    ],
)
def test_weights_that_are_not_there_are_told_in_one_line(
    measured_run: Path, trial: int, readout: Readout, line: str
) -> None:
    file = checkpoint_folder(measured_run, confirmed(measured_run)[trial].key.trial_id) / FINAL
    with pytest.raises(RunError, match=line):
        calculator_from(file, readout=readout)


def test_a_run_refuses_to_begin_where_a_library_is_missing(
    measured_run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from rich.console import Console

    from tunebench.properties import registry
    from tunebench.tuning.runner import RunOptions, run_study

    monkeypatch.setattr(registry, "missing_libraries", lambda: ["matcalc"])
    with pytest.raises(RunError, match=r"properties: found no matcalc, allowed: what pip install"):
        run_study(resolve(measured_run.parent / "study.yaml"), RunOptions(run=tmp_path / "run"), Console())
    assert not (tmp_path / "run").exists()


def test_a_long_round_says_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Job:
        readout, cpus, gpus, model = Readout.RAW, 1.0, 0.0, "trial"

        def left(self, run: Path) -> int:
            return self not in ended

    ended: set[Any] = set()
    jobs = [Job() for _ in range(4)]
    ray = mock.MagicMock()
    ray.remote.return_value.options.return_value.remote.side_effect = lambda job, run: job
    ray.wait.side_effect = lambda pending, timeout: (pending[:1], pending[1:])
    ray.get.side_effect = ended.add
    monkeypatch.setattr(property_tasks, "ray", ray)
    monkeypatch.setattr(property_tasks, "join_ray", mock.Mock())
    monkeypatch.setattr(property_tasks, "model_jobs", lambda *arguments: jobs)
    monkeypatch.setattr(property_tasks, "reference_jobs", lambda *arguments: [])
    monkeypatch.setattr(property_tasks, "_SAY_EVERY_S", 0.0)
    console = Console(record=True)
    property_tasks.run_properties(
        mock.Mock(), [], mock.Mock(run=tmp_path, address="auto"), storage=None, console=console
    )
    said = [line for line in console.export_text().splitlines() if "models" in line]
    assert said == [f"properties: {done} of 4 models done" for done in range(5)]
