"""Study files with one mistake each, all made from the quickstart by one edit, and the key their error must name."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any, cast

from tunebench.study.installed import shipped_folder
from tunebench.study.strict_yaml import read_yaml, write_yaml

Edit = Callable[[dict[str, Any]], None]

FRAME = (
    '2\nProperties=species:S:1:pos:R:3:forces:R:3 energy={energy} pbc="F F F"\nH 0 0 {z} 0 0 0.1\nH 0 0 0 0 0 -0.1\n'
)
THREE_FRAMES = "".join(FRAME.format(energy=-1.0 - 0.1 * n, z=0.7 + 0.01 * n) for n in range(3))


@dataclass(frozen=True, kw_only=True)
class BrokenStudy:
    """One mistake.

    Attributes:
        key: what the error line must name; empty where the file as a whole is wrong.
        edit: changes the quickstart's data; ``text`` replaces the file altogether.
        extra: further files beside the study. missing: write no study file at all.
        needs_data: the file itself is in order, only preparing its data or building its model shows the mistake.
        reported_in: name of the file in the error line, where it is not the study.
    """

    id: str
    key: str
    edit: Edit | None = None
    text: str | None = None
    extra: Mapping[str, str] = field(default_factory=dict)
    missing: bool = False
    needs_data: bool = False
    reported_in: str = "broken.yaml"

    def write(self, folder: Path) -> Path:
        """Write the study and what lies beside it; returns the study's path."""
        file = folder / "broken.yaml"
        for name, text in self.extra.items():
            (folder / name).write_text(text, encoding="utf-8")
        if not self.missing:
            file.write_text(self.text if self.text is not None else self._edited(), encoding="utf-8")
        return file

    def _edited(self) -> str:
        study = quickstart()
        assert self.edit is not None
        self.edit(study)
        return write_yaml(study)


def quickstart() -> dict[str, Any]:
    """The quickstart's data; its two workloads share nothing, so that an edit touches one."""
    data: dict[str, Any] = json.loads(json.dumps(read_yaml(shipped_folder("studies") / "quickstart.yaml")))
    return data


def put(*path: str | int, value: Any) -> Edit:
    """The edit that sets one value, making the mappings on its way."""

    def edit(study: dict[str, Any]) -> None:
        parent: Any = study
        for part in path[:-1]:
            parent = parent.setdefault(part, {}) if isinstance(parent, dict) else parent[part]
        parent[path[-1]] = value

    return edit


def drop(*path: str | int) -> Edit:
    """The edit that removes one key."""

    def edit(study: dict[str, Any]) -> None:
        parent: Any = reduce(getitem, path[:-1], cast(Any, study))
        del parent[path[-1]]

    return edit


def both(*edits: Edit) -> Edit:
    """Edits that only together are one mistake."""

    def edit(study: dict[str, Any]) -> None:
        for one in edits:
            one(study)

    return edit


def space(**changes: Any) -> dict[str, str]:
    """A search-space file `space.yaml` for adamw with the learning rate's entries changed."""
    data = read_yaml(shipped_folder("search_spaces") / "adamw.yaml")
    data["parameters"]["learning_rate"].update(changes)
    return {"space.yaml": write_yaml(data)}


def announced_space() -> dict[str, str]:
    """A search-space file `space.yaml` for an adamw that this version does not have."""
    data = read_yaml(shipped_folder("search_spaces") / "adamw.yaml")
    return {"space.yaml": write_yaml({**data, "available": False, "reason": "its update rule lands later"})}


W0 = ("workloads", 0)
MANY = 10**6  # more than any number of steps, frames or trials in the quickstart
EXTXYZ: dict[str, Any] = {"source": "extxyz", "train": "three.xyz", "frames": {"train": 5, "val": 1, "test": 1}}
OWN_SPACE = put("optimizers", 0, value={"name": "adamw", "search_space": "space.yaml"})
THREE = {"three.xyz": THREE_FRAMES}


def extxyz(**changes: Any) -> Edit:
    """The first workload reads files."""
    return put(*W0, "data", value={**EXTXYZ, **changes})


BROKEN = [
    # the file as a whole
    BrokenStudy(id="no such file", key="", missing=True),
    BrokenStudy(id="empty file", key="", text=""),
    BrokenStudy(id="no yaml", key="", text="name: [unclosed\n"),
    BrokenStudy(id="a list", key="", text="- name: x\n"),
    BrokenStudy(id="two documents", key="", text="name: x\n---\nname: y\n"),
    BrokenStudy(id="python object", key="", text="name: !!python/object/apply:os.getcwd []\n"),
    BrokenStudy(id="holds itself", key="", text="name: &name [*name]\n"),
    BrokenStudy(id="control character", key="", text="name: \x01\n"),
    BrokenStudy(id="key twice", key="seed", text="name: x\nseed: 1\nseed: 2\n"),
    BrokenStudy(id="key is a number", key="600", text="name: x\n600: y\n"),
    # keys
    BrokenStudy(id="unknown key at the top", key="worklods", edit=put("worklods", value=[])),
    BrokenStudy(id="unknown key in a workload", key="workloads[0].batchsize", edit=put(*W0, "batchsize", value=5)),
    BrokenStudy(
        id="unknown key in data", key="workloads[0].data.temperature", edit=put(*W0, "data", "temperature", value=1)
    ),
    BrokenStudy(id="unknown key in asha", key="tune.asha.brackets", edit=put("tune", "asha", "brackets", value=3)),
    BrokenStudy(id="no name", key="name", edit=drop("name")),
    BrokenStudy(id="no workloads", key="workloads", edit=drop("workloads")),
    BrokenStudy(id="no horizon", key="workloads[0].max_steps", edit=drop(*W0, "max_steps")),
    BrokenStudy(id="no data source", key="workloads[0].data.source", edit=drop(*W0, "data", "source")),
    BrokenStudy(id="no frames", key="workloads[0].data.frames", edit=drop(*W0, "data", "frames")),
    # types
    BrokenStudy(id="seed is a text", key="seed", edit=put("seed", value="5")),
    BrokenStudy(id="seed is true", key="seed", edit=put("seed", value=True)),
    BrokenStudy(id="steps are a fraction", key="workloads[0].max_steps", edit=put(*W0, "max_steps", value=240.0)),
    BrokenStudy(id="workloads are a mapping", key="workloads", edit=put("workloads", value={"name": "x"})),
    BrokenStudy(id="data is a text", key="workloads[0].data", edit=put(*W0, "data", value="ethanol")),
    BrokenStudy(id="optimizer is a number", key="optimizers[0]", edit=put("optimizers", 0, value=3)),
    BrokenStudy(id="truth value is yes", key="workloads[0].data.allow_duplicates", edit=extxyz(allow_duplicates="yes")),
    # values
    BrokenStudy(id="name with a slash", key="name", edit=put("name", value="a/b")),
    BrokenStudy(id="no workload at all", key="workloads", edit=put("workloads", value=[])),
    BrokenStudy(id="no optimizer at all", key="optimizers", edit=put("optimizers", value=[])),
    BrokenStudy(id="negative seed", key="seed", edit=put("seed", value=-1)),
    BrokenStudy(id="zero steps", key="workloads[0].max_steps", edit=put(*W0, "max_steps", value=0)),
    BrokenStudy(
        id="no training frames", key="workloads[0].data.frames.train", edit=put(*W0, "data", "frames", "train", value=0)
    ),
    BrokenStudy(id="unknown source", key="workloads[0].data.source", edit=put(*W0, "data", "source", value="xtbb")),
    BrokenStudy(id="unknown family", key="workloads[0].model.family", edit=put(*W0, "model", "family", value="mace")),
    BrokenStudy(id="unknown dtype", key="workloads[0].model.dtype", edit=put(*W0, "model", "dtype", value="bfloat16")),
    BrokenStudy(
        id="cutoff of nothing",
        key="workloads[0].model.r_max_angstrom",
        edit=put(*W0, "model", "r_max_angstrom", value=0.0),
    ),
    BrokenStudy(
        id="infinite temperature",
        key="workloads[0].data.temperature_kelvin",
        edit=put(*W0, "data", "temperature_kelvin", value=float("inf")),
    ),
    BrokenStudy(
        id="more than all forces",
        key="workloads[0].labels.force_fraction",
        edit=put(*W0, "labels", "force_fraction", value=1.5),
    ),
    BrokenStudy(id="averaging that never moves", key="workloads[0].ema_decay", edit=put(*W0, "ema_decay", value=1.0)),
    BrokenStudy(id="unknown schedule", key="schedule.kind", edit=put("schedule", "kind", value="cosin")),
    BrokenStudy(id="negative weight", key="objective.forces", edit=put("objective", "forces", value=-1.0)),
    BrokenStudy(id="unknown metric", key="objective.metric", edit=put("objective", "metric", value="mse")),
    BrokenStudy(
        id="nothing is halved", key="tune.asha.reduction_factor", edit=put("tune", "asha", "reduction_factor", value=1)
    ),
    BrokenStudy(
        id="judged on arrival in no order",
        key="tune.asha.order",
        edit=put("tune", "asha", value={"form": "stopping", "order": "deterministic"}),
    ),
    BrokenStudy(id="too many sentinels", key="tune.asha.sentinels", edit=put("tune", "asha", "sentinels", value=MANY)),
    BrokenStudy(id="sentinels in words", key="tune.asha.sentinels", edit=put("tune", "asha", "sentinels", value="all")),
    BrokenStudy(id="unknown form", key="tune.asha.form", edit=put("tune", "asha", "form", value="halving")),
    BrokenStudy(
        id="untuned and searched twice",
        key="optimizers[0].budget",
        edit=put("optimizers", value=[{"name": "adamw", "untuned": True, "budget": 2}]),
    ),
    BrokenStudy(
        id="a second name for nothing",
        key="optimizers[0].optimizer",
        edit=put("optimizers", value=[{"name": "mine", "optimizer": "newton"}]),
    ),
    BrokenStudy(id="no such rule", key="waive.F20", edit=put("waive", value={"F20": "why not"})),
    BrokenStudy(id="waived without a reason", key="waive.F11", edit=put("waive", value={"F11": ""})),
    BrokenStudy(id="unknown sampler", key="tune.sampler", edit=put("tune", "sampler", value="random")),
    BrokenStudy(id="no seeds", key="confirm.seeds", edit=put("confirm", "seeds", value=0)),
    BrokenStudy(id="unknown engine", key="engine", edit=put("engine", value="jax")),
    BrokenStudy(id="no slots", key="resources.slots", edit=put("resources", "slots", value=0)),
    BrokenStudy(id="slots in words", key="resources.slots", edit=put("resources", "slots", value="many")),
    BrokenStudy(id="no processor", key="resources.cpus_per_trial", edit=put("resources", "cpus_per_trial", value=0)),
    # parts that contradict each other
    BrokenStudy(id="workload twice", key="workloads[1].name", edit=put("workloads", 1, "name", value="ethanol-nequip")),
    BrokenStudy(id="optimizer twice", key="optimizers[3].name", edit=put("optimizers", 3, value="adamw")),
    BrokenStudy(id="batch above data", key="workloads[0].batch_size", edit=put(*W0, "batch_size", value=MANY)),
    BrokenStudy(
        id="evaluates after the end",
        key="workloads[0].evaluate_every_steps",
        edit=put(*W0, "evaluate_every_steps", value=MANY),
    ),
    BrokenStudy(id="unknown preset", key="workloads[0].model.preset", edit=put(*W0, "model", "preset", value="huge")),
    BrokenStudy(
        id="preset of the other family",
        key="workloads[1].model.preset",
        edit=put("workloads", 1, "model", "preset", value="L"),
    ),
    BrokenStudy(
        id="argument that tunebench sets",
        key="workloads[0].model.arguments.r_max",
        edit=put(*W0, "model", "arguments", "r_max", value=5.0),
    ),
    BrokenStudy(
        id="another builder",
        key="workloads[0].model.arguments._target_",
        edit=put(*W0, "model", "arguments", "_target_", value="x.Model"),
    ),
    BrokenStudy(
        id="argument without a value",
        key="workloads[0].model.arguments.avg_num_neighbors",
        edit=put(*W0, "model", "arguments", "avg_num_neighbors", value=float("nan")),
    ),
    BrokenStudy(
        id="no loss", key="workloads[0].loss", edit=put(*W0, "loss", value={"energy_per_atom": 0.0, "forces": 0.0})
    ),
    BrokenStudy(
        id="forces only, none labelled",
        key="workloads[0].labels.force_fraction",
        edit=both(put(*W0, "loss", "energy_per_atom", value=0.0), put(*W0, "labels", "force_fraction", value=0.0)),
    ),
    BrokenStudy(id="stress of a molecule", key="workloads[0].loss.stress", edit=put(*W0, "loss", "stress", value=1.0)),
    BrokenStudy(
        id="unknown molecule", key="workloads[0].data.system", edit=put(*W0, "data", "system", value="ethanoll")
    ),
    BrokenStudy(
        id="several molecules of one", key="workloads[0].data.molecules", edit=put(*W0, "data", "molecules", value=4)
    ),
    BrokenStudy(
        id="hot temperature without frames",
        key="workloads[0].data.frames.ood",
        edit=put(*W0, "data", "frames", "ood", value=0),
    ),
    BrokenStudy(
        id="hot frames without temperature",
        key="workloads[0].data.ood_temperature_kelvin",
        edit=drop(*W0, "data", "ood_temperature_kelvin"),
    ),
    BrokenStudy(
        id="snapshots within a step",
        key="workloads[0].data.interval_fs",
        edit=put(*W0, "data", "interval_fs", value=0.1),
    ),
    BrokenStudy(
        id="nothing selects", key="objective", edit=put("objective", value={"energy_per_atom": 0, "forces": 0})
    ),
    BrokenStudy(id="molecules selected by stress", key="objective.stress", edit=put("objective", "stress", value=1.0)),
    BrokenStudy(
        id="warm-up and decay overlap",
        key="schedule.decay_fraction",
        edit=put("schedule", value={"kind": "warmup_stable_decay", "warmup_fraction": 0.6, "decay_fraction": 0.5}),
    ),
    BrokenStudy(
        id="decay of a schedule without that part",
        key="schedule.decay_fraction",
        edit=put("schedule", value={"kind": "cosine", "decay_fraction": 0.5}),
    ),
    BrokenStudy(
        id="end of a constant schedule",
        key="optimizers[0].schedule.final_factor",
        edit=put("optimizers", 0, value={"name": "adamw", "schedule": {"kind": "constant", "final_factor": 0.1}}),
    ),
    BrokenStudy(
        id="first rung after the end", key="tune.asha.grace_steps", edit=put("tune", "asha", "grace_steps", value=MANY)
    ),
    BrokenStudy(id="confirms more than it tried", key="confirm.top_k", edit=put("confirm", "top_k", value=MANY)),
    BrokenStudy(
        id="a GPU and a half", key="resources.gpus_per_trial", edit=put("resources", "gpus_per_trial", value=1.5)
    ),
    BrokenStudy(
        id="DataModule without target",
        key="workloads[0].data.datamodule._target_",
        edit=put(*W0, "data", value={"source": "nequip", "datamodule": {"batch_size": 1}}),
    ),
    # optimizers and their search spaces
    BrokenStudy(id="unknown optimizer", key="optimizers[0].name", edit=put("optimizers", 0, value="adamv")),
    BrokenStudy(
        id="optimizer without an update rule", key="optimizers[0].name", edit=OWN_SPACE, extra=announced_space()
    ),
    BrokenStudy(
        id="view that there is not",
        key="optimizers[2].fixed.fctp_view",
        edit=put("optimizers", 2, value={"name": "muon", "fixed": {"fctp_view": "types"}}),
    ),
    BrokenStudy(
        id="fixes what is not there",
        key="optimizers[0].fixed.momentum",
        edit=put("optimizers", 0, value={"name": "adamw", "fixed": {"momentum": 0.9}}),
    ),
    BrokenStudy(
        id="fixes a choice that is none",
        key="optimizers[0].fixed.beta1",
        edit=put("optimizers", 0, value={"name": "adamw", "fixed": {"beta1": 0.5}}),
    ),
    BrokenStudy(
        id="fixes a number to a text",
        key="optimizers[0].fixed.learning_rate",
        edit=put("optimizers", 0, value={"name": "adamw", "fixed": {"learning_rate": "fast"}}),
    ),
    BrokenStudy(
        id="fixes a step backwards",
        key="optimizers[0].fixed.learning_rate",
        edit=put("optimizers", 0, value={"name": "adamw", "fixed": {"learning_rate": -0.1}}),
    ),
    BrokenStudy(
        id="fixes eps for one arm only",
        key="optimizers[0].fixed.eps",
        edit=put("optimizers", 0, value={"name": "adamw", "fixed": {"eps": 1e-8}}),
    ),
    BrokenStudy(id="search space that is missing", key="optimizers[0].search_space", edit=OWN_SPACE),
    BrokenStudy(
        id="search space of another optimizer",
        key="name",
        edit=put("optimizers", 0, value={"name": "muon", "search_space": "space.yaml"}),
        extra=space(),
        reported_in="space.yaml",
    ),
    BrokenStudy(
        id="range upside down",
        key="parameters.learning_rate",
        edit=OWN_SPACE,
        extra=space(low=1.0),
        reported_in="space.yaml",
    ),
    BrokenStudy(
        id="range of an unknown kind",
        key="parameters.learning_rate.kind",
        edit=OWN_SPACE,
        extra=space(kind="normal"),
        reported_in="space.yaml",
    ),
    BrokenStudy(
        id="range without authority",
        key="parameters.learning_rate.source",
        edit=OWN_SPACE,
        extra=space(source=""),
        reported_in="space.yaml",
    ),
    # data files
    BrokenStudy(id="no data file", key="workloads[0].data.train", edit=extxyz(train="nowhere.xyz")),
    BrokenStudy(
        id="variable not set",
        key="workloads[0].data.train",
        edit=extxyz(train="${TUNEBENCH_NEVER_SET}/a.xyz"),
        extra=THREE,
    ),
    BrokenStudy(id="no test file", key="workloads[0].data.test", edit=extxyz(test="nowhere.xyz"), extra=THREE),
    BrokenStudy(id="slice of words", key="workloads[0].data.train", edit=extxyz(train="three.xyz@a:b"), extra=THREE),
    BrokenStudy(
        id="slice of four numbers", key="workloads[0].data.train", edit=extxyz(train="three.xyz@1:2:3:4"), extra=THREE
    ),
    BrokenStudy(id="slice in no steps", key="workloads[0].data.val", edit=extxyz(val="three.xyz@::0"), extra=THREE),
    BrokenStudy(
        id="slice of no file",
        key="workloads[0].data.ood.hot",
        edit=extxyz(ood={"hot": "nowhere.xyz@1:"}, frames={"train": 5, "val": 1, "test": 1, "ood": 1}),
        extra=THREE,
    ),
    BrokenStudy(
        id="slice of no frames",
        key="workloads[0].data.train",
        edit=extxyz(train="three.xyz@3:"),
        extra=THREE,
        needs_data=True,
    ),
    BrokenStudy(
        id="slices that overlap",
        key="workloads[0].data.test",
        edit=extxyz(train="twelve.xyz@:8", test="twelve.xyz@7:", allow_duplicates=True),
        extra={"twelve.xyz": THREE_FRAMES * 4},
        needs_data=True,
    ),
    BrokenStudy(
        id="hot file without frames",
        key="workloads[0].data.frames.ood",
        edit=extxyz(ood={"hot": "three.xyz"}),
        extra=THREE,
    ),
    BrokenStudy(
        id="hot frames without files",
        key="workloads[0].data.ood",
        edit=extxyz(frames={"train": 5, "val": 1, "test": 1, "ood": 1}),
        extra=THREE,
    ),
    BrokenStudy(
        id="more frames than the file has",
        key="workloads[0].data.frames.train",
        edit=extxyz(),
        extra=THREE,
        needs_data=True,
    ),
    BrokenStudy(
        id="energies under another name",
        key="workloads[0].data.keys.energy",
        edit=extxyz(keys={"energy": "dft_energy"}),
        extra=THREE,
        needs_data=True,
    ),
    BrokenStudy(
        id="data that ASE cannot read",
        key="workloads[0].data.train",
        edit=extxyz(),
        extra={"three.xyz": "neither\na structure\n"},
        needs_data=True,
    ),
    BrokenStudy(
        id="argument the builder does not know",
        key="workloads[0].model.arguments",
        edit=put(*W0, "model", "arguments", "num_feature", value=8),
        needs_data=True,
    ),
    # the promise of a search space
    BrokenStudy(
        id="rule that would treat no matrix",
        key="workloads[0].model",
        edit=put("optimizers", 3, value={"name": "soap", "fixed": {"max_precondition_dim": 1}}),
        needs_data=True,
    ),
    BrokenStudy(
        id="variant that the optimizer does not have",
        key="workloads[0].model",
        edit=put("optimizers", 0, value={"name": "soap_muon", "fixed": {"recipe": "olmo"}}),
        needs_data=True,
    ),
]
