"""Optimizers on the true matrices of equivariant weights."""

from tunebench.optim.groups import matrix_groups, weight_groups
from tunebench.optim.matrix_optimizers import SOAP, Muon, SOAPMuon
from tunebench.optim.optimizers import LAMB, SGD, Adam, AdamW, AdamWScheduleFree, RAdam, Ranger

__all__ = [
    "LAMB",
    "SGD",
    "SOAP",
    "Adam",
    "AdamW",
    "AdamWScheduleFree",
    "Muon",
    "RAdam",
    "Ranger",
    "SOAPMuon",
    "matrix_groups",
    "weight_groups",
]
