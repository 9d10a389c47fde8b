"""The optimizer table of arXiv:2607.02499 (Table 5): test MAE, mean and deviation over five seeds."""

from __future__ import annotations

import pytest

from analysis.published_table import Effect, PublishedCell, reanalyse

OPTIMIZERS = ("adamw", "muon", "soap", "soap_muon")
# Columns: energy (meV/atom) and force (meV/Å) on CDP, then on water; rows in the order of OPTIMIZERS.
TABLE = {
    100: """.628 .0434 32.2 .615 .773 .0713 25.7 1.44
            .581 .0328 29.6 .617 1.53 .317 26.6 2.90
            .569 .0694 29.6 .305 .604 .0105 20.9 .698
            .582 .0469 27.8 .634 .590 .0687 21.0 1.04""",
    75: """.664 .0383 33.9 .993 .738 .117 25.1 1.34
           .622 .0287 31.1 1.11 .773 .146 27.1 1.76
           .630 .0185 31.3 .617 .601 .0381 20.9 .872
           .596 .0280 30.1 .452 .602 .101 21.6 1.27""",
    50: """.698 .0175 37.4 .778 .789 .147 26.8 1.30
           .645 .0508 34.1 .803 1.01 .153 30.8 2.86
           .690 .0724 34.5 .869 .650 .0772 22.7 1.01
           .637 .00589 32.5 1.01 .713 .191 23.1 1.07""",
    10: """1.28 .0809 68.4 2.54 1.09 .198 34.5 3.69
           1.06 .106 60.0 3.10 1.15 .108 37.4 2.17
           1.02 .0579 52.9 1.65 1.04 .207 31.9 2.19
           .977 .0525 51.9 .842 .999 .133 40.6 17.3""",
    5: """1.62 .0551 94.9 5.09 1.51 .224 41.3 2.09
          1.38 .103 84.0 6.70 1.46 .253 43.5 1.10
          1.16 .0841 69.2 1.83 1.62 .659 41.9 1.59
          1.20 .0901 68.1 3.05 1.54 .466 41.2 3.31""",
    0: """5.16 .178 503 31.8 3.21 .272 306 46.1
          3.30 .135 281 9.73 5.37 .813 591 59.1
          3.03 .389 214 25.7 2.38 .573 236 54.8
          2.75 .163 201 18.8 2.77 .346 269 24.5""",
}
COLUMNS = ("cdp energy", "cdp force", "water energy", "water force")


def cells() -> list[PublishedCell]:
    found = []
    for labels, text in TABLE.items():
        rows = [[float(word) for word in line.split()] for line in text.splitlines()]
        for optimizer, row in zip(OPTIMIZERS[1:], rows[1:], strict=True):
            for column, name in enumerate(COLUMNS):
                mean, deviation = row[2 * column : 2 * column + 2]
                base, base_deviation = rows[0][2 * column : 2 * column + 2]
                found.append(
                    PublishedCell(
                        name=f"{name} {labels} {optimizer}",
                        mean=mean,
                        deviation=deviation,
                        baseline_mean=base,
                        baseline_deviation=base_deviation,
                        seeds=5,
                    )
                )
    return found


def test_27_of_72_published_effects_survive_holm() -> None:
    results = reanalyse(cells())
    assert len(results) == 72
    assert sum(result.p < 0.05 for result in results) == 43
    surviving = {result.cell.name: result.effect for result in results if result.effect is not Effect.UNDECIDED}
    assert len(surviving) == 27
    assert [name for name, effect in surviving.items() if effect is Effect.LOSS] == ["water force 0 muon"]
    assert {name for name in surviving if name.startswith("water")} == {
        "water force 100 soap",
        "water force 75 soap",
        "water force 50 soap",
        "water force 100 soap_muon",
        "water force 0 muon",
    }
    assert sum(name.startswith("cdp") for name in surviving) == 22
    assert not [name for name in surviving if "energy 100" in name or "energy 75" in name]


def test_headline_energy_gain_is_not_significant_even_alone() -> None:
    p = {result.cell.name: result.p for result in reanalyse(cells())}
    assert p["cdp energy 100 soap"] == pytest.approx(0.15, abs=0.01)
    assert p["cdp energy 100 muon"] == pytest.approx(0.09, abs=0.01)


def test_welch_by_hand() -> None:
    cell = PublishedCell(name="c", mean=1.0, deviation=1.0, baseline_mean=3.0, baseline_deviation=1.0, seeds=2)
    (result,) = reanalyse([cell])
    # t = 2 / sqrt(1/2 + 1/2) = 2 with 2 degrees of freedom: p = 1 - 2 / sqrt(2 + 4).
    assert result.p == pytest.approx(1.0 - 2.0 / 6.0**0.5)
    assert (result.change, result.effect) == (pytest.approx(-2.0 / 3.0), Effect.UNDECIDED)


def test_a_single_seed_is_refused() -> None:
    cell = PublishedCell(name="c", mean=1.0, deviation=1.0, baseline_mean=3.0, baseline_deviation=1.0, seeds=1)
    with pytest.raises(ValueError, match="c: found 1 seeds"):
        reanalyse([cell])
