"""What the numbers say: key figures, a table of models, and a few sentences."""

import dataclasses
import re
import statistics
from collections.abc import Mapping, Sequence

from aib_tf.evaluation.intervals import Estimate
from aib_tf.evaluation.report import tables
from aib_tf.evaluation.suite import Result, Skipped

# What each suite is for, and lists of patterns of the metrics that stand for it: of each list the first that is there.
SUITES = {
    "accuracy": (
        "How often the prediction is right, and how far its probabilities can be trusted.",
        [["top_1"], ["ece"]],
    ),
    "consistency": (
        "Whether the map stays as it is when the image is altered and the prediction is not.",
        [[f"score_90_{family}_attention", f"score_.*_{family}_attention", f"score_90_{family}_.*"]
         for family in ("spatial", "frequency")],
    ),
    "localisation": (
        "Whether the map lies on the object.",
        [["pointing_mask_attention", "pointing_box_attention", "pointing_.*"],
         ["energy_mask_attention", "energy_box_attention"]],
    ),
    "faithfulness": (
        "Whether the pixels that the map marks are those that the decision needs.",
        [["insertion_attention", "insertion_.*"], ["deletion_attention", "deletion_.*"]],
    ),
    "robustness": (
        "What is left of the accuracy when each pixel may be changed a little, at worst.",
        [["accuracy_pgd_4", "accuracy_pgd_.*"]],
    ),
    "transfer": ("What the frozen features are worth on other data.", [["svm_accuracy_.*"]]),
    "saliency": (
        "How close the map is to where people look, or to another reference.",
        [["cc_attention", "cc_.*"], ["nss_attention", "nss_.*"]],
    ),
    "bottleneck": (
        "How much the representation says about the image, and how much of that is about the label.",
        [["rate_bits"], ["label_information_bits"]],
    ),
}  # fmt: skip
# Details that say in words what the numbers of a suite are worth: they stand above its tables.
_VERDICTS = r"gradient_check|.*_verdict(_.*)?"
# Of suites with many metrics, those that their tables show before one asks for the rest.
_FIRST = {
    "consistency": r"(kept|score_.*)_(spatial|frequency|unrelated)(_.*)?",
    "localisation": r"(?!box_accuracy_\d).*",
    "robustness": r"accuracy_.*",
    "accuracy": r"(?!.*_drawn_).*",
}
# Figures beyond these no longer are the key ones.
_MOST = 8


@dataclasses.dataclass(frozen=True)
class Key:
    """A metric that stands for its suite."""

    suite: str
    metric: str

    @property
    def label(self) -> str:
        base, of = tables.split(self.metric)
        return tables.label(base) + (f", {tables.MAPS[of]}" if of and of != "attention" else "")

    def of(self, results: Mapping[str, Result | Skipped]) -> Estimate | None:
        """The estimate in the results of a run, if they hold it."""
        result = results.get(self.suite)
        return result.metrics.get(self.metric) if isinstance(result, Result) else None


@dataclasses.dataclass(frozen=True)
class Seeds:
    """One metric over the seeds of a model: mean and range of the values of its runs."""

    mean: str
    low: str
    high: str
    runs: int


def purpose(suite: str) -> str:
    """What a suite is for, in a sentence; nothing for one that this module does not know."""
    return SUITES.get(suite, ("", []))[0]


def comes_first(suite: str, metric: str) -> bool:
    """Whether a table of the suite shows the metric before one asks for the rest."""
    return re.fullmatch(_FIRST.get(suite, ".*"), metric) is not None


def verdicts(results: Mapping[str, Result]) -> list[str]:
    """What a suite says in words about its own numbers, each with the runs that it says it of."""
    found: dict[tuple[str, str], list[str]] = {}
    for run, result in results.items():
        for name, text in result.details.items():
            if isinstance(text, str) and re.fullmatch(_VERDICTS, name):
                found.setdefault((name, text), []).append(run)
    several = len(results) > 1
    return [
        f"{tables.label(name)}{f' ({_listed(runs)})' if several else ''}: {text.rstrip('.')}."
        for (name, text), runs in found.items()
    ]


def keys(runs: Sequence[Mapping[str, Result | Skipped]]) -> list[Key]:
    """The metrics that stand for the suites of some runs, up to eight."""
    metrics: dict[str, dict[str, None]] = {}
    for results in runs:
        for suite, result in results.items():
            if isinstance(result, Result) and result.metrics:
                metrics.setdefault(suite, {}).update(dict.fromkeys(result.metrics))
    first, further = [], []
    for suite, names in metrics.items():
        found = []
        for patterns in SUITES.get(suite, ("", []))[1]:
            matches = (name for pattern in patterns for name in names if re.fullmatch(pattern, name))
            match = next(matches, None)
            if match and match not in found:
                found.append(match)
        found = found or [next(iter(names))]
        first.append(Key(suite, found[0]))
        further += [Key(suite, name) for name in found[1:]]
    # One of each suite, before any has two.
    kept = {*(first + further)[:_MOST]}
    order = list(metrics)
    return sorted(kept, key=lambda key: (order.index(key.suite), [*first, *further].index(key)))


def over_seeds(estimates: Sequence[Estimate | None]) -> Seeds | None:
    """Mean and range of what the runs of one model say; None where none says anything."""
    values = [estimate.value for estimate in estimates if estimate is not None]
    if not values:
        return None
    low, high = min(values), max(values)
    # As exact as the intervals of the runs allow.
    error = statistics.median([(each.high - each.low) / 2 for each in estimates if each is not None])
    return Seeds(*(tables.decimal(value, error) for value in (statistics.fmean(values), low, high)), len(values))


def sentences(runs: Mapping[str, Mapping[str, Result | Skipped]], groups: Mapping[str, str]) -> list[str]:
    """What the numbers of one run, or of several, say."""
    return _of_one(next(iter(runs.values()))) if len(runs) == 1 else _of_several(runs, groups)


def _of_one(results):
    said = []
    top_1 = Key("accuracy", "top_1").of(results)
    if top_1:
        value, low, high = (_percent(each) for each in (top_1.value, top_1.low, top_1.high))
        said.append(f"{value} of {_images(top_1.images)} classified correctly (95% interval {low} to {high}).")
    for key in keys([results]):
        base, of = tables.split(key.metric)
        if of == "attention":
            said += _beside_baselines(results[key.suite].metrics, base)
    rate, information = (Key("bottleneck", name).of(results) for name in ("rate_bits", "label_information_bits"))
    if rate and information:
        entropy = results["bottleneck"].details.get("label_entropy_bits")
        total = f" of the {tables.plain(float(entropy))}" if isinstance(entropy, float) else ""
        said.append(
            f"The representation holds at most {_value(rate)} bits about the image, and at least "
            f"{_value(information)}{total} bits about its label."
        )
    return said


def _beside_baselines(metrics, base):
    """How the attention compares with the other maps, in one sentence."""
    own = metrics[f"{base}_attention"]
    places: dict[str, list[str]] = {"above": [], "below": [], "": []}
    for of, name in tables.MAPS.items():
        other = metrics.get(f"{base}_{of}")
        if of != "attention" and other:
            places[tables.compare(own, other)].append(f"{name if of == 'grad_cam' else name.lower()} ({_value(other)})")
    parts = [f"{tables.label(base)}: attention {_value(own)}"]
    for place in ("above", "below"):
        if places[place]:
            parts.append(f"{place} {_listed(places[place])} beyond the intervals")
    if places[""]:
        parts.append(f"not told apart from {_listed(places[''])}")
    return [", ".join(parts) + "."] if len(parts) > 1 else []


def _of_several(runs, groups):
    first = next(iter(runs))
    differing, compared = 0, 0
    for name, results in runs.items():
        for suite, result in results.items():
            reference = runs[first].get(suite)
            if name == first or not isinstance(result, Result) or not isinstance(reference, Result):
                continue
            for metric, estimate in result.metrics.items():
                if metric in reference.metrics:
                    compared += 1
                    differing += bool(tables.compare(estimate, reference.metrics[metric]))
    models = len(set(groups.values()))
    several = f" of {models} models" if 1 < models < len(runs) else ""
    said = [f"{len(runs)} runs{several}, compared with {first}."]
    if compared:
        verb = "differs" if differing == 1 else "differ"
        said[0] += f" Of the {compared:,} figures that can be compared, {differing:,} {verb} beyond the 95% intervals."
    alike = []
    for key in keys(list(runs.values())):
        found = {name: key.of(results) for name, results in runs.items() if key.of(results)}
        if len(found) < 2:
            continue
        highest, lowest = (choose(found, key=lambda name: found[name].value) for choose in (max, min))
        if tables.compare(found[highest], found[lowest]):
            said.append(
                f"{key.label}: lowest with {lowest} ({_value(found[lowest])}), highest with {highest} "
                f"({_value(found[highest])})."
            )
        else:
            alike.append(key.label)
    if alike:
        said.append(f"No two runs differ beyond the intervals in: {'; '.join(alike)}.")
    return said


def _value(estimate):
    return tables.numbers(estimate.value, estimate.low, estimate.high)[0]


def _percent(share):
    return f"{100 * share:.1f}%"


def _images(count):
    return f"{count:,} images are" if count > 1 else "1 image is"


def _listed(texts):
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"
