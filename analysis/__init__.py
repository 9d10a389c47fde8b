"""From a run directory to a ranking: load, check, compare, plot, report. Imports neither Ray nor torch."""
