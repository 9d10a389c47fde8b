"""The command line: every verb is one library call and a way to print it."""

from __future__ import annotations

import csv
import gc
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from tunebench import __version__
from tunebench.cluster.templates import Kind
from tunebench.study.control import Wish, ask
from tunebench.study.errors import Interrupted, RunError
from tunebench.study.record import JOURNAL, Readout, Split, Stage
from tunebench.study.spec import AshaForm, AshaOrder, StudyError
from tunebench.tuning.console_lines import say

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Fair optimizer studies for NequIP and Allegro interatomic potentials.",
)
data_app = typer.Typer(no_args_is_help=True, help="Make or look at a study's data.")
app.add_typer(data_app, name="data")
cluster_app = typer.Typer(no_args_is_help=True, help="Describe a cluster to Ray.")
app.add_typer(cluster_app, name="cluster")

StudyFile = Annotated[Path, typer.Argument(help="study file, for example studies/quickstart.yaml")]
RunFolder = Annotated[Path, typer.Argument(help="run directory")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON document on standard output")]

_BAD_INPUT = (StudyError, RunError, FileNotFoundError)
_LONGEST_LINE = 1000  # an unexpected error may carry whole tracebacks; TUNEBENCH_TRACEBACK=1 shows them
_PIPE_WIDTH = 140  # columns of a table that is not shown on a terminal
ASSUMED_SEED_SD = 0.05
_TOLD = 2  # properties that are being computed
DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


def main() -> None:
    """Entry point of the `tunebench` command; bad input ends in one line and exit code 2."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    code = run_command(sys.argv[1:])
    gc.freeze()  # all that is left goes with the process; to look through PyTorch for cycles takes a second
    sys.exit(code)


def run_command(arguments: list[str]) -> int:
    """Run one command line and return its exit code."""
    try:
        code = app(arguments, standalone_mode=False, prog_name="tunebench")
    except KeyboardInterrupt:
        return _complain("interrupted", INTERRUPTED)
    except typer.Exit as end:
        return int(end.exit_code)
    except Exception as error:
        return _complain(_one_line(error), _exit_code(error))
    return int(code or DONE)


@app.callback(invoke_without_command=True)
def options(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="print the version")] = False
) -> None:
    """Fair optimizer studies for NequIP and Allegro interatomic potentials."""
    if version:
        typer.echo(f"tunebench {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(BAD_INPUT)


@app.command()
def plan(
    study: Annotated[Path, typer.Argument(help="study file, or run directory of a study that has begun")],
    measure: Annotated[bool, typer.Option(help="time a few steps of every arm on this machine")] = True,
    seed_sd: Annotated[
        float, typer.Option("--seed-sd", min=0.0, help="assumed seed-to-seed deviation of an error, as a share of it")
    ] = ASSUMED_SEED_SD,
    as_json: Json = False,
) -> None:
    """Judge a study by the rules of a fair comparison and show what it will do. Makes its data, trains nothing.

    Rungs, expected survivors, device-hours by stage, disk, and the smallest difference that its seeds resolve. Exits 1
    where a rule fails that the study does not waive. Of a run it shows what it was extended to.
    """
    from tunebench.properties.of_study import property_needs
    from tunebench.study.journal import read_afforded
    from tunebench.study.lint import lint
    from tunebench.study.power import LEVEL, POWER, smallest_difference
    from tunebench.study.resolve import load_run, resolve
    from tunebench.study.summary import plan_summary
    from tunebench.tuning.engine_choice import choose_engines
    from tunebench.tuning.preparation import check_arms, prepare_workloads

    resolved = load_run(study) if study.is_dir() else resolve(study)
    findings = lint(resolved)
    data = prepare_workloads(resolved, _stderr())
    check_arms(resolved, data)
    choices = choose_engines(resolved, data)
    for choice in choices.values():
        if choice.reason:
            _stderr().print(choice.warning(), style="yellow", highlight=False, soft_wrap=True)
    seconds = None
    if measure:
        from tunebench.engine.calibration import step_seconds

        seconds = step_seconds(resolved, data)
    from tunebench.tuning.footprint import disk_bytes

    engines = {name: choice.to_plain() for name, choice in choices.items()}
    frames = {name: prepared.splits[Split.TRAIN].frames for name, prepared in data.items()}
    afforded = read_afforded(study) if (study / JOURNAL).is_file() else None
    summary = plan_summary(resolved, seconds, engines, afforded=afforded, training_frames=frames)
    resolvable = smallest_difference(resolved.study.confirm.seeds)
    summary |= {
        "disk_bytes": disk_bytes(resolved, data),
        "resolvable": {
            "seeds": resolved.study.confirm.seeds,
            "power": POWER,
            "level": LEVEL,
            "seed_sds": resolvable if math.isfinite(resolvable) else None,
            "assumed_seed_sd": seed_sd,
            "share_of_error": resolvable * seed_sd if math.isfinite(resolvable) else None,
        },
        "rules": [finding.to_plain() for finding in findings],
        "properties": property_needs(resolved.study, summary["arms"]),
    }
    _print(summary, as_json, _plan_view)
    if any(finding.blocks for finding in findings):
        raise typer.Exit(FAILED)


@app.command()
def run(
    study: Annotated[
        str | None, typer.Argument(help="study file; a run directory or a run's storage goes on with that run")
    ] = None,
    run_folder: Annotated[Path | None, typer.Option("--run", help="run directory, else runs/NAME-HASH")] = None,
    storage: Annotated[
        str | None,
        typer.Option(
            help="address such as s3://bucket/studies where all nodes keep checkpoints and curves, in NAME-HASH; left "
            "out, the run directory"
        ),
    ] = None,
    address: Annotated[str | None, typer.Option(help="Ray cluster to join, `auto` on a cluster's node")] = None,
    extend: Annotated[
        int,
        typer.Option(
            min=0,
            help="more configurations for every arm of a run that began; widens ranges whose best lies at the edge",
        ),
    ] = 0,
    drivers: Annotated[
        int,
        typer.Option(min=1, help="processes that share the arms, where one cannot take in the reports of all trials"),
    ] = 1,
    properties: Annotated[
        bool, typer.Option(help="compute the study's properties; left out, `tunebench properties RUN` does so later")
    ] = True,
    report: Annotated[bool, typer.Option(help="write the report at the end")] = True,
    as_json: Json = False,
) -> None:
    """Run a study, or go on where it stopped. Ctrl-C keeps everything."""
    from tunebench.tuning.run_source import source_of
    from tunebench.tuning.runner import RunOptions, run_study

    console = _stderr() if as_json else _stdout()
    found = source_of(study or str(_default_study()), run_folder, storage)
    console.print(f"run directory: {found.folder}", highlight=False, soft_wrap=True)
    options = RunOptions(
        run=found.folder,
        address=address,
        extend=extend,
        storage=found.storage,
        drivers=drivers,
        properties=properties,
    )
    records = run_study(found.resolved, options, console)
    summary: dict[str, Any] = {"run": str(found.folder), "trials": len(records)}
    if report:
        summary |= _write_report(found.folder)
    _print(summary, as_json, lambda s: f"report: {s['report']}" if report else f"run: {s['run']}")
    _fail_for_checks(summary)


@app.command("pretrain")
def pretrain_command(
    study: StudyFile,
    out: Annotated[Path | None, typer.Option(help="file to write, ending in .ckpt; else bases/NAME.ckpt")] = None,
    as_json: Json = False,
) -> None:
    """Train the one arm of a study to its horizon and keep it as a base model that `init` of other studies takes.

    Hyperparameters are the study's fixed ones and defaults. An interrupted training goes on; another study's file is
    never overwritten.
    """
    from tunebench.pretraining import base_path, check_pretraining, pretrain
    from tunebench.study.resolve import resolve
    from tunebench.tuning.preparation import check_arms, prepare_workloads

    resolved, console = resolve(study), _stderr()
    check_pretraining(resolved)
    data = prepare_workloads(resolved, console)
    check_arms(resolved, data)
    (prepared,) = data.values()
    file = out or base_path(resolved)
    record = pretrain(resolved, prepared, file, partial(say, console))
    _print({"file": str(file), **record}, as_json, lambda found: f"base model: {found['file']}")


@app.command()
def fetch(
    address: Annotated[str, typer.Argument(help="storage of a run, for example s3://bucket/studies/NAME-HASH")],
    run_folder: Annotated[Path | None, typer.Option("--run", help="run directory to make, else runs/NAME-HASH")] = None,
    checkpoints: Annotated[bool, typer.Option(help="bring checkpoints, too")] = True,
    as_json: Json = False,
) -> None:
    """Bring a run, finished or not, from its storage to a run directory; what has not changed is left as it is."""
    from tunebench.study.run_copy import fetch_run
    from tunebench.study.storage import Storage

    folder = run_folder or Path("runs") / address.rstrip("/").rpartition("/")[2]
    came = fetch_run(Storage(address), folder, checkpoints=checkpoints)
    _print({"run": str(folder), "files": len(came)}, as_json, lambda f: f"{f['run']}: {f['files']} files came")


@app.command()
def calibrate(
    source: Annotated[
        Path, typer.Argument(help="run directory, or study file: its run directory is then runs/NAME-HASH")
    ],
    run_folder: Annotated[Path | None, typer.Option("--run", help="run directory")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="times that every step is measured")] = 5,
    seconds: Annotated[float, typer.Option(min=0.0, help="least duration of one measurement")] = 0.5,
    address: Annotated[
        str | None,
        typer.Option(help="Ray cluster to join: measure one device of every kind that it has; left out, this device"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure what a step of every arm takes alone on a device, for the report's time axis.

    The file keeps one table for each kind of device; a kind that is measured again gets a new one.
    """
    from tunebench.tuning.calibration import CalibrateOptions, calibrate_run

    options = CalibrateOptions(run=run_folder, address=address, rounds=rounds, seconds=seconds)
    file, calibration = calibrate_run(source, options, _stderr())
    _print({"file": str(file), **calibration.model_dump(mode="json")}, as_json, _calibration_table)


@app.command()
def pause(run_folder: RunFolder, as_json: Json = False) -> None:
    """Let every trial of a running study give up its device at its next evaluation; the driver waits."""
    _ask(run_folder, Wish.PAUSE, as_json)


@app.command()
def resume(run_folder: RunFolder, as_json: Json = False) -> None:
    """Let a paused, draining or cancelled study go on; one without a driver needs `tunebench run` as well."""
    _ask(run_folder, Wish.RESUME, as_json)


@app.command()
def drain(run_folder: RunFolder, as_json: Json = False) -> None:
    """Start nothing new; the driver ends when what trains has reached its next rung or its end."""
    _ask(run_folder, Wish.DRAIN, as_json)


@app.command()
def cancel(run_folder: RunFolder, as_json: Json = False) -> None:
    """End the driver at once, keep everything, and do not start again before `tunebench resume`."""
    _ask(run_folder, Wish.CANCEL, as_json)


@app.command()
def status(run_folder: RunFolder, as_json: Json = False) -> None:
    """Count a run's trials by arm, stage and how they ended."""
    from tunebench.study.status import run_status

    _print(run_status(run_folder), as_json, _status_table)


@app.command()
def watch(
    run_folder: RunFolder,
    every: Annotated[float, typer.Option(min=0.1, help="seconds between two looks")] = 2.0,
    as_json: Json = False,
) -> None:
    """Show the status of a run until it is finished, from its files alone; with --json a line per look.

    It ends, too, where the training is over and no driver computes the properties that are left. Without a terminal the
    status is printed whenever it has changed.
    """
    from tunebench.study.status import run_status

    console = _stderr() if as_json else _stdout()
    shown: dict[str, Any] | None = None
    with Live(console=console, transient=as_json) if console.is_terminal else nullcontext() as live:
        while True:
            summary = run_status(run_folder)
            if as_json:
                typer.echo(json.dumps(summary))
            if live is not None:
                live.update(_status_table(summary))
            elif not as_json and _without_clocks(summary) != shown:
                console.print(_status_table(summary))
            if summary["finished"] or _left_to_others(summary["properties"]):
                return
            shown = _without_clocks(summary)
            time.sleep(every)


@app.command()
def explain(
    trial: Annotated[str, typer.Argument(help="trial id, or the start of one")],
    run_folder: Annotated[Path, typer.Argument(help="run directory")],
    as_json: Json = False,
) -> None:
    """Say what happened to a trial and why."""
    from tunebench.study.status import explain_trial

    _print(explain_trial(run_folder, trial), as_json, lambda e: e["text"])


@app.command()
def replay(
    run_folder: RunFolder,
    reduction_factor: Annotated[int | None, typer.Option(min=2, help="another tune.asha.reduction_factor")] = None,
    grace_steps: Annotated[int | None, typer.Option(min=1, help="another tune.asha.grace_steps")] = None,
    form: Annotated[AshaForm | None, typer.Option(help="another tune.asha.form")] = None,
    order: Annotated[AshaOrder | None, typer.Option(help="another tune.asha.order")] = None,
    arrivals: Annotated[int, typer.Option(min=1, help="random arrivals")] = 200,
    seed: Annotated[int, typer.Option(min=0, help="seed of the arrivals")] = 0,
    as_json: Json = False,
) -> None:
    """Replay early stopping over a run's recorded curves: what other settings, or another arrival, would have lost."""
    from tunebench.tuning.replay import replay_run

    given = {"reduction_factor": reduction_factor, "grace_steps": grace_steps, "form": form, "order": order}
    changes = {name: value for name, value in given.items() if value is not None}
    if changes.get("form") is AshaForm.STOPPING:
        changes.setdefault("order", AshaOrder.ASYNCHRONOUS)
    _print(replay_run(run_folder, changes, arrivals, seed), as_json, _replay_view)


@app.command("curvature")
def curvature_command(
    run_folder: RunFolder,
    trial: Annotated[str, typer.Argument(help="trial id, or the start of one")],
    at: Annotated[
        list[int] | None,
        typer.Option(min=1, help="step to train the trial to again, may be repeated; left out, its checkpoint is read"),
    ] = None,
    rungs: Annotated[bool, typer.Option("--rungs", help="train it again to each of its rungs and to its end")] = False,
    frames: Annotated[int, typer.Option(min=1, help="training frames that the loss runs over at most")] = 40,
    chunk_frames: Annotated[int, typer.Option(min=1, help="of them, those that go through the model together")] = 8,
    probes: Annotated[int, typer.Option(min=1, help="random vectors of the spectral density")] = 4,
    steps: Annotated[int, typer.Option(min=1, help="Lanczos steps from each of them")] = 40,
    trace_products: Annotated[int, typer.Option(min=0, help="products for the trace, 0 or at least 3")] = 30,
    seed: Annotated[int, typer.Option(min=0, help="of frames and random vectors")] = 0,
    recompute: Annotated[
        bool, typer.Option("--recompute", help="keep no graphs: less memory, up to twice the time")
    ] = False,
    device: Annotated[Literal["cpu", "cuda"] | None, typer.Option(help="left out, CUDA where there is any")] = None,
    as_json: Json = False,
) -> None:
    """Measure the curvature of the training loss where a trial has come to, with and without its preconditioner.

    Writes RUN/curvature/TRIAL.json, which the report shows. It explains an optimizer and never ranks one.
    """
    from tunebench.curvature.measure import measure_curvature
    from tunebench.curvature.record import CurvatureSettings, summary_rows

    settings = CurvatureSettings(
        frames=frames,
        chunk_frames=chunk_frames,
        probes=probes,
        steps=steps,
        trace_products=trace_products,
        seed=seed,
        keep_graphs=not recompute,
    )
    tell = partial(say, _stderr())
    record = measure_curvature(run_folder, trial, settings, tell, at=at or (), along_rungs=rungs, device=device)
    _print(summary_rows(record), as_json, _curvature_table)


@app.command("report")
def report_command(
    run_folder: RunFolder,
    out: Annotated[Path | None, typer.Option(help="folder of the report, else RUN/report")] = None,
    as_json: Json = False,
) -> None:
    """Write report/index.html and report/ranking.json of a run, finished or not; exits 1 where a check failed."""
    summary = _write_report(run_folder, out)
    _print(summary, as_json, lambda r: r["report"])
    _fail_for_checks(summary)


@app.command("export")
def export_command(
    run_folder: RunFolder,
    workload: Annotated[str | None, typer.Option(help="workload by name; left out, the only one")] = None,
    arm: Annotated[str | None, typer.Option(help="this arm's best configuration, whatever the verdict")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="file to write, else standard output")] = None,
    as_json: Json = False,
) -> None:
    """Write the recommended configuration as a complete `nequip-train` config, after NequIP has accepted it."""
    from tunebench.export import export

    exported = export(run_folder, workload, arm)
    if out:
        out.write_text(exported.text, encoding="utf-8")
        _stderr().print(exported.choice.why, highlight=False, soft_wrap=True, markup=False)
    if as_json or not out:
        summary = {**asdict(exported.choice), "seed_index": exported.seed_index, "file": str(out) if out else None}
        typer.echo(json.dumps({**summary, "config": exported.text}, indent=2) if as_json else exported.text, nl=as_json)


@app.command("inspect")
def inspect_command(
    study: StudyFile,
    workload: Annotated[str | None, typer.Option(help="one workload by name, else all")] = None,
    fctp_view: Annotated[
        Literal["flat", "per_type", "merged"], typer.Option(help="how FullyConnectedTensorProduct weights are read")
    ] = "merged",
    split_heads: Annotated[bool, typer.Option("--split-heads", help="cut fused last layers by output")] = False,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="also write the blocks to this file")] = None,
    as_json: Json = False,
) -> None:
    """Show what an optimizer sees of each workload's model: its blocks, their rule, their share, dead or live."""
    from tunebench.optim.inspection import chosen_workloads, inspect_workload
    from tunebench.optim.matrix_view import FctpView
    from tunebench.study.resolve import resolve
    from tunebench.tuning.preparation import prepare_workloads

    resolved = resolve(study)
    chosen = chosen_workloads(resolved, workload)
    data = prepare_workloads(resolved, _stderr())
    view = FctpView(fctp_view)
    found = (inspect_workload(resolved, i, data, fctp_view=view, split_heads=split_heads) for i in chosen)
    rows = [inspection.to_plain() for inspection in found]
    if csv_file:
        _write_blocks(csv_file, rows)
    _print(rows, as_json, lambda all_rows: Group(*(table for each in all_rows for table in _block_tables(each))))


@app.command("properties")
def properties_command(
    model: Annotated[
        str,
        typer.Argument(
            help="run directory, for all models of its confirm stage; or final.ckpt or refined.pt of one of its "
            "trials, a packaged model, or emt"
        ),
    ],
    settings: Annotated[
        Path | None, typer.Option(help="property plan of one model: what to compute, of what, against what")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="file for the rows, .parquet or .json")] = None,
    device: Annotated[Literal["cpu", "cuda"] | None, typer.Option(help="where one model runs, else cpu")] = None,
    readout: Annotated[
        Readout | None, typer.Option(help="weights of a confirm trial; left out, those final.ckpt evaluates with")
    ] = None,
    address: Annotated[str | None, typer.Option(help="Ray cluster to join for the models of a run")] = None,
    as_json: Json = False,
) -> None:
    """Compute physical properties in float64 and compare them with a reference.

    Of one model by a plan, which exits 1 where one failed. Or, on any machine that has the run directory, what the
    study of a run asks of its models and is not there yet: `tunebench report` shows it.
    """
    from tunebench.properties.command import evaluate_model, rows_table

    if Path(model).is_dir():
        of_one_model = {"--settings": settings, "--out": out, "--device": device, "--readout": readout}
        _refuse_options(of_one_model, f"none of one model, for {model} is a run directory")
        from tunebench.tuning.measure_run import measure_run

        found = measure_run(Path(model), address, _stderr() if as_json else _stdout())
        _print(found, as_json, lambda f: _properties_line(f["run"], {**f, "driver": False}))
        return
    _refuse_options({"--address": address}, f"it for a run directory, not for {model}")
    if settings is None:
        raise RunError(f"--settings: found none, allowed: the property plan of {model}, or a run directory instead")
    rows = evaluate_model(model, settings, out, device or "cpu", readout)
    _print([row.to_plain() for row in rows], as_json, lambda _: rows_table(rows))
    if any(row.failed for row in rows):
        raise typer.Exit(FAILED)


@app.command()
def doctor(
    folder: Annotated[Path, typer.Option(help="where runs will lie")] = Path("runs"),
    address: Annotated[str | None, typer.Option(help="Ray cluster to examine, `auto` on one of its nodes")] = None,
    as_json: Json = False,
) -> None:
    """Look for what would keep a study from running: versions, devices, storage, free space, clocks; exits 1 on any."""
    from tunebench.tuning.doctor import examine

    found = [finding.to_plain() for finding in examine(folder, address)]
    _print(found, as_json, _doctor_table)
    if not all(finding["ok"] for finding in found):
        raise typer.Exit(FAILED)


@app.command()
def schema(as_json: Json = True) -> None:
    """Print the JSON-Schema of study files, with or without --json."""
    from tunebench.study.schema import study_schema

    typer.echo(json.dumps(study_schema(), indent=2))


@data_app.command("make")
def data_make(study: StudyFile, as_json: Json = False) -> None:
    """Make or fetch the data of every workload of a study."""
    from tunebench.study.resolve import resolve
    from tunebench.tuning.preparation import prepare_workloads

    prepared = prepare_workloads(resolve(study), _stderr())
    rows = {
        name: {"folder": str(data.folder), "hash": data.hash, "frames": {s: f.frames for s, f in data.splits.items()}}
        for name, data in prepared.items()
    }
    _print(rows, as_json, lambda r: "\n".join(f"{n}: {row['frames']} in {row['folder']}" for n, row in r.items()))


@data_app.command("inspect")
def data_inspect(study: StudyFile, as_json: Json = False) -> None:
    """Describe the data of every workload: frames, species, energies, forces, neighbours, energy shifts."""
    from tunebench.study.resolve import resolve
    from tunebench.tuning.preparation import prepare_workloads
    from tunebench.workloads.inspection import inspect

    resolved = resolve(study)
    prepared = prepare_workloads(resolved, _stderr())
    rows = {w.name: inspect(prepared[w.name], w.model.r_max_angstrom) for w in resolved.study.workloads}
    _print(rows, as_json, lambda r: json.dumps(r, indent=2))


@cluster_app.command("init")
def cluster_init(
    kind: Annotated[Kind, typer.Option(help="where the machines come from")],
    answer: Annotated[
        list[str] | None, typer.Option("--answer", "-a", metavar="NAME=VALUE", help="to a question, may be repeated")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="file to write, else a name after the kind")] = None,
    as_json: Json = False,
) -> None:
    """Write the description of a cluster: a copy of that in `cluster/` with your answers in it.

    On a terminal it asks for what is left; otherwise what has no usual answer must be given.
    """
    from tunebench.cluster.templates import next_commands, parsed_answers, write_description

    answers = parsed_answers(answer or ())
    if not as_json and sys.stdin.isatty():
        answers |= _asked(kind, answers)
    files = write_description(kind, answers, out)
    summary = {"files": [str(file) for file in files], "next": next_commands(kind, files[0])}
    _print(summary, as_json, lambda s: "\n".join([f"wrote {', '.join(s['files'])}; next:", *s["next"]]))


def _asked(kind: Kind, answers: Mapping[str, str]) -> dict[str, str]:
    """Answers to the questions of a kind of cluster that were not given, from the terminal."""
    from tunebench.cluster.templates import QUESTIONS

    open_questions = [question for question in QUESTIONS[kind] if question.name not in answers]
    return {
        question.name: question.checked(
            typer.prompt(question.asks, default=None if question.required else question.example)
        )
        for question in open_questions
    }


def _refuse_options(given: Mapping[str, Any], allowed: str) -> None:
    """Refuse options that say nothing where they are given; None stands for one that is left out."""
    for name, value in given.items():
        if value is not None:
            raise RunError(f"{name}: found {value}, allowed: {allowed}")


def _ask(run_folder: Path, wish: Wish, as_json: bool) -> None:
    ask(run_folder, wish)
    _print({"run": str(run_folder), "asked": wish.value}, as_json, lambda a: f"{a['run']}: {a['asked']}")


def _write_report(run_folder: Path, out: Path | None = None) -> dict[str, Any]:
    from analysis.report import write_report

    result = write_report(run_folder, out)
    return {
        "report": str(result.page),
        "ranking": str(result.ranking),
        "failed_checks": list(result.failed_checks),
    }


def _fail_for_checks(summary: dict[str, Any]) -> None:
    for line in summary.get("failed_checks", ()):
        _complain(f"check failed: {line}", FAILED)
    if summary.get("failed_checks"):
        raise typer.Exit(FAILED)


def _default_study() -> Path:
    from tunebench.study.installed import shipped_folder

    return shipped_folder("studies") / "quickstart.yaml"


def _print(content: Any, as_json: bool, text: Callable[[Any], Any]) -> None:
    if as_json:
        typer.echo(json.dumps(content, indent=2))
    else:
        shown = text(content)
        _stdout().print(shown, highlight=False, markup=False, soft_wrap=isinstance(shown, str))


def _plan_view(summary: dict[str, Any]) -> Group:
    return Group(_plan_table(summary), *_plan_lines(summary), _rules_table(summary["rules"]))


def _plan_lines(summary: dict[str, Any]) -> list[str]:
    lines = [f"disk: up to {summary['disk_bytes'] / 2**20:.0f} MiB of checkpoints at once"]
    if summary["expected_device_s"] is not None:
        stages = (f"{summary[f'expected_{stage}_device_s'] / 3600:.3g} in the {stage} stage" for stage in Stage)
        lines.append(f"device-hours of training: {', '.join(stages)}; evaluation comes on top")
    if summary["expected_refine_device_s"]:
        hours = summary["expected_refine_device_s"] / 3600
        lines.append(f"device-hours of refinement: {hours:.3g} in float32, up to twice that in float64")
    lines += [f"properties: {need['text']}" for need in summary["properties"]]
    power = summary["resolvable"]
    if power["seed_sds"] is None:
        return [*lines, "resolution: one seed resolves nothing"]
    return [
        *lines,
        f"resolution: {power['seeds']} paired seeds see a true difference of {power['seed_sds']:.2g} seed standard "
        f"deviations with {100 * power['power']:.0f} % power, that is {100 * power['share_of_error']:.2g} % of the "
        f"error if a seed moves it by {100 * power['assumed_seed_sd']:.2g} % (assumed, --seed-sd)",
    ]


def _rules_table(rules: list[dict[str, str]]) -> Table:
    table = Table(title="rules of a fair comparison; the report judges F5, F16, F18 and F19", title_justify="left")
    for column in ("rule", "verdict", "why", "mend"):
        table.add_column(column, no_wrap=column in ("rule", "verdict"), overflow="fold")
    for rule in rules:
        waived = f"waived: {rule['waived']}" if rule["waived"] else rule["mend"]
        table.add_row(rule["rule"], rule["verdict"], rule["reason"], waived)
    return table


def _plan_table(summary: dict[str, Any]) -> Table:
    seconds = summary["expected_device_s"]
    cost = "" if seconds is None else f", about {seconds:.0f} device-seconds"
    table = Table(title=f"{summary['study']}: {summary['trials']} trials{cost}", title_justify="left")
    counted = ("slots", "trials", "confirm", "horizon", "rungs", "survivors", "step [ms]", "device-seconds")
    for column in ("arm", "engine", *counted):
        table.add_column(column, justify="right" if column in counted else "left", no_wrap=column == "arm")
    for arm in summary["arms"]:
        table.add_row(
            arm["arm"],
            arm["engine"] or "",
            "" if arm["slots"] is None else str(arm["slots"]),
            _capped(arm),
            str(arm["confirm_trials"]),
            str(arm["horizon_steps"]),
            _rungs(arm),
            " ".join(map(str, arm["expected_survivors"])),
            "" if arm["step_s"] is None else f"{1e3 * arm['step_s']:.1f}",
            "" if arm["expected_device_s"] is None else f"{arm['expected_device_s']:.0f}",
        )
    return table


def _capped(arm: dict[str, Any]) -> str:
    """Trials of an arm, how many there would be without its cap on device-seconds, and how many are sentinels."""
    count, wanted = arm["trials"], arm["trials_without_cap"]
    trials = str(count) if count == wanted else f"{count} of {wanted}"
    return f"{trials} ({arm['sentinels']} s.)" if arm["sentinels"] else trials


def _rungs(arm: dict[str, Any]) -> str:
    """Steps of the rungs, and whether each ends a schedule of its own."""
    steps = " ".join(map(str, arm["rungs"]))
    return f"{steps} (rescale)" if arm["fidelity"] == "rescale" else steps


def _replay_view(summary: dict[str, Any]) -> Group:
    asha = ", ".join(f"{name} {value}" for name, value in summary["asha"].items() if value is not None)
    replayed = Table(title=f"{summary['run']}: {summary['arrivals']} arrivals; {asha}", title_justify="left")
    counted = ("trials", "rungs", "best lost [%]", "best objective", "best left", "outcomes", "steps saved [%]")
    for column in ("arm", *counted):
        replayed.add_column(column, justify="left" if column == "arm" else "right", no_wrap=column == "arm")
    for row in summary["arms"]:
        lost = f"{100 * row['best_lost']:.1f} ({100 * row['best_lost_low']:.0f} to {100 * row['best_lost_high']:.0f})"
        cells = (lost, f"{row['best_objective']:.4g}", f"{row['best_left_objective']:.4g}")
        saved = f"{100 * row['steps_saved']:.0f}"
        replayed.add_row(row["arm"], str(row["trials"]), _rungs(row), *cells, str(row["different_outcomes"]), saved)
    evidence = Table(title="sentinels: what the run's own rungs would have stopped", title_justify="left")
    for column in ("arm", "sentinels", "would stop", "wrongly", "false stops [%]"):
        evidence.add_column(column, justify="left" if column == "arm" else "right", no_wrap=column == "arm")
    for row in summary["sentinels"]:
        counts = (str(row[name]) for name in ("sentinels", "would_stop", "wrongly"))
        evidence.add_row(row["arm"], *counts, _rate(row))
    return Group(replayed, evidence)


def _curvature_table(rows: list[dict[str, Any]]) -> Table:
    table = Table("step", "operator", "largest", "least", "trace", "condition", "spread, decades", "products", "s")
    for row in rows:
        wanted = (row[name] for name in ("largest", "least", "trace", "condition", "spread_decades"))
        numbers = ["" if value is None else f"{value:.3g}" for value in wanted]
        table.add_row(str(row["step"]), row["operator"], *numbers, str(row["products"]), f"{row['seconds']:.1f}")
    return table


def _doctor_table(found: list[dict[str, Any]]) -> Table:
    table = Table(title="doctor", title_justify="left")
    for column in ("check", "where", "found", "mend"):
        table.add_column(column, overflow="fold")
    for finding in found:
        table.add_row(finding["check"], finding["where"], finding["found"], finding["mend"] or "well")
    return table


def _calibration_table(summary: dict[str, Any]) -> Group:
    return Group(summary["file"], *map(_device_table, summary["tables"]))


def _device_table(times: dict[str, Any]) -> Table:
    title = f"{times['device']}, {times['rounds']} rounds, median (quartiles)"
    table = Table(title=title, title_justify="left")
    for column in ("arm", "settings", "engine", "plain step [ms]", "refresh step [ms]"):
        table.add_column(column, justify="right" if "[ms]" in column else "left", no_wrap=column == "arm")
    for step in times["steps"]:
        settings = " ".join(f"{name}={value}" for name, value in step["settings"].items())
        steps = (_milliseconds(step[kind]) for kind in ("plain", "refresh"))
        table.add_row(f"{step['workload']}/{step['optimizer']}", settings, step["engine"], *steps)
    return table


def _milliseconds(timed: dict[str, Any] | None) -> str:
    if timed is None:
        return ""
    median, low, high = (f"{1e3 * timed[name]:.2f}" for name in ("median_s", "low_s", "high_s"))
    return f"{median} ({low} to {high})"


def _status_table(summary: dict[str, Any]) -> Table:
    state = "finished" if summary["finished"] else "not finished"
    state += "" if summary["asked"] == Wish.RESUME else f", asked to {summary['asked']}"
    state += f", {summary['notice']}" if summary["notice"] else ""
    table = Table(title=f"{summary['run']}: {state}", title_justify="left")
    counted = ("planned", "waiting", "running", "at_rung", "FINISHED", "STOPPED_ASHA", "failed")
    for column in ("arm", "stage", "engine", *counted, "best objective", "false stops [%]"):
        left = column in ("arm", "stage", "engine")
        table.add_column(column, justify="left" if left else "right", no_wrap=left, overflow="fold")
    for row in summary["arms"]:
        best = "" if row["best_objective"] is None else f"{row['best_objective']:.4g}"
        counts = (str(row[name]) for name in counted)
        table.add_row(row["arm"], row["stage"], row["engine"], *counts, best, _rate(row["false_stops"]))
    if summary["properties"] is not None:
        table.caption, table.caption_justify = _properties_line(summary["run"], summary["properties"]), "left"
    return table


def _left_to_others(properties: dict[str, Any] | None) -> bool:
    """Whether a trained run lacks properties and no driver is at work on them."""
    return properties is not None and properties["complete"] < properties["models"] and not properties["driver"]


def _properties_line(run: str, properties: dict[str, Any]) -> str:
    line = "properties: {complete} of {models} models complete, {done} of {entries} entries, {failed} failed"
    line = line.format(**properties)
    if _left_to_others(properties):
        return f"{line}; no driver computes them: tunebench properties {run}"
    now = [f"{one['entry']} of {one['model']} for {one['seconds']:.0f} s" for one in properties["running"]]
    if not now or not properties["driver"]:
        return line
    return f"{line}; now {', '.join(now[:_TOLD])}" + (f" and {len(now) - _TOLD} more" if len(now) > _TOLD else "")


def _without_clocks(summary: dict[str, Any]) -> dict[str, Any]:
    """What of a status changes only when something has happened."""
    if summary["properties"] is None:
        return summary
    running = [(one["model"], one["entry"]) for one in summary["properties"]["running"]]
    return {**summary, "properties": {**summary["properties"], "running": running}}


def _rate(stops: dict[str, Any] | None) -> str:
    """A rate of false stops with its interval, in percent; empty without sentinels."""
    if stops is None or stops["rate"] is None:
        return ""
    return f"{100 * stops['rate']:.0f} ({100 * stops['low']:.0f} to {100 * stops['high']:.0f})"


def _block_tables(inspection: dict[str, Any]) -> tuple[Table, Table]:
    live = inspection["live_parameters"] / inspection["parameters"]
    title = f"{inspection['workload']}: {inspection['parameters']} parameters, {100 * live:.2f} % live"
    blocks = Table(title=title, title_justify="left", caption=inspection["evidence"], caption_justify="left")
    for column in ("tensor", "path", "shape", "view", "rule", "share [%]", "gradient"):
        blocks.add_column(column, justify="right" if column == "share [%]" else "left", overflow="fold")
    for row in inspection["blocks"]:
        shape, share = " x ".join(map(str, row["shape"])), f"{100 * row['share']:.3f}"
        blocks.add_row(row["tensor"], row["path"], shape, row["view"], row["rule"], share, _gradient(row))
    reach = Table(title=f"{inspection['workload']}: under the matrix rule", title_justify="left")
    for column in ("matrices chosen by", "parameters", "of all [%]", "of live [%]"):
        reach.add_column(column, justify="left" if column == "matrices chosen by" else "right")
    for row in inspection["reach"]:
        shares = (f"{100 * row[name]:.2f}" for name in ("share", "share_of_live"))
        reach.add_row(row["chosen_by"], str(row["parameters"]), *shares)
    return blocks, reach


def _write_blocks(file: Path, inspections: list[dict[str, Any]]) -> None:
    names = ("workload", "tensor", "path", "shape", "view", "rule", "parameters", "share", "gradient")
    with file.open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, names, extrasaction="ignore")
        writer.writeheader()
        for each in inspections:
            for row in each["blocks"]:
                shape = "x".join(map(str, row["shape"]))
                writer.writerow({**row, "workload": each["workload"], "shape": shape, "gradient": _gradient(row)})


def _gradient(row: dict[str, Any]) -> str:
    live = float(row["live_share"])
    return "dead" if live == 0 else "live" if live == 1 else f"{100 * live:.1f} % live"


def _stdout() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=_PIPE_WIDTH)


def _stderr() -> Console:
    return Console(stderr=True)


def _one_line(error: Exception) -> str:
    text = getattr(error, "format_message", lambda: str(error))() or type(error).__name__
    line = " ".join(str(text).split())
    return line if len(line) <= _LONGEST_LINE else f"{line[:_LONGEST_LINE]} ..."


def _exit_code(error: Exception) -> int:
    if isinstance(error, Interrupted):
        return INTERRUPTED
    if isinstance(error, _BAD_INPUT) or type(error).__module__.startswith(("click", "typer")):
        return BAD_INPUT
    if os.environ.get("TUNEBENCH_TRACEBACK"):
        raise error
    return FAILED


def _complain(line: str, code: int) -> int:
    Console(stderr=True).print(f"tunebench: {line}", highlight=False, soft_wrap=True, markup=False)
    return code
