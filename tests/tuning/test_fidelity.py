"""What a rung shows of a decaying schedule: simulated training, cut short or through complete short schedules."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.tuning.test_replay import HORIZON, survivors
from tunebench.engine.schedules import schedule_factor
from tunebench.study.plan import rung_steps
from tunebench.study.spec import Asha, Schedule, Tune

Floats = NDArray[np.float64]

STUDIES, DIMENSIONS = 1000, 12
RUNGS = rung_steps(Asha(), HORIZON)


def trained(rates: Floats, horizon: int, stops: tuple[int, ...], draw: np.random.Generator) -> dict[int, Floats]:
    """Losses at some steps of SGD with a cosine schedule on noisy quadratics of condition 100.

    The noise is that of one data order per study, as paired trials have it.

    Args:
        rates: learning rates relative to the largest stable one, shape (studies, trials).
        horizon: of the schedule.
        stops: steps at which the loss is taken.
        draw: source of the noise.
    """
    curvatures = np.logspace(-2.0, 0.0, DIMENSIONS)
    weights = np.ones((*rates.shape, DIMENSIONS))
    losses = {}
    for step in range(max(stops)):
        factor = schedule_factor(Schedule(), step, horizon)
        noise = draw.standard_normal((len(rates), 1, DIMENSIONS))
        weights -= factor * rates[..., None] * (curvatures * weights + 0.3 * np.sqrt(curvatures) * noise)
        if step + 1 in stops:
            losses[step + 1] = 0.5 * (curvatures * weights**2).sum(axis=-1)
    return losses


@pytest.fixture(scope="module")
def losses() -> dict[str, dict[int, Floats]]:
    """Losses at the rungs and at the horizon by fidelity, each of shape (studies, trials)."""
    draw, trials = np.random.default_rng(0), Tune().trials_per_arm
    rates = 10.0 ** draw.uniform(-3.0, 0.0, (STUDIES, trials))
    truncated = trained(rates, HORIZON, (*RUNGS, HORIZON), draw)
    rescaled = {rung: trained(rates, rung, (rung,), draw)[rung] for rung in RUNGS}
    return {"truncate": truncated, "rescale": {**rescaled, HORIZON: truncated[HORIZON]}}


def survival(losses: dict[int, Floats], asha: Asha) -> float:
    """Share of studies in which the best configuration reaches the horizon."""
    kept = 0
    for study in range(STUDIES):
        curves = {
            f"t{index:02d}": {step: float(values[study, index]) for step, values in losses.items()}
            for index in range(losses[HORIZON].shape[1])
        }
        best = min(curves, key=lambda name: curves[name][HORIZON])
        kept += best in survivors(curves, asha, study)
    return kept / STUDIES


def test_with_default_settings_the_best_configuration_survives_complete_short_schedules_in_95_of_100_studies(
    losses: dict[str, dict[int, Floats]],
) -> None:
    assert survival(losses["rescale"], Asha()) >= 0.95


def test_a_schedule_that_is_cut_short_loses_the_best_configuration_more_often(
    losses: dict[str, dict[int, Floats]],
) -> None:
    bare = Asha(sentinels=0)
    cut, complete = survival(losses["truncate"], bare), survival(losses["rescale"], bare)
    assert 1.0 - cut > 2.0 * (1.0 - complete)
