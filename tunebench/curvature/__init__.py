"""Curvature of the training loss where an optimizer has come to, with and without its preconditioner.

It explains how an optimizer sees a loss; it never ranks. Nothing here imports Ray, and `spectrum` and `record` do not
import torch either.
"""
