"""Optimizers as NequIP training configurations."""
