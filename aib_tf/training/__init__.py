"""Training: a config in, a run folder and its history out."""

from aib_tf.optimizers import SGD, Adam, learning_rate_schedule
from aib_tf.training import distribution
from aib_tf.training.callbacks import BetaWarmup, NonFiniteLossError, TrainingInterrupted
from aib_tf.training.cluster import ClusterError
from aib_tf.training.distribution import WorkerLostError
from aib_tf.training.fit import fit
from aib_tf.training.results import draw_attention, measure, measured_images, measuring_batch, subject
from aib_tf.training.run import Run, RunMismatchError

__all__ = [
    "SGD",
    "Adam",
    "BetaWarmup",
    "ClusterError",
    "NonFiniteLossError",
    "Run",
    "RunMismatchError",
    "TrainingInterrupted",
    "WorkerLostError",
    "distribution",
    "draw_attention",
    "fit",
    "learning_rate_schedule",
    "measure",
    "measured_images",
    "measuring_batch",
    "subject",
]
