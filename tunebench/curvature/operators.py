"""Symmetric linear operators that are known by their products with vectors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
import torch

from tunebench.curvature.probes import rademacher
from tunebench.engine.full_batch import FullBatch
from tunebench.optim.packing import Tensors

Product = Callable[[torch.Tensor], torch.Tensor]


class Operator(Protocol):
    """A symmetric operator on vectors (size,) in float64.

    Attributes:
        size: dimension. device: of its vectors.
        products: how often it was multiplied.
    """

    size: int
    device: torch.device
    products: int

    def __call__(self, vector: torch.Tensor) -> torch.Tensor:
        """The product with one vector, (size,)."""
        ...


class Explicit:
    """An operator from a function, for problems with a known spectrum."""

    def __init__(self, size: int, product: Product, device: torch.device | str = "cpu") -> None:
        self.size, self.device, self.products = size, torch.device(device), 0
        self._product = product

    def __call__(self, vector: torch.Tensor) -> torch.Tensor:
        """The product with one vector, (size,)."""
        self.products += 1
        return self._product(vector)


class Coordinates:
    """Some elements of a model's weights as one vector, in the order of their names.

    Args:
        masks: elements that take part, bool, shaped as the weights.
    """

    def __init__(self, masks: Mapping[str, torch.Tensor]) -> None:
        self.names = tuple(sorted(masks))
        self._shapes = [masks[name].shape for name in self.names]
        self._chosen = torch.cat([masks[name].reshape(-1) for name in self.names]).nonzero().squeeze(1)
        self.total = sum(shape.numel() for shape in self._shapes)

    @property
    def size(self) -> int:
        """Elements that take part."""
        return len(self._chosen)

    @property
    def device(self) -> torch.device:
        """Where the vectors are."""
        return self._chosen.device

    def vector(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The elements of named tensors, float64 (size,)."""
        flat = torch.cat([tensors[name].reshape(-1).to(torch.float64) for name in self.names])
        return flat[self._chosen]

    def tensors(self, vector: torch.Tensor) -> Tensors:
        """Named tensors in float64, zero where an element takes no part."""
        flat = torch.zeros(self.total, dtype=torch.float64, device=vector.device)
        flat[self._chosen] = vector
        pieces = torch.split(flat, [shape.numel() for shape in self._shapes])
        return {name: p.view(s) for name, p, s in zip(self.names, pieces, self._shapes, strict=True)}


class Hessian:
    """The exact Hessian of a full-batch loss at the model's weights, on the elements that the loss depends on.

    Reverse over reverse: NequIP takes forces by `torch.autograd.grad` inside the model, so a product is a third
    derivative of the energy. Forward over reverse (`torch.func.jvp` of `grad` of the traced graph) was as exact and
    took two and a half times as long for tiny NequIP and Allegro models on a CPU; docs/curvature.md has the numbers.

    An element is left out as dead where both the gradient and a product with a random vector are exactly zero.

    Args:
        loss: the full batch; its model's weights must not change afterwards.
        draw: source of the random vector.
        keep_graphs: keep the graphs of the gradients of all chunks, which saves up to half the time of a product and
            costs the memory of a forward and backward pass over all frames; else they are made anew for each product.

    Attributes:
        coordinates: the elements that take part.
        gradient: of the loss, float64 (size,).
        loss: its value.
        products: Hessian-vector products so far, the one that finds dead elements included.
    """

    def __init__(self, loss: FullBatch, draw: np.random.Generator, *, keep_graphs: bool = True) -> None:
        self._full_batch, self._keep = loss, keep_graphs
        self._parameters = list(loss.parameters.values())
        self._kept: list[list[torch.Tensor]] = []
        self.products = 0
        self.loss, gradient = self._linearise()
        everything = Coordinates({n: torch.ones_like(p, dtype=torch.bool) for n, p in loss.parameters.items()})
        probe = everything.tensors(rademacher(draw, everything.size, everything.device))
        image = self._product(probe)
        masks = {name: (gradient[name] != 0) | (image[name] != 0) for name in gradient}
        self.coordinates = Coordinates(masks)
        self.gradient = self.coordinates.vector(gradient)
        self.size, self.device = self.coordinates.size, everything.device

    def __call__(self, vector: torch.Tensor) -> torch.Tensor:
        """The product with one vector, (size,)."""
        return self.coordinates.vector(self._product(self.coordinates.tensors(vector)))

    def _linearise(self) -> tuple[float, Tensors]:
        """Loss and gradient, and the gradients with their graphs, chunk by chunk, where they are kept."""
        total = 0.0
        gradient = {name: torch.zeros_like(parameter) for name, parameter in self._full_batch.parameters.items()}
        for loss in self._full_batch.chunk_losses():
            parts = self._gradients(loss)
            total += float(loss.detach())
            for (name, kept), part in zip(gradient.items(), parts, strict=True):
                gradient[name] = kept + part.detach()
            if self._keep:
                self._kept.append(parts)
        return total, gradient

    def _gradients(self, loss: torch.Tensor) -> list[torch.Tensor]:
        found = torch.autograd.grad(loss, self._parameters, create_graph=True, materialize_grads=True)
        return list(found)

    def _product(self, vector: Tensors) -> Tensors:
        self.products += 1
        along = [vector[name].to(p.dtype) for name, p in self._full_batch.parameters.items()]
        image = [torch.zeros_like(parameter) for parameter in self._parameters]
        chunks = self._kept if self._keep else map(self._gradients, self._full_batch.chunk_losses())
        for gradients in chunks:
            reached = [(g, v) for g, v in zip(gradients, along, strict=True) if g.requires_grad]
            parts = torch.autograd.grad(
                [g for g, _ in reached],
                self._parameters,
                [v for _, v in reached],
                retain_graph=self._keep,
                materialize_grads=True,
            )
            image = [kept + part for kept, part in zip(image, parts, strict=True)]
        return dict(zip(self._full_batch.parameters, image, strict=True))
