"""From a study file to a study that is complete, checked, hashed and, in a run directory, frozen."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunebench.properties.of_study import with_properties
from tunebench.study import record
from tunebench.study.checks import space_problems, study_problems
from tunebench.study.extension import extended
from tunebench.study.files import replacing
from tunebench.study.initial import Initial
from tunebench.study.paths import NoSuchFileError, existing_file, frames_of_file
from tunebench.study.problems import Problem, one_of, parse, raise_problems
from tunebench.study.search_space import SearchSpace, available_optimizers, shipped_optimizers
from tunebench.study.spec import (
    PROPERTY_TIME_LIMIT_S,
    Arm,
    ExtxyzData,
    InWords,
    Schedule,
    Study,
    StudyError,
    Workload,
)
from tunebench.study.strict_yaml import read_yaml, write_yaml


@dataclass(frozen=True, kw_only=True)
class ResolvedStudy:
    """A study with everything it refers to.

    Attributes:
        study: the file with defaults filled in; paths of data files are absolute.
        file: where it was read from.
        spaces: by name of the optimizer's entry, its search space after `fixed` has been taken out of the search.
        schedules: likewise, its learning-rate schedule.
        hash: SHA-256 (hex) of study and search spaces; formatting, comments and the order of keys do not count, nor do
            `engine` and `resources.slots`: a run may go on with another engine.
        earlier_trials_per_arm: configurations of every arm before each extension of its run; the study has today's.
    """

    study: Study
    file: Path
    spaces: Mapping[str, SearchSpace]
    schedules: Mapping[str, Schedule]
    hash: str
    earlier_trials_per_arm: tuple[int, ...] = ()

    def write(self, run: Path) -> None:
        """Freeze the study in a run directory: study.yaml, search_spaces/ and, last, study.sha256.

        Raises:
            StudyError: the directory cannot be written.
        """
        study = self.study.model_dump(mode="json")
        for arm in study["optimizers"]:
            arm["search_space"] = f"{record.SEARCH_SPACES}/{arm['name']}.yaml"
        rules = {arm.name: arm.rule for arm in self.study.optimizers}
        texts = {
            f"{record.SEARCH_SPACES}/{name}.yaml": write_yaml(
                space.model_dump(mode="json", exclude_unset=True) | {"name": rules[name]}
            )
            for name, space in self.spaces.items()
        }
        texts |= {record.STUDY: write_yaml(study), record.STUDY_HASH: f"{self.hash}\n"}
        for name, text in texts.items():
            _write_whole(run / name, text)


def resolve(path: Path) -> ResolvedStudy:
    """The study of a file with its search spaces, schedules and hash.

    Raises:
        StudyError: anything wrong, in one line.
    """
    study, spaces = _read(path)
    study, contradictions = _with_initial_models(study, path.resolve().parent)
    problems = [*contradictions, *study_problems(study), *space_problems(study, spaces)]
    study, missing = _with_data_files(study, path.resolve().parent)
    raise_problems(path, [*problems, *missing])
    if study.properties:
        study = with_properties(study, path)
    return _resolved(path, study, spaces)


def load_run(run: Path) -> ResolvedStudy:
    """The study that a run directory was started with, and extended to.

    To read it takes the directory alone. To go on with the run takes the data files as well, where the study names
    them, even if their prepared set is in the cache: its name is a hash that covers their content.

    Raises:
        StudyError: the directory holds no study, or one that was edited after the run had started.
        RunError: its extension cannot be read.
    """
    file, hash_file = run / record.STUDY, run / record.STUDY_HASH
    if not file.is_file():
        found = "no such directory" if not run.is_dir() else f"no {record.STUDY}"
        raise StudyError(
            run, "", InWords(found), f"a run directory, which holds {record.STUDY} and {record.STUDY_HASH}"
        )
    if not hash_file.is_file():
        raise StudyError(hash_file, "", InWords("no such file"), f"the hash that was written with {record.STUDY}")
    study, spaces = _read(file)
    raise_problems(file, [problem for problem in space_problems(study, spaces) if ".fixed." in problem.key])
    resolved = _resolved(file, study, spaces)
    frozen = hash_file.read_text(encoding="utf-8", errors="replace").strip()
    if resolved.hash != frozen:
        allowed = f"hash {frozen[:12]} of {record.STUDY_HASH}: a started study stays as it is; copy it to start another"
        raise StudyError(file, "", InWords(f"a study or search space with hash {resolved.hash[:12]}"), allowed)
    return extended(resolved, run)


def _read(file: Path) -> tuple[Study, dict[str, SearchSpace]]:
    """The study and its search spaces as they stand in their files, the latter before `fixed`."""
    study = parse(Study, read_yaml(file), file)
    spaces = {arm.name: _space(arm, index, file) for index, arm in enumerate(study.optimizers)}
    return study, spaces


def _space(arm: Arm, index: int, file: Path) -> SearchSpace:
    if arm.rule not in shipped_optimizers():
        key = f"optimizers[{index}].{'optimizer' if arm.optimizer else 'name'}"
        raise StudyError(file, key, arm.rule, one_of(available_optimizers(), arm.rule))
    if arm.search_space is None:
        return SearchSpace.load(arm.rule)
    try:
        path = existing_file(arm.search_space, file.resolve().parent)
    except NoSuchFileError as error:
        raise StudyError(file, f"optimizers[{index}].search_space", arm.search_space, str(error)) from None
    return SearchSpace.load(arm.rule, path)


def _resolved(file: Path, study: Study, spaces: Mapping[str, SearchSpace]) -> ResolvedStudy:
    fixed = {arm.name: _space_of(arm, spaces[arm.name]) for arm in study.optimizers}
    schedules = {arm.name: fixed[arm.name].schedule_of(arm, study.schedule) for arm in study.optimizers}
    return ResolvedStudy(study=study, file=file, spaces=fixed, schedules=schedules, hash=_hash(study, fixed))


def _space_of(arm: Arm, space: SearchSpace) -> SearchSpace:
    """What the arm searches, under the arm's name."""
    searched = space.fix(arm.fixed)
    return (searched.untuned() if arm.untuned else searched).model_copy(update={"name": arm.name})


def _hash(study: Study, spaces: Mapping[str, SearchSpace]) -> str:
    """Search spaces count by what they say, not by where their files lie.

    Who trains a trial does not count, nor how long one waits for who does not train any more.
    """
    data: dict[str, Any] = study.model_dump(mode="json")
    del data["engine"], data["resources"]["slots"], data["resources"]["stalled_after_s"]
    if data["confirm"]["refine"] is None:  # a study without it is what it was before there was any
        del data["confirm"]["refine"]
    if not data["properties"]:
        del data["properties"]
    for section in data.get("properties", ()):  # likewise
        if section["time_limit_s"] == PROPERTY_TIME_LIMIT_S:
            del section["time_limit_s"]
    for workload in data["workloads"]:  # likewise
        if "keys" in workload["data"] and workload["data"]["keys"]["config_type"] is None:
            del workload["data"]["keys"]["config_type"]
        if workload["init"] is None:
            del workload["init"]
        else:
            del workload["init"]["path"]  # the file is known by its hash
    for arm in data["optimizers"]:
        del arm["search_space"]
    content = {"study": data, "spaces": {name: space.model_dump(mode="json") for name, space in spaces.items()}}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _with_initial_models(study: Study, folder: Path) -> tuple[Study, list[Problem]]:
    """The study with the architecture and the hash of every file that `init` names, and what is wrong with them."""
    problems: list[Problem] = []
    workloads = []
    for index, workload in enumerate(study.workloads):
        adopted, found = (workload, []) if workload.init is None else _adopted(workload, workload.init, folder)
        workloads.append(adopted)
        problems += [Problem(f"workloads[{index}].{p.key}", p.found, p.allowed) for p in found]
    return study.model_copy(update={"workloads": tuple(workloads)}), problems


def _adopted(workload: Workload, initial: Initial, folder: Path) -> tuple[Workload, list[Problem]]:
    from tunebench.workloads.errors import WorkloadError
    from tunebench.workloads.starting_point import checked_hash  # imports torch
    from tunebench.workloads.trained_model import adopted_model, read_architecture

    try:
        path = existing_file(initial.path, folder)
        located = initial.model_copy(update={"path": str(path)})
        located = located.model_copy(update={"sha256": checked_hash(located)})
        model, problems = adopted_model(workload.model, read_architecture(path).model)
    except NoSuchFileError as error:
        return workload, [Problem("init.path", initial.path, str(error))]
    except WorkloadError as error:
        return workload, [Problem(error.key, error.found, error.allowed)]
    found = [Problem(f"model.{p.key}", p.found, p.allowed) for p in problems]
    return workload.model_copy(update={"init": located, "model": model}), found


def _with_data_files(study: Study, folder: Path) -> tuple[Study, list[Problem]]:
    """The study with absolute paths of its data files and their slices, and what is wrong with them."""
    problems: list[Problem] = []
    workloads = []
    for index, workload in enumerate(study.workloads):
        located, found = _located(workload, folder)
        workloads.append(located)
        problems += [Problem(f"workloads[{index}].data.{p.key}", p.found, p.allowed) for p in found]
    return study.model_copy(update={"workloads": tuple(workloads)}), problems


def _located(workload: Workload, folder: Path) -> tuple[Workload, list[Problem]]:
    data, problems = workload.data, []
    if not isinstance(data, ExtxyzData):
        return workload, []
    written = {"train": data.train, "val": data.val, "test": data.test} | {f"ood.{n}": f for n, f in data.ood.items()}
    files: dict[str, str | None] = {}
    for key, text in written.items():
        files[key] = text
        if text is None:
            continue
        try:
            files[key] = str(frames_of_file(text, folder))
        except NoSuchFileError as error:
            problems.append(Problem(key, text, str(error)))
    ood = {name: files[f"ood.{name}"] for name in data.ood}
    located = data.model_copy(update={"train": files["train"], "val": files["val"], "test": files["test"], "ood": ood})
    return workload.model_copy(update={"data": located}), problems


def _write_whole(file: Path, text: str) -> None:
    """Write a file so that a reader sees all of it or none."""
    try:
        with replacing(file) as partial:
            partial.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StudyError(file, "", InWords(error.strerror or error), "a folder that can be written") from None
