"""Accuracy, likelihood and calibration."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from aib_tf.evaluation import intervals, suite
from aib_tf.evaluation.chart import Chart, Line
from aib_tf.evaluation.intervals import RESAMPLES
from aib_tf.evaluation.subject import UnavailableError
from aib_tf.evaluation.suite import Result, Suite, Summary
from aib_tf.validation import check_count

BINS = 15

# As many draws as the released code makes on CIFAR and on CUB.
DRAWS = (4, 12)


def accuracy(
    model, dataset, draws: Sequence[int] = DRAWS, samples: int = 0, resamples: int = RESAMPLES, seed: int = 0
) -> Result:
    """How often the model is right, and how well its probabilities say so.

    Probabilities are the softmax of the logits of `model.explain`. Among equal logits the class
    of the lowest index comes first.

    Metrics: `top_1`; `top_5` where there are more than five classes; `nll_nats` and `nll_bits`,
    the mean negative log-likelihood of the label; `brier`, the mean of the summed squared
    differences between probabilities and one-hot label, in 0..2; `ece`, the expected calibration
    error over 15 bins of equal width, each holding its upper edge (Guo et al. 2017). The same with
    `_drawn_4` behind the name are for logits averaged over 4 draws of attention and 4 of the latent
    for each, which models without anything to draw do not have.

    Chart `reliability`: accuracy against confidence, bin by bin.

    Args:
        model: A model or a `Subject`.
        dataset: Batches, see `aib_tf.evaluation.evaluate`.
        draws: Numbers of draws that are measured beside `samples`. What is drawn depends on `seed`,
            on what was drawn before and so on the size of the batches.
        samples: Draws of attention for each image; 0 takes the means.
        resamples: Draws of the bootstrap.
        seed: Seed of the bootstrap.

    Returns:
        A `Result`. Values per image: `label`, `prediction`, `rank` of the label (0 is best),
        `confidence` in the prediction, `nll_nats`, `brier`, and all but the label again for each
        of `draws`.

    Raises:
        ValueError: The logits hold NaN or look like probabilities, or a label is no class of the model.
        UnavailableError: All labels are -1, which stands for none.
    """
    return suite.run(model, dataset, Accuracy, {"draws": draws}, samples, resamples, seed)


class Accuracy(Suite):
    """The suite behind `accuracy`."""

    name = "accuracy"

    def __init__(self, subject, draws=DRAWS):
        super().__init__(subject)
        self.draws = [check_count("draws", count) for count in draws]
        self.classes = 0

    def measure(self, batch):
        logits = batch.finite("logits", rank=2)
        labels = check_labels(batch.labels, logits)
        self.classes = logits.shape[1]
        values = {"label": labels, **_scores(logits, labels)}
        # A model with a bottleneck or an attention of its own has something to draw.
        if {"kl", "attention_stddev"} & batch.explanation.keys():
            for count in self.draws:
                drawn = dataclasses.replace(batch, samples=count).finite("logits", rank=2)
                values |= {f"{name}_drawn_{count}": value for name, value in _scores(drawn, labels).items()}
        return values

    def summarise(self, values, resamples, seed):
        found, lines = {}, {}
        for count in (None, *self.draws):
            end = "" if count is None else f"_drawn_{count}"
            if f"rank{end}" not in values:
                continue
            correct, confidence = values[f"rank{end}"] == 0, values[f"confidence{end}"]
            terms = {
                "top_1": correct,
                "top_5": values[f"rank{end}"] < 5,
                "nll": values[f"nll_nats{end}"],
                "brier": values[f"brier{end}"],
                "gap": _bin_gaps(confidence, correct),
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
            metrics = {f"{name}{end}": metric for name, metric in metrics.items()}
            found |= intervals.estimates(terms, metrics, resamples, seed)
            lines["means" if count is None else f"{count} draws"] = _reliability(confidence, correct)
        chart = Chart("confidence", "accuracy", lines, diagonal=True)
        return Summary(found, {"classes": self.classes, "ece_bins": BINS}, {"reliability": chart})


def _scores(logits, labels):
    """Values per image of one set of logits."""
    log_probabilities = log_softmax(logits)
    probabilities = np.exp(log_probabilities)
    rows, classes = np.arange(len(logits)), np.arange(logits.shape[1])
    own = logits[rows, labels][:, None]
    ahead = (logits > own) | ((logits == own) & (classes < labels[:, None]))
    one_hot = labels[:, None] == classes
    return {
        "prediction": logits.argmax(axis=1),
        "rank": ahead.sum(axis=1),
        "confidence": probabilities.max(axis=1),
        "nll_nats": -log_probabilities[rows, labels],
        "brier": np.square(probabilities - one_hot).sum(axis=1),
    }


def _reliability(confidence, correct) -> Line:
    """Mean accuracy against mean confidence of the bins that hold images, with Wilson's 95% intervals."""
    bins = _bins(confidence)
    filled, counts = np.unique(bins, return_counts=True)
    share = np.bincount(bins, correct)[filled] / counts
    middle = np.bincount(bins, confidence)[filled] / counts
    # Few images lie in most bins, and often all of them right, where a bootstrap would see no spread.
    z = 1.959964
    centre = (share + z**2 / (2 * counts)) / (1 + z**2 / counts)
    half = z / (1 + z**2 / counts) * np.sqrt(share * (1 - share) / counts + z**2 / (4 * counts**2))
    return Line(middle, share, np.maximum(centre - half, 0), np.minimum(centre + half, 1))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities in nats from logits (B, classes)."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def check_labels(labels: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """The labels, when each is a class of the logits.

    Raises:
        UnavailableError: All labels are -1, which stands for none.
        ValueError: A label is no class of the model.
    """
    if len(labels) and (labels == -1).all():
        raise UnavailableError("the data has no labels")
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
    return np.eye(BINS)[_bins(confidence)] * (confidence - correct)[:, None]


def _bins(confidence: np.ndarray) -> np.ndarray:
    # Rounding may lift a confidence just above 1.
    return np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
