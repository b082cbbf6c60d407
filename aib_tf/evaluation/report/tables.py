"""What the tables of a page hold: numbers as text, in rows and columns."""

import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence

from aib_tf.evaluation.intervals import Estimate
from aib_tf.evaluation.suite import Result

# Maps that metrics are told for, by the endings of their names, in the order of their columns.
MAPS = {"attention": "Attention", "grad_cam": "Grad-CAM", "uniform": "Uniform", "centred": "Centred"}

_WORDS = {
    "top 1": "top-1", "top 5": "top-5", "nll": "NLL", "ece": "ECE", "iou": "IoU", "fgsm": "FGSM", "pgd": "PGD",
    "auc judd": "AUC-Judd", "cc": "CC", "sim": "SIM", "kl": "KL", "nss": "NSS", "auc": "AUC", "svm": "SVM", "v2": "V2",
    "maxboxacc": "MaxBoxAcc", "grad cam": "Grad-CAM", "brier": "Brier score",
}  # fmt: skip
# Last words of a name that stand behind a comma.
_QUALIFIERS = ("bits", "nats", "pixels", "box", "mask")
# Entries of a list among the details before the rest is only counted.
_SHOWN_ENTRIES = 24


@dataclasses.dataclass(frozen=True)
class Cell:
    """An estimate as text.

    Attributes:
        value: The number.
        low: Lower end of its interval.
        high: Upper end.
        images: How many images it is over.
        mark: "above" or "below" where its interval lies beyond that of the first run, else "".
    """

    value: str
    low: str
    high: str
    images: int
    mark: str = ""


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        metric: Name of the metric, as in metrics.json.
        label: The same for people.
        cells: One for each column; None where there is no such number.
        map: Name of the map for people where the rows of one metric tell of several, else "".
        span: Rows that the label stands beside; 0 in all but the first of them.
    """

    metric: str
    label: str
    cells: Sequence[Cell | None]
    map: str = ""
    span: int = 1

    @property
    def images(self) -> int | None:
        """How many images all of its numbers are over, None where they differ."""
        counts = {cell.images for cell in self.cells if cell}
        return counts.pop() if len(counts) == 1 else None


def single(result: Result) -> tuple[list[Row], list[str], list[Row]]:
    """The tables of one run.

    Returns:
        Rows of one cell; the names of the maps, for people; rows of a cell for each map.
    """
    plain, mapped = {}, {}
    for name, estimate in result.metrics.items():
        base, of = split(name)
        if of:
            mapped.setdefault(base, {})[of] = cell(estimate)
        else:
            plain[name] = cell(estimate)
    maps = [of for of in MAPS if any(of in cells for cells in mapped.values())]
    return (
        [Row(name, label(name), [one]) for name, one in plain.items()],
        [MAPS[of] for of in maps],
        [Row(base, label(base), [cells.get(of) for of in maps]) for base, cells in mapped.items()],
    )


def several(results: Sequence[Result | None]) -> list[Row]:
    """The table of several runs: a column for each, a row for each metric and map, against the first run."""
    names: dict[str, list[str]] = {}
    for result in results:
        for name in result.metrics if result else ():
            base, of = split(name)
            names.setdefault(base if of else name, [])
            if name not in names[base if of else name]:
                names[base if of else name].append(name)
    rows = []
    # As for one run, first what is told of no map.
    for base, members in sorted(names.items(), key=lambda item: split(item[1][0])[1] != ""):
        members = sorted(members, key=lambda name: list(MAPS).index(split(name)[1]) if split(name)[1] else -1)
        for place, name in enumerate(members):
            found = cells([result.metrics.get(name) if result else None for result in results])
            rows.append(Row(name, label(base), found, MAPS.get(split(name)[1], ""), 0 if place else len(members)))
    return rows


def details(results: Sequence[Result | None]) -> list[tuple[str, list[str]]]:
    """What a result says beside its metrics: label and, for each run, the text."""
    found = [{"samples": result.samples, **result.details} if result else {} for result in results]
    names = dict.fromkeys(name for one in found for name in one)
    return [(label(name), [plain(one[name]) if name in one else "" for one in found]) for name in names]


def split(metric: str) -> tuple[str, str]:
    """A metric's name without the map that it ends in, and the map; "" where it ends in none."""
    for of in MAPS:
        if metric.endswith(f"_{of}"):
            return metric.removesuffix(f"_{of}"), of
    return metric, ""


def cells(estimates: Sequence[Estimate | None]) -> list[Cell | None]:
    """Estimates of one metric as texts with equally many decimals, marked where they differ from the first."""
    errors = [(each.high - each.low) / 2 for each in estimates if each and each.high > each.low]
    error = statistics.median(errors) if errors else 0.0
    return [estimate and cell(estimate, estimates[0], error) for estimate in estimates]


def cell(estimate: Estimate, reference: Estimate | None = None, error: float | None = None) -> Cell:
    """An estimate as text, marked where it differs from the reference beyond both intervals."""
    texts = numbers(estimate.value, estimate.low, estimate.high, error)
    return Cell(*texts, estimate.images, compare(estimate, reference))


def compare(estimate: Estimate, reference: Estimate | None) -> str:
    """Says "above" or "below" where the two intervals have no number in common, else ""."""
    if reference is None:
        return ""
    return "above" if estimate.low > reference.high else "below" if estimate.high < reference.low else ""


def numbers(value: float, low: float, high: float, error: float | None = None) -> list[str]:
    """A number and its interval, with as many decimals as give `error`, by default half the interval, two digits."""
    if all(math.isfinite(each) and each == round(each) for each in (value, low, high)):
        error = 0.0  # counts, and shares that are all or nothing
    return [decimal(each, (high - low) / 2 if error is None else error) for each in (value, low, high)]


def decimal(value: float, error: float) -> str:
    """A number with as many decimals as give its error two digits; four significant digits where there is none."""
    if not (math.isfinite(value) and math.isfinite(error) and error > 0):
        return plain(float(value))
    decimals = 1 - math.floor(math.log10(error))
    if decimals > 6:
        return plain(float(value))
    text = f"{value:,.{max(0, decimals)}f}"
    # No minus before a zero.
    return (text if float(text.replace(",", "")) else text.lstrip("-")).replace("-", "−")


def plain(value) -> str:
    """A detail as text."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}".replace("-", "−")
    if isinstance(value, float):
        if not math.isfinite(value):
            return "–"
        whole = value == round(value) and abs(value) < 1e6
        return (f"{value:,.0f}" if whole else f"{value:.4g}").replace("-", "−")
    if isinstance(value, Mapping):
        return plain([f"{name}: {plain(each)}" for name, each in value.items()])
    if isinstance(value, Iterable) and not isinstance(value, str):
        entries = [plain(each) for each in value]
        more = [f"… ({len(entries):,} in all)"] if len(entries) > _SHOWN_ENTRIES else []
        return ", ".join(entries[:_SHOWN_ENTRIES] + more)
    return str(value)


def label(name: str) -> str:
    """A metric's name for people: "nll_bits_drawn_4" becomes "NLL, bits, 4 draws"."""
    rest, drawn, draws = name.rpartition("_drawn_")
    if drawn:
        return f"{label(rest)}, {draws} draws"
    words = name.replace("_", " ").split()
    unit = words.pop() if len(words) > 1 and words[-1] in _QUALIFIERS else ""
    text = " ".join(words)
    padded = f" {text} "
    for word, written in _WORDS.items():
        padded = padded.replace(f" {word} ", f" {written} ")
    text = padded.strip() or name
    return text[0].upper() + text[1:] + (f", {unit}" if unit else "")
