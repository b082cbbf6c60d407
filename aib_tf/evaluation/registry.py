"""The table of suites, and a way to run several in one pass."""

from collections.abc import Iterable, Sequence

from aib_tf.evaluation import suite
from aib_tf.evaluation.accuracy import Accuracy
from aib_tf.evaluation.bottleneck import Bottleneck
from aib_tf.evaluation.intervals import RESAMPLES
from aib_tf.evaluation.localisation import Localisation
from aib_tf.evaluation.suite import Result, Skipped

SUITES = {kind.name: kind for kind in (Accuracy, Bottleneck, Localisation)}


def evaluate(
    model,
    dataset: Iterable,
    suites: Sequence[str] | None = None,
    samples: int = 0,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Result | Skipped]:
    """Runs suites by name in one pass over the data.

    Args:
        model: Has `explain(images, samples)`.
        dataset: Batches as dicts with "image" (B, H, W, C), "label" (B,) and optionally "bbox"
            (B, 4) and "mask" (B, H, W, 1), or as tuples (image, label). Read once.
        suites: Names from `SUITES`; None runs them all.
        samples: Draws of attention for each image; 0 takes the means.
        resamples: Draws of the bootstrap.
        seed: Seed of the bootstrap.

    Returns:
        Name of the suite to its `Result`, or to a `Skipped` that says why the model or the data
        could not serve it, in the order asked for.

    Raises:
        ValueError: A suite is unknown or named twice, or a number is out of range.
        UnavailableError: One suite alone was asked for, and the model or the data cannot serve it.
    """
    names = list(SUITES) if suites is None else list(suites)
    unknown = [name for name in names if name not in SUITES]
    if unknown or not names or len(set(names)) < len(names):
        raise ValueError(f"suites must be one or more of {', '.join(SUITES)}, each once. Received: suites={names}")
    kinds = [SUITES[name](model) for name in names]
    return suite.run(model, dataset, kinds, samples, resamples, seed)
