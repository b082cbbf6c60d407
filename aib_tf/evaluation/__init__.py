"""How accurate a model is, where it looks, what its bottleneck lets through, with intervals.

Each suite is a function `suite(model, dataset, ...) -> Result`. `evaluate` runs several of them in
one pass over the data. To add a suite, write a module like its neighbours (a `Suite` and a function
of the same name) and name it in `registry.SUITES`.
"""

from aib_tf.evaluation import report
from aib_tf.evaluation.accuracy import accuracy
from aib_tf.evaluation.bottleneck import bottleneck
from aib_tf.evaluation.intervals import Estimate
from aib_tf.evaluation.localisation import localisation
from aib_tf.evaluation.registry import SUITES, evaluate
from aib_tf.evaluation.suite import Result, Skipped, UnavailableError

__all__ = [
    "SUITES",
    "Estimate",
    "Result",
    "Skipped",
    "UnavailableError",
    "accuracy",
    "bottleneck",
    "evaluate",
    "localisation",
    "report",
]
