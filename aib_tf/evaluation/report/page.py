"""One self-contained HTML page of the results of one or more runs."""

import base64
import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Mapping

import numpy as np

from aib_tf import files
from aib_tf.evaluation.report import charts, pictures, summary, tables
from aib_tf.evaluation.report.pictures import Gallery, GalleryMaps
from aib_tf.evaluation.suite import Result, Skipped

_TEMPLATE = "page.html.jinja"


@dataclasses.dataclass(frozen=True, eq=False)
class RunResults:
    """What a report says about one run.

    Attributes:
        results: Name of the suite to its result, as `aib_tf.evaluation.evaluate` returns them.
        context: What else is worth knowing, such as the data set, the split, the folder and the best epoch: name to
            text or number.
        maps: What the model says about the images of the gallery, or None.
        group: The model that the run is one of several seeds of, or None.
        seed: The seed of its training, or None.
    """

    results: Mapping[str, Result | Skipped]
    context: Mapping[str, object] = dataclasses.field(default_factory=dict)
    maps: GalleryMaps | None = None
    group: str | None = None
    seed: int | None = None


def write(
    folder: str | os.PathLike,
    runs: Mapping[str, RunResults],
    gallery: Gallery | None = None,
    *,
    title: str | None = None,
    note: str = "",
) -> "os.PathLike":
    """Writes a report: a page that needs no network and no other file, and the numbers as JSON.

    Several runs stand side by side, and the first is the one that the others are compared with: a number is marked
    where its 95% interval and that of the first have no value in common. Runs with the same `group` are seeds of one
    model: they share a colour, and the summary gives their mean and range. The same arguments give the same files.

    Args:
        folder: Where index.html and metrics.json are written, each whole or not at all; made where it is missing.
        runs: Name to run, in the order in which they are shown; runs of one group are moved together.
        gallery: The images to show, or None.
        title: Heading of the page; by default the name of the run, or the number of runs.
        note: Text for the foot of the page, such as the date.

    Returns:
        The path of index.html.

    Raises:
        ValueError: There are no runs, maps do not belong to the gallery, or a number is NaN or infinite.
    """
    if not runs:
        raise ValueError(f"A report needs at least one run. Received: runs={dict(runs)}")
    for name, run in runs.items():
        _check_maps(name, run.maps, gallery)
    groups = {name: run.group or name for name, run in runs.items()}
    order = list(dict.fromkeys(groups.values()))
    runs = {name: runs[name] for name in sorted(runs, key=lambda name: order.index(groups[name]))}
    groups = {name: groups[name] for name in runs}

    numbers = {
        "runs": {
            name: {
                "group": run.group,
                "seed": run.seed,
                "context": dict(run.context),
                "suites": {suite: result.to_dict() for suite, result in run.results.items()},
            }
            for name, run in runs.items()
        }
    }
    page = _render(runs, groups, gallery, title or _title(runs, groups), note)
    folder = files.path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # First what may refuse: JSON has no NaN.
    files.write_json(folder / "metrics.json", numbers)
    files.write_text(folder / "index.html", page)
    return folder / "index.html"


def _check_maps(name, maps, gallery):
    if maps is None:
        return
    count = 0 if gallery is None else len(gallery.labels)
    classes = maps.probabilities.shape[1]
    named = classes if gallery is None or gallery.class_names is None else len(gallery.class_names)
    if len(maps.probabilities) != count or named != classes or gallery.labels.max() >= classes:
        raise ValueError(
            f"The maps of a run must be of the images of the gallery, and its probabilities of the same classes. "
            f"Received: run={name!r}, images={len(maps.probabilities)} beside {count} in the gallery, "
            f"classes={classes}" + (f" beside {named} names" if named != classes else "")
        )


def _title(runs, groups):
    if len(runs) == 1:
        return next(iter(runs))
    models = len(set(groups.values()))
    return f"{len(runs)} runs" + (f" of {models} model{'s' if models > 1 else ''}" if models < len(runs) else "")


def _render(runs, groups, gallery, title, note):
    import jinja2

    here = pathlib.Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(here),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["plain"] = tables.plain
    environment.filters["label"] = tables.label
    style, script = ((here / name).read_text(encoding="utf-8") for name in ("style.css", "viewer.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    results = {name: run.results for name, run in runs.items()}
    keys = summary.keys(list(results.values()))
    return environment.get_template(_TEMPLATE).render(
        title=title,
        note=note,
        style=style,
        script=script,
        script_digest=digest,
        runs=runs,
        columns=_columns(runs, groups),
        first=next(iter(runs)),
        shared=_context(runs, shared=True),
        context=_context(runs, shared=False),
        sentences=summary.sentences(results, groups),
        keys=keys,
        cells=_key_cells(results, keys),
        models=_models(results, groups, keys),
        sections=_sections(runs, groups),
        skipped=_skipped(results),
        methods=_methods(results),
        pictures=[] if gallery is None else pictures.encode_pictures(gallery.pictures),
        gallery=gallery,
        data=None if gallery is None else _data(runs, groups, gallery),
    )


@dataclasses.dataclass(frozen=True)
class _Column:
    """One run as the head of a column; `model` is its group, and `span` the runs of it, in the first of them alone."""

    name: str
    short: str
    model: str
    span: int


@dataclasses.dataclass(frozen=True)
class _Section:
    """One suite, of all runs."""

    name: str
    purpose: str
    images: int | None
    tables: list
    maps: list
    figures: list
    details: list
    missing: dict[str, list[str]]
    verdicts: list[str]


def _columns(runs, groups):
    """Heads of columns; the lower line of a group with several runs names their seeds."""
    members = list(groups.values())
    columns = []
    for name, run in runs.items():
        model = groups[name]
        first = next(each for each in runs if groups[each] == model) == name
        seeded = members.count(model) > 1 and run.seed is not None
        columns.append(_Column(name, f"seed {run.seed}" if seeded else name, model, members.count(model) * first))
    return columns


def _context(runs, shared):
    """What all runs have in common, or the rest: name to texts, one for each run."""
    names = dict.fromkeys(name for run in runs.values() for name in run.context)
    found = {name: [run.context.get(name) for run in runs.values()] for name in names}
    common = {name: values for name, values in found.items() if all(value == values[0] for value in values)}
    if shared:
        return {name: tables.plain(values[0]) for name, values in common.items()}
    return {
        name: ["" if value is None else tables.plain(value) for value in values]
        for name, values in found.items()
        if name not in common
    }


def _key_cells(results, keys):
    """Name of the run to its key figures, marked against those of the first."""
    columns = [tables.cells([key.of(run) for run in results.values()]) for key in keys]
    return {name: [column[place] for column in columns] for place, name in enumerate(results)}


def _models(results, groups, keys):
    """Name of the group to its runs, and the mean and range of each key figure where it has several."""
    return [
        (model, members, [summary.over_seeds([key.of(results[name]) for name in members]) for key in keys])
        for model in dict.fromkeys(groups.values())
        for members in [[name for name in results if groups[name] == model]]
    ]


def _sections(runs, groups):
    sections = []
    for number, suite in enumerate(dict.fromkeys(suite for run in runs.values() for suite in run.results)):
        entries = {name: run.results.get(suite) for name, run in runs.items()}
        found = {name: entry for name, entry in entries.items() if isinstance(entry, Result)}
        if not found:
            continue
        columns = [found.get(name) for name in runs]
        rows, maps, map_rows = tables.single(columns[0]) if len(runs) == 1 else (tables.several(columns), [], [])
        # What is shown at once, and the rest; where nothing comes first, all does.
        first = {row.metric for row in [*rows, *map_rows] if summary.comes_first(suite, row.metric)}
        first = first or {row.metric for row in [*rows, *map_rows]}
        parts = [
            [[row for row in each if (row.metric in first) is is_first] for each in (rows, map_rows)]
            for is_first in (True, False)
        ]
        counts = {result.images for result in found.values()}
        names = dict.fromkeys(name for result in found.values() for name in result.charts)
        figures = [
            charts.figure(
                f"chart-{number}-{place}",
                tables.label(name),
                {run: result.charts[name] for run, result in found.items() if name in result.charts},
                groups,
                lambda name: tables.MAPS.get(name) or tables.label(name),
            )
            for place, name in enumerate(names)
        ]
        missing: dict[str, list[str]] = {}
        for name, entry in entries.items():
            if name not in found:
                reason = entry.reason if isinstance(entry, Skipped) else "it was not asked for"
                missing.setdefault(reason, []).append(name)
        sections.append(
            _Section(suite, summary.purpose(suite), counts.pop() if len(counts) == 1 else None,
                     parts, maps, figures, tables.details(columns), missing, summary.verdicts(found))
        )  # fmt: skip
    return sections


def _skipped(results):
    """Suites that no run has a result of: name and reasons."""
    names = dict.fromkeys(suite for run in results.values() for suite in run)
    found = []
    for name in names:
        entries = [run[name] for run in results.values() if name in run]
        if all(isinstance(entry, Skipped) for entry in entries):
            found.append((name, list(dict.fromkeys(entry.reason for entry in entries))))
    return found


def _methods(results):
    """The ways in which intervals were made, as sentences; one where all results agree."""
    found = {}
    for run in results.values():
        for result in run.values():
            if isinstance(result, Result):
                interval = result.to_dict()["interval"]
                text = (
                    f"{interval['level']:.0%} intervals: {interval['method']}, {interval['resamples']:,} resamples, "
                    f"seed {interval['seed']}."
                )
                found.setdefault(text, {})[result.suite] = None
    if len(found) < 2:
        return list(found)
    return [f"{', '.join(tables.label(suite) for suite in suites)}: {text}" for text, suites in found.items()]


def _data(runs, groups, gallery):
    """What the viewer draws, as JSON can hold it."""
    from matplotlib import colormaps

    palette = (colormaps["viridis"](np.arange(256))[:, :3] * 255).round().astype(np.uint8)
    shown = {}
    for name, run in runs.items():
        if run.maps is None:
            continue
        probabilities = run.maps.probabilities
        order = np.argsort(-probabilities, axis=1, kind="stable")[:, : pictures.SHOWN_CLASSES]
        shown[name] = {
            "model": groups[name],
            "classes": order.tolist(),
            "probabilities": np.take_along_axis(probabilities, order, axis=1).round(4).tolist(),
            "truth": probabilities[np.arange(len(probabilities)), gallery.labels].round(4).tolist(),
            "maps": {
                kind: pictures.encode_maps(values)
                for kind in pictures.KINDS
                for values in [getattr(run.maps, kind)]
                if values is not None
            },
        }
    return {
        "palette": base64.b64encode(palette.tobytes()).decode(),
        "labels": gallery.labels.tolist(),
        "indices": gallery.indices.tolist(),
        "names": gallery.class_names,
        "boxes": None if gallery.boxes is None else gallery.boxes.round(4).tolist(),
        # A list, since JSON's own order of names is nobody's.
        "runs": [{"name": name, **run} for name, run in shown.items()],
    }
