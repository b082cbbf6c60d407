"""What the runs of a sweep reached: a table for people, all numbers for programs, and the course of training."""

import dataclasses
import json
import math
import os
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from aib_tf import files, visualization
from aib_tf.evaluation.intervals import Estimate
from aib_tf.evaluation.report.tables import decimal, numbers, plain
from aib_tf.evaluation.suite import Result
from aib_tf.training.run import Run, RunMismatchError
from aib_tf.training.sweep.plan import Cell, Column, Sweep, evaluate_arguments, train_arguments
from aib_tf.training.sweep.runner import is_evaluated, read_record

_NOTHING = "-"
_PAPER = "see the paper"
# Okabe-Ito, apart for every kind of colour vision; a further row takes the next kind of line.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
_LINES = ("-", "--", ":", "-.")
# Panel of the curves: name in the history, title, axis label.
_PANELS = (
    ("val_accuracy", "Accuracy on the validation images", "share of images"),
    ("val_rate_bits", "Rate on the validation images", "bits"),
)


@dataclasses.dataclass(frozen=True)
class _Found:
    """What one row with one seed reached.

    Attributes:
        cell: The row and the seed.
        results: Name of each suite to its `Result`.
        facts: Name to number of what `RUN_FACTS` lists, None where nobody knows it.
        history: Name to a number for each epoch.
        machines: What it was computed on.
    """

    cell: Cell
    results: Mapping[str, Result]
    facts: Mapping[str, float | int | None]
    history: Mapping[str, Sequence[float]]
    machines: Sequence[Mapping]

    def __call__(self, column: Column) -> Estimate | float | int | None:
        """What it has for a column."""
        if column.source == "run":
            value = self.facts[column.metric]
            return None if value is None else _scaled(column, value)
        result = self.results.get(column.source)
        estimate = result.metrics.get(column.metric) if result else None
        if estimate is None:
            return None
        ends = sorted(column.apply(end) for end in (estimate.low, estimate.high))
        return Estimate(column.apply(estimate.value), *ends, estimate.images)


def write(
    sweep: Sweep,
    output_dir: str | os.PathLike,
    train: Sequence[str],
    evaluate: Sequence[str],
    command: Sequence[str],
    failures: Mapping[str, str] | None = None,
) -> Path:
    """Writes table.md, table.json and curves.png from the runs that are there.

    Args:
        sweep: What was run.
        output_dir: The folder of the runs.
        train: Command that trains, see `execute`.
        evaluate: Command that evaluates.
        command: The command that runs the sweep, for the reader.
        failures: What `execute` returned: these runs are missing.

    Returns:
        The path of table.md.

    Raises:
        ValueError: No run has the metric of a column, though none failed; the message lists what there is.
        RunMismatchError: A run cannot be read.
    """
    folder = files.path(output_dir)
    parameters = {}
    rows = {name: _found(cells, sweep, folder, parameters) for name, cells in sweep.rows.items()}
    if not failures:
        _check_metrics(sweep, rows)
    shown = [shlex.join("python" if part == sys.executable else part for part in each) for each in (train, evaluate)]
    figure = _curves(rows)
    text = _markdown(sweep, rows, shown, shlex.join(command), folder, figure is not None)
    files.write_json(folder / "table.json", _numbers(sweep, rows, command, failures or {}))
    if figure is not None:
        visualization.save_figure(figure, folder / "curves.png")
    files.write_text(folder / "table.md", text)
    return folder / "table.md"


def _found(cells, sweep, folder, parameters):
    """What those seeds of a row reached that are finished."""
    found = []
    for cell in cells:
        run = Run(folder / cell.run)
        if not run.is_finished or not is_evaluated(cell, folder):
            continue
        run.resolve(cell.config)
        training = read_record(run.path).get("training") or {}
        evaluation = read_record(folder / cell.results).get("evaluation") or {} if cell.evaluate is not None else {}
        history = run.read_history()
        facts = {
            "parameters": None,
            "seconds_per_epoch": statistics.median(history["seconds"]) if history.get("seconds") else None,
            "peak_memory_bytes": training.get("peak_memory_bytes"),
            "training_seconds": training.get("seconds"),
            "evaluation_seconds": evaluation.get("seconds"),
        }
        if any(column.source == "run" and column.metric == "parameters" for column in sweep.columns):
            if cell.row not in parameters:  # seeds do not change it
                weights = run.load_best().trainable_weights
                parameters[cell.row] = sum(math.prod(weight.shape) for weight in weights)
            facts["parameters"] = parameters[cell.row]
        found.append(_Found(cell, _results(cell, run, folder), facts, history, training.get("machines") or []))
    return found


def _results(cell, run, folder):
    """Results of a cell by suite: those of the evaluation, and beside them those that training ends with."""
    found = {}
    asked = cell.evaluate or {}
    same_samples = asked.get("samples") in (None, cell.config.samples)
    if same_samples and asked.get("split", "test") == "test":
        found |= _read(run.metrics_file)
    if cell.evaluate is not None:
        found |= _read(folder / cell.results / cell.results_file)
    return found


def _read(file):
    """Results by suite from a file that `evaluation.report.write_json` wrote, without the suites that were skipped."""
    try:
        suites = json.loads(file.read_text(encoding="utf-8"))["suites"]
        return {
            name: Result.from_dict({"charts": {}, **values}, {})
            for name, values in suites.items()
            if "metrics" in values
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunMismatchError(
            f"{file} cannot be read ({type(error).__name__}: {error}). It was changed, or written by another version "
            "of aib_tf: delete it and repeat the command, which measures again."
        ) from error


def _scaled(column, value):
    return value if column.scale == 1 and not column.complement else column.apply(value)


def _check_metrics(sweep, rows):
    """Raises ValueError for a column that no row has anything for."""
    every = [one for found in rows.values() for one in found]
    for column in sweep.columns:
        if column.source == "run" or any(one(column) is not None for one in every):
            continue
        served = [one.results[column.source] for one in every if column.source in one.results]
        known = dict.fromkeys(name for result in served for name in result.metrics)
        there = f"the suite {column.source} has {', '.join(known)}" if known else f"none was served by {column.source}"
        raise ValueError(
            f"Column {column.heading!r}: no row has this metric; {there}. "
            f"Received: metric={column.source}.{column.metric}"
        )


def _markdown(sweep, rows, commands, command, folder, curves):
    machines = list({json.dumps(m): m for found in rows.values() for one in found for m in one.machines}.values())
    headings = [*(column.heading for column in sweep.columns), "seeds", "training", "evaluation", "machine", "paper"]
    lines = [["", *headings]]
    for name, found in rows.items():
        texts = [_cell_text([one(column) for one in found]) for column in sweep.columns]
        texts.append(", ".join(str(one.cell.seed) for one in found) or _NOTHING)
        for fact in ("training_seconds", "evaluation_seconds"):
            texts.append(_duration([one.facts[fact] for one in found]))
        used = sorted({machines.index(machine) + 1 for one in found for machine in one.machines})
        texts.append(", ".join(map(str, used)) or _NOTHING)
        lines.append([name, *texts, _PAPER])
    table = ["| " + " | ".join(_escaped(text) for text in line) + " |" for line in lines]
    table.insert(1, "| --- |" + " ---: |" * (len(headings) - 1) + " --- |")
    blocks = [f"# {sweep.title}", f"    {command}", "\n".join(table)]
    notes = [
        "Several seeds: their mean (smallest to largest). One seed: the value, with its 95% interval over images where "
        "there is one."
    ]
    missing = [cell.name for cell in sweep.cells if all(one.cell is not cell for one in rows[cell.row])]
    if missing:
        notes.append(f"Missing: {', '.join(missing)}.")
    blocks.append(" ".join(notes))
    blocks.append("\n".join(f"Machine {index}: {_machine_text(one)}." for index, one in enumerate(machines, 1)))
    blocks.append("![Validation accuracy and rate by epoch](curves.png)" if curves else "")
    blocks.append("## Commands\n\nThose of the first seed of each row; the others differ in the seed.")
    for name, (cell, *_) in sweep.rows.items():
        parts = []
        if cell.is_trained:
            parts.append(f"    {commands[0]} {shlex.join(train_arguments(cell, folder / cell.run))}")
        if cell.evaluate is not None:
            parts.append(f"    {commands[1]} {shlex.join(evaluate_arguments(cell, folder))}")
        if parts:
            blocks.append("\n".join([f"{name}:\n", *parts]))
    return "\n\n".join(block for block in blocks if block) + "\n"


def _cell_text(values):
    """The values of one column for all seeds of a row as text."""
    values = [value for value in values if value is not None]
    if not values:
        return _NOTHING
    if len(values) == 1:
        (value,) = values
        if not isinstance(value, Estimate):
            return plain(value)
        text, low, high = numbers(value.value, value.low, value.high)
        return f"{text} ({low} to {high})"
    errors = [(value.high - value.low) / 2 for value in values if isinstance(value, Estimate)]
    each = [value.value if isinstance(value, Estimate) else value for value in values]
    low, high = min(each), max(each)
    if low == high and not any(errors):
        return plain(low)
    mean = statistics.fmean(each)
    # What is measured once, such as seconds, has no interval, and is not known to more than a few digits.
    error = statistics.median(errors) if any(errors) else max((high - low) / 2, abs(mean) / 20)
    return f"{decimal(mean, error)} ({decimal(low, error)} to {decimal(high, error)})"


def _duration(seconds):
    """The mean of some durations as text; "-" where one of them is not known."""
    if not seconds or None in seconds:
        return _NOTHING
    total = round(statistics.fmean(seconds))
    if total < 60:
        return f"{total} s"
    minutes, rest = divmod(total, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _machine_text(machine):
    gpus = f", {len(machine['gpus'])} × {machine['gpus'][0]}" if machine["gpus"] else ""
    return (
        f"{machine['cpu']}, {machine['threads']} of {machine['cores']} cores for each run{gpus}; TensorFlow "
        f"{machine['tensorflow']}, Keras {machine['keras']}, Python {machine['python']}"
    )


def _escaped(text):
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")


def _numbers(sweep, rows, command, failures):
    """Everything in the table and behind it, in full precision, as JSON takes it."""
    found = {}
    for name, runs in rows.items():
        cells = {column.heading: {str(one.cell.seed): _json(one(column)) for one in runs} for column in sweep.columns}
        found[name] = {
            "columns": cells,
            "runs": {
                str(one.cell.seed): {
                    "run": one.cell.run,
                    "results": one.cell.results if one.cell.evaluate is not None else one.cell.run,
                    "flags": dict(one.cell.flags),
                    "evaluate": one.cell.evaluate,
                    "facts": one.facts,
                    "machines": one.machines,
                    "suites": {suite: _without_charts(result) for suite, result in one.results.items()},
                }
                for one in runs
            },
        }
    return {"title": sweep.title, "command": list(command), "rows": found, "failures": dict(failures)}


def _json(value):
    return value.to_dict() if isinstance(value, Estimate) else value


def _without_charts(result):
    return {name: value for name, value in result.to_dict().items() if name != "charts"}


def _curves(rows):
    """Draws the course of training of all runs, a colour for each row; None where there are none."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    # Rows that look at the runs of others have the same curves.
    trained = {name: [one for one in found if one.cell.is_trained] for name, found in rows.items()}
    trained = {name: found for name, found in trained.items() if found}
    panels = [panel for panel in _PANELS if any(panel[0] in one.history for found in trained.values() for one in found)]
    if not panels:
        return None
    figure = Figure(figsize=(4.6 * len(panels), 3.6), dpi=120, facecolor="white", layout="constrained")
    handles = {}
    for axes, (series, title, unit) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for index, (name, found) in enumerate(trained.items()):
            style = {
                "color": _COLOURS[index % len(_COLOURS)],
                "linestyle": _LINES[index // len(_COLOURS) % len(_LINES)],
                "linewidth": 1.4,
            }
            for one in found:
                if series in one.history:
                    # The first epoch of a short run is a point, which a line alone would not show.
                    marker = {"marker": "o", "markersize": 3} if len(one.history[series]) < 20 else {}
                    (line,) = axes.plot(one.history["epoch"], one.history[series], **style, **marker)
                    handles.setdefault(name, line)
        shown = [value for found in trained.values() for one in found for value in one.history.get(series, ())]
        if min(shown) > 0 and max(shown) > 100 * min(shown):
            axes.set_yscale("log")  # without a weight, the rate is orders of magnitude above the others
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel("epoch", fontsize=9)
        axes.set_ylabel(unit, fontsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25, linewidth=0.6)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    legend = figure.legend(handles.values(), handles, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)  # the name of a row may hold dollar signs
    return figure
