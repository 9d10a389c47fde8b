"""Where every trial of a fine-tuning workload starts: a trained model's weights under the workload's own types.

It depends on the file, the data set and the `init` section alone, never on a trial's seeds, so all arms and all seeds
start from the same numbers. It is worked out once and kept in the cache, for all processes of a node.
"""

from __future__ import annotations

import hashlib
import json
import logging
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate
from nequip.data import AtomicDataDict
from numpy.typing import NDArray

from tunebench.study.files import replacing
from tunebench.study.initial import Energies, Initial, NewTypes, source_of
from tunebench.study.record import Split
from tunebench.study.spec import InWords, Model
from tunebench.workloads.data import PreparedData, cache_folder, known_hash, load_prepared
from tunebench.workloads.errors import WorkloadError
from tunebench.workloads.frames import PreparedFrames, prepared_frames
from tunebench.workloads.models import build_model, model_config
from tunebench.workloads.statistics import composition, fit_energy_shifts, training_statistics
from tunebench.workloads.trained_model import TrainedModel, read_record, read_trained
from tunebench.workloads.type_rows import Tensors, TypeMap, mapped_tensors

_log = logging.getLogger(__name__)

SCHEMA_VERSION = 1
Array = NDArray[np.float64]

# The same weights in the same operations; what is left is the rounding of two versions of a library.
_TOLERANCE = {"float32": 1e-3, "float64": 1e-8}
_COMPARED_FRAMES, _BATCH_FRAMES = 2, 32
_BATCH_EDGES = 10_000  # Allegro's tensor product takes 70 kB of memory an edge; one frame may have more
_SMALL = 0.1  # eV/Å: forces of a perfect crystal are rounding


@dataclass(frozen=True, kw_only=True, eq=False)
class StartingPoint:
    """A model to start from.

    Attributes:
        constants: arguments of the model's builder that are the file's and not the data set's: energy scales and
            shifts (eV), average number of neighbours.
        tensors: all other weights and buffers by name in NequIP's GraphModel.
        digest: SHA-256 (hex) of both.
        about: what was done, in plain values for a record: the file's hash, types, energies before and after.
    """

    constants: Mapping[str, Any]
    tensors: Tensors
    digest: str
    about: Mapping[str, Any]

    def put_into(self, model: torch.nn.Module) -> None:
        """Copy the tensors into a GraphModel that was built with the constants."""
        own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        with torch.no_grad():
            for name, tensor in self.tensors.items():
                own[name].copy_(tensor)


def starting_point(initial: Initial, model: Model, data: PreparedData) -> StartingPoint:
    """The starting point of a workload, from the cache where it has been worked out before.

    Args:
        initial: the workload's `init` section.
        model: its model section, with the architecture of the file.
        data: its data.

    Raises:
        WorkloadError: the file has changed or cannot be used; a species is new to it; its model, built anew with these
            types, does not compute what the file's computes.
    """
    kept = kept_file(initial, model, data)
    return _kept(kept, initial.model_dump_json(), model.model_dump_json(), data.folder)


def kept_file(initial: Initial, model: Model, data: PreparedData) -> Path:
    """Where the cache keeps a starting point; arguments and errors of the file as for `starting_point`."""
    sha256 = checked_hash(initial)
    said = initial.model_dump(mode="json", include={"new_types", "energies", "seed"})
    key = {"version": SCHEMA_VERSION, "file": sha256, "data": data.hash, "init": said, "model": model.model_dump()}
    digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()
    return cache_folder() / "initial" / f"{digest[:24]}.pt"


def started_model(start: str, model: Mapping[str, Any]) -> torch.nn.Module:
    """A model with the weights of a starting point, for a `nequip-train` config by ``_target_``.

    Args:
        start: file of the starting point, from `kept_file`.
        model: NequIP's own model section, with the starting point's constants.

    Raises:
        WorkloadError: the file is gone or damaged.
    """
    found = _read(Path(start))
    if found is None:
        raise WorkloadError("model.start", start, "a starting point that `tunebench export` has named; export it again")
    built: torch.nn.Module = instantiate(model, _recursive_=False, _convert_="all")
    found.put_into(built)
    return built


def forget() -> None:
    """Forget the starting points that this process has at hand; the cache keeps them."""
    _kept.cache_clear()


def checked_hash(initial: Initial) -> str:
    """SHA-256 of the file that an `init` section names.

    Raises:
        WorkloadError: there is no such file, or another one than the section states.
    """
    try:
        found = known_hash(Path(initial.path))
    except OSError as error:
        allowed = "a checkpoint (.ckpt) or a packaged model (.nequip.zip)"
        raise WorkloadError("init.path", InWords(f"{initial.path}: {error.strerror}"), allowed) from error
    if initial.sha256 not in (None, found):
        stated = f"SHA-256 {str(initial.sha256)[:12]}, of the file that init.sha256 states or the run began with"
        raise WorkloadError("init.path", InWords(f"{initial.path} with SHA-256 {found[:12]}"), stated)
    return found


@lru_cache(maxsize=16)
def _kept(kept: Path, initial: str, model: str, folder: Path) -> StartingPoint:
    found = _read(kept)
    if found is None:
        sections = Initial.model_validate_json(initial), Model.model_validate_json(model)
        found = _worked_out(*sections, load_prepared(folder))
        _write(kept, found)
    return found


def _worked_out(initial: Initial, model: Model, data: PreparedData) -> StartingPoint:
    trained = read_trained(Path(initial.path))
    types = TypeMap(own=data.type_names, others=trained.architecture.type_names)
    _check_types(initial, types)
    constants = _constants(trained, types)
    statistics = training_statistics(data, model.r_max_angstrom)
    built = build_model({**model_config(model, data.type_names, statistics, initial.seed), **constants})
    tensors = mapped_tensors(built, trained.model, types)
    start = _assembled(constants, tensors, {})
    start.put_into(built)
    frames = prepared_frames(data, Split.TRAIN, model.r_max_angstrom)
    _check_alike(built, trained, types, frames, model.dtype)
    before, shifts, after, note = _reestimated(built, frames, constants, types)
    if initial.energies is Energies.REESTIMATE:
        constants = {**constants, "per_type_energy_shifts": shifts}
    about = {
        "sha256": known_hash(trained.file),
        "types": list(types.own),
        "new_types": list(types.new),
        "left_out_types": [name for name in types.others if name not in types.own],
        "energies": initial.energies.value,
        "energy_rmse_before_ev_per_atom": before,
        "energy_rmse_ev_per_atom": after if initial.energies is Energies.REESTIMATE else before,
        "note": note,
        "pretrained": _origin(trained.file),
    }
    return _assembled(constants, tensors, about)


def _origin(file: Path) -> dict[str, Any] | None:
    """Of a base model that tunebench has trained: by which study, on which data, how far and how well."""
    record = read_record(file) if source_of(file.name) == "checkpoint" else None
    names = ("study", "study_hash", "data_hash", "optimizer", "steps", "errors")
    return None if record is None else {name: record.get(name) for name in names}


def _check_types(initial: Initial, types: TypeMap) -> None:
    if len(types.new) == len(types.own):
        found = InWords(f"a model of {', '.join(types.others)}")
        raise WorkloadError("init.path", found, f"a model that knows at least one of {', '.join(types.own)}")
    if types.new and initial.new_types is NewTypes.ERROR:
        found = InWords(f"{', '.join(types.new)} in the data, which the file does not know")
        allowed = f"species among {', '.join(types.others)}; or `random`, with random weights for the new ones"
        raise WorkloadError("init.new_types", found, allowed)
    if types.new and initial.energies is Energies.KEEP:
        allowed = f"reestimate, because the file has no energy for {', '.join(types.new)}"
        raise WorkloadError("init.energies", initial.energies.value, allowed)


# --- the builder's arguments that are the file's ---------------------------------------------------------------------


def _constants(trained: TrainedModel, types: TypeMap) -> dict[str, Any]:
    """Number of neighbours, energy scales and shifts, under the model's own types; those of new types are their mean.

    The shift of a new type is zero, which is never kept.
    """
    found = _modules(trained.model, "PerTypeScaleShift")
    scales = _per_type(found[0].scales, types) if found and found[0].has_scales else None
    shifts = _per_type(found[0].shifts, types) if found and found[0].has_shifts else None
    if not isinstance(shifts, dict):
        shifts = dict.fromkeys(types.own, shifts or 0.0)
    constants = {
        "avg_num_neighbors": _neighbours(trained, types),
        "per_type_energy_scales": scales,
        "per_type_energy_shifts": shifts | dict.fromkeys(types.new, 0.0),
    }
    return constants | _own_cutoffs(trained.architecture.model.arguments.get("per_edge_type_cutoff"), types)


def _modules(model: torch.nn.Module, kind: str) -> list[Any]:
    return [module for module in model.modules() if type(module).__name__ == kind]


def _per_type(values: torch.Tensor, types: TypeMap) -> float | dict[str, float]:
    """A value for all types, or by type."""
    listed = [float(value) for value in values.detach().reshape(-1)]
    if len(listed) == 1 and len(types.others) > 1:
        return listed[0]
    return _by_own_type(dict(zip(types.others, listed, strict=True)), types)


def _by_own_type(by_type: Mapping[str, float], types: TypeMap) -> dict[str, float]:
    mean = float(np.mean([by_type[name] for name in types.own if name in by_type]))
    return {name: float(by_type.get(name, mean)) for name in types.own}


def _neighbours(trained: TrainedModel, types: TypeMap) -> float | dict[str, float] | None:
    """As the file's configuration says it, or where that says how to compute it, as its model holds it."""
    said = trained.architecture.constants.get("avg_num_neighbors")
    if isinstance(said, int | float):
        return float(said)
    if isinstance(said, Mapping):
        return _by_own_type({str(name): float(value) for name, value in said.items()}, types)
    norms = _modules(trained.model, "AvgNumNeighborsNorm")
    return _per_type(norms[0].norm_const.to(torch.float64) ** -2, types) if norms else None


def _own_cutoffs(cutoffs: Any, types: TypeMap) -> dict[str, Any]:
    """The file's cutoffs by pair of types, for the types that the model has."""
    if not isinstance(cutoffs, Mapping):
        return {}
    kept = {name: value for name, value in cutoffs.items() if name in types.own}
    for name, value in kept.items():
        if isinstance(value, Mapping):
            kept[name] = {other: cutoff for other, cutoff in value.items() if other in types.own}
    return {"per_edge_type_cutoff": kept}


# --- the model built anew against the file's -------------------------------------------------------------------------


def _check_alike(
    built: torch.nn.Module, trained: TrainedModel, types: TypeMap, frames: PreparedFrames, dtype: str
) -> None:
    """Both models on training structures whose atoms are given types that both know, each of them in turn."""
    both = types.pairs
    for index in range(min(_COMPARED_FRAMES, len(frames))):
        frame = frames.frames[index]
        turns = torch.arange(len(frame["pos"])) + index
        own, other = (torch.tensor([pair[side] for pair in both])[turns % len(both)] for side in (0, 1))
        found = _outputs(built, {**frame, "atom_types": own})
        expected = _outputs(trained.model, {**frame, "atom_types": other})
        scale = max(_SMALL, float(expected[AtomicDataDict.FORCE_KEY].abs().max()))
        worst = max(
            float((found[key] - expected[key]).abs().max()) / size
            for key, size in ((AtomicDataDict.FORCE_KEY, scale), (AtomicDataDict.TOTAL_ENERGY_KEY, len(turns) * scale))
        )
        if not worst <= _TOLERANCE[dtype]:
            said = InWords(f"{trained.file}, whose model differs by {worst:.1e} from one built anew with its weights")
            raise WorkloadError("init.path", said, "a model that this version of NequIP builds alike")


def _outputs(model: torch.nn.Module, frame: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found = model.eval()(_batched([frame]))
    return {key: found[key].detach() for key in (AtomicDataDict.TOTAL_ENERGY_KEY, AtomicDataDict.FORCE_KEY)}


# --- energies by type ------------------------------------------------------------------------------------------------


def _reestimated(
    built: torch.nn.Module, frames: PreparedFrames, constants: Mapping[str, Any], types: TypeMap
) -> tuple[float, dict[str, float], float, str]:
    """Shifts corrected by least squares of what the model leaves over, per atom, on the training split.

    Returns:
        RMSE of the energy before, eV/atom; shifts by type, eV; RMSE with them; a note where compositions leave them
        open.
    """
    counts, energies = composition(frames, len(types.own))
    left_over = energies - _energies(built, frames)
    fit = fit_energy_shifts(counts, left_over)
    old = constants["per_type_energy_shifts"]
    shifts = {name: old[name] + float(change) for name, change in zip(types.own, fit.shifts, strict=True)}
    few = f"{fit.rank} independent compositions for {len(types.own)} species: the smallest correction is taken"
    before = float(np.sqrt(np.mean(np.square(left_over / counts.sum(axis=1)))))
    after = float(np.sqrt(np.mean(np.square(fit.residuals))))
    return before, shifts, after, few if fit.rank < len(types.own) else ""


def _energies(model: torch.nn.Module, frames: PreparedFrames) -> Array:
    """Total energies that a model predicts, eV (frames,); without forces, which would cost most of the time."""
    inner = model.get_submodule("model")
    energy = inner.get_submodule("func") if type(inner).__name__ == "ForceStressOutput" else inner
    predicted: list[float] = []
    with torch.no_grad():
        for batch in _batches(frames.frames):
            predicted += energy(batch)[AtomicDataDict.TOTAL_ENERGY_KEY].reshape(-1).tolist()
    return np.array(predicted, dtype=np.float64)


def _batches(frames: Sequence[Mapping[str, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
    """Frames in their order, no more of them and of their edges in a batch than memory holds."""
    chosen: list[Mapping[str, torch.Tensor]] = []
    for frame in frames:
        edges = sum(one[AtomicDataDict.EDGE_INDEX_KEY].shape[1] for one in (*chosen, frame))
        if chosen and (len(chosen) == _BATCH_FRAMES or edges > _BATCH_EDGES):
            yield _batched(chosen)
            chosen = []
        chosen.append(frame)
    if chosen:
        yield _batched(chosen)


def _batched(frames: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    copies = [{key: value.clone() for key, value in frame.items()} for frame in frames]
    batch: dict[str, torch.Tensor] = AtomicDataDict.batched_from_list(copies)
    return batch


# --- kept ------------------------------------------------------------------------------------------------------------


def _assembled(constants: Mapping[str, Any], tensors: Tensors, about: Mapping[str, Any]) -> StartingPoint:
    digest = hashlib.sha256(json.dumps(constants, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous()
        digest.update(repr((name, tuple(tensor.shape), str(tensor.dtype))).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return StartingPoint(constants=constants, tensors=tensors, digest=digest.hexdigest(), about=about)


def _read(kept: Path) -> StartingPoint | None:
    if not kept.is_file():
        return None
    try:
        content = torch.load(kept, map_location="cpu", weights_only=True)
        found = _assembled(content["constants"], content["tensors"], content["about"])
        if found.digest == content["digest"]:
            return found
        _log.warning("%s: does not hold what it says, and is worked out anew", kept)
    except (OSError, EOFError, RuntimeError, KeyError, pickle.UnpicklingError) as error:
        _log.warning("%s: cannot be read and is worked out anew: %s", kept, error)
    return None


def _write(kept: Path, start: StartingPoint) -> None:
    """Keep it, where the cache can be written; who cannot keep it works it out again."""
    content = {name: getattr(start, name) for name in ("constants", "tensors", "digest", "about")}
    try:
        with replacing(kept) as partial:
            torch.save(content, partial)
    except OSError as error:
        _log.warning("%s: cannot be written: %s", kept, error)
