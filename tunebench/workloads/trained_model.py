"""Models that somebody has trained: NequIP's checkpoints, tunebench's among them, and NequIP's packages.

Such a file says how its model is built; tunebench builds it anew by its own means, so that the model can have other
types, and takes the weights from the file. Reading one runs code in it.
"""

from __future__ import annotations

import inspect
import pickle
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from nequip.model.saved_models import ModelFromCheckpoint, ModelFromPackage
from nequip.utils.global_state import set_global_state
from omegaconf import OmegaConf
from torch.package.package_importer import PackageImporter

from tunebench.study.initial import ADOPTED, source_of
from tunebench.study.problems import Problem
from tunebench.study.spec import Family, InWords, Model
from tunebench.workloads.errors import WorkloadError
from tunebench.workloads.model_arguments import SET_BY_TUNEBENCH
from tunebench.workloads.models import builders_of, known_arguments
from tunebench.workloads.presets import NEQUIP_OWN_PRESETS, PRESETS

PATH = "init.path"
RECORD = "tunebench"
"""Key of what `tunebench pretrain` says of a base model, in its checkpoint."""
CONSTANTS = ("avg_num_neighbors", "per_type_energy_scales", "per_type_energy_shifts")
"""Arguments of a builder that are statistics of the data that the file's model was trained on."""

_FAMILIES = {
    "NequIPGNNModel": Family.NEQUIP,
    "PresetNequIPGNNModel": Family.NEQUIP,
    "AllegroModel": Family.ALLEGRO,
}
_OF_FAMILY = {Family.NEQUIP: "a NequIP model", Family.ALLEGRO: "an Allegro model"}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What a file says of how its model is built.

    Attributes:
        model: as a study's model section, with all arguments of the builder.
        type_names: of its types, in the order of its rows.
        constants: those of `CONSTANTS` that it names, as it names them.
    """

    model: Model
    type_names: tuple[str, ...]
    constants: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainedModel:
    """A model from a file.

    Attributes:
        file: where it was read from.
        architecture: how it is built.
        model: NequIP's GraphModel on the CPU with the weights that the file counts by: averaged ones where it has them.
    """

    file: Path
    architecture: Architecture
    model: torch.nn.Module


def read_architecture(file: Path) -> Architecture:
    """What a checkpoint or package says of its model's architecture; its weights are not looked at.

    Raises:
        WorkloadError: the file is of another kind, cannot be read, or holds a model that tunebench cannot build.
    """
    config = _config(file)
    target = str(config.get("_target_", ""))
    family = _FAMILIES.get(target.rpartition(".")[2])
    if family is None:
        raise WorkloadError(PATH, InWords(f"a model of {target or 'nothing'} in {file}"), ", ".join(_FAMILIES))
    own = str(config.get("preset", "")).upper()
    section = {
        "family": family,
        "preset": own if own in NEQUIP_OWN_PRESETS else ADOPTED,
        "r_max_angstrom": float(config["r_max"]),
        "dtype": config["model_dtype"],
        "arguments": _arguments(config, family, file),
    }
    constants = {name: config[name] for name in CONSTANTS if config.get(name) is not None}
    return Architecture(
        model=Model.model_validate(section), type_names=tuple(config["type_names"]), constants=constants
    )


def read_trained(file: Path) -> TrainedModel:
    """The model of a checkpoint or package.

    Raises:
        WorkloadError: as for `read_architecture`.
    """
    architecture = read_architecture(file)
    load = ModelFromPackage if source_of(file.name) == "package" else ModelFromCheckpoint
    set_global_state()
    with _refusals(file), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of versions and of formats, which NequIP reads all the same
        models = load(str(file))
        (model,) = models.values() if isinstance(models, torch.nn.ModuleDict) else (models,)
    return TrainedModel(file=file, architecture=architecture, model=model.to("cpu").eval())


def read_record(file: Path) -> dict[str, Any] | None:
    """What `tunebench pretrain` wrote of a base model beside its weights; None for a file of another kind."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=False, mmap=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError):
        return None
    record = content.get(RECORD) if isinstance(content, Mapping) else None
    return dict(record) if isinstance(record, Mapping) else None


def adopted_model(stated: Model, found: Model) -> tuple[Model, list[Problem]]:
    """The model section of a workload that starts from a file, and where the study contradicts the file.

    What the study leaves out is as in the file; what it states must be so there.

    Args:
        stated: the study's model section.
        found: the file's.

    Returns:
        The file's section, and a problem for each contradiction, with keys relative to the section.
    """
    said = stated.model_fields_set
    problems = [
        _contradiction(name, getattr(stated, name), getattr(found, name))
        for name in ("family", "r_max_angstrom", "dtype")
        if name in said and getattr(stated, name) != getattr(found, name)
    ]
    if stated.family is found.family and not (stated.preset == found.preset and stated.arguments == found.arguments):
        problems += _argument_problems(stated, found)
    return found, problems


def _contradiction(key: str, stated: object, found: object) -> Problem:
    found, stated = (str(value) if isinstance(value, Family) else value for value in (found, stated))
    return Problem(key, stated, f"left out, or {found!r} as in the file that init names")


def _argument_problems(stated: Model, found: Model) -> Iterator[Problem]:
    """Arguments that the study states, by its preset or one by one, and that are otherwise in the file."""
    by_preset = PRESETS[stated.family].get(stated.preset, {}) if "preset" in stated.model_fields_set else {}
    in_file = {**PRESETS[found.family].get(found.preset, {}), **found.arguments}
    defaults = _defaults(found)
    for name, value in {**by_preset, **stated.arguments}.items():
        own = in_file.get(name, defaults.get(name))
        if _same(value, own) or name in CONSTANTS:
            continue
        if name in stated.arguments:
            yield _contradiction(f"arguments.{name}", value, own)
        else:
            allowed = f"left out, or a preset with {name} = {own!r} as in the file that init names"
            yield Problem("preset", InWords(f"{stated.preset!r}, which says {name} = {value!r}"), allowed)
            return


def _same(one: object, other: object) -> bool:
    """Whether two arguments say the same; a pair potential says its species elsewhere."""
    if isinstance(one, dict) and isinstance(other, dict):
        names = (one.keys() | other.keys()) - {"chemical_species"}
        return all(_same(one.get(name), other.get(name)) for name in names)
    return one == other


def _defaults(model: Model) -> dict[str, Any]:
    """Defaults of the builders' arguments."""
    builders = builders_of(model.family)
    found = (parameter for builder in builders for parameter in inspect.signature(builder).parameters.values())
    return {parameter.name: parameter.default for parameter in found if parameter.default is not parameter.empty}


def _arguments(config: Mapping[str, Any], family: Family, file: Path) -> dict[str, Any]:
    left_out = {"_target_", "compile_mode", *SET_BY_TUNEBENCH, *CONSTANTS}
    arguments = {name: value for name, value in config.items() if name not in left_out}
    unknown = sorted(arguments.keys() - set(known_arguments(family)))
    if unknown:
        found = InWords(f"{_OF_FAMILY[family]} with the argument {unknown[0]} in {file}")
        raise WorkloadError(PATH, found, ", ".join(known_arguments(family)))
    pair = arguments.get("pair_potential")
    if isinstance(pair, dict) and list(pair.get("chemical_species", ())) == list(config["type_names"]):
        arguments["pair_potential"] = {name: value for name, value in pair.items() if name != "chemical_species"}
    return arguments


def _config(file: Path) -> dict[str, Any]:
    """The model section of the configuration that a file carries."""
    source = source_of(file.name)
    if source is None:
        raise WorkloadError(PATH, str(file), "a checkpoint (.ckpt) or a packaged model (.nequip.zip)")
    with _refusals(file):
        whole = OmegaConf.create(_packaged_config(file) if source == "package" else _checkpoint_config(file))
        config = OmegaConf.to_container(whole.training_module.model, resolve=True)
        while isinstance(config, dict) and isinstance(config.get("model"), dict):  # within NequIP's `modify`
            config = config["model"]
        assert isinstance(config, dict), f"a model section that is a {type(config).__name__}"
        content: dict[str, Any] = {str(name): value for name, value in config.items()}
        further = content.get("package_path", content.get("checkpoint_path"))
        for name in ("r_max", "model_dtype", "type_names") if further is None else ():
            assert name in content, f"a model section without {name}"
    if further is not None:  # it was itself trained from another file
        return _config(_beside(file, Path(str(further))))
    return content


def _beside(file: Path, further: Path) -> Path:
    found = further if further.is_absolute() else file.parent / further
    if not found.is_file():
        raise WorkloadError(PATH, InWords(f"{file}, which was trained from {further}"), f"that file, at {found}")
    return found


def _packaged_config(file: Path) -> dict[str, Any]:
    importer = PackageImporter(str(file))
    content: dict[str, Any] = yaml.safe_load(importer.load_text("model", "config.yaml"))
    return content


def _checkpoint_config(file: Path) -> dict[str, Any]:
    checkpoint = torch.load(file, map_location="cpu", weights_only=False, mmap=True)
    info = checkpoint["hyper_parameters"]["info_dict"]
    return {"training_module": {"model": info["training_module"]["model"]}}


@contextmanager
def _refusals(file: Path) -> Iterator[None]:
    try:
        yield
    except WorkloadError:
        raise
    except Exception as error:  # any file may be named, and what reads it is foreign code
        found = f"{file} ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        raise WorkloadError(PATH, InWords(found), "a checkpoint or package that NequIP can read") from error
