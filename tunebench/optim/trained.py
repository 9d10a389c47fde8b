"""Which weights of a model are trained, and with which share of the learning rate, by patterns of their names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

import torch

ALL, READOUT = "all", "readout"
_READOUT = ("per_atom_energy_readout.*", "edge_readout.*", "per_type_energy_scale_shift.*")
_WRAPPERS = ("sole_model", "model", "func")


class UnknownWeights(ValueError):
    """A pattern that does not choose weights as it should.

    Attributes:
        key: ``train`` or ``lr_factors``. pattern: the pattern. allowed: what would do.
    """

    def __init__(self, key: str, pattern: str, allowed: str) -> None:
        self.key, self.pattern, self.allowed = key, pattern, allowed
        super().__init__(f"{key}: found {pattern!r}, allowed: {allowed}")


def short_name(name: str) -> str:
    """A weight's name without the wrappers that NequIP puts around every model."""
    parts = name.split(".")
    while parts[0] in _WRAPPERS and len(parts) > 1:
        parts = parts[1:]
    return ".".join(parts)


def trained_names(names: Iterable[str], train: str | Sequence[str] = ALL) -> tuple[str, ...]:
    """The weights that are trained.

    Args:
        names: of all weights of a model, with or without its wrappers.
        train: ``all``, ``readout`` (the network that ends in the energy, and scales and shifts where they can be
            trained), or patterns of names without wrappers, in which ``*`` stands for anything.

    Raises:
        UnknownWeights: a pattern that matches no weight.
    """
    names = tuple(names)
    if train == ALL:
        return names
    patterns = _READOUT if train == READOUT else tuple(train)
    found = [name for name in names if any(fnmatchcase(short_name(name), pattern) for pattern in patterns)]
    unmet = () if train == READOUT and found else [p for p in patterns if not _matches(names, p)]
    for pattern in unmet:
        raise UnknownWeights("train", pattern, _known(names))
    return tuple(found)


def learning_rate_factors(names: Iterable[str], factors: Mapping[str, float]) -> dict[str, float]:
    """Factor on the learning rate of every weight, 1 where no pattern matches.

    Args:
        names: of the trained weights.
        factors: by pattern.

    Raises:
        UnknownWeights: a pattern that matches no trained weight, or one that another pattern matches.
    """
    names = tuple(names)
    found: dict[str, float] = {}
    for pattern, factor in factors.items():
        matched = _matches(names, pattern)
        if not matched:
            raise UnknownWeights("lr_factors", pattern, _known(names))
        twice = [short_name(name) for name in matched if name in found]
        if twice:
            raise UnknownWeights("lr_factors", pattern, f"one pattern for each weight; another matches {twice[0]}")
        found |= dict.fromkeys(matched, float(factor))
    return {name: found.get(name, 1.0) for name in names}


def freeze_others(model: torch.nn.Module, train: str | Sequence[str]) -> None:
    """Let only the trained weights of a model have gradients; errors as for `trained_names`."""
    kept = set(trained_names([name for name, _ in model.named_parameters()], train))
    for name, parameter in model.named_parameters():
        if name not in kept:
            parameter.requires_grad_(False)


def _matches(names: Sequence[str], pattern: str) -> list[str]:
    return [name for name in names if fnmatchcase(short_name(name), pattern)]


def _known(names: Sequence[str]) -> str:
    return f"a pattern that matches one of {', '.join(short_name(name) for name in names)}"
