from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tunebench.study.installed import shipped_folder
from tunebench.study.lint import Finding, Verdict, lint, refuse_unfair, smallest_grace
from tunebench.study.plan import plan_arms
from tunebench.study.resolve import ResolvedStudy, resolve
from tunebench.study.spec import StudyError
from tunebench.workloads.models import model_config
from tunebench.workloads.statistics import TrainingStatistics
from tunebench.workloads.trained_model import adopted_model

STUDIES = sorted(shipped_folder("studies").glob("*.yaml"))
WORKLOAD: dict[str, Any] = {
    "name": "ethanol",
    "data": {"source": "xtb", "system": "ethanol", "frames": {"train": 10, "val": 4, "test": 4}},
    "model": {"family": "nequip"},
    "max_steps": 400,
}
FAIR: dict[str, Any] = {
    "name": "fair",
    "workloads": [WORKLOAD, {**WORKLOAD, "name": "other"}],
    "optimizers": [
        "adamw",
        "radam",
        {"name": "adamw-untuned", "optimizer": "adamw", "untuned": True},
        {"name": "adamw-audit", "optimizer": "adamw", "budget": 2},
    ],
    "schedule": {"kind": "constant"},
}
PASS, WARN, FAIL = Verdict.PASS, Verdict.WARN, Verdict.FAIL


def study(folder: Path, **changes: Any) -> ResolvedStudy:
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(FAIR | changes))
    return resolve(file)


def judged(folder: Path, **changes: Any) -> Mapping[str, Finding]:
    return {finding.rule: finding for finding in lint(study(folder, **changes))}


def test_a_fair_study_passes_every_rule(tmp_path: Path) -> None:
    found = judged(tmp_path, tune={"trials_per_arm": 20, "device_seconds_per_arm": 3600.0})
    assert {rule: finding.verdict for rule, finding in found.items()} == dict.fromkeys(found, PASS)
    assert list(found) == [
        "F1",
        "F2",
        "F3",
        "F4",
        "F6",
        "F7",
        "F8",
        "F9",
        "F10",
        "F11",
        "F12",
        "F13",
        "F14",
        "F15",
        "F17",
    ]


@pytest.mark.parametrize(
    ("rule", "verdict", "changes"),
    [
        ("F2", WARN, {}),
        ("F3", FAIL, {"optimizers": ["adamw", {"name": "radam", "fixed": {"learning_rate": 0.01}}]}),
        ("F4", WARN, {"tune": {"sampler": "tpe"}}),
        ("F6", WARN, {"optimizers": ["adamw", "soap"]}),
        ("F7", WARN, {"optimizers": ["adamw", {"name": "radam", "schedule": {"kind": "cosine"}}]}),
        ("F9", WARN, {"resources": {"gpus_per_trial": 0.5}}),
        ("F11", FAIL, {"confirm": {"top_k": 2, "seeds": 5}}),
        ("F11", FAIL, {"confirm": {"top_k": 3, "seeds": 4}}),
        ("F12", FAIL, {"tune": {"asha": {"grace_steps": 99}}}),
        ("F12", FAIL, {"tune": {"asha": {"reduction_factor": 4}}}),
        ("F12", FAIL, {"schedule": {"kind": "constant", "warmup_fraction": 0.3}}),
        ("F12", PASS, {"schedule": {"kind": "cosine"}, "tune": {"asha": {"grace_steps": 20}}}),
        ("F12", WARN, {"schedule": {"kind": "cosine"}, "tune": {"asha": {"fidelity": "truncate"}}}),
        ("F12", FAIL, {"schedule": {"kind": "cosine"}, "tune": {"asha": {"fidelity": "truncate", "grace_steps": 99}}}),
        ("F12", PASS, {"schedule": {"kind": "cosine"}, "tune": {"asha": None}}),
        ("F13", WARN, {"tune": {"asha": {"sentinels": 7}}}),
        ("F13", WARN, {"tune": {"trials_per_arm": 8}}),
        ("F13", PASS, {"tune": {"trials_per_arm": 8, "asha": None}}),
        ("F14", WARN, {"tune": {"asha": {"order": "asynchronous"}}}),
        ("F15", WARN, {"workloads": [WORKLOAD]}),
        ("F17", WARN, {"optimizers": ["adamw", "radam"]}),
    ],
)
def test_a_broken_rule_is_named_with_its_mend(
    tmp_path: Path, rule: str, verdict: Verdict, changes: dict[str, Any]
) -> None:
    found = judged(tmp_path, **changes)[rule]
    assert found.verdict is verdict
    assert found.reason
    assert bool(found.mend) == (verdict is not PASS)


def test_what_complete_short_schedules_cost_beside_truncated_ones_is_said(tmp_path: Path) -> None:
    unlike = {"optimizers": ["adamw", {"name": "radam", "schedule": {"kind": "cosine"}}]}
    assert "complete short schedules cost radam 1." in judged(tmp_path, **unlike)["F2"].reason
    assert "short schedules" not in judged(tmp_path)["F2"].reason


def test_a_study_that_fails_a_rule_is_refused_unless_it_waives_the_rule_with_a_reason(tmp_path: Path) -> None:
    few = {"confirm": {"top_k": 1, "seeds": 1}}
    with pytest.raises(
        StudyError, match=r"waive\.F11: found rule F11 broken: .* confirm\.top_k of at least 3"
    ) as error:
        refuse_unfair(study(tmp_path, **few))
    assert len(str(error.value).splitlines()) == 1
    waived = study(tmp_path, **few, waive={"F11": "a demonstration"})
    refuse_unfair(waived)
    assert {finding.rule: finding.waived for finding in lint(waived) if finding.waived} == {"F11": "a demonstration"}


def test_a_waiver_of_one_rule_does_not_cover_another(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="rule F12"):
        refuse_unfair(study(tmp_path, tune={"asha": {"grace_steps": 1}}, waive={"F11": "a demonstration"}))


def test_a_waiver_stays_with_the_frozen_study(tmp_path: Path) -> None:
    waived = study(tmp_path, waive={"F12": "short runs only"})
    waived.write(tmp_path / "run")
    assert yaml.safe_load((tmp_path / "run" / "study.yaml").read_text())["waive"] == {"F12": "short runs only"}


@pytest.fixture(scope="module")
def shipped_with_bases(tmp_path_factory: pytest.TempPathFactory, reference_data: Path) -> Iterator[Path]:
    """The shipped studies beside base models of the architectures that `tunebench pretrain` would give them."""
    folder = tmp_path_factory.mktemp("shipped")
    shutil.copytree(STUDIES[0].parent, folder / "studies")
    (folder / "bases").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNEBENCH_DATA", str(reference_data))
        for file in sorted((folder / "studies").glob("pretrain-*.yaml")):
            (workload,) = resolve(file).study.workloads
            nothing_known = TrainingStatistics(
                per_type_energy_shifts=(0.0,), degenerate=False, force_rms=1.0, avg_num_neighbors=1.0,
                labelled_frames=1, note="",
            )  # fmt: skip
            model = model_config(workload.model, ["H"], nothing_known, 0)
            info = {"training_module": {"model": model}}
            torch.save({"hyper_parameters": {"info_dict": info}}, folder / "bases" / f"{file.stem}.ckpt")
        yield folder / "studies"


@pytest.mark.parametrize("name", [file.name for file in STUDIES])
def test_every_shipped_study_passes_or_says_which_rule_it_breaks(name: str, shipped_with_bases: Path) -> None:
    refuse_unfair(resolve(shipped_with_bases / name))


@pytest.mark.parametrize("name", [file.name for file in STUDIES if file.stem.startswith("finetune-")])
def test_fine_tuned_workloads_differ_from_their_twins_from_scratch_in_their_start_alone(
    name: str, shipped_with_bases: Path
) -> None:
    workloads = resolve(shipped_with_bases / name).study.workloads
    pairs = list(zip(workloads[::2], workloads[1::2], strict=True))
    for fine_tuned, scratch in pairs:
        assert fine_tuned.init is not None
        assert scratch.init is None
        _, contradictions = adopted_model(scratch.model, fine_tuned.model)
        assert not contradictions
        alike = {"name": "", "init": None, "model": scratch.model}
        assert fine_tuned.model_copy(update=alike) == scratch.model_copy(update=alike)


@pytest.mark.parametrize(
    ("changes", "smallest"),
    [
        ({}, 100),
        ({"max_steps": 8, "ema_decay": 0.999}, 3),  # two windows of an average that warms up: n >= 2 (10 + n) / 9
        ({"max_steps": 2000, "ema_decay": 0.9985}, 500),
        ({"schedule": {"warmup_fraction": 0.5}}, 200),
    ],
)
def test_the_first_rung_waits_for_warm_up_averages_and_a_quarter(
    tmp_path: Path, changes: dict[str, Any], smallest: int
) -> None:
    schedule = {**FAIR["schedule"], **changes.get("schedule", {})}
    workload = {**WORKLOAD, **{name: value for name, value in changes.items() if name != "schedule"}}
    arm = plan_arms(study(tmp_path, workloads=[workload], schedule=schedule))[0]
    assert smallest_grace(arm)[0] == smallest
