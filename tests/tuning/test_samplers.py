from __future__ import annotations

import math
import os
import random
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from tunebench.study.record import Reason, Stage, TrialKey, TrialRecord
from tunebench.study.search_space import SearchSpace
from tunebench.tuning.samplers import configuration, sobol_points, tpe_configurations

ADAMW = SearchSpace.load("adamw")
SOAP = SearchSpace.load("soap")
LAMB = SearchSpace.load("lamb")


def only(space: SearchSpace, *names: str) -> SearchSpace:
    """The space with every other parameter fixed."""
    return space.fix({name: parameter.default for name, parameter in space.parameters.items() if name not in names})


def record(index: int, reason: Reason | None, value: float | None, **changes: Any) -> TrialRecord:
    """A trial of the adamw arm whose objective is lowest at a learning rate of 1e-2."""
    units = {name: (0.37 * index + 0.11 * k) % 1.0 for k, name in enumerate(sorted(ADAMW.parameters))}
    return TrialRecord(
        **{
            "key": TrialKey(workload="ethanol", optimizer="adamw", stage=Stage.TUNE, config_index=index, seed_index=0),
            "number": index,
            "state": "COMPLETE",
            "reason": reason,
            "detail": {},
            "value": value,
            "params": configuration(ADAMW, units),
            "rungs": {},
            "seeds": {},
            "ledger": {},
        }
        | changes
    )


def history(count: int) -> list[TrialRecord]:
    trials = [record(index, Reason.FINISHED, None) for index in range(count)]
    distances = [abs(math.log10(trial.params["learning_rate"]) + 2.0) for trial in trials]
    return [record(index, Reason.FINISHED, 0.1 + distance) for index, distance in enumerate(distances)]


def test_arms_of_a_workload_share_the_values_of_parameters_they_share() -> None:
    points = sobol_points([ADAMW, SOAP, LAMB], 6, seed=3)
    for point in points:
        adamw, soap, lamb = (configuration(space, point) for space in (ADAMW, SOAP, LAMB))
        assert adamw["weight_decay"] == soap["weight_decay"]
        assert adamw["beta1"] == soap["beta1"] == lamb["beta1"]
        units = {
            space.parameters["learning_rate"].unit_of(values["learning_rate"])
            for space, values in ((ADAMW, adamw), (SOAP, soap), (LAMB, lamb))
        }
        assert max(units) - min(units) < 1e-12


def test_the_order_of_the_arms_has_no_influence() -> None:
    assert sobol_points([ADAMW, SOAP], 4, seed=3) == sobol_points([SOAP, ADAMW], 4, seed=3)


@pytest.mark.parametrize("count", [1, 5, 8])
def test_more_trials_extend_the_sequence(count: int) -> None:
    assert sobol_points([ADAMW, SOAP], 16, seed=3)[:count] == sobol_points([ADAMW, SOAP], count, seed=3)


def test_the_seed_alone_decides_the_points() -> None:
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    first = sobol_points([ADAMW], 4, seed=3)
    random.seed(2)
    np.random.seed(2)  # noqa: NPY002
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    assert sobol_points([ADAMW], 4, seed=3) == first
    assert random.getstate() == python_state
    assert (np.random.get_state()[1] == numpy_state[1]).all()  # noqa: NPY002
    others = [sobol_points([ADAMW], 4, seed=seed) for seed in (4, 5)]
    assert all(ours != theirs for other in others for ours, theirs in zip(first, other, strict=True)), (
        "also the first point is drawn from the seed"
    )


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("spaces", [[only(ADAMW, "learning_rate")], [ADAMW], [ADAMW, SOAP, LAMB]])
def test_eight_points_fall_into_the_eight_eighths_of_every_parameter(spaces: list[SearchSpace], seed: int) -> None:
    points = sobol_points(spaces, 8, seed)
    for name in points[0]:
        assert sorted(math.floor(8 * point[name]) for point in points) == list(range(8))


def test_the_points_are_the_same_in_every_process() -> None:
    code = (
        "from tunebench.study.search_space import SearchSpace; from tunebench.tuning.samplers import sobol_points; "
        "print(sobol_points([SearchSpace.load(name) for name in ('adamw', 'soap')], 2, seed=3))"
    )
    for hash_seed in ("1", "2"):  # which orders sets of names differently
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment)
        assert done.stdout.strip() == str(sobol_points([ADAMW, SOAP], 2, seed=3))


def test_points_lie_in_the_half_open_cube() -> None:
    for point in sobol_points([ADAMW, SOAP, LAMB], 64, seed=0):
        assert all(0.0 <= value < 1.0 for value in point.values())


def test_values_reach_both_ends_of_every_range() -> None:
    almost_one = math.nextafter(1.0, 0.0)
    for space in (ADAMW, SOAP, LAMB):
        low = configuration(space, dict.fromkeys(space.parameters, 0.0))
        high = configuration(space, dict.fromkeys(space.parameters, almost_one))
        for name, parameter in space.parameters.items():
            if parameter.kind == "choice":
                assert (low[name], high[name]) == (parameter.choices[0], parameter.choices[-1])
            else:
                assert (low[name], high[name]) == pytest.approx((parameter.low, parameter.high), rel=1e-12)
    frequencies = {configuration(SOAP, point)["precondition_frequency"] for point in sobol_points([SOAP], 512, 0)}
    assert {1, 100} <= frequencies


def test_every_choice_is_drawn() -> None:
    points = sobol_points([ADAMW], 8, seed=0)
    drawn = [configuration(ADAMW, point)["beta2"] for point in points]
    assert set(drawn) == set(ADAMW.parameters["beta2"].choices)


def test_without_searched_parameters_every_trial_is_the_fixed_configuration() -> None:
    fixed = only(ADAMW)
    assert sobol_points([fixed], 3, seed=0) == [{}, {}, {}]
    assert configuration(fixed, {}) == {}
    assert tpe_configurations(fixed, [], 2, seed=0) == [{}, {}]


def test_a_fixed_parameter_is_not_drawn_but_leaves_the_others_in_the_range() -> None:
    space = only(SOAP, "learning_rate", "precondition_frequency")
    (point,) = sobol_points([space], 1, seed=0)
    assert set(configuration(space, point)) == {"learning_rate", "precondition_frequency"}


def test_tpe_searches_where_the_history_was_good() -> None:
    def distance(past: list[TrialRecord]) -> float:
        drawn = [values for seed in range(4) for values in tpe_configurations(ADAMW, past, 4, seed)]
        return float(np.median([abs(math.log10(values["learning_rate"]) + 2.0) for values in drawn]))

    assert distance(history(80)) < 0.5 * distance([])


def test_tpe_stays_in_the_search_space() -> None:
    for values in tpe_configurations(SOAP, [], 10, seed=0):
        assert set(values) == set(SOAP.parameters)
        for name, parameter in SOAP.parameters.items():
            assert 0.0 <= parameter.unit_of(values[name]) <= 1.0


def test_tpe_proposes_the_same_for_the_same_seed_and_history_only() -> None:
    past = history(12)
    first = tpe_configurations(ADAMW, past, 3, seed=1)
    np.random.seed(7)  # noqa: NPY002
    assert tpe_configurations(ADAMW, past, 3, seed=1) == first
    assert tpe_configurations(ADAMW, past, 3, seed=2) != first
    assert tpe_configurations(ADAMW, history(30), 3, seed=1) != first
    assert len({str(values) for values in first}) == 3


def test_tpe_learns_nothing_from_failed_and_open_trials() -> None:
    past = history(12)
    nothing = [
        record(20, Reason.DIVERGED, None, state="FAIL"),
        record(21, Reason.CRASHED, None, state="FAIL", rungs={3: 0.5}),
        record(22, None, None, state="RUNNING", rungs={3: 0.5}),
        record(23, None, None, state="WAITING"),
        record(24, Reason.DIVERGED, 0.01, state="FAIL"),
        record(25, Reason.TIMED_OUT, 0.01, state="FAIL"),
    ]
    assert tpe_configurations(ADAMW, past + nothing, 3, seed=1) == tpe_configurations(ADAMW, past, 3, seed=1)


@pytest.mark.parametrize("rungs", [{}, {3: 5.0}])
def test_tpe_learns_from_stopped_trials_with_and_without_rungs(rungs: dict[int, float]) -> None:
    past = history(30)
    best = min(past, key=lambda trial: trial.value)
    stopped = [
        record(40 + k, Reason.STOPPED_ASHA, 5.0, state="PRUNED", rungs=rungs, params=best.params) for k in range(9)
    ]
    assert tpe_configurations(ADAMW, past + stopped, 3, seed=1) != tpe_configurations(ADAMW, past, 3, seed=1)


def test_tpe_ranks_stopped_trials_by_their_rungs() -> None:
    def stopped(values: list[float]) -> list[TrialRecord]:
        return [
            record(index, Reason.STOPPED_ASHA, value, state="PRUNED", rungs={3: value})
            for index, value in enumerate(values)
        ]

    values = [float(trial.value or 0.0) for trial in history(30)]
    near, far = (tpe_configurations(ADAMW, stopped(order), 3, seed=1) for order in (values, [-v for v in values]))
    assert near != far
