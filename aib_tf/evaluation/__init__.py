"""How accurate a model is, where it looks, what its bottleneck lets through, with intervals.

Each suite is a function `suite(model, dataset, ...) -> Result`. `evaluate` runs several of them, and
keeps what is finished. Models of other libraries and maps of other methods come in as a `Subject`.
To add a suite, write a module like its neighbours (a `Suite` and a function of the same name) and
name it in `registry.SUITES`.
"""

from aib_tf.evaluation import report
from aib_tf.evaluation.accuracy import accuracy
from aib_tf.evaluation.bottleneck import bottleneck
from aib_tf.evaluation.chart import Chart, Line
from aib_tf.evaluation.intervals import Estimate
from aib_tf.evaluation.localisation import localisation
from aib_tf.evaluation.registry import QUICK, SUITES, evaluate
from aib_tf.evaluation.subject import Subject, UnavailableError
from aib_tf.evaluation.suite import Result, Skipped

__all__ = [
    "QUICK",
    "SUITES",
    "Chart",
    "Estimate",
    "Line",
    "Result",
    "Skipped",
    "Subject",
    "UnavailableError",
    "accuracy",
    "bottleneck",
    "evaluate",
    "localisation",
    "report",
]
