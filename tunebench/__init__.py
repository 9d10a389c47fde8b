"""Fair optimizer studies for NequIP and Allegro interatomic potentials."""

__version__ = "0.1.0"
