"""Models of the sizes that the tests of blocks share."""

from __future__ import annotations

from typing import Any

import torch

from tunebench.study.spec import Model
from tunebench.workloads.models import build_model, model_config
from tunebench.workloads.statistics import TrainingStatistics

FOUR_TYPES = ("H", "C", "N", "O")
SPLINE = {"_target_": "allegro.nn.TwoBodySplineScalarEmbed", "num_splines": 8, "spline_span": 6}

# Four layers, l_max 2, 32 features: the sizes that the documentation's table of reach is about.
NEQUIP_FOUR_LAYERS = {"num_layers": 4, "l_max": 2, "num_features": 32, "radial_mlp_depth": 2, "radial_mlp_width": 64}
ALLEGRO_TWO_LAYERS = {
    "num_scalar_features": 64,
    "num_tensor_features": 32,
    "radial_chemical_embed_dim": 64,
    "scalar_embed_mlp_hidden_layers_width": 64,
    "allegro_mlp_hidden_layers_depth": 2,
    "allegro_mlp_hidden_layers_width": 128,
    "tp_path_channel_coupling": True,
    "l_max": 2,
    "parity": True,
}


def model_of(family: str, types: tuple[str, ...] = FOUR_TYPES, dtype: str = "float32", **arguments: Any) -> Any:
    """The tiny preset of a family with some arguments changed."""
    statistics = TrainingStatistics(
        per_type_energy_shifts=(0.0,) * len(types),
        degenerate=False,
        force_rms=1.0,
        avg_num_neighbors=10.0,
        labelled_frames=1,
        note="",
    )
    chosen = Model(family=family, preset="tiny", dtype=dtype, arguments=arguments)
    model: torch.nn.Module = build_model(model_config(chosen, types, statistics, seed=0))
    return model
