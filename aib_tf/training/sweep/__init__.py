"""Sweeps: one file that names many runs, their training and evaluation, and one table of what they reached."""

from aib_tf.training.sweep.plan import Cell, Column, Sweep, read
from aib_tf.training.sweep.runner import execute
from aib_tf.training.sweep.table import write

__all__ = ["Cell", "Column", "Sweep", "execute", "read", "write"]
