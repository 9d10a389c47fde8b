"""Physical properties that a potential predicts: crystals, phonons, molecules, dynamics, solid-liquid interfaces.

Whatever ASE calls a calculator can be judged: a trained model in float64 (`calculators`), a teacher potential, or DFT
forces that a data set holds (`references`). `evaluate` turns models and references into rows that `analysis` reads.
Neither Ray nor Hydra is imported here; ASE, matcalc, phonopy and torch only where they are used.
"""
