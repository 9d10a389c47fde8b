from __future__ import annotations

import pytest

from tests.engine.test_cohort import CrystalTrials, crystal_trials


@pytest.fixture(scope="session")
def trials(tmp_path_factory: pytest.TempPathFactory) -> CrystalTrials:
    """Trials on crystals of two sizes with stress, half of whose forces have labels, in float64."""
    return crystal_trials(tmp_path_factory.mktemp("curvature"))
