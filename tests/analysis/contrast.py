"""Luminance and contrast of colours after WCAG 2, for tests of what can be read."""

from __future__ import annotations

import re


def luminance(colour: str) -> float:
    """Relative luminance, 0 to 1, of ``#RRGGBB`` or ``rgb(r, g, b)``."""
    if colour.startswith("#"):
        numbers = [float(int(colour[place : place + 2], 16)) for place in (1, 3, 5)]
    else:
        numbers = [float(part) for part in re.findall(r"[\d.]+", colour)[:3]]
    parts = [number / 255.0 for number in numbers]
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(first: str, second: str) -> float:
    """From 1 to 21."""
    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)
