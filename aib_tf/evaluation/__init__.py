"""Does the attention mean something: what a model reaches, where it looks, and whether to believe it.

Each suite is a function `suite(model, dataset, ...) -> Result`. `evaluate` runs several of them, and
keeps what is finished. Models of other libraries and maps of other methods come in as a `Subject`.
To add a suite, write a module like its neighbours (a `Suite` and a function of the same name) and
name it in `registry.SUITES`.
"""

from aib_tf.evaluation import report
from aib_tf.evaluation.accuracy import accuracy
from aib_tf.evaluation.bottleneck import bottleneck
from aib_tf.evaluation.chart import Chart, Line
from aib_tf.evaluation.consistency import consistency
from aib_tf.evaluation.faithfulness import faithfulness
from aib_tf.evaluation.grad_cam import GradCAM
from aib_tf.evaluation.intervals import Estimate
from aib_tf.evaluation.localisation import localisation
from aib_tf.evaluation.registry import COSTLY, QUICK, SUITES, check_names, evaluate
from aib_tf.evaluation.robustness import robustness
from aib_tf.evaluation.saliency import saliency
from aib_tf.evaluation.subject import Subject, UnavailableError
from aib_tf.evaluation.suite import Result, Skipped
from aib_tf.evaluation.transfer import shared_classes, transfer

__all__ = [
    "COSTLY",
    "QUICK",
    "SUITES",
    "Chart",
    "Estimate",
    "GradCAM",
    "Line",
    "Result",
    "Skipped",
    "Subject",
    "UnavailableError",
    "accuracy",
    "bottleneck",
    "check_names",
    "consistency",
    "evaluate",
    "faithfulness",
    "localisation",
    "report",
    "robustness",
    "saliency",
    "shared_classes",
    "transfer",
]
