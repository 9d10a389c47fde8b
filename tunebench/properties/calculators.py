"""Potentials as ASE calculators in float64: trained models, and teachers by name."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunebench.study.errors import RunError
from tunebench.study.paths import NoSuchFileError, existing_file
from tunebench.study.problems import one_of
from tunebench.study.record import Readout, Split

if TYPE_CHECKING:
    import torch
    from ase.calculators.calculator import Calculator

TEACHERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "emt": ("ase.calculators.emt", "EMT", {}),
    "gfn2-xtb": ("tblite.ase", "TBLite", {"method": "GFN2-xTB", "verbosity": 0}),
}
"""Potentials that stand in for DFT where a study has none, by name."""


def calculator_named(
    name: str, device: str = "cpu", base: Path | None = None, readout: Readout | None = None
) -> Calculator:
    """A teacher by its name, or the model in a checkpoint or package by its path.

    Args:
        name: teacher or path, with ``${VARIABLE}`` from the environment.
        device: ``cpu`` or ``cuda``; teachers know the CPU alone.
        base: folder that a relative path starts from; left out, the working directory.
        readout: as for `calculator_from`; teachers have none.

    Raises:
        RunError: neither a teacher's name nor a model that NequIP can load.
    """
    if name in TEACHERS:
        if readout is not None:
            raise RunError(f"readout: found {readout} of {name}, allowed: a readout of a confirm trial's checkpoint")
        return teacher(name)
    try:
        path = existing_file(name, base or Path.cwd())
    except NoSuchFileError as error:
        raise RunError(f"{name}: found no model, allowed: {one_of(TEACHERS, name)}, or {error}") from error
    return calculator_from(path, device, readout)


def teacher(name: str) -> Calculator:
    """A potential whose properties the same code computes, as the reference of models trained on its labels.

    ``emt`` is ASE's effective-medium theory for Al, Cu, Ag, Au, Ni, Pd and Pt (Jacobsen, Stoltze, Nørskov,
    Surf. Sci. 366, 394, 1996). ``gfn2-xtb`` is what labels the embedded molecules (doi:10.1021/acs.jctc.8b01176).

    Raises:
        RunError: no teacher of this name.
    """
    from importlib import import_module

    if name not in TEACHERS:
        raise RunError(f"teacher: found {name}, allowed: {one_of(TEACHERS, name)}")
    module, kind, arguments = TEACHERS[name]
    made: Calculator = getattr(import_module(module), kind)(**arguments)
    return made


def calculator_from(path: Path, device: str = "cpu", readout: Readout | None = None) -> Calculator:
    """The model of a NequIP checkpoint (``final.ckpt`` of a confirm trial) or package (``.nequip.zip``), in float64.

    Checkpoints and packages are unpickled, which runs whatever code they hold: open only those you trust.

    Args:
        path: the file; a confirm trial's ``refined.pt`` means its refined weights.
        device: ``cpu`` or ``cuda``.
        readout: which weights of a confirm trial; left out, a checkpoint's evaluation weights, the averaged ones where
            the optimizer keeps an average. ``raw`` and ``refined`` come from the files beside the checkpoint.

    Raises:
        RunError: NequIP cannot load it, or there are no such weights.
    """
    from tunebench.engine.checkpoints import FINAL, REFINED  # imports torch

    if path.name == REFINED:
        path, readout = path.with_name(FINAL), readout or Readout.REFINED
    model = in_float64(_loaded(path))
    weights = _weights_of(path, readout)
    if weights is not None:
        _set_weights(model, weights, path)
    return calculator_of(model, device)


def _loaded(path: Path) -> torch.nn.Module:
    from nequip.model.saved_models.load_utils import load_saved_model
    from nequip.utils.global_state import set_global_state

    set_global_state()
    try:
        model: torch.nn.Module = load_saved_model(str(path), compile_mode="eager")
    except Exception as error:  # unpickling and building raise whatever they meet
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise RunError(f"{path}: found {reason}, allowed: a model that NequIP can load") from error
    return model


def _weights_of(path: Path, readout: Readout | None) -> dict[str, torch.Tensor] | None:
    """Weights by name that take the place of a checkpoint's own; None where those are the ones."""
    from tunebench.engine.checkpoints import FINAL, LAST, REFINED

    if readout is None:
        return None
    if path.name != FINAL:
        raise RunError(f"readout: found {readout} of {path.name}, allowed: a readout of a confirm trial's {FINAL}")
    if readout is Readout.REFINED:
        return dict(_read(path.with_name(REFINED))["weights"])
    last = _read(path.with_name(LAST))
    found = {Readout(name) for name in json.loads(last["evaluation"])["errors"].get(Split.VAL, {})}
    if readout not in found:
        raise RunError(f"readout: found {readout}, allowed: {one_of(found, readout)} for {path}")
    own = last["module"].items()
    return {n.removeprefix("model."): w for n, w in own if n.startswith("model.")} if readout is Readout.RAW else None


def _read(path: Path) -> dict[str, Any]:
    import torch

    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise RunError(f"{path}: found {reason}, allowed: what a finished confirm trial leaves there") from error
    return content


def _set_weights(model: torch.nn.Module, weights: Mapping[str, torch.Tensor], path: Path) -> None:
    """Put weights in place of the model's own, in its precision; those that were not trained stay as they are."""
    import torch

    own = model.state_dict(keep_vars=True)
    given = {name.removeprefix("sole_model."): weight for name, weight in weights.items()}
    if unknown := sorted(given.keys() - own.keys()):
        raise RunError(f"{path}: found weights for {unknown[0]}, allowed: weights of the checkpoint's own model")
    with torch.no_grad():
        for name, weight in given.items():
            own[name].copy_(weight)


def calculator_of(model: torch.nn.Module, device: str = "cpu") -> Calculator:
    """A NequIP or Allegro model, as `tunebench.workloads.models.build_model` makes it, with float64 arithmetic.

    Finite differences need it: the forces of a float32 model are off by some 1e-4 eV/Å from the slope of its energy,
    those of the same weights in float64 by 1e-8. The given model is copied and stays as it is. Makes float64 torch's
    default dtype, as all of NequIP's commands do: nequip 0.19.1 reads positions in the default dtype.

    Args:
        model: NequIP's GraphModel, whose type names are chemical symbols.
        device: ``cpu`` or ``cuda``.

    Returns:
        A calculator of energy, forces and stress (eV, eV/Å, eV/Å³ with ASE's sign).
    """
    import torch
    from nequip.integrations.ase import NequIPCalculator
    from nequip.integrations.utils import basic_transforms
    from nequip.utils.global_state import set_global_state

    set_global_state()
    torch.set_default_dtype(torch.float64)  # NequIP does so once a process, whatever was set since
    metadata: dict[str, Any] = model.metadata  # type: ignore[assignment]  # a property of NequIP's GraphModel
    types = metadata["type_names"].split(" ")
    transforms = basic_transforms(metadata, float(metadata["r_max"]), types, {name: name for name in types})
    made: Calculator = NequIPCalculator(model=in_float64(model).eval(), device=device, transforms=transforms)
    return made


def in_float64(model: torch.nn.Module) -> torch.nn.Module:
    """A copy of a model that computes in float64 with the weights and constants it was trained with.

    NequIP's modules remember the dtype they were built for as an attribute, which a cast of their tensors leaves as
    it is.
    """
    import torch

    copied = copy.deepcopy(model).to(dtype=torch.float64)
    for module in copied.modules():
        remembered: dict[str, Any] = {name: value for name, value in vars(module).items() if value is torch.float32}
        for name in remembered:
            setattr(module, name, torch.float64)
    return copied
