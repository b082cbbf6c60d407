"""What the bottleneck lets through: rate, information about the label, use of the anchors."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from aib_tf.evaluation import intervals, suite
from aib_tf.evaluation.accuracy import check_labels, log_softmax
from aib_tf.evaluation.chart import Chart, Line
from aib_tf.evaluation.intervals import RESAMPLES
from aib_tf.evaluation.subject import UnavailableError
from aib_tf.evaluation.suite import Result, Suite, Summary

BINS = 40


def bottleneck(
    model,
    dataset,
    history: Mapping[str, Sequence[float]] | None = None,
    samples: int = 0,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Result:
    """Both axes of the information plane, and the use of the anchors.

    Metrics, in bits where the name says so:

    - `rate_bits`: mean KL divergence of the latent from its prior, an upper bound on I(Z; X).
    - `cross_entropy_bits`: mean negative log-likelihood of the labels.
    - `label_information_bits`: H(Y) - CE, a lower bound on I(Z; Y). It is about the
      representation that made the logits: with samples=0 that is the mean latent, with samples > 0
      the averaged draws. It is negative where the model is worse than the label frequencies.
      H(Y) is that of the labels of these images; it stands in the details, and the interval holds
      it fixed, since a resample's own frequencies would only add bias.
    - `anchors_in_use`, `anchors_in_use_share`: anchors that at least one score went to, of all Q.
      A resample can only lose anchors, so the interval lies at or below the value.
    - `anchor_perplexity`: 2 ** entropy of how often each anchor is used, in 1..Q.

    The last three are there when the model has a quantizer.

    Charts: `scores`, how the attention scores spread over 40 bins of 0..1, before and after
    quantization (scores beyond, which draws may be, count in the first and the last bin);
    `anchors`, the share of scores that each anchor gets; `information_plane`, both bounds epoch by
    epoch, from `history`.

    Args:
        model: A model or a `Subject` whose explanations hold "logits" (B, classes) and "kl" (B,) in
            nats. One with `quantizer.anchors` (Q,) also gives "attention_quantized" (n, B, h, w).
        dataset: Batches, see `aib_tf.evaluation.evaluate`.
        history: Name to one value per epoch: "rate_bits", "label_information_bits", both also with
            "val_" before them, as `aib_tf.training.Run.read_history` returns; None for no such chart.
        samples: Draws of attention for each image; 0 takes the means.
        resamples: Draws of the bootstrap.
        seed: Seed of the bootstrap.

    Returns:
        A `Result`. Values per image: `label`, `rate_bits`, `cross_entropy_bits` and, with a
        quantizer, `anchor_share` (images, Q), how its scores spread over the anchors; with attention,
        `scores`, and with a quantizer `quantized_scores`, (images, 40), their shares in the bins.

    Raises:
        UnavailableError: The model has no bottleneck.
        ValueError: The model returns NaN, or a label is no class of the model.
    """
    return suite.run(model, dataset, Bottleneck, {"history": history}, samples, resamples, seed)


class Bottleneck(Suite):
    """The suite behind `bottleneck`."""

    name = "bottleneck"

    def __init__(self, subject, history=None):
        super().__init__(subject)
        self.history = dict(history or {})
        quantizer = getattr(subject.model, "quantizer", None)
        self.anchors = None if quantizer is None else np.asarray(quantizer.anchors).ravel()

    def measure(self, batch):
        if "kl" not in batch.explanation:
            raise UnavailableError("the model has no information bottleneck")
        logits = batch.finite("logits", rank=2)
        labels = check_labels(batch.labels, logits)
        nll = -log_softmax(logits)[np.arange(len(logits)), labels]
        values = {
            "label": labels,
            "rate_bits": batch.finite("kl", rank=1) / math.log(2),
            "cross_entropy_bits": nll / math.log(2),
        }
        if self.anchors is not None:
            scores = batch.finite("attention_quantized", rank=4, axis=1)
            values["anchor_share"] = _anchor_shares(np.moveaxis(scores, 1, 0), self.anchors)
            values["quantized_scores"] = _histograms(np.moveaxis(scores, 1, 0))
        if "attention" in batch.explanation:
            values["scores"] = _histograms(np.moveaxis(batch.finite("attention", rank=4, axis=1), 1, 0))
        return values

    def summarise(self, values, resamples, seed):
        _, counts = np.unique(values["label"], return_counts=True)
        label_entropy = float(entropy_bits(counts / counts.sum()))
        terms = {
            "rate": values["rate_bits"],
            "cross_entropy": values["cross_entropy_bits"],
        }
        metrics = {
            "rate_bits": lambda mean: mean["rate"],
            "cross_entropy_bits": lambda mean: mean["cross_entropy"],
            "label_information_bits": lambda mean: label_entropy - mean["cross_entropy"],
        }
        details = {"classes_seen": len(counts), "label_entropy_bits": label_entropy}
        if "anchor_share" in values:
            anchors = values["anchor_share"].shape[1]
            terms["anchor"] = values["anchor_share"]
            metrics |= {
                "anchors_in_use": lambda mean: (mean["anchor"] > 0).sum(axis=1),
                "anchors_in_use_share": lambda mean: (mean["anchor"] > 0).mean(axis=1),
                "anchor_perplexity": lambda mean: 2 ** entropy_bits(mean["anchor"]),
            }
            details["anchors"] = anchors
        return Summary(
            intervals.estimates(terms, metrics, resamples, seed), details, self._charts(values, resamples, seed)
        )

    def _charts(self, values, resamples, seed):
        charts = {}
        middles = (np.arange(BINS) + 0.5) / BINS
        lines = {
            title: Line(middles, values[name].mean(axis=0))
            for title, name in (("before quantization", "scores"), ("after quantization", "quantized_scores"))
            if name in values
        }
        if lines:
            if len(lines) == 1:
                lines = {"attention": next(iter(lines.values()))}
            charts["scores"] = Chart("attention score", "share of scores", lines, "bar")
        if "anchor_share" in values:
            order = np.argsort(self.anchors, kind="stable")
            use = [band[order] for band in intervals.bands(values["anchor_share"], resamples, seed)]
            charts["anchors"] = Chart("anchor", "share of scores", {"use": Line(self.anchors[order], *use)}, "bar")
        planes = {}
        for title, start in (("training", ""), ("validation", "val_")):
            columns = [self.history.get(f"{start}{name}") for name in ("rate_bits", "label_information_bits")]
            if all(column is not None for column in columns):
                epochs = [pair for pair in zip(*columns, strict=True) if None not in pair and np.isfinite(pair).all()]
                if epochs:
                    planes[title] = Line(*zip(*epochs, strict=True))
        if planes:
            charts["information_plane"] = Chart(
                "rate, upper bound on I(Z;X), bits", "H(Y) - CE, lower bound on I(Z;Y), bits", planes
            )
        return charts


def entropy_bits(shares: np.ndarray) -> np.ndarray:
    """Entropy of distributions (..., k), in bits; 0 log 0 is 0."""
    logs = np.log2(shares, out=np.zeros_like(shares), where=shares > 0)
    return np.maximum(0.0, -(shares * logs).sum(axis=-1))


def _anchor_shares(scores: np.ndarray, anchors: np.ndarray) -> np.ndarray:
    """How the scores (B, ...) of each image spread over their nearest anchors: (B, Q)."""
    flat = scores.reshape(len(scores), -1)
    order = np.argsort(anchors, kind="stable")
    ordered = anchors[order].astype(np.float64)
    # A stable sort and "left" give the lowest index among duplicate anchors.
    place = np.searchsorted((ordered[1:] + ordered[:-1]) / 2, flat, side="left")
    index = order[place] + len(anchors) * np.arange(len(flat))[:, None]
    counts = np.bincount(index.ravel(), minlength=len(flat) * len(anchors))
    return counts.reshape(len(flat), len(anchors)) / flat.shape[1]


def _histograms(scores: np.ndarray) -> np.ndarray:
    """The shares of the scores (B, ...) of each image in the bins of 0..1: (B, BINS), float32."""
    flat = scores.reshape(len(scores), -1)
    index = np.clip(np.floor(flat * BINS), 0, BINS - 1).astype(int) + BINS * np.arange(len(flat))[:, None]
    counts = np.bincount(index.ravel(), minlength=len(flat) * BINS)
    return (counts.reshape(len(flat), BINS) / flat.shape[1]).astype(np.float32)
