"""SOAP and SOAP-Muon, one block at a time and word for word: what the batched rules must reproduce.

Written from the algorithms, without any of the rules' batching: loops over matrices, the momentum kept in the
eigenbasis and carried to a new one, `torch.linalg.qr` in the refresh, `torch.linalg.svd` for singular values. Only the
first basis is the project's own, since a rank-deficient factor has no other definite one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch

from tunebench.optim.eigenbasis import eigenbasis

Settings = Mapping[str, float]
Direction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""From the normalised direction in the eigenbasis (m, n) and the bases QL, QR to the update (m, n)."""


class NaiveSoap:
    """Steps tensors of shape (matrices, in, out); those at positions in `vectors` get the skip-first Adam."""

    def __init__(
        self,
        blocks: Sequence[torch.Tensor],
        hyper: Settings,
        *,
        vectors: Sequence[int] = (),
        direction: Direction = lambda n, ql, qr: ql @ n @ qr.T,
        rotated: Callable[[int, int], tuple[bool, bool]] = lambda m, n: (True, True),
        current: bool = False,
        warmup: int = 0,
    ) -> None:
        self.blocks, self.hyper, self.vectors = blocks, hyper, set(vectors)
        self.direction, self.rotated, self.current, self.warmup = direction, rotated, current, warmup
        self.count = -1
        self.state: list[dict[str, torch.Tensor]] = [{} for _ in blocks]
        self.refreshes = 0

    def step(self) -> None:
        self.count += 1
        for position, (w, state) in enumerate(zip(self.blocks, self.state, strict=True)):
            assert w.grad is not None
            if not state:
                state["M"], state["V"] = torch.zeros_like(w.detach()), torch.zeros_like(w.detach())
            with torch.no_grad():
                if position in self.vectors:
                    self.vector_step(w, w.grad, state)
                else:
                    self.matrix_step(w, w.grad, state)
        self.refreshes += self.due()

    def due(self) -> bool:
        return self.count > 0 and (self.count % self.hyper["precondition_frequency"] == 0 or self.count <= self.warmup)

    def length(self, rate: float, beta1: float, beta2: float) -> float:
        return rate * math.sqrt(1 - beta2**self.count) / (1 - beta1**self.count)

    def vector_step(self, w: torch.Tensor, g: torch.Tensor, state: dict[str, torch.Tensor]) -> None:
        if self.count == 0:
            return
        h = self.hyper
        rate = h["learning_rate"] * h["aux_learning_rate_ratio"]
        state["M"] = h["aux_beta1"] * state["M"] + (1 - h["aux_beta1"]) * g
        state["V"] = h["aux_beta2"] * state["V"] + (1 - h["aux_beta2"]) * g * g
        w -= self.length(rate, h["aux_beta1"], h["aux_beta2"]) * state["M"] / (state["V"].sqrt() + h["aux_eps"])
        w -= rate * h["aux_weight_decay"] * w

    def matrix_step(self, w: torch.Tensor, g: torch.Tensor, state: dict[str, torch.Tensor]) -> None:
        h = self.hyper
        if self.count == 0:
            self.update_factors(g, state)
            m, n = g.shape[1:]
            left, right = self.rotated(m, n)
            state["QL"] = eigenbasis(state["L"]) if left else torch.eye(m, dtype=g.dtype)
            state["QR"] = eigenbasis(state["R"]) if right else torch.eye(n, dtype=g.dtype)
            return
        if self.current:
            self.update_factors(g, state)
            self.refresh(state)
        ql, qr = state["QL"], state["QR"]
        for k in range(len(g)):
            rotated = ql.T @ g[k] @ qr
            state["M"][k] = h["beta1"] * state["M"][k] + (1 - h["beta1"]) * rotated
            state["V"][k] = h["beta2"] * state["V"][k] + (1 - h["beta2"]) * rotated * rotated
            normalised = state["M"][k] / (state["V"][k].sqrt() + h["eps"])
            w[k] -= self.length(h["learning_rate"], h["beta1"], h["beta2"]) * self.direction(normalised, ql, qr)
            w[k] -= h["learning_rate"] * h["weight_decay"] * w[k]
        if not self.current:
            self.update_factors(g, state)
            self.refresh(state)

    def update_factors(self, g: torch.Tensor, state: dict[str, torch.Tensor]) -> None:
        beta = self.hyper["shampoo_beta"]
        left, right = sum(x @ x.T for x in g), sum(x.T @ x for x in g)
        state["L"] = beta * state.get("L", torch.zeros_like(left)) + (1 - beta) * left
        state["R"] = beta * state.get("R", torch.zeros_like(right)) + (1 - beta) * right

    def refresh(self, state: dict[str, torch.Tensor]) -> None:
        if not self.due():
            return
        original = [state["QL"] @ m @ state["QR"].T for m in state["M"]]
        for side, factor, axis in (("QL", "L", 1), ("QR", "R", 2)):
            if self.rotated(*state["V"].shape[1:])[axis - 1]:
                s, q = state[factor], state[side]
                order = torch.argsort(torch.diagonal(q.T @ s @ q), descending=True)
                state["V"] = state["V"].index_select(axis, order)
                state[side] = torch.linalg.qr(s @ q[:, order]).Q
        state["M"] = torch.stack([state["QL"].T @ m @ state["QR"] for m in original])


def newton_schulz(x: torch.Tensor, schedule: Sequence[tuple[float, float, float]]) -> torch.Tensor:
    """Of one matrix, step by step."""
    if x.norm() == 0:
        return x
    if x.shape[0] > x.shape[1]:
        return newton_schulz(x.T, schedule).T
    x = x / x.norm()
    for a, b, c in schedule:
        gram = x @ x.T
        x = a * x + b * gram @ x + c * gram @ gram @ x
    return x


def singular_value_power(x: torch.Tensor, rho: float) -> torch.Tensor:
    """Of one matrix."""
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    powered: torch.Tensor = (u * s**rho) @ vh
    return powered
