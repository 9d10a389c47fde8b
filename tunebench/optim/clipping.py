"""Global-norm gradient clipping, a step of its own and equal for all rules."""

from __future__ import annotations

import torch

from tunebench.optim.packing import Tensors
from tunebench.optim.rule import scalar


def clip_by_global_norm(grads: Tensors, max_norm: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """Gradients scaled down to a global norm of at most `max_norm`, as torch.nn.utils.clip_grad_norm_.

    Args:
        grads: one vector per segment; one norm for all of them, whatever their dtypes.
        max_norm: zero-dimensional float64; infinity clips nothing.

    Returns:
        The gradients, and their norm before clipping (zero-dimensional float64). A norm that is not finite leaves NaN
        in the gradients, for the caller to see.
    """
    # Summed in float64: the square of a float32 gradient of 1e20 is beyond float32.
    norms = [torch.linalg.vector_norm(grad, dtype=torch.float64) for grad in grads.values()]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    coefficient = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    return {name: grad * scalar(coefficient, grad) for name, grad in grads.items()}, norm
