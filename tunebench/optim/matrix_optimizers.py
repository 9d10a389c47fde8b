"""Muon, SOAP and SOAP-Muon, for Lightning, `nequip-train` and plain PyTorch.

They see matrices through the groups of `matrix_groups`; without it a tensor of two axes is a matrix and any other goes
to the auxiliary Adam.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from tunebench.optim.factors import Sides
from tunebench.optim.optimizer import BlockOptimizer, Group
from tunebench.optim.optimizers import EPS, Betas, Params, rates
from tunebench.optim.packing import Packing
from tunebench.optim.rule import UpdateRule
from tunebench.optim.rules.muon import Muon as MuonRule
from tunebench.optim.rules.muon import Scale
from tunebench.optim.rules.soap import Basis
from tunebench.optim.rules.soap import Soap as SoapRule
from tunebench.optim.rules.soap_muon import Recipe
from tunebench.optim.rules.soap_muon import SoapMuon as SoapMuonRule
from tunebench.optim.settings_checks import checked, chosen


class Muon(BlockOptimizer):
    """Muon (kellerjordan.github.io/posts/muon): momentum orthogonalised by Newton-Schulz; AdamW for the rest.

    Args:
        scale: `match_rms_adamw`, 0.2 sqrt(max(in, out)), so that learning rates compare with Adam's, or `keller`,
            sqrt(max(1, out / in)).
        aux_lr_ratio: learning rate of the rest over `lr`.
        aux_betas, aux_eps, aux_weight_decay: AdamW's settings for the rest; None for the matrices' weight decay.
    """

    matrix_rule = "muon"
    plain_rule = "adamw"

    def __init__(
        self,
        params: Params,
        lr: float = 1e-2,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        scale: str = Scale.MATCH_RMS_ADAMW,
        newton_schulz_steps: int = 5,
        aux_lr_ratio: float = 1.0,
        aux_betas: Betas = (0.9, 0.95),
        aux_eps: float = EPS,
        aux_weight_decay: float | None = None,
        capture: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "scale": chosen("scale", scale, Scale).value,
            "newton_schulz_steps": newton_schulz_steps,
            "capture": capture,
        }
        auxiliary = _auxiliary_defaults(aux_lr_ratio, aux_betas, aux_eps, aux_weight_decay)
        super().__init__(params, checked(defaults | auxiliary))

    def _rule(self, group: Group, packing: Packing) -> UpdateRule:
        return MuonRule(packing, group["nesterov"], Scale(group["scale"]), group["newton_schulz_steps"])

    def _hyper(self, group: Group) -> dict[str, float]:
        return rates(group) | {"momentum": float(group["momentum"])} | _auxiliary_hyper(group)


class SOAP(BlockOptimizer):
    """SOAP (arXiv:2409.11321): Adam in the slowly turning eigenbasis of Shampoo's factors; Adam for the rest.

    Args:
        shampoo_beta: decay rate of the factors; None for the second of `betas`.
        precondition_frequency: steps between two refreshes of the bases; may change while running.
        max_precondition_dim: axes longer than this are not rotated.
        sides: rotate `two` axes of a matrix, or `one`, the smaller.
        basis: of `past` gradients, as published, or also of the `current` one.
        basis_warmup_steps: refresh at each of the first so many steps.
        aux_lr_ratio, aux_betas, aux_eps, aux_weight_decay: Adam's settings for the rest; None for the matrices'.
    """

    matrix_rule = "soap"
    plain_rule = "adam"
    _algorithm: Mapping[str, Any] = MappingProxyType({})

    def __init__(
        self,
        params: Params,
        lr: float = 3e-3,
        betas: Betas = (0.95, 0.95),
        shampoo_beta: float | None = None,
        eps: float = EPS,
        weight_decay: float = 1e-2,
        precondition_frequency: int = 10,
        max_precondition_dim: int = 10000,
        sides: str = Sides.TWO,
        basis: str = Basis.PAST,
        basis_warmup_steps: int = 0,
        aux_lr_ratio: float = 1.0,
        aux_betas: Betas | None = None,
        aux_eps: float = EPS,
        aux_weight_decay: float | None = None,
        capture: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "shampoo_beta": shampoo_beta,
            "eps": eps,
            "weight_decay": weight_decay,
            "precondition_frequency": precondition_frequency,
            "max_precondition_dim": max_precondition_dim,
            "sides": chosen("sides", sides, Sides).value,
            "basis": chosen("basis", basis, Basis).value,
            "basis_warmup_steps": basis_warmup_steps,
            "capture": capture,
        }
        auxiliary = _auxiliary_defaults(aux_lr_ratio, aux_betas or betas, aux_eps, aux_weight_decay)
        super().__init__(params, checked(defaults | auxiliary | dict(self._algorithm)))

    def _rule(self, group: Group, packing: Packing) -> UpdateRule:
        return SoapRule(packing=packing, **_soap_settings(group))

    def _hyper(self, group: Group) -> dict[str, float]:
        beta1, beta2 = group["betas"]
        shampoo_beta = beta2 if group["shampoo_beta"] is None else group["shampoo_beta"]
        numbers = {"beta1": beta1, "beta2": beta2, "shampoo_beta": shampoo_beta, "eps": group["eps"]}
        frequency = {"precondition_frequency": float(group["precondition_frequency"])}
        return rates(group) | {k: float(v) for k, v in numbers.items()} | frequency | _auxiliary_hyper(group)


class SOAPMuon(SOAP):
    """SOAP-Muon (arXiv:2607.02499, algorithm 2, unless another recipe is named); plain SOAP's Adam for the rest.

    Updates of matrices have unit RMS, so learning rates are about a tenth of the other optimizers'.

    Args:
        recipe: paper, nanogpt, olmo or track3, see `Recipe`.
        rho: exponent of the singular values: 0 (Newton-Schulz) or, in the paper's recipe, 0.5.
        settings: SOAP's.
    """

    matrix_rule = "soap_muon"

    def __init__(
        self, params: Params, lr: float = 1e-3, recipe: str = Recipe.PAPER, rho: float = 0.0, **settings: Any
    ) -> None:
        self._algorithm = {"recipe": chosen("recipe", recipe, Recipe).value, "rho": float(rho)}
        super().__init__(params, lr, **{"aux_betas": (0.9, 0.95)} | settings)
        for group in self.param_groups:
            self._rule(group, Packing.elementwise({}))  # refuses a rho that the recipe does not have

    def _rule(self, group: Group, packing: Packing) -> UpdateRule:
        recipe = Recipe(group["recipe"])
        return SoapMuonRule(packing=packing, recipe=recipe, rho=group["rho"], **_soap_settings(group))


def _soap_settings(group: Group) -> dict[str, Any]:
    return {
        "max_precondition_dim": group["max_precondition_dim"],
        "sides": Sides(group["sides"]),
        "basis": Basis(group["basis"]),
        "basis_warmup_steps": group["basis_warmup_steps"],
    }


def _auxiliary_defaults(ratio: float, betas: Betas, eps: float, weight_decay: float | None) -> Group:
    return {"aux_lr_ratio": ratio, "aux_betas": betas, "aux_eps": eps, "aux_weight_decay": weight_decay}


def _auxiliary_hyper(group: Group) -> dict[str, float]:
    decay = group["weight_decay"] if group["aux_weight_decay"] is None else group["aux_weight_decay"]
    return {
        "aux_learning_rate_ratio": float(group["aux_lr_ratio"]),
        "aux_beta1": float(group["aux_betas"][0]),
        "aux_beta2": float(group["aux_betas"][1]),
        "aux_eps": float(group["aux_eps"]),
        "aux_weight_decay": float(decay),
    }
