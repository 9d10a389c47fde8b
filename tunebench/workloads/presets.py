"""Named model sizes: keyword arguments of NequIP's and Allegro's builders. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NEQUIP_OWN_PRESETS = ("S", "M", "L", "XL")

_BESSEL: dict[str, Any] = {
    "_target_": "allegro.nn.TwoBodyBesselScalarEmbed",
    "num_bessels": 8,
    "bessel_trainable": False,
    "polynomial_cutoff_p": 6,
}

# `paper` is Table 3 of Harari et al., arXiv:2607.02499: NequIP for water with a ZBL pair term, Allegro for CsH2PO4.
# `tiny` trains on one CPU core; `small` is meant for many trials on one GPU.
PRESETS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "nequip": {
        "tiny": {
            "num_layers": 2,
            "l_max": 1,
            "parity": False,
            "num_features": 16,
            "radial_mlp_depth": 1,
            "radial_mlp_width": 32,
        },
        "small": {
            "num_layers": 3,
            "l_max": 1,
            "parity": False,
            "num_features": 32,
            "radial_mlp_depth": 1,
            "radial_mlp_width": 64,
        },
        "paper": {
            "num_layers": 4,
            "l_max": 2,
            "parity": True,
            "num_features": 32,
            "radial_mlp_depth": 3,
            "radial_mlp_width": 64,
            "num_bessels": 8,
            "bessel_trainable": False,
            "polynomial_cutoff_p": 6,
            "per_type_energy_scales_trainable": True,
            "per_type_energy_shifts_trainable": True,
            "pair_potential": {"_target_": "nequip.nn.pair_potential.ZBL", "units": "metal"},
        },
        **{name: {} for name in NEQUIP_OWN_PRESETS},
    },
    "allegro": {
        "tiny": {
            "num_layers": 2,
            "l_max": 1,
            "parity": False,
            "num_scalar_features": 16,
            "num_tensor_features": 8,
            "radial_chemical_embed": _BESSEL,
            "radial_chemical_embed_dim": 16,
            "scalar_embed_mlp_hidden_layers_depth": 1,
            "scalar_embed_mlp_hidden_layers_width": 32,
            "allegro_mlp_hidden_layers_depth": 1,
            "allegro_mlp_hidden_layers_width": 32,
            "readout_mlp_hidden_layers_depth": 1,
            "readout_mlp_hidden_layers_width": 32,
            "tp_path_channel_coupling": False,
        },
        "small": {
            "num_layers": 2,
            "l_max": 2,
            "parity": True,
            "num_scalar_features": 64,
            "num_tensor_features": 32,
            "radial_chemical_embed": _BESSEL,
            "radial_chemical_embed_dim": 32,
            "scalar_embed_mlp_hidden_layers_depth": 1,
            "scalar_embed_mlp_hidden_layers_width": 64,
            "allegro_mlp_hidden_layers_depth": 1,
            "allegro_mlp_hidden_layers_width": 64,
            "readout_mlp_hidden_layers_depth": 1,
            "readout_mlp_hidden_layers_width": 32,
        },
        "paper": {
            "num_layers": 2,
            "l_max": 2,
            "parity": True,
            "num_scalar_features": 32,
            "num_tensor_features": 32,
            "radial_chemical_embed": _BESSEL,
            "radial_chemical_embed_dim": 32,
            "scalar_embed_mlp_hidden_layers_depth": 2,
            "scalar_embed_mlp_hidden_layers_width": 128,
            "scalar_embed_mlp_nonlinearity": "silu",
            "allegro_mlp_hidden_layers_depth": 2,
            "allegro_mlp_hidden_layers_width": 128,
            "allegro_mlp_nonlinearity": "silu",
            "readout_mlp_hidden_layers_depth": 1,
            "readout_mlp_hidden_layers_width": 32,
            "readout_mlp_nonlinearity": None,
            "tp_path_channel_coupling": False,
            "per_type_energy_scales_trainable": True,
            "per_type_energy_shifts_trainable": True,
        },
    },
}
