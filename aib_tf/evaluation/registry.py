"""The table of suites, and a way to run several, one after the other."""

import contextlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence

from aib_tf.evaluation import suite
from aib_tf.evaluation.accuracy import Accuracy
from aib_tf.evaluation.bottleneck import Bottleneck
from aib_tf.evaluation.consistency import Consistency
from aib_tf.evaluation.faithfulness import Faithfulness
from aib_tf.evaluation.intervals import RESAMPLES
from aib_tf.evaluation.localisation import Localisation
from aib_tf.evaluation.robustness import Robustness
from aib_tf.evaluation.saliency import Saliency
from aib_tf.evaluation.store import Store
from aib_tf.evaluation.subject import Subject, UnavailableError
from aib_tf.evaluation.suite import Result, Skipped
from aib_tf.evaluation.transfer import transfer

_ONE_PASS = {
    kind.name: kind for kind in (Accuracy, Consistency, Localisation, Faithfulness, Robustness, Saliency, Bottleneck)
}

# In the order of a report. To add one: its class above, and its name here.
SUITES = (
    "accuracy",
    "consistency",
    "localisation",
    "faithfulness",
    "robustness",
    "transfer",
    "saliency",
    "bottleneck",
)

# What asks the model many times for each image, and looks at some of them unless told otherwise: these take `images`.
COSTLY = ("faithfulness", "robustness")

# What takes seconds, and is measured at the end of each training.
QUICK = ("accuracy", "bottleneck", "localisation")


def evaluate(
    model,
    dataset: Iterable,
    suites: Sequence[str] | None = None,
    samples: int = 0,
    resamples: int = RESAMPLES,
    seed: int = 0,
    options: Mapping[str, Mapping[str, object]] | None = None,
    folder: str | os.PathLike | None = None,
    progress: Callable[[str, int, int | None], None] | None = None,
) -> dict[str, Result | Skipped]:
    """Runs suites by name, each in a pass of its own over the data.

    Args:
        model: A model or a `Subject`.
        dataset: Batches as dicts with "image" (B, H, W, C), "label" (B,) and optionally "bbox"
            (B, 4) and "mask" (B, H, W, 1), or as tuples (image, label). Read once by each suite
            (twice by one that looks at some of the images only).
        suites: Names from `SUITES`; None runs them all.
        samples: Draws of attention for each image; 0 takes the means.
        resamples: Draws of the bootstrap.
        seed: Seed of the bootstrap, and of whatever a suite draws.
        options: Name of a suite to arguments of its function, such as
            {"robustness": {"epsilons": (4,)}}.
        folder: Where each result is kept as soon as it is there. What an earlier, perhaps
            interrupted, evaluation with the same model, data and arguments left there is read, not
            measured again. None keeps nothing.
        progress: Called after each batch with the suite, the number of images so far, and the number
            there will be where the suite looks at some only, else None.

    Returns:
        Name of the suite to its `Result`, or to a `Skipped` that says why the model or the data
        could not serve it, in the order asked for.

    Raises:
        ValueError: A suite is unknown or named twice, a number is out of range, or the data set can
            be read only once and there are several suites, or a folder.
        UnavailableError: One suite alone was asked for, and the model or the data cannot serve it.
    """
    names = check_names(suites)
    suite.check_numbers(samples, resamples, seed)
    options = dict(options or {})
    check_names(list(options), allow_none=True)
    if (len(names) > 1 or folder is not None) and iter(dataset) is dataset:
        raise ValueError(
            "Each suite reads the data set: it must be one that can be read again, such as a tf.data.Dataset or a "
            f"list. Received: dataset={type(dataset).__name__}, suites={names}"
        )
    subject = Subject.of(model)
    for name in _ONE_PASS.keys() & set(names):
        # What is wrong with an option is said before the first suite has taken its time.
        with contextlib.suppress(UnavailableError):
            _ONE_PASS[name](subject, **options.get(name, {}))
    store = None
    if folder is not None:
        store = Store(folder, subject, dataset)
    results: dict[str, Result | Skipped] = {}
    for name in names:
        arguments = dict(samples=samples, resamples=resamples, seed=seed)
        own = dict(options.get(name, {}))
        found = store.load(name, {**arguments, **own}) if store else None
        if found is None:
            report = None if progress is None else _named(progress, name)
            try:
                if name == "transfer":  # its data are those of the targets
                    found = transfer(subject, **own, **arguments)
                else:
                    found = suite.run(subject, dataset, _ONE_PASS[name], own, **arguments, progress=report)
            except UnavailableError as error:
                if len(names) == 1:
                    raise
                found = Skipped(name, str(error))
            if store and isinstance(found, Result):
                store.save(found, {**arguments, **own})
        results[name] = found
    return results


def check_names(suites: Sequence[str] | None, allow_none: bool = False) -> list[str]:
    """The names of suites, None for all; ValueError for an unknown one, one named twice, or none at all."""
    names = list(SUITES if suites is None else suites)
    unknown = [name for name in names if name not in SUITES]
    if unknown or (not names and not allow_none) or len(set(names)) < len(names):
        raise ValueError(f"suites must be one or more of {', '.join(SUITES)}, each once. Received: suites={names}")
    return names


def _named(progress, name):
    return lambda done, total: progress(name, done, total)
