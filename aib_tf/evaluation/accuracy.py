"""Accuracy, likelihood and calibration."""

import math

import numpy as np

from aib_tf.evaluation import intervals, suite
from aib_tf.evaluation.intervals import RESAMPLES
from aib_tf.evaluation.suite import Result, Suite

BINS = 15


def accuracy(model, dataset, samples: int = 0, resamples: int = RESAMPLES, seed: int = 0) -> Result:
    """How often the model is right, and how well its probabilities say so.

    Probabilities are the softmax of the logits of `model.explain`. Among equal logits the class
    of the lowest index comes first.

    Metrics: `top_1`; `top_5` where there are more than five classes; `nll_nats` and `nll_bits`,
    the mean negative log-likelihood of the label; `brier`, the mean of the summed squared
    differences between probabilities and one-hot label, in 0..2; `ece`, the expected calibration
    error over 15 bins of equal width, each holding its upper edge (Guo et al. 2017).

    Args:
        model: Has `explain(images, samples)` with "logits" (B, classes).
        dataset: Batches, see `aib_tf.evaluation.evaluate`.
        samples: Draws of attention for each image; 0 takes the means.
        resamples: Draws of the bootstrap.
        seed: Seed of the bootstrap.

    Returns:
        A `Result`. Values per image: `label`, `prediction`, `rank` of the label (0 is best),
        `confidence` in the prediction, `nll_nats`, `brier`.

    Raises:
        ValueError: The logits hold NaN, or a label is no class of the model.
    """
    return suite.run(model, dataset, [Accuracy(model)], samples, resamples, seed)[Accuracy.name]


class Accuracy(Suite):
    """The suite behind `accuracy`."""

    name = "accuracy"

    def __init__(self, model):
        super().__init__(model)
        self.classes = 0

    def measure(self, batch):
        logits = batch.finite("logits", rank=2)
        log_probabilities = log_softmax(logits)
        probabilities = np.exp(log_probabilities)
        rows, labels = np.arange(len(logits)), check_labels(batch.labels, logits)
        self.classes = logits.shape[1]
        own = logits[rows, labels][:, None]
        ahead = (logits > own) | ((logits == own) & (np.arange(self.classes) < labels[:, None]))
        one_hot = np.eye(self.classes)[labels]
        return {
            "label": labels,
            "prediction": logits.argmax(axis=1),
            "rank": ahead.sum(axis=1),
            "confidence": probabilities.max(axis=1),
            "nll_nats": -log_probabilities[rows, labels],
            "brier": np.square(probabilities - one_hot).sum(axis=1),
        }

    def summarise(self, values, resamples, seed):
        correct = values["rank"] == 0
        terms = {
            "top_1": correct,
            "top_5": values["rank"] < 5,
            "nll": values["nll_nats"],
            "brier": values["brier"],
            "gap": _bin_gaps(values["confidence"], correct),
        }
        metrics = {
            "top_1": lambda mean: mean["top_1"],
            "top_5": lambda mean: mean["top_5"],
            "nll_nats": lambda mean: mean["nll"],
            "nll_bits": lambda mean: mean["nll"] / math.log(2),
            "brier": lambda mean: mean["brier"],
            "ece": lambda mean: np.abs(mean["gap"]).sum(axis=1),
        }
        if self.classes <= 5:
            del metrics["top_5"]
        found = intervals.estimates(terms, metrics, resamples, seed)
        return found, {"classes": self.classes, "ece_bins": BINS}


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities in nats from logits (B, classes)."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def check_labels(labels: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """The labels, when each is a class of the logits; a ValueError otherwise."""
    classes = logits.shape[1]
    bad = labels[(labels < 0) | (labels >= classes)]
    if bad.size:
        raise ValueError(f"Labels must lie in 0..{classes - 1}, the classes of the model. Received: label={bad[0]}")
    return labels


def _bin_gaps(confidence: np.ndarray, correct: np.ndarray) -> np.ndarray:
    """Confidence minus correctness in the bin of each image, else 0: (images, BINS).

    sum_b n_b / n |mean confidence - mean accuracy| = sum_b |mean over all images of this column|:
    as a function of means it is resampled like every other metric.
    """
    # Rounding may lift a confidence just above 1.
    bins = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    return np.eye(BINS)[bins] * (confidence - correct)[:, None]
