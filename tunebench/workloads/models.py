"""Models: from a study's model section to NequIP's, and from that to a built model."""

from __future__ import annotations

import copy
import difflib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from allegro.model import AllegroModel
from allegro.model.allegro_models import FullAllegroModel
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from nequip.model import NequIPGNNModel
from nequip.model.nequip_models import FullNequIPGNNModel
from nequip.utils.global_state import set_global_state

from tunebench.study.initial import ADOPTED
from tunebench.study.spec import Family, Model
from tunebench.workloads.errors import WorkloadError
from tunebench.workloads.model_arguments import SET_BY_TUNEBENCH, why_left_out
from tunebench.workloads.presets import NEQUIP_OWN_PRESETS, PRESETS
from tunebench.workloads.statistics import TrainingStatistics

_BUILDERS = {
    Family.NEQUIP: ("nequip.model.NequIPGNNModel", (NequIPGNNModel, FullNequIPGNNModel)),
    Family.ALLEGRO: ("allegro.model.AllegroModel", (AllegroModel, FullAllegroModel)),
}
# What the family's builder works out itself and hands to its full form.
_DERIVED_ARGUMENTS = ("feature_irreps_hidden", "irreps_edge_sh", "tensor_track_allowed_irreps")
_PRESET_BUILDER = "nequip.model.PresetNequIPGNNModel"


def model_config(model: Model, type_names: Sequence[str], statistics: TrainingStatistics, seed: int) -> dict[str, Any]:
    """NequIP's ``training_module.model`` section: plain values for YAML, `nequip-train` and `build_model`.

    The preset comes first, then what the training split says (energy shifts by least squares, force RMS as energy scale
    of every type, average number of neighbours), then the study's own arguments, which win.

    Args:
        model: the study's model section.
        type_names: chemical symbols.
        statistics: of the training split at this cutoff.
        seed: seed of the initial weights.

    Raises:
        WorkloadError: unknown preset, or an argument that the builder does not have or that the study sets elsewhere.
    """
    presets = PRESETS[model.family]
    if model.preset not in presets and model.preset != ADOPTED:
        raise WorkloadError("model.preset", model.preset, ", ".join(presets))
    _check_arguments(model)
    target, _ = _BUILDERS[model.family]
    own = model.family is Family.NEQUIP and model.preset in NEQUIP_OWN_PRESETS
    config: dict[str, Any] = {"_target_": _PRESET_BUILDER, "preset": model.preset} if own else {"_target_": target}
    config.update(copy.deepcopy(dict(presets.get(model.preset, {}))))
    config.update(
        seed=seed,
        model_dtype=model.dtype,
        r_max=model.r_max_angstrom,
        type_names=list(type_names),
        avg_num_neighbors=statistics.avg_num_neighbors,
        per_type_energy_scales=statistics.force_rms,
        per_type_energy_shifts=dict(zip(type_names, statistics.per_type_energy_shifts, strict=True)),
    )
    config.update(copy.deepcopy(model.arguments))
    pair = config.get("pair_potential")
    if isinstance(pair, dict) and str(pair.get("_target_", "")).endswith(".ZBL"):
        pair.setdefault("chemical_species", list(type_names))
    return config


def build_model(config: dict[str, Any]) -> torch.nn.Module:
    """Build the model of a `model_config` on the CPU; the same config gives the same weights.

    Sets NequIP's global state first, which among other things makes float64 torch's default dtype.

    Raises:
        WorkloadError: the builder refuses its arguments.
    """
    set_global_state()
    try:
        model: torch.nn.Module = instantiate(config, _recursive_=False, _convert_="all")
    except (InstantiationException, TypeError, AssertionError, ValueError) as error:
        reason = error.__cause__ or error
        found = f"{type(reason).__name__}: {reason}"
        raise WorkloadError("model.arguments", found, f"arguments that {config['_target_']} accepts") from error
    return model


def builders_of(family: Family) -> tuple[Callable[..., Any], ...]:
    """A family's builder, and the full form that it hands its arguments to."""
    _, builders = _BUILDERS[family]
    return builders


def known_arguments(family: Family) -> tuple[str, ...]:
    """The keyword arguments of a family's builder that a study may set."""
    names = {name for builder in builders_of(family) for name in _named_parameters(builder)}
    return tuple(sorted((names | {"compile_mode"}) - set(SET_BY_TUNEBENCH) - set(_DERIVED_ARGUMENTS)))


def _named_parameters(builder: Any) -> list[str]:
    parameters = inspect.signature(builder).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD]


def _check_arguments(model: Model) -> None:
    known = known_arguments(model.family)
    for name in model.arguments:
        if reason := why_left_out(name):
            raise WorkloadError(f"model.arguments.{name}", model.arguments[name], f"left out: {reason}")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise WorkloadError("model.arguments", name, ", ".join(known) + hint)
