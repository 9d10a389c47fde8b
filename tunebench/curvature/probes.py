"""Random vectors."""

from __future__ import annotations

import numpy as np
import torch


def rademacher(draw: np.random.Generator, size: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """A vector of independent signs, float64 (size,); its outer product has the identity as mean."""
    signs = draw.integers(0, 2, size=size, dtype=np.int64).astype(np.float64) * 2.0 - 1.0
    return torch.from_numpy(signs).to(device)
