"""The shipped search spaces are comparable, and ranges map the unit interval to values and back."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import optuna
import pytest

from tunebench.study.search_space import (
    ChoiceParameter,
    FloatParameter,
    IntParameter,
    Parameter,
    Role,
    SearchSpace,
    Treats,
    available_optimizers,
    shipped_optimizers,
)
from tunebench.study.spec import StudyError
from tunebench.tuning.samplers import configuration

SPACES = {name: SearchSpace.load(name) for name in shipped_optimizers()}
PARAMETERS = [
    pytest.param(parameter, id=f"{space}.{name}")
    for space, parts in SPACES.items()
    for name, parameter in parts.parameters.items()
]
RANGES = [param for param in PARAMETERS if isinstance(param.values[0], FloatParameter)]
SHARED = {"source": "arXiv:0000.00000", "role": "stability"}

READ_BY_UPDATE_RULES = {
    "adam": {"learning_rate", "weight_decay", "beta1", "beta2", "eps"},
    "adamw": {"learning_rate", "weight_decay", "beta1", "beta2", "eps"},
    "radam": {"learning_rate", "weight_decay", "beta1", "beta2", "eps"},
    "sgd": {"learning_rate", "weight_decay", "momentum", "nesterov", "eps"},
    "lamb": {"learning_rate", "weight_decay", "beta1", "beta2", "clamp", "fctp_view", "eps"},
    "ranger": {
        *("learning_rate", "weight_decay", "beta1", "beta2", "eps"),
        *("lookahead_k", "lookahead_alpha", "centralise", "fctp_view"),
    },
    "schedule_free": {"learning_rate", "weight_decay", "beta1", "beta2", "eps"},
    "muon": {
        *("learning_rate", "weight_decay", "momentum", "aux_beta1", "aux_beta2", "eps"),
        *("fctp_view", "scale", "nesterov"),
    },
    "soap": {
        *("learning_rate", "weight_decay", "beta1", "beta2", "aux_beta1", "aux_beta2", "eps"),
        *("precondition_frequency", "fctp_view", "max_precondition_dim", "sides", "basis"),
    },
}
READ_BY_UPDATE_RULES["soap_muon"] = READ_BY_UPDATE_RULES["soap"] | {"rho", "recipe"}


def test_every_shipped_optimizer_is_available() -> None:
    assert set(available_optimizers()) == set(shipped_optimizers()) == set(READ_BY_UPDATE_RULES)


@pytest.mark.parametrize("name", sorted(READ_BY_UPDATE_RULES))
def test_a_space_holds_exactly_what_its_update_rule_reads(name: str) -> None:
    assert SPACES[name].defaults().keys() == READ_BY_UPDATE_RULES[name]


def test_every_learning_rate_spans_the_same_three_decades() -> None:
    decades = set()
    for space in SPACES.values():
        rate = space.parameters["learning_rate"]
        assert isinstance(rate, FloatParameter)
        assert rate.log
        assert rate.role is Role.LEARNING_RATE
        assert rate.published
        decades.add(round(math.log10(rate.high / rate.low), 9))
    assert decades == {3.0}


@pytest.mark.parametrize("parameter", RANGES)
def test_published_values_and_the_default_lie_inside_the_outer_tenths(parameter: FloatParameter) -> None:
    for value in (parameter.default, *parameter.published):
        assert 0.1 < parameter.unit_of(value) < 0.9


def test_shared_hyperparameters_have_one_range_in_all_arms() -> None:
    decays = {
        (p.low, p.high, p.log) for s in SPACES.values() if isinstance(p := s.parameters["weight_decay"], FloatParameter)
    }
    assert decays == {(1e-7, 1e-2, True)}
    for names, choices in (
        (("beta1", "momentum", "aux_beta1"), (0.9, 0.95)),
        (("beta2", "aux_beta2"), (0.95, 0.98, 0.999)),
    ):
        found = [space.parameters[name] for space in SPACES.values() for name in names if name in space.parameters]
        assert {part.choices for part in found if isinstance(part, ChoiceParameter)} == {choices}
        assert all(isinstance(part, ChoiceParameter) for part in found)


def test_eps_is_alike_and_fixed_everywhere() -> None:
    assert {space.fixed_values()["eps"] for space in SPACES.values()} == {1e-12}


def test_the_matrix_optimizers_promise_the_matrices_and_search_their_view_of_tensor_products() -> None:
    matrices = {name: space for name, space in SPACES.items() if space.treats is Treats.MATRICES}
    assert matrices.keys() == {"muon", "soap", "soap_muon"}
    for space in matrices.values():
        view = space.parameters["fctp_view"]
        assert isinstance(view, ChoiceParameter)
        assert (view.choices, view.role) == (("flat", "per_type", "merged"), Role.STRUCTURE)
    assert {name: space.defaults()["fctp_view"] for name, space in matrices.items()} == {
        "muon": "merged",
        "soap": "per_type",
        "soap_muon": "per_type",
    }


def test_matrices_cannot_be_promised_without_a_view() -> None:
    content = SPACES["adamw"].model_dump(mode="json") | {"treats": "matrices"}
    with pytest.raises(ValueError, match="treats: matrices without fctp_view"):
        SearchSpace.model_validate(content)


def test_soap_muon_is_the_papers_unless_a_study_says_otherwise() -> None:
    assert SPACES["soap_muon"].defaults()["recipe"] == "paper"
    other = SPACES["soap_muon"].fix({"recipe": "olmo", "rho": 0.0})
    assert (other.fixed_values()["recipe"], "rho" in other.parameters) == ("olmo", False)


def test_only_schedule_free_has_its_own_schedule_and_readout() -> None:
    assert {name for name, space in SPACES.items() if space.schedule is not None} == {"schedule_free"}
    assert {name for name, space in SPACES.items() if space.readout != "ema"} == {"schedule_free"}


def test_precondition_frequency_is_marked_as_trading_cost() -> None:
    frequency = SPACES["soap"].parameters["precondition_frequency"]
    assert isinstance(frequency, IntParameter)
    assert (frequency.low, frequency.high, frequency.log, frequency.role) == (1, 100, True, Role.COST)


@pytest.mark.parametrize("parameter", PARAMETERS)
def test_every_range_names_its_source(parameter: Parameter) -> None:
    assert "arXiv:" in parameter.source or "." in parameter.source
    assert len(parameter.source) > 20


@pytest.mark.parametrize("parameter", PARAMETERS)
def test_a_value_has_a_place_in_the_range_and_the_place_has_the_value(parameter: Any) -> None:
    for unit in np.linspace(0.0, 0.999, 41):
        value = parameter.value_at(float(unit))
        again = parameter.value_at(parameter.unit_of(value))
        assert again == (pytest.approx(value, rel=1e-12) if isinstance(parameter, FloatParameter) else value)
        assert parameter.distribution()._contains(parameter.distribution().to_internal_repr(value))


@pytest.mark.parametrize("parameter", PARAMETERS)
def test_uniform_units_follow_optunas_distribution(parameter: Parameter) -> None:
    units = np.random.default_rng(2).random(2000)
    ours = [parameter.value_at(float(unit)) for unit in units]
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=3))
    theirs = [study.ask({"x": parameter.distribution()}).params["x"] for _ in range(300)]
    if isinstance(parameter, ChoiceParameter):
        shares = [ours.count(choice) / len(ours) for choice in parameter.choices]
        assert shares == pytest.approx([1.0 / len(shares)] * len(shares), abs=0.05)
        assert set(theirs) == set(ours)
    else:
        logs = [np.log(np.asarray(values, dtype=np.float64)) for values in (ours, theirs)]
        for quantile in (0.25, 0.5, 0.75):
            first, second = (np.quantile(values, quantile) for values in logs)
            assert first == pytest.approx(second, abs=0.08 * math.log(parameter.high / parameter.low))


def test_integers_on_a_linear_scale_get_equal_shares() -> None:
    part = IntParameter.model_validate({"kind": "int", "low": 5, "high": 8, "default": 6, **SHARED})
    values = [part.value_at(unit) for unit in np.linspace(0.0, 0.9999, 4000)]
    assert [values.count(value) for value in (5, 6, 7, 8)] == pytest.approx([1000] * 4, abs=2)


def test_the_ends_of_a_range_are_its_bounds() -> None:
    rate: Any = SPACES["adamw"].parameters["learning_rate"]
    assert (rate.value_at(0.0), rate.value_at(1.0)) == (pytest.approx(2e-4), pytest.approx(0.2))
    assert rate.value_at(1.0) <= 0.2


@pytest.mark.parametrize("unit", [-0.1, 1.1, float("nan")])
@pytest.mark.parametrize("name", ["learning_rate", "beta1", "precondition_frequency"])
def test_a_place_outside_the_unit_interval_is_refused(unit: float, name: str) -> None:
    with pytest.raises(ValueError, match="allowed: 0 to 1"):
        SPACES["soap"].parameters[name].value_at(unit)


@pytest.mark.parametrize(("name", "value"), [("learning_rate", 1.0), ("beta1", 0.5), ("precondition_frequency", 101)])
def test_a_value_outside_the_range_has_no_place(name: str, value: float) -> None:
    with pytest.raises(ValueError, match="allowed: "):
        SPACES["soap"].parameters[name].unit_of(value)  # type: ignore[arg-type]


def test_true_and_one_are_different_choices() -> None:
    nesterov = SPACES["sgd"].parameters["nesterov"]
    assert nesterov.refuses(1) is not None
    assert nesterov.refuses(True) is None


def test_one_point_of_the_unit_cube_is_one_configuration() -> None:
    space = SPACES["soap"]
    values = {**configuration(space, dict.fromkeys(space.parameters, 0.5)), **space.fixed_values()}
    assert values.keys() == READ_BY_UPDATE_RULES["soap"]
    assert values["learning_rate"] == pytest.approx(math.sqrt(2e-4 * 0.2))


def test_fixing_twice_is_fixing_once_and_search_spaces_never_change() -> None:
    space = SPACES["soap"]
    fixed = space.fix({"precondition_frequency": 5})
    assert fixed.fix({"precondition_frequency": 5}) == fixed
    assert "precondition_frequency" in space.parameters
    with pytest.raises(ValueError, match=r"beta1: found 2.0, allowed: one of 0.9, 0.95"):
        space.fix({"beta1": 2.0})


def test_an_unknown_optimizer_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(StudyError, match="did you mean muon"):
        SearchSpace.load("muonn")
