"""Settings of an optimizer that make no sense are refused where it is built, in one line."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

_AT_LEAST_ZERO = ("lr", "eps", "weight_decay", "aux_lr_ratio", "aux_eps", "aux_weight_decay")
_AVERAGES = ("momentum", "shampoo_beta")
_WHOLE = ("k", "precondition_frequency", "max_precondition_dim", "newton_schulz_steps")


def checked(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, if each is one an optimizer can run with.

    Raises:
        ValueError: the first that is not, with what is allowed.
    """
    for name in _AT_LEAST_ZERO:
        value = settings.get(name)
        if value is not None and not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{name}: found {value}, allowed: a finite number of 0 or more")
    betas = [(name, beta) for name in ("betas", "aux_betas") for beta in settings.get(name, ())]
    for name, value in [*betas, *((name, settings.get(name)) for name in _AVERAGES)]:
        if value is not None and not 0 <= value < 1:
            raise ValueError(f"{name}: found {value}, allowed: from 0 to below 1")
    for name in _WHOLE:
        value = settings.get(name)
        if value is not None and not (value >= 1 and int(value) == value):
            raise ValueError(f"{name}: found {value}, allowed: a whole number of 1 or more")
    if settings.get("nesterov") and settings.get("momentum") == 0:
        raise ValueError("nesterov: found true without momentum, allowed: momentum above 0")
    return dict(settings)


def chosen(name: str, value: Any, kind: Any) -> Any:
    """The member of an enumeration that has this value.

    Raises:
        ValueError: there is none.
    """
    if value not in list(kind):
        raise ValueError(f"{name}: found {value!r}, allowed: {', '.join(str(member.value) for member in kind)}")
    return kind(value)
